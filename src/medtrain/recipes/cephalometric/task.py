"""Training and judging MAHT-Net on cephalograms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from medtrain.data.cache import NodeCache
from medtrain.data.cases import Row
from medtrain.data.loaders import (
    CaseDataset,
    Sample,
    build_loader,
    prediction_batches,
    training_batches,
)
from medtrain.data.manifest import Case
from medtrain.data.transforms import derive_seed
from medtrain.errors import ConfigError, DataError
from medtrain.recipes.cephalometric.config import CephalometricStage, Heatmap
from medtrain.recipes.cephalometric.data import annotators, landmark_indices, truth
from medtrain.recipes.cephalometric.metrics import make_row, summarize
from medtrain.recipes.cephalometric.model import MahtNet, MahtOutput
from medtrain.recipes.cephalometric.transforms import (
    OVERSAMPLING,
    Array,
    Pixels,
    Size,
    draw_change,
    find_peaks,
    letterbox,
    make_sample,
    move_points,
    read_film,
    render_heatmaps,
    soft_argmax,
    to_heatmap_pixels,
    to_input_pixels,
)
from medtrain.train.pretrained import MatchReport, load_pretrained, random_initialization
from medtrain.train.task import Batch, Clock, Shard, TaskContext


def build_task(context: TaskContext) -> CephalometricTask:
    """The task of one stage on one split."""
    return CephalometricTask(context)


class CephalometricTask:
    """The five questions for landmarks on lateral films."""

    weights_report: MatchReport | None = None
    """What pretrained weights supplied, once the model is built; None if a checkpoint follows."""

    def __init__(self, context: TaskContext) -> None:
        assert isinstance(context.stage, CephalometricStage)
        self.context = context
        self.stage: CephalometricStage = context.stage
        self.num_landmarks = len(landmark_indices(self.stage.data))
        self.image_size = Size(*self.stage.data.image_size)
        self._cache = NodeCache(context.cache_path)
        self._ssim = _build_ssim() if "ssim" in self.stage.losses else None

    def build_model(self) -> nn.Module:
        """A new network; its encoder has the pretrained weights where the stage starts from them.

        Raises:
            ConfigError: The stage starts from pretrained weights, but there are none.
            CheckpointError: The weights are those of another network.
        """
        config = self.stage.model
        model = MahtNet(config, num_landmarks=self.num_landmarks)
        source = self.stage.init.source
        if source == "stage" or self.context.allow_missing_weights:
            return model
        what, wanted = f"encoder {config.encoder.name}", config.encoder.weights.hub_id
        if source == "scratch":
            self.weights_report = random_initialization(what, wanted=None)
            return model
        if "encoder" not in self.context.weights:
            raise ConfigError(
                "init.from=pretrained needs the weights 'encoder', but the task was given none. "
                "Set model.encoder.weights.file, or model.encoder.weights.allow_random_init=true."
            )
        path = self.context.weights["encoder"]
        if path is None:
            self.weights_report = random_initialization(what, wanted=wanted)
            return model
        stem = next(name for name, p in model.encoder.named_parameters() if p.ndim == 4)
        self.weights_report = load_pretrained(
            model.encoder, path, source=wanted or path.name, stem=stem
        )
        return model

    def build_loader(self, split: str, shard: Shard) -> DataLoader[Batch]:
        """Batches of `image`, `points`, `film_points`, `to_film` and `mm_per_pixel`.

        `image` (B, 1, H, W) is gray in [0, 1]; `points` (B, K, 2) are true landmarks as x, y in
        pixels of the input, `film_points` in those of the film, both NaN without annotation;
        `to_film` (B, 2, 3) maps the former to the latter.
        """
        case_ids = sorted(row.case_id for row in self.context.split if row.role == split)
        read = self._read_augmented if shard.is_training else self._read_plain
        dataset = CaseDataset(case_ids, read, seed=shard.seed, epoch=shard.epoch)
        micro = self.stage.batch.micro
        if shard.is_training:
            batches = training_batches(
                len(case_ids),
                micro=micro,
                rank=shard.rank,
                world_size=shard.world_size,
                seed=shard.seed,
                epoch=shard.epoch,
            )
        else:
            batches = prediction_batches(
                len(case_ids), micro=micro, rank=shard.rank, world_size=shard.world_size
            )
        return build_loader(
            dataset,
            batches,
            first_batch=shard.first_batch,
            num_workers=self.stage.job.loader_workers,
        )

    def losses(self, model: nn.Module, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The configured terms, each the mean over the batch's cases, in fp32."""
        output: MahtOutput = model(batch["image"])
        heatmap = self.stage.model.heatmap
        # Squares of small numbers and exponentials: half precision would lose them.
        with torch.autocast(batch["image"].device.type, enabled=False):
            heatmaps = output.heatmaps.float()
            size = Size(*heatmaps.shape[-2:])
            points = to_heatmap_pixels(batch["points"].float(), heatmap.stride)
            target = render_heatmaps(points, size=size, sigma=heatmap.sigma)
            terms: dict[str, Tensor] = {}
            if "heatmap" in self.stage.losses:
                terms["heatmap"] = heatmap_loss(heatmaps, target, config=heatmap)
            if self._ssim is not None:
                terms["ssim"] = self._ssim(heatmaps.clamp(0.0, 1.0), target)
            if "coord" in self.stage.losses:
                terms["coord"] = F.smooth_l1_loss(self._coordinates(output), points)
            if "consistency" in self.stage.losses:
                places = soft_argmax(heatmaps, temperature=heatmap.softargmax_temperature)
                terms["consistency"] = F.smooth_l1_loss(places, self._coordinates(output))
        return terms

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch, clock: Clock) -> list[Row]:
        """Landmarks in pixels of the film, with `peak`, the heat at each, and errors if known.

        With `model.mc_dropout_passes` also `spread_mm`: the root of the summed variances of x and
        y over passes with dropout. Its randomness is a function of the seed and the case.
        """
        heatmaps = model(batch["image"]).heatmaps
        sigma = self.stage.model.heatmap.sigma
        on_film = self._on_film(heatmaps, batch["to_film"]).cpu().numpy()
        heat = find_peaks(heatmaps, sigma=sigma).values.double().cpu().numpy()
        true_points = batch["film_points"].cpu().numpy()
        rows = []
        for index, case_id in enumerate(batch["case_id"]):
            is_annotated = bool(np.isfinite(true_points[index]).all())
            row = make_row(
                case_id,
                points=on_film[index],
                true_points=true_points[index] if is_annotated else None,
                mm_per_pixel=float(batch["mm_per_pixel"][index]),
            )
            row["peak"] = heat[index]
            if self.stage.model.mc_dropout_passes:
                row["spread_mm"] = self._spread_mm(model, batch, index)
            rows.append(row)
        return rows

    def summarize(self, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics of a whole split."""
        return summarize(rows)

    def _coordinates(self, output: MahtOutput) -> Tensor:
        """The coordinate head's answer in heatmap pixels."""
        config = self.stage.model
        if config.coord_head == "softargmax":
            temperature = config.heatmap.softargmax_temperature
            return soft_argmax(output.heatmaps, temperature=temperature)
        assert output.coordinates is not None
        height, width = output.heatmaps.shape[-2:]
        coordinates = output.coordinates.float()
        return coordinates * coordinates.new_tensor([width, height]) - 0.5

    def _on_film(self, heatmaps: Tensor, to_film: Tensor) -> Tensor:
        """Decoded points (B, K, 2) in pixels of the film, float64."""
        config = self.stage.model.heatmap
        places = find_peaks(heatmaps, sigma=config.sigma).points
        on_input = to_input_pixels(places.double(), config.stride)
        return on_input @ to_film[:, :, :2].transpose(1, 2) + to_film[:, None, :, 2]

    def _spread_mm(self, model: nn.Module, batch: Batch, index: int) -> Array:
        passes = self.stage.model.mc_dropout_passes
        image = batch["image"][index : index + 1].expand(passes, -1, -1, -1)
        to_film = batch["to_film"][index : index + 1].expand(passes, -1, -1)
        devices = [image.device] if image.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), dropout_on(model):
            torch.manual_seed(derive_seed("dropout", self.stage.seed, batch["case_id"][index]))
            points = self._on_film(model(image).heatmaps, to_film)
        variance = points.var(dim=0, correction=1 if passes > 1 else 0).sum(-1)
        spread: Array = float(batch["mm_per_pixel"][index]) * variance.sqrt().cpu().numpy()
        return spread

    def _read_augmented(self, case_id: str, seed: int) -> Sample:
        return self._read(case_id, rng=np.random.default_rng(seed))

    def _read_plain(self, case_id: str, seed: int) -> Sample:
        return self._read(case_id, rng=None)

    def _read(self, case_id: str, *, rng: np.random.Generator | None) -> Sample:
        """One case; with a generator it is augmented."""
        data = self.stage.data
        case = self.context.cases[case_id]
        film = Size(int(case.attributes["height"]), int(case.attributes["width"]))
        film_points = truth(case, data) if annotators(case).present else None
        change = None
        if rng is not None:
            if film_points is None:
                raise DataError(
                    f"case {case_id} must have annotations to be trained on, but has none."
                )
            at_rest = move_points(letterbox(film, self.image_size), film_points)
            change = draw_change(data.augmentation, rng=rng, image=self.image_size, points=at_rest)
        sample = make_sample(
            self._stored_film(case), film=film, image=self.image_size, change=change
        )
        if film_points is None:
            film_points = np.full((self.num_landmarks, 2), np.nan)
        to_film = np.linalg.inv(sample.from_film)[:2]
        return {
            "image": sample.image,
            "points": torch.from_numpy(move_points(sample.from_film, film_points)).float(),
            "film_points": torch.from_numpy(film_points),
            "to_film": torch.from_numpy(np.ascontiguousarray(to_film)),
            "mm_per_pixel": float(case.attributes["mm_per_pixel"]),
        }

    def _stored_film(self, case: Case) -> Pixels:
        """The film at about twice the input's size, decoded once a node and mapped from disk."""
        entry = case.files["image"]
        size = self.image_size
        key = f"gray film {entry.checksum} {size.height}x{size.width} x{OVERSAMPLING:g}"

        def build() -> Pixels:
            try:
                return read_film(self.context.data_path / entry.path, size)
            except DataError as error:
                raise DataError(f"case {case.case_id}: {error}") from error

        return self._cache.array(key, build)


def heatmap_loss(heatmaps: Tensor, target: Tensor, *, config: Heatmap) -> Tensor:
    """Squared error, `1 + beta * target` times as heavy at the peak: per map, then the mean."""
    squared = (1.0 + config.beta * target) * (heatmaps - target) ** 2
    maps = squared.flatten(2)
    per_map = maps.sum(-1) if config.reduction == "sum_per_map" else maps.mean(-1)
    return per_map.mean()


@contextmanager
def dropout_on(model: nn.Module) -> Iterator[None]:
    """Let dropout modules, and nothing else, act as in training."""
    switched = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
    ]
    for module in switched:
        module.train()
    try:
        yield
    finally:
        for module in switched:
            module.eval()


def _build_ssim() -> nn.Module:
    # A slow import, and only some stages need it.
    from monai.losses.ssim_loss import SSIMLoss

    return SSIMLoss(spatial_dims=2, data_range=1.0, win_size=11, kernel_sigma=1.5)
