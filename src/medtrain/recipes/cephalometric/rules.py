"""The doctor's rules for cephalometric landmarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, cast

from medtrain.config import StageConfig
from medtrain.recipes.recipe import Facts, Rule

if TYPE_CHECKING:
    from medtrain.recipes.cephalometric.config import CephalometricStage

_FARTHEST_DEFINITION_MM = 3.0
"""Landmark 16 is the same point of two sets whose mean offsets from landmark 7 differ by less."""
_FEWEST_FILMS = 30
"""The mean offset of fewer films may be as far off by chance: offsets of films spread by 5 mm."""
_EARLIER = {"transformer": "baseline", "multitask": "transformer"}
_ISBI_FILM = (1935, 2400)
"""Width and height of an ISBI 2015 film in pixels of 0.1 mm."""
_LARGEST_HEATMAP_PIXEL_MM = 1.0
_MEAN_ROUNDING = 0.3826
"""Mean distance of a point in a unit square from its center: (sqrt(2) + ln(1 + sqrt(2))) / 6."""
_HEAT_RANGE = 1.0
"""Target peaks reach from 0 to 1."""
_LARGEST_TEMPERATURE = 0.05 * _HEAT_RANGE
"""At 0.1 the soft-argmax of a unit peak of sigma 2 in 128 x 128 is already 12 pixels off."""
_BALANCED_MEAN_WEIGHT = 100.0
"""Weight of a mean-reduced heatmap loss, relative to a coordinate loss in pixels, below which the
heatmaps hardly count."""
_OTHER_STATISTICS = (
    "*.ap_in1k",
    "*.ra4_e3600_*",
    "*_pruned.in1k",
    "*_clip*.*",
    "resnetv2_*",
    "tf_efficientnet_cc*",
    "tf_efficientnet_e?.*",
    "tf_efficientnet_lite*",
    "tf_efficientnetv2_[smlx]*",
    "tf_efficientnetv2_b3.in21k*",
)
"""EfficientNet and ResNet weights of timm 1.0 that were not trained with ImageNet's mean and
standard deviation."""


def _of(stage: StageConfig) -> CephalometricStage:
    # Imported for its type alone: the recipe's configuration imports this module.
    return cast("CephalometricStage", stage)


def _normalisation(stage: StageConfig, facts: Facts) -> str | None:
    encoder = _of(stage).model.encoder
    weights = (encoder.weights.hub_id or "").removeprefix("timm/")
    if stage.init.source != "pretrained":
        return None
    if not any(fnmatchcase(weights, pattern) for pattern in _OTHER_STATISTICS):
        return None
    return (
        f"model.encoder.weights.hub_id={encoder.weights.hub_id} was trained with another mean and "
        "standard deviation than ImageNet's, by which films are normalised for both stems. Take "
        "weights such as timm/efficientnet_b3.ra2_in1k."
    )


def _foreign_weights(stage: StageConfig, facts: Facts) -> str | None:
    encoder = _of(stage).model.encoder
    hub_id = encoder.weights.hub_id or ""
    network = hub_id.removeprefix("timm/").partition(".")[0]
    if stage.init.source != "pretrained" or not hub_id.startswith("timm/"):
        return None
    if network == encoder.name.partition(".")[0] or encoder.weights.file is not None:
        return None
    return (
        f"model.encoder.weights.hub_id={hub_id} holds weights of {network}, but "
        f"model.encoder.name is {encoder.name}. Set both."
    )


def _unequal_terms(stage: StageConfig, facts: Facts) -> str | None:
    heatmap, coord = stage.losses.get("heatmap"), stage.losses.get("coord")
    if heatmap is None or coord is None or not coord.weight:
        return None
    if _of(stage).model.heatmap.reduction != "mean":
        return None
    if heatmap.weight >= _BALANCED_MEAN_WEIGHT * coord.weight:
        return None
    return (
        f"losses.heatmap (weight {heatmap.weight:g}) is a mean over all heatmap pixels, "
        f"about 1e-3, and losses.coord (weight {coord.weight:g}) an error in pixels, about 10: the "
        "terms differ by 1e4. Set model.heatmap.reduction=sum_per_map and model.heatmap.beta=20."
    )


def _flip(stage: StageConfig, facts: Facts) -> str | None:
    if not _of(stage).data.augmentation.flip:
        return None
    return (
        "data.augmentation.flip mirrors films, but a lateral film has one facing side and its "
        "landmarks have no mirror pairs: the model would learn films that do not exist. "
        "Set data.augmentation.flip=false."
    )


def _flat_softargmax(stage: StageConfig, facts: Facts) -> str | None:
    model = _of(stage).model
    uses_softargmax = model.coord_head == "softargmax" or "consistency" in stage.losses
    temperature = model.heatmap.softargmax_temperature
    if not uses_softargmax or temperature <= _LARGEST_TEMPERATURE:
        return None
    return (
        f"model.heatmap.softargmax_temperature={temperature:g} is more than 5 % of the heat range "
        f"of {_HEAT_RANGE:g}: the soft-argmax moves towards the center of the image. "
        f"Set it to {_LARGEST_TEMPERATURE:g} or less."
    )


def _coarse_heatmap(stage: StageConfig, facts: Facts) -> str | None:
    data, heatmap = _of(stage).data, _of(stage).model.heatmap
    width, height = facts.get("film_size", _ISBI_FILM)
    pitch = 0.1 * _ISBI_FILM[1] / height
    if "film_size" in facts:
        pitch = data.mm_per_pixel or facts.get("mm_per_pixel", pitch)
    # The film is letterboxed: its tighter side decides for both.
    input_mm = pitch * max(height / data.image_size[0], width / data.image_size[1])
    pixel_mm = input_mm * heatmap.stride
    if pixel_mm <= _LARGEST_HEATMAP_PIXEL_MM:
        return None
    return (
        f"a heatmap pixel is {pixel_mm:.2f} mm wide (input pixel {input_mm:.2f} mm x "
        f"model.heatmap.stride={heatmap.stride}): rounding to it alone would cost "
        f"{_MEAN_ROUNDING * pixel_mm:.2f} mm, so accuracy rests on the interpolation of the peak. "
        "Where that is not enough, lower model.heatmap.stride or raise data.image_size."
    )


def _is_temporal(stage: StageConfig) -> bool:
    return stage.data.protocol == "temporal"


def _no_time(stage: StageConfig, facts: Facts) -> str | None:
    if facts["has_acquisition_order"]:
        return None
    return (
        "data.protocol=temporal needs the order in which films were taken (a column "
        "acquisition_order in meta.csv), but the data have none; ISBI 2015 has none. "
        "Take another data.protocol."
    )


def _other_protocol(stage: StageConfig, facts: Facts) -> str | None:
    if stage.data.protocol == "challenge":
        return None
    return (
        f"data.protocol={stage.data.protocol} is not the split of the literature: compare with "
        "published figures only under data.protocol=challenge (150/150/100 films), and name "
        f"data.annotator={_of(stage).data.annotator} beside every figure."
    )


def _landmarks_leave(stage: StageConfig, facts: Facts) -> str | None:
    change = _of(stage).data.augmentation
    strength = change.intensity if change.probability > 0 else 0.0
    angle = math.radians(min(45.0, change.rotation_deg * strength))
    scale = 1.0 + (max(change.scale) - 1.0) * strength
    # A landmark half-way between center and corner, turned, scaled and moved as far as can be.
    reach = 0.25 * scale * (math.cos(angle) + math.sin(angle)) + change.translation * strength
    if reach <= 0.5:
        return None
    return (
        f"data.augmentation moves a landmark from half-way to the border to {reach / 0.5:.0%} of "
        "it. Such draws are drawn again, up to ten times, and then dropped: strong augmentation "
        "becomes none. Lower its translation, scale, rotation_deg or intensity."
    )


def _cold_start(stage: StageConfig, facts: Facts) -> str | None:
    name = stage.name.rpartition(":")[2]
    earlier = _EARLIER.get(name)
    if earlier is None or stage.init.stage == earlier:
        return None
    given = f"stage {stage.init.stage}" if stage.init.stage else f"init.from={stage.init.source}"
    return (
        f"{name} must start from the best checkpoint of {earlier}, but starts from {given}: its "
        f"parts would be trained on features that are not there. Set init.from=stage "
        f"init.stage={earlier}."
    )


def _has_landmark_16(stage: StageConfig) -> bool:
    return _of(stage).data.landmarks == "isbi19"


def _two_definitions(stage: StageConfig, facts: Facts) -> str | None:
    annotator = _of(stage).data.annotator
    num_films = facts.get("subsets", {})
    offsets = {
        subset: offset
        for subset, offset in _offsets_of(annotator, facts["landmark_16_from_7_mm"]).items()
        if num_films.get(subset, _FEWEST_FILMS) >= _FEWEST_FILMS
    }
    learned = offsets.pop("train", None)
    if learned is None:
        return None
    apart = {subset: math.dist(learned, offset) for subset, offset in offsets.items()}
    moved = [
        f"{_millimeters(offsets[subset])} in {subset}, {distance:.1f} mm away"
        for subset, distance in sorted(apart.items())
        if distance > _FARTHEST_DEFINITION_MM
    ]
    if not moved:
        return None
    return (
        f"landmark 16 is not the same point in training and test films by "
        f"data.annotator={annotator}: its mean offset from landmark 7 is {_millimeters(learned)} "
        f"in train, but {' and '.join(moved)}. A model cannot be right in both. Read MRE, SD and "
        "SDR without landmark 16, which stand beside those with it (…_without_l16)."
    )


def _offsets_of(
    annotator: str, offsets: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, float]]:
    """Subset → mean offset of what the annotator marks; subsets without it are absent."""
    readers = ("junior", "senior") if annotator == "mean" else (annotator,)
    found = {}
    for subset in {name.rpartition("_")[0] for name in offsets}:
        if all(f"{subset}_{reader}" in offsets for reader in readers):
            x, y = zip(*(offsets[f"{subset}_{reader}"] for reader in readers), strict=True)
            found[subset] = (sum(x) / len(x), sum(y) / len(y))
    return found


def _millimeters(offset: tuple[float, float]) -> str:
    return f"({offset[0]:.1f}, {offset[1]:.1f}) mm"


RULES: tuple[Rule, ...] = (
    Rule("D-M01", "warning", "normalisation of the pretrained encoder", _normalisation),
    Rule("D-M02", "warning", "loss terms of different size", _unequal_terms),
    Rule("D-M03", "error", "flipped films", _flip),
    Rule("D-M05", "error", "soft-argmax that is too soft", _flat_softargmax),
    Rule("D-M05", "warning", "coarse heatmaps", _coarse_heatmap),
    Rule(
        "D-M06",
        "error",
        "temporal split without times",
        _no_time,
        needs=("has_acquisition_order",),
        supplied_by="medtrain data check cephalometric data.root=…",
        applies=_is_temporal,
    ),
    Rule("D-M07", "info", "comparison with the literature", _other_protocol),
    Rule("D-M10", "warning", "landmarks pushed out of the film", _landmarks_leave),
    Rule("D-M11", "error", "stage without the stage before it", _cold_start),
    Rule(
        "D-M12",
        "warning",
        "two definitions of landmark 16",
        _two_definitions,
        needs=("landmark_16_from_7_mm",),
        supplied_by="medtrain data check cephalometric data.root=…",
        applies=_has_landmark_16,
    ),
    Rule("D-G15", "error", "pretrained weights of another network", _foreign_weights),
)
