from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from medtrain.config import Batch, Checkpoint, Criterion, Init, LossTerm, Optim, ParamGroup, Weights
from medtrain.data.cases import rows_from_csv, rows_to_csv
from medtrain.data.manifest import Case, FileEntry
from medtrain.data.splits import SplitRow
from medtrain.errors import CheckpointError, ConfigError, DataError
from medtrain.recipes.cephalometric.config import (
    Augmentation,
    CephalometricData,
    CephalometricModel,
    CephalometricStage,
    Encoder,
    Heatmap,
)
from medtrain.recipes.cephalometric.films import points_to_text
from medtrain.recipes.cephalometric.model import MahtNet, MahtOutput
from medtrain.recipes.cephalometric.task import (
    CephalometricTask,
    build_task,
    dropout_on,
    heatmap_loss,
)
from medtrain.recipes.cephalometric.transforms import Size, render_heatmaps
from medtrain.train.task import Clock, Shard, TaskContext

CLOCK = Clock(epoch=1, step=0, fraction=0.0)
RESTING = Shard(rank=0, world_size=1, seed=7, epoch=1, is_training=False)
TRAINING = replace(RESTING, is_training=True)
ALL_TERMS = {name: LossTerm() for name in ("heatmap", "ssim", "coord", "consistency")}


def _draw_cases(
    folder: Path, *, num: int, size: Size, is_annotated: bool = True, seed: int = 0
) -> dict[str, Case]:
    """Films of noise with 19 dots of different size and brightness; 1 mm a pixel."""
    rng = np.random.default_rng(seed)
    limits = np.array([size.width, size.height])
    template = rng.uniform(0.2, 0.8, (19, 2)) * limits
    rows, columns = np.mgrid[: size.height, : size.width]
    cases = {}
    for number in range(num):
        points = np.round(template + rng.normal(0, 0.04, (19, 2)) * limits)
        points = points.clip(4, limits - 5)
        film = rng.normal(60, 8, (size.height, size.width))
        for index, (x, y) in enumerate(points):
            width = 1.5 + 0.1 * index
            squared = (columns - x) ** 2 + (rows - y) ** 2
            film += (60 + 6 * index) * np.exp(-squared / (2 * width**2))
        name = f"{number:03}"
        path = folder / f"{name}.bmp"
        Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(path)
        text = points_to_text([(x, y) for x, y in points.tolist()])
        attributes = {"width": str(size.width), "height": str(size.height), "mm_per_pixel": "1.0"}
        if is_annotated:
            attributes |= {"junior": text, "senior": text}
        cases[name] = Case(
            name,
            f"case-{name}",
            {"image": FileEntry(path.name, path.stat().st_size, f"sha256:{seed}-{name}")},
            attributes,
        )
    return cases


def _stage(
    *,
    losses: Mapping[str, LossTerm] | None = None,
    data: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    heatmap: Mapping[str, Any] | None = None,
    **changes: Any,
) -> CephalometricStage:
    network = {
        "encoder": Encoder(name="efficientnet_b0"),
        "decoder_widths": (24, 16, 16, 16),
        "heatmap": Heatmap(**(heatmap or {})),
    }
    return CephalometricStage(
        **{
            "name": "cephalometric/test:baseline",
            "epochs": 2,
            "data": CephalometricData(**{"image_size": (64, 64), **(data or {})}),
            "batch": Batch(global_=4, micro=2),
            "model": CephalometricModel(**{**network, **(model or {})}),
            "optim": Optim(groups={"all": ParamGroup(match=("*",), lr=1e-3)}),
            "losses": losses or {"heatmap": LossTerm()},
            "checkpoint": Checkpoint(
                criteria={"best": Criterion(metric="val_mre_mm", mode="min")}, monitor="best"
            ),
            **changes,
        }
    )


FULL = {"coord_head": "gap_mlp", "attention": "gate", "fusion_channels": 16}


def _task(
    folder: Path,
    stage: CephalometricStage,
    *,
    cases: Mapping[str, Case] | None = None,
    roles: Sequence[str] = ("train", "train", "train", "train", "val"),
    **context: Any,
) -> CephalometricTask:
    if cases is None:
        cases = _draw_cases(folder, num=len(roles), size=Size(120, 96))
    split = [
        SplitRow(case_id, case_id, role, "", 1) for case_id, role in zip(cases, roles, strict=True)
    ]
    return build_task(
        TaskContext(
            stage=stage,
            cases=cases,
            split=split[::-1],
            data_path=folder,
            cache_path=folder / "cache",
            weights=context.pop("weights", {}),
            **context,
        )
    )


class _Answering(nn.Module):
    """Answers with the given heatmaps and coordinates, whatever it sees."""

    def __init__(self, heatmaps: torch.Tensor, coordinates: torch.Tensor | None = None) -> None:
        super().__init__()
        self.output = MahtOutput(heatmaps, coordinates)

    def forward(self, image: torch.Tensor) -> MahtOutput:
        return self.output


# loaders


def test_a_split_is_read_in_the_order_of_its_case_ids(tmp_path):
    loader = _task(tmp_path, _stage()).build_loader("train", RESTING)
    assert [batch["case_id"] for batch in loader] == [["000", "001"], ["002", "003"]]


def test_a_batch_maps_its_points_to_the_film_and_back(tmp_path):
    task = _task(tmp_path, _stage(data={"augmentation": Augmentation(probability=1.0)}))
    for shard in (RESTING, TRAINING):
        batch = next(iter(task.build_loader("train", shard)))
        assert batch["image"].shape == (2, 1, 64, 64)
        assert batch["image"].dtype == torch.float32
        assert 0 <= batch["image"].min() < batch["image"].max() <= 1
        matrix, points = batch["to_film"], batch["points"].double()
        back = points @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]
        assert (back - batch["film_points"]).abs().max() < 1e-4
        assert batch["mm_per_pixel"].tolist() == [1.0, 1.0]


def test_dots_are_where_the_points_say_after_augmentation(tmp_path):
    task = _task(tmp_path, _stage(data={"augmentation": Augmentation(probability=1.0)}))
    for batch in task.build_loader("train", TRAINING):
        for image, points in zip(batch["image"][:, 0], batch["points"], strict=True):
            at_points = image[points[:, 1].round().long(), points[:, 0].round().long()]
            assert at_points[-6:].min() > 1.5 * image[image > 0.02].median()


def test_augmentation_is_a_function_of_seed_epoch_and_case(tmp_path):
    task = _task(tmp_path, _stage(data={"augmentation": Augmentation(probability=1.0)}))

    def images(shard: Shard) -> dict[str, torch.Tensor]:
        return {
            case_id: image
            for batch in task.build_loader("train", shard)
            for case_id, image in zip(batch["case_id"], batch["image"], strict=True)
        }

    once, again = images(TRAINING), images(TRAINING)
    assert all(torch.equal(once[case_id], again[case_id]) for case_id in once)
    later = images(replace(TRAINING, epoch=2))
    other = images(replace(TRAINING, seed=8))
    for case_id, image in once.items():
        assert not torch.equal(image, later[case_id])
        assert not torch.equal(image, other[case_id])
    shares = [images(replace(TRAINING, rank=rank, world_size=2)) for rank in (0, 1)]
    together = shares[0] | shares[1]
    assert all(torch.equal(once[case_id], together[case_id]) for case_id in once)


def test_a_loader_goes_on_in_the_middle_of_an_epoch(tmp_path):
    task = _task(tmp_path, _stage())
    whole = list(task.build_loader("train", TRAINING))
    (rest,) = task.build_loader("train", replace(TRAINING, first_batch=1))
    assert rest["case_id"] == whole[1]["case_id"]
    assert torch.equal(rest["image"], whole[1]["image"])


def test_films_are_decoded_once(tmp_path):
    task = _task(tmp_path, _stage())
    first = next(iter(task.build_loader("train", RESTING)))
    for film in tmp_path.glob("*.bmp"):
        film.unlink()
    again = next(iter(task.build_loader("train", RESTING)))
    assert torch.equal(first["image"], again["image"])


def test_a_damaged_film_is_named_by_its_case(tmp_path):
    task = _task(tmp_path, _stage())
    (tmp_path / "004.bmp").write_bytes(b"BM")
    with pytest.raises(DataError, match="case 004: film must be a whole image"):
        next(iter(task.build_loader("val", RESTING)))


def test_seven_landmarks_are_a_choice_of_the_nineteen(tmp_path):
    task = _task(tmp_path, _stage(data={"landmarks": "maht7"}))
    batch = next(iter(task.build_loader("val", RESTING)))
    assert batch["points"].shape == (1, 7, 2)
    assert task.build_model()(batch["image"]).heatmaps.shape[1] == 7


# losses


def _batch(points: torch.Tensor) -> dict[str, Any]:
    num = len(points)
    return {
        "case_id": [str(n) for n in range(num)],
        "image": torch.zeros(num, 1, 64, 64),
        "points": points,
        "film_points": points.double(),
        "to_film": torch.eye(3, dtype=torch.float64)[:2].repeat(num, 1, 1),
        "mm_per_pixel": torch.full((num,), 0.5, dtype=torch.float64),
    }


POINTS = torch.tensor([[[20.0, 30.0], [41.0, 17.0]], [[50.0, 8.0], [33.0, 33.0]]])


def test_the_terms_returned_are_those_configured(tmp_path):
    for names in (["heatmap"], ["ssim", "heatmap"], list(ALL_TERMS)):
        stage = _stage(losses={name: ALL_TERMS[name] for name in names}, model=FULL)
        task = _task(tmp_path, stage)
        batch = next(iter(task.build_loader("train", TRAINING)))
        terms = task.losses(task.build_model(), batch, CLOCK)
        assert set(terms) == set(names)
        assert all(term.shape == () and term.isfinite() for term in terms.values())


def test_a_perfect_answer_has_no_loss(tmp_path):
    task = _task(tmp_path, _stage(losses=ALL_TERMS, model=FULL))
    target = render_heatmaps((POINTS + 0.5) / 4 - 0.5, size=Size(16, 16), sigma=1.5)
    model = _Answering(target, (POINTS + 0.5) / 64)
    terms = task.losses(model, _batch(POINTS), CLOCK)
    assert all(abs(terms[name]) < 1e-6 for name in ("heatmap", "ssim", "coord"))
    assert terms["consistency"] < 0.01


def test_the_heatmap_term_is_the_weighted_square_of_the_specification():
    heatmaps, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    expected = 0.0
    for image, truth in zip(heatmaps.flatten(0, 1), target.flatten(0, 1), strict=True):
        expected += float(((1 + 20 * truth) * (image - truth) ** 2).sum()) / 6
    summed = heatmap_loss(heatmaps, target, config=Heatmap(beta=20))
    assert float(summed) == pytest.approx(expected, rel=1e-5)
    mean = heatmap_loss(heatmaps, target, config=Heatmap(beta=20, reduction="mean"))
    assert float(mean) == pytest.approx(expected / 64, rel=1e-5)
    plain = heatmap_loss(heatmaps, target, config=Heatmap(beta=0, reduction="mean"))
    assert float(plain) == pytest.approx(float((heatmaps - target).square().mean()), rel=1e-5)


def test_the_zero_map_has_the_losses_of_the_specification(tmp_path):
    """Magnitudes at sigma 2 on maps of 128 x 128: 7.7e-4 (mean square), 0.0134 (SSIM)."""
    stage = _stage(
        losses={name: ALL_TERMS[name] for name in ("heatmap", "ssim")},
        heatmap={"stride": 2, "sigma": 2.0, "beta": 0.0, "reduction": "mean"},
    )
    points = torch.tensor([[[100.0, 130.0]]])
    terms = _task(tmp_path, stage).losses(
        _Answering(torch.zeros(1, 1, 128, 128)), _batch(points), CLOCK
    )
    assert float(terms["heatmap"]) == pytest.approx(7.7e-4, rel=0.01)
    assert float(terms["ssim"]) == pytest.approx(0.0134, rel=0.02)


def test_coordinates_are_compared_in_heatmap_pixels(tmp_path):
    stage = _stage(losses={"heatmap": LossTerm(), "coord": LossTerm()}, model=FULL)
    shifted = _Answering(torch.zeros(2, 2, 16, 16), (POINTS + 0.5 + 12.0) / 64)
    terms = _task(tmp_path, stage).losses(shifted, _batch(POINTS), CLOCK)
    # 12 input pixels are 3 heatmap pixels; beyond 1 the term is the distance less a half.
    assert float(terms["coord"]) == pytest.approx(2.5, rel=1e-5)


def test_coordinates_may_come_from_the_heatmaps_themselves(tmp_path):
    stage = _stage(
        losses={"heatmap": LossTerm(), "coord": LossTerm()}, model={"coord_head": "softargmax"}
    )
    target = render_heatmaps((POINTS + 0.5) / 4 - 0.5 + 3.0, size=Size(16, 16), sigma=1.5)
    terms = _task(tmp_path, stage).losses(_Answering(target), _batch(POINTS), CLOCK)
    assert float(terms["coord"]) == pytest.approx(2.5, abs=0.5)


def test_the_mean_over_two_halves_is_the_mean_over_the_batch(tmp_path):
    task = _task(tmp_path, _stage(losses=ALL_TERMS, model=FULL))
    model = task.build_model().eval()
    (batch,) = _task(
        tmp_path,
        _stage(losses=ALL_TERMS, model=FULL, batch=Batch(global_=4, micro=4)),
    ).build_loader("train", RESTING)

    def part(first: int, last: int) -> dict[str, float]:
        cut = {name: value[first:last] for name, value in batch.items()}
        with torch.no_grad():
            return {name: float(term) for name, term in task.losses(model, cut, CLOCK).items()}

    whole, halves = part(0, 4), (part(0, 2), part(2, 4))
    for name, value in whole.items():
        assert value == pytest.approx((halves[0][name] + halves[1][name]) / 2, rel=1e-4)


def test_losses_are_computed_in_full_precision_under_autocast(tmp_path):
    task = _task(tmp_path, _stage(losses=ALL_TERMS, model=FULL))
    batch = next(iter(task.build_loader("train", TRAINING)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = task.losses(task.build_model(), batch, CLOCK)
    assert {term.dtype for term in terms.values()} == {torch.float32}


def test_every_parameter_gets_a_gradient_from_the_terms_of_the_last_stage(tmp_path):
    task = _task(tmp_path, _stage(losses=ALL_TERMS, model=FULL))
    model = task.build_model()
    batch = next(iter(task.build_loader("train", TRAINING)))
    torch.stack(list(task.losses(model, batch, CLOCK).values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# prediction


def test_predictions_are_in_pixels_and_millimeters_of_the_film(tmp_path):
    task = _task(tmp_path, _stage())
    batch = _batch(POINTS)
    batch["to_film"] = torch.tensor([[[2.0, 0.0, 5.0], [0.0, 2.0, -3.0]]] * 2).double()
    batch["film_points"] = 2 * POINTS.double() + torch.tensor([5.0, -3.0])
    off = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    heatmaps = render_heatmaps((POINTS + off + 0.5) / 4 - 0.5, size=Size(16, 16), sigma=1.5)
    rows = task.predict(_Answering(heatmaps), batch, CLOCK)
    assert [row["case_id"] for row in rows] == ["0", "1"]
    row = rows[0]
    # 3 and 4 input pixels, 2 film pixels each, half a millimeter each.
    assert row["error_mm"].tolist() == pytest.approx([3.0, 4.0], abs=0.5)
    assert row["x"].tolist() == pytest.approx([51.0, 87.0], abs=1.0)
    assert row["true_y"].tolist() == [57.0, 31.0]
    assert row["mm_per_pixel"] == 0.5
    assert all(0.8 < value <= 1 for value in row["peak"])
    assert "spread_mm" not in row


def test_rows_survive_a_table_and_are_summarized(tmp_path):
    task = _task(tmp_path, _stage())
    model = task.build_model().eval()
    rows = [
        row for b in task.build_loader("train", RESTING) for row in task.predict(model, b, CLOCK)
    ]
    again = rows_from_csv(rows_to_csv(rows))
    assert task.summarize(again) == task.summarize(rows)
    assert len(again) == 4
    assert again[0]["x"].shape == (19,)


def test_a_film_without_annotation_is_predicted_without_errors(tmp_path):
    cases = _draw_cases(tmp_path, num=1, size=Size(120, 96), is_annotated=False)
    task = _task(tmp_path, _stage(), cases=cases, roles=["test"])
    (batch,) = task.build_loader("test", RESTING)
    (row,) = task.predict(task.build_model().eval(), batch, CLOCK)
    assert set(row) == {"case_id", "mm_per_pixel", "x", "y", "peak"}
    assert task.summarize([row]) == {}
    trained_on = _task(tmp_path, _stage(), cases=cases, roles=["train"])
    with pytest.raises(DataError, match="case 000 must have annotations"):
        next(iter(trained_on.build_loader("train", TRAINING)))


def test_dropout_at_evaluation_gives_a_spread_that_belongs_to_the_case(tmp_path):
    task = _task(tmp_path, _stage(model={"mc_dropout_passes": 4, "dropout": 0.5}))
    plain = _task(tmp_path, _stage(model={"dropout": 0.5}))
    torch.manual_seed(0)
    model = task.build_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (first, _) = task.build_loader("train", RESTING)
    state = torch.get_rng_state()
    rows = task.predict(model, first, CLOCK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(row["spread_mm"].shape == (19,) and row["spread_mm"].max() > 0 for row in rows)
    alone = {name: value[1:] for name, value in first.items()}
    (row,) = task.predict(model, alone, CLOCK)
    assert row["spread_mm"].tolist() == rows[1]["spread_mm"].tolist()
    (without, _) = plain.predict(model, first, CLOCK)
    assert without["x"].tolist() == rows[0]["x"].tolist()
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_dropout_acts_as_in_training():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout2d(0.5), nn.Dropout())
    model.eval()
    with dropout_on(model):
        assert [module.training for module in model] == [False, False, True, True]
    assert not any(module.training for module in model.modules())


# weights


def _pretrained(**changes: Any) -> CephalometricStage:
    return _stage(init=Init(source="pretrained"), **changes)


def test_pretrained_rgb_weights_reach_the_encoder(tmp_path):
    torch.manual_seed(0)
    rgb = CephalometricModel(encoder=Encoder(name="efficientnet_b0", stem="repeat_rgb"))
    encoder = MahtNet(rgb, num_landmarks=1).encoder
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    weights = {"encoder": tmp_path / "model.safetensors"}
    task = _task(tmp_path, _pretrained(), weights=weights)
    model = task.build_model()
    assert isinstance(model, MahtNet)
    summed = encoder.conv_stem.weight.sum(1, keepdim=True)
    assert torch.equal(model.encoder.conv_stem.weight, summed)
    assert torch.equal(
        model.encoder.blocks[3][0].conv_pw.weight, encoder.blocks[3][0].conv_pw.weight
    )
    report = task.weights_report
    assert report is not None
    assert report.missing == report.unexpected == ()
    assert len(report.adapted) == 1
    assert report.sha256


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("efficientnet_b0", ("conv_head.", "bn2.", "classifier.")),
        ("resnet18", ("fc.",)),
    ],
)
def test_files_of_whole_classifiers_fit_but_for_their_heads(tmp_path, name, unused):
    # Importable once the network has made torchvision so.
    import timm

    classifier = timm.create_model(name)
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    stage = _pretrained(model={"encoder": Encoder(name=name)})
    task = _task(tmp_path, stage, weights={"encoder": tmp_path})
    task.build_model()
    report = task.weights_report
    assert report is not None
    assert report.missing == ()
    assert report.unexpected
    assert all(tensor.startswith(unused) for tensor in report.unexpected)
    assert len(report.adapted) == 1


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"conv_stem.weight": torch.zeros(32, 1, 3, 3)}, tmp_path / "w.safetensors")
    task = _task(tmp_path, _pretrained(), weights={"encoder": tmp_path / "w.safetensors"})
    with pytest.raises(CheckpointError, match="at least 99%"):
        task.build_model()


def test_random_weights_are_allowed_aloud(tmp_path, caplog):
    weights = Weights(hub_id="timm/efficientnet_b0", allow_random_init=True)
    stage = _pretrained(model={"encoder": Encoder(name="efficientnet_b0", weights=weights)})
    task = _task(tmp_path, stage, weights={"encoder": None})
    task.build_model()
    assert "RANDOM INITIALIZATION" in caplog.text
    assert task.weights_report is not None
    assert task.weights_report.source == "random initialization"


def test_forgotten_weights_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="needs the weights 'encoder'"):
        _task(tmp_path, _pretrained()).build_model()


@pytest.mark.parametrize("source", ["scratch", "pretrained"])
def test_nothing_is_asked_or_said_where_a_checkpoint_follows(tmp_path, caplog, source):
    stage = _stage(init=Init(source=source))
    task = _task(tmp_path, stage, allow_missing_weights=True)
    task.build_model()
    assert task.weights_report is None
    assert caplog.text == ""


# learning


def _learn(folder: Path, *, size: int, num_steps: int) -> dict[str, float]:
    """Fit eight films by heart; metrics on them, 1 mm being one pixel of the input."""
    cases = _draw_cases(folder, num=8, size=Size(size, size))
    stage = _stage(
        data={"image_size": (size, size), "augmentation": Augmentation(probability=0.0)},
        model={"fusion_channels": 32, "decoder_widths": (64, 48, 32, 32), "dropout": 0.0},
        heatmap={"stride": 2, "sigma": 1.5},
        batch=Batch(global_=8, micro=8),
    )
    task = _task(folder, stage, cases=cases, roles=["train"] * 8)
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    (batch,) = task.build_loader("train", TRAINING)
    for _ in range(num_steps):
        (loss,) = task.losses(model, batch, CLOCK).values()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return task.summarize(task.predict(model.train(), batch, CLOCK))


def test_eight_small_films_are_nearly_learned_by_heart(tmp_path):
    """The quick form of the experiment E06: with the batch's statistics, which need fewer steps."""
    metrics = _learn(tmp_path, size=64, num_steps=45)
    assert metrics["mre_mm"] < 1.0
