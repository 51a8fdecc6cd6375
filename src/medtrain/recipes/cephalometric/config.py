"""Recipe `cephalometric`: MAHT-Net, 19 landmarks on lateral cephalograms.

Source: the training strategy document of MAHT-Net. Data: ISBI 2015 challenge, 400 films of
1935 x 2400 pixels of 0.1 mm. Three stages, each from the best checkpoint of the one before:
`baseline` (frozen encoder, heatmaps), `transformer` (bottleneck, spatial attention, SSIM),
`multitask` (gates, multi-scale fusion, coordinates). The document hopes for a mean radial error
of at most 1.5 mm within 12 hours on one GPU; no figure on the true data has been measured here.

    medtrain run cephalometric data.root=/data/isbi2015
    medtrain run cephalometric/small:baseline data.root=/data/isbi2015 epochs=20
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from medtrain.config import (
    Batch,
    Checkpoint,
    ConstantSchedule,
    CosineRestartsSchedule,
    Criterion,
    Data,
    Duration,
    EarlyStop,
    Ema,
    Init,
    Job,
    LossTerm,
    Optim,
    ParamGroup,
    Section,
    StageConfig,
    Weights,
)
from medtrain.recipes.cephalometric.rules import RULES
from medtrain.recipes.recipe import Gate, Recipe

LOSS_TERMS = ("heatmap", "ssim", "coord", "consistency")


class Augmentation(Section):
    """Random changes of training images, at full intensity; each is applied with `probability`."""

    probability: float = Field(0.5, ge=0.0, le=1.0)
    intensity: float = Field(1.0, ge=0.0, le=1.0)
    """Part of the ranges below that is used."""
    rotation_deg: float = Field(15.0, ge=0.0, le=180.0)
    scale: tuple[PositiveFloat, PositiveFloat] = (0.8, 1.2)
    translation: float = Field(0.10, ge=0.0, lt=1.0)
    """Part of each side."""
    brightness: float = Field(0.20, ge=0.0, lt=1.0)
    contrast: float = Field(0.15, ge=0.0, lt=1.0)
    flip: bool = False
    """Mirror left and right. A lateral film has one facing side and no mirror pairs of landmarks:
    off."""

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be [smallest, largest], but is {list(self.scale)}")
        return self


class CephalometricData(Data):
    """ISBI 2015 films and how they reach the model."""

    protocol: Literal["holdout_5fold", "challenge", "temporal", "external"] = "holdout_5fold"
    """20 % held out and five folds on the rest; the challenge's 150/150/100; by acquisition order;
    another root."""
    annotator: Literal["mean", "junior", "senior"] = "mean"
    """Whose landmarks are the truth. Published figures differ in this: every report names it."""
    landmarks: Literal["isbi19", "maht7"] = "isbi19"
    mm_per_pixel: float | None = Field(None, gt=0.0)
    """Pixel size of the raw films; default: what the data set's dataset.json says, else 0.1 for
    films of 1935 x 2400."""
    image_size: tuple[int, int] = (512, 512)
    """Height and width of the model's input; films are letterboxed. Multiples of 32."""
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _fold_exists(self) -> Self:
        if self.protocol in ("holdout_5fold", "challenge") and self.fold >= 5:
            raise ValueError(f"fold must be 0 to 4 with protocol {self.protocol}")
        return self

    @model_validator(mode="after")
    def _size_fits_encoder(self) -> Self:
        if any(side % 32 or side <= 0 for side in self.image_size):
            raise ValueError(f"image_size must be multiples of 32, but is {list(self.image_size)}")
        return self


class Encoder(Section):
    """A timm network that yields feature maps at strides 2, 4, 8, 16 and 32."""

    name: str = "efficientnet_b3"
    weights: Weights = Weights(hub_id="timm/efficientnet_b3.ra2_in1k")
    stem: Literal["sum_rgb", "repeat_rgb"] = "sum_rgb"
    """How a gray film meets a stem trained on RGB: add up its weights, or repeat the film three
    times."""


class Transformer(Section):
    """Transformer on the stride-32 map; its output projection starts at zero."""

    dim: int = Field(384, ge=8)
    heads: int = Field(8, ge=1)
    layers: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} must be a multiple of heads={self.heads}")
        if self.dim % 4:
            raise ValueError(f"dim={self.dim} must be a multiple of 4 for the 2-D position code")
        return self


class Heatmap(Section):
    """Target heatmaps and their loss."""

    stride: Literal[2, 4, 8] = 4
    """Input pixels per heatmap pixel."""
    sigma: float = Field(1.5, gt=0.0)
    """Width of the Gaussian peak in heatmap pixels."""
    beta: float = Field(20.0, ge=0.0)
    """Additional weight of the peak in the squared error."""
    reduction: Literal["sum_per_map", "mean"] = "sum_per_map"
    softargmax_temperature: float = Field(0.05, gt=0.0)


class CephalometricModel(Section):
    """One network; the stages switch its parts on."""

    encoder: Encoder = Encoder()
    transformer: Transformer | None = None
    attention: Literal["none", "spatial", "gate"] = "none"
    """Attention on the skip connections."""
    fusion_channels: int | None = Field(None, ge=8)
    """Channels of the feature pyramid that fuses the scales; `null`: no fusion."""
    coord_head: Literal["none", "gap_mlp", "softargmax"] = "none"
    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 32)
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    heatmap: Heatmap = Heatmap()
    mc_dropout_passes: int = Field(0, ge=0)
    """Passes with dropout on at evaluation, for an uncertainty of every landmark; 0: none."""


class CephalometricStage(StageConfig):
    """A stage of MAHT-Net."""

    data: CephalometricData = CephalometricData()
    model: CephalometricModel = CephalometricModel()

    @model_validator(mode="after")
    def _terms_fit_model(self) -> Self:
        problems = []
        unknown = sorted(set(self.losses) - set(LOSS_TERMS))
        if unknown:
            problems.append(
                f"losses: {', '.join(unknown)} unknown; this system has {', '.join(LOSS_TERMS)}"
            )
        if "coord" in self.losses and self.model.coord_head == "none":
            problems.append("losses.coord needs model.coord_head=gap_mlp or softargmax")
        if "consistency" in self.losses and self.model.coord_head != "gap_mlp":
            problems.append(
                "losses.consistency compares the heatmaps with model.coord_head=gap_mlp"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _merged(stage: CephalometricStage, **changes: object) -> CephalometricStage:
    """`stage` with some fields replaced, validated anew (`model_copy` alone does not validate)."""
    fields = {name: getattr(stage, name) for name in type(stage).model_fields}
    return CephalometricStage(**{**fields, **changes})


_CHECKPOINT = Checkpoint(
    criteria={
        "best_mre": Criterion(metric="val_mre_mm", mode="min"),
        "best_sdr_2mm": Criterion(metric="val_sdr_2mm", mode="max"),
        "best_loss": Criterion(metric="val_loss", mode="min"),
    },
    monitor="best_mre",
)

# Learning rates: the document's "encoder 1e-5, transformer 1e-4". timm's EfficientNet stages 3 to
# 6 make the two
# deepest feature maps; the shallower ones thaw one after the other, every ten epochs.
_THAWING = {
    "encoder_deep": ParamGroup(match=tuple(f"encoder.blocks.{n}.*" for n in (3, 4, 5, 6)), lr=1e-5),
    "encoder_stride8": ParamGroup(match=("encoder.blocks.2.*",), lr=1e-5, starts_epoch=11),
    "encoder_stride4": ParamGroup(match=("encoder.blocks.1.*",), lr=1e-5, starts_epoch=21),
    "encoder_stride2": ParamGroup(match=("encoder.blocks.0.*",), lr=1e-5, starts_epoch=31),
    "encoder_stem": ParamGroup(match=("encoder.*",), lr=1e-5, starts_epoch=41),
}
_BOTTLENECK = ParamGroup(
    match=("bottleneck.*",),
    lr=1e-4,
    schedule=ConstantSchedule(warmup=Duration(5, "epochs"), warmup_from=0.01),
)
_DECODER = ParamGroup(match=("decoder.*", "heatmap_head.*"), lr=1e-4)


def _stages(
    *,
    variant: str,
    data: CephalometricData,
    encoder: Encoder,
    transformer: Transformer,
    fusion_channels: int,
    heatmap: Heatmap,
    batch: Batch,
) -> Mapping[str, CephalometricStage]:
    """The three stages of the document at one size."""
    prefix = "cephalometric" if variant == "default" else f"cephalometric/{variant}"

    def augmented(intensity: float) -> CephalometricData:
        augmentation = data.augmentation.model_copy(update={"intensity": intensity})
        return data.model_copy(update={"augmentation": augmentation})

    baseline = CephalometricStage(
        name=f"{prefix}:baseline",
        epochs=50,
        init=Init(source="pretrained"),
        data=augmented(0.33),
        batch=batch,
        model=CephalometricModel(encoder=encoder, heatmap=heatmap),
        optim=Optim(
            groups={"encoder": ParamGroup(match=("encoder.*",), lr=None), "decoder": _DECODER}
        ),
        losses={"heatmap": LossTerm()},
        early_stop=EarlyStop(patience=15, min_epochs=20),
        checkpoint=_CHECKPOINT,
    )
    with_transformer = _merged(
        baseline,
        name=f"{prefix}:transformer",
        init=Init(
            source="stage", stage="baseline", new_parts=("bottleneck.*", "decoder.*.attention.*")
        ),
        data=augmented(0.66),
        model=baseline.model.model_copy(
            update={"transformer": transformer, "attention": "spatial"}
        ),
        optim=Optim(groups={**_THAWING, "bottleneck": _BOTTLENECK, "decoder": _DECODER}),
        losses={"heatmap": LossTerm(), "ssim": LossTerm(weight=0.3)},
    )
    # 25 + 75 epochs: the last restart ends with the stage.
    restarts = CosineRestartsSchedule(first=Duration(25, "epochs"), factor=3)
    multitask = _merged(
        with_transformer,
        name=f"{prefix}:multitask",
        epochs=100,
        init=Init(
            source="stage",
            stage="transformer",
            new_parts=("fusion.*", "coord_head.*", "decoder.*.attention.*"),
            dropped_parts=("decoder.*.attention.*",),
        ),
        data=augmented(1.0),
        model=with_transformer.model.model_copy(
            update={
                "attention": "gate",
                "fusion_channels": fusion_channels,
                "coord_head": "gap_mlp",
            }
        ),
        optim=Optim(
            clip_norm=1.0,
            schedule=restarts,
            groups={
                "encoder": ParamGroup(match=("encoder.*",), lr=1e-5),
                "bottleneck": ParamGroup(match=("bottleneck.*",), lr=1e-4),
                "fusion": ParamGroup(match=("fusion.*",), lr=1e-4),
                "decoder": _DECODER,
                "coord_head": ParamGroup(match=("coord_head.*",), lr=1e-4),
            },
        ),
        losses={
            "heatmap": LossTerm(),
            "ssim": LossTerm(weight=0.3),
            "coord": LossTerm(weight=1.0),
            "consistency": LossTerm(weight=0.1),
        },
        early_stop=EarlyStop(patience=25, min_epochs=50),
    )
    return {"baseline": baseline, "transformer": with_transformer, "multitask": multitask}


def _sized(variant: str, transformer: Transformer) -> Mapping[str, CephalometricStage]:
    return _stages(
        variant=variant,
        data=CephalometricData(),
        encoder=Encoder(),
        transformer=transformer,
        fusion_channels=256,
        heatmap=Heatmap(),
        batch=Batch(global_=8, micro=8),
    )


def _seed_literal() -> Mapping[str, CephalometricStage]:
    """The document's words taken literally, for the doctor to look at."""
    stages = dict(_sized("seed_literal", Transformer()))
    for stage_name, stage in stages.items():
        literal_heatmap = stage.model.heatmap.model_copy(
            update={"reduction": "mean", "beta": 0.0, "sigma": 2.0}
        )
        flipped = stage.data.augmentation.model_copy(update={"flip": True})
        changes: dict[str, object] = {
            "model": stage.model.model_copy(update={"heatmap": literal_heatmap}),
            "data": stage.data.model_copy(update={"augmentation": flipped}),
        }
        if stage_name == "multitask":
            changes["losses"] = {"heatmap": LossTerm(), "ssim": LossTerm(), "coord": LossTerm()}
        stages[stage_name] = _merged(stage, **changes)
    return stages


def _smoke() -> Mapping[str, CephalometricStage]:
    """Minutes on two CPU cores, on synthetic films: shows that everything works, not how well.

    Weights start at random (said aloud), so the encoder is trained in every stage and learning
    rates are larger.
    """
    stages = dict(
        _stages(
            variant="smoke",
            data=CephalometricData(image_size=(192, 192)),
            encoder=Encoder(name="efficientnet_b0", weights=Weights(allow_random_init=True)),
            transformer=Transformer(dim=192, heads=6, layers=2),
            fusion_channels=32,
            heatmap=Heatmap(stride=4, sigma=1.5),
            batch=Batch(global_=8, micro=4),
        )
    )
    checkpoint = Checkpoint(
        criteria={
            **_CHECKPOINT.criteria,
            "best_ema_mre": Criterion(metric="val_ema_mre_mm", mode="min"),
        },
        monitor="best_mre",
    )
    parts = {
        "baseline": ("encoder", "decoder"),
        "transformer": ("encoder", "bottleneck", "decoder"),
        "multitask": ("encoder", "bottleneck", "fusion", "decoder", "coord_head"),
    }
    patterns: dict[str, tuple[str, ...]] = {
        name: (f"{name}.*",) for name in ("encoder", "bottleneck", "fusion", "coord_head")
    }
    patterns["decoder"] = ("decoder.*", "heatmap_head.*")
    rates = {"baseline": 3e-3, "transformer": 1e-3, "multitask": 1e-3}
    for stage_name, stage in stages.items():
        groups = {
            part: ParamGroup(match=patterns[part], lr=rates[stage_name])
            for part in parts[stage_name]
        }
        stages[stage_name] = _merged(
            stage,
            epochs=12,
            init=Init() if stage_name == "baseline" else stage.init,
            model=stage.model.model_copy(update={"decoder_widths": (128, 64, 48, 32)}),
            optim=Optim(
                clip_norm=1.0,
                groups=groups,
                schedule=CosineRestartsSchedule(
                    first=Duration(12, "epochs"),
                    warmup=Duration(1, "epochs"),
                    warmup_from=0.1,
                    floor=0.01,
                ),
            ),
            early_stop=None,
            ema=Ema(decay=0.95, warmup=True),
            checkpoint=checkpoint,
            job=Job(processes=2, cpu="2", memory="4Gi"),
        )
    return stages


_BASE = Transformer(dim=384, heads=8, layers=4)

RECIPE = Recipe(
    system="cephalometric",
    title="Cephalometric landmarks (MAHT-Net), ISBI 2015",
    stage_type=CephalometricStage,
    variants={
        "default": _sized("default", _BASE),
        "clinical": _sized("clinical", Transformer(dim=768, heads=12, layers=6)),
        "base": _sized("base", _BASE),
        "small": _sized("small", Transformer(dim=256, heads=8, layers=2)),
        "seed_literal": _seed_literal(),
        "smoke": _smoke(),
    },
    overlays={
        "oom_rescue": (
            "batch.micro=2",
            "activation_checkpointing=[encoder.blocks.*]",
            "precision=bf16",
        ),
        "flip": ("data.augmentation.flip=true",),
    },
    gates={
        "default": Gate(metric="test_mre_mm", at_most=1.5),
        "clinical": Gate(metric="test_mre_mm", at_most=1.5),
        "base": Gate(metric="test_mre_mm", at_most=1.5),
        "small": Gate(metric="test_mre_mm", at_most=2.0),
        "seed_literal": Gate(metric="test_mre_mm", at_most=1.5),
        "smoke": Gate(metric="test_mre_mm", at_most=10.0, min_cases=4),
    },
    rules=RULES,
)
