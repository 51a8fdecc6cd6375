"""MAHT-Net: a timm encoder, an optional transformer, and a decoder to heatmaps of landmarks.

Every part that a later stage adds begins as (nearly) the identity: the transformer and the fusion
end in a 1x1 convolution of zeros and are added to their input, and attention begins at
sigmoid(4) = 0.982 everywhere. So a stage starts from where the one before it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtrain.errors import ConfigError
from medtrain.recipes.cephalometric.config import CephalometricModel, Transformer
from medtrain.train.torchvision_ops import ensure_torchvision

ensure_torchvision()
import timm  # noqa: E402  (needs torchvision)

STRIDES = (2, 4, 8, 16, 32)
"""Input pixels per feature, for the five maps of an encoder."""

OPEN = 4.0
"""Bias of fresh attention: sigmoid(4) = 0.982 lets nearly everything pass."""


@dataclass(frozen=True)
class Statistics:
    """Means and deviations of the images that an encoder was pretrained on, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


STATISTICS = {
    "sum_rgb": Statistics((0.449,), (0.226,)),
    "repeat_rgb": Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""ImageNet's, by stem; one gray channel takes the mean over the colors."""


@dataclass(frozen=True)
class MahtOutput:
    """What the network says about a batch."""

    heatmaps: Tensor
    """(B, K, h, w), linear; the target's peak is 1."""
    coordinates: Tensor | None
    """(B, K, 2): x, y as fractions of the input's width and height; None without `gap_mlp`."""


class MahtNet(nn.Module):
    """Heatmaps, and with `coord_head: gap_mlp` also coordinates, of `num_landmarks` landmarks.

    Input: gray films (B, 1, H, W) in [0, 1]; H and W are multiples of 32. The network normalizes
    them itself: with `stem: sum_rgb` by one mean and deviation, with `repeat_rgb` by those of each
    color. New weights are drawn from torch's global generator.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: CephalometricModel, *, num_landmarks: int) -> None:
        super().__init__()
        statistics = STATISTICS[config.encoder.stem]
        for name, values in (("mean", statistics.mean), ("std", statistics.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.encoder = _build_encoder(config.encoder.name, in_chans=len(statistics.mean))
        channels: list[int] = self.encoder.feature_info.channels()
        used = STRIDES.index(config.heatmap.stride)
        self._first_used = used
        deepest = channels[-1]
        self.bottleneck = (
            TransformerBottleneck(deepest, config.transformer, dropout=config.dropout)
            if config.transformer
            else None
        )
        self.fusion = (
            PyramidFusion(channels[used:], config.fusion_channels)
            if config.fusion_channels
            else None
        )
        self.decoder = Decoder(
            channels[used:],
            strides=STRIDES[used:],
            widths=config.decoder_widths,
            attention=config.attention,
            dropout=config.dropout,
        )
        self.heatmap_head = _heatmap_head(self.decoder.out_channels, num_landmarks)
        self.coord_head = (
            CoordinateHead(deepest, num_landmarks) if config.coord_head == "gap_mlp" else None
        )

    def forward(self, image: Tensor) -> MahtOutput:
        """Heatmaps and coordinates of a batch of images."""
        # Where the statistics are those of three colors, this also repeats the film.
        normalized = (image - self.mean) / self.std
        features: list[Tensor] = self.encoder(normalized)[self._first_used :]
        if self.bottleneck is not None:
            features[-1] = self.bottleneck(features[-1])
        if self.fusion is not None:
            features = self.fusion(features)
        heatmaps = self.heatmap_head(self.decoder(features))
        coordinates = self.coord_head(features[-1]) if self.coord_head is not None else None
        return MahtOutput(heatmaps, coordinates)


def _build_encoder(name: str, *, in_chans: int) -> Any:
    """timm's feature extractor: no class of its own, but `feature_info` and a list of maps."""
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
        raise ConfigError(
            f"model.encoder.name must be a network of timm, but is '{name}'. "
            f"Near names: {near or 'none'}."
        )
    try:
        encoder: Any = timm.create_model(name, features_only=True, in_chans=in_chans)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"model.encoder.name must be a network with feature maps, but is '{name}' ({error})."
        ) from error
    reduction = tuple(encoder.feature_info.reduction())
    if reduction != STRIDES:
        raise ConfigError(
            f"model.encoder.name must be a network with feature maps at strides {STRIDES}, "
            f"but '{name}' has {reduction}."
        )
    return encoder


class TransformerBottleneck(nn.Module):
    """Pre-norm transformer on the deepest map, added to it through a 1x1 convolution of zeros."""

    def __init__(self, channels: int, config: Transformer, *, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, config.dim, 1)
        # A list of our own: nn.TransformerEncoder copies one layer, so all would start equal.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.dim,
                config.heads,
                4 * config.dim,
                dropout,
                "gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.project = _zero_conv(config.dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        embedded = self.embed(x)
        _, dim, height, width = embedded.shape
        code = position_code(dim, height, width).to(embedded)
        tokens = (embedded + code).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        grid = self.norm(tokens).transpose(1, 2).reshape(-1, dim, height, width)
        out: Tensor = x + self.project(grid)
        return out


def position_code(dim: int, height: int, width: int) -> Tensor:
    """Fixed code of shape (dim, height, width): sines and cosines of y, then of x."""
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    y = torch.arange(height, dtype=torch.float32)[None, :] * frequencies[:, None]
    x = torch.arange(width, dtype=torch.float32)[None, :] * frequencies[:, None]
    of_y = torch.cat([y.sin(), y.cos()])[:, :, None].expand(-1, -1, width)
    of_x = torch.cat([x.sin(), x.cos()])[:, None, :].expand(-1, height, -1)
    return torch.cat([of_y, of_x])


class PyramidFusion(nn.Module):
    """Feature pyramid whose maps return to the encoder's through 1x1 convolutions of zeros."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(_conv_bn_relu(width, width) for _ in channels)
        self.project = nn.ModuleList(_zero_conv(width, c) for c in channels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps of the same shapes; every one has seen all deeper ones."""
        pyramid = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        for level in range(len(pyramid) - 2, -1, -1):
            pyramid[level] = pyramid[level] + _double(pyramid[level + 1])
        return [
            x + project(smooth(level))
            for x, level, smooth, project in zip(
                features, pyramid, self.smooth, self.project, strict=True
            )
        ]


class Decoder(nn.Module):
    """From the deepest map up to the heatmaps' stride; blocks are named by their stride."""

    def __init__(
        self,
        channels: Sequence[int],
        *,
        strides: Sequence[int],
        widths: Sequence[int],
        attention: str,
        dropout: float,
    ) -> None:
        super().__init__()
        below = channels[-1]
        skips = list(zip(strides, channels, strict=True))[-2::-1]
        for (stride, skip), width in zip(skips, widths, strict=False):
            block = DecoderBlock(below, skip, width, attention=attention, dropout=dropout)
            self.add_module(f"stride{stride}", block)
            below = width
        self.out_channels = below

    def forward(self, features: list[Tensor]) -> Tensor:
        """(B, out_channels, h, w) at the stride of the first map."""
        x = features[-1]
        for block, skip in zip(self.children(), features[-2::-1], strict=True):
            x = block(x, skip)
        return x


class DecoderBlock(nn.Module):
    """Doubles the resolution, joins the attended skip, then two convolutions with a residual."""

    def __init__(
        self, below: int, skip: int, width: int, *, attention: str, dropout: float
    ) -> None:
        super().__init__()
        self.attention = _build_attention(attention, below=below, skip=skip)
        self.convs = nn.Sequential(
            _conv_bn_relu(below + skip, width),
            nn.Dropout2d(dropout),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Conv2d(below + skip, width, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`x` at half the resolution of `skip`."""
        x = _double(x)
        if self.attention is not None:
            skip = self.attention(skip, x)
        joined = torch.cat([x, skip], dim=1)
        return F.relu(self.convs(joined) + self.shortcut(joined))


def _build_attention(kind: str, *, below: int, skip: int) -> nn.Module | None:
    match kind:
        case "none":
            return None
        case "spatial":
            return SpatialAttention()
        case "gate":
            return AttentionGate(below, skip)
    raise ConfigError(f"model.attention must be none, spatial or gate, but is '{kind}'.")


class SpatialAttention(nn.Module):
    """A weight for every place of the skip, from the mean and the maximum over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = _open(nn.Conv2d(2, 1, 7, padding=3))

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """The weighted skip; `below` is not looked at."""
        summary = torch.cat([skip.mean(1, keepdim=True), skip.amax(1, keepdim=True)], dim=1)
        weighted: Tensor = skip * self.weigh(summary).sigmoid()
        return weighted


class AttentionGate(nn.Module):
    """Additive gate of Attention U-Net: what lies below says which places of the skip count."""

    def __init__(self, below: int, skip: int) -> None:
        super().__init__()
        inner = max(skip // 2, 1)
        self.of_below = _conv_bn(below, inner)
        self.of_skip = _conv_bn(skip, inner)
        self.psi = _open(nn.Conv2d(inner, 1, 1))

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """The gated skip; `below` has the skip's resolution."""
        joined = F.relu(self.of_below(below) + self.of_skip(skip))
        gated: Tensor = skip * self.psi(joined).sigmoid()
        return gated


class CoordinateHead(nn.Module):
    """Coordinates from the mean of the deepest map, as fractions of width and height."""

    def __init__(self, channels: int, num_landmarks: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 2 * num_landmarks),
        )
        # The first answer is about the middle of the image.
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, 0.5)

    def forward(self, deepest: Tensor) -> Tensor:
        """(B, K, 2)."""
        flat: Tensor = self.mlp(deepest.mean(dim=(2, 3)))
        return flat.reshape(len(flat), -1, 2)


def _heatmap_head(channels: int, num_landmarks: int) -> nn.Sequential:
    return nn.Sequential(
        _conv_bn_relu(channels, channels),
        _conv_bn_relu(channels, channels),
        nn.Conv2d(channels, num_landmarks, 1),
    )


def _conv_bn(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))


def _conv_bn_relu(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


def _zero_conv(channels: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, width, 1)
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _open(conv: nn.Conv2d) -> nn.Conv2d:
    """Let a fresh attention pass 0.982 of everything, whatever the size of the features."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.constant_(conv.bias, OPEN)
    return conv


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
