from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from medtrain.config import Section
from medtrain.errors import ConfigError
from medtrain.recipes.cephalometric.config import (
    RECIPE,
    CephalometricModel,
    Encoder,
    Heatmap,
    Transformer,
)
from medtrain.recipes.cephalometric.model import (
    AttentionGate,
    MahtNet,
    SpatialAttention,
    TransformerBottleneck,
    position_code,
)
from medtrain.train.pretrained import load_parent

B0 = Encoder(name="efficientnet_b0")
SMALL = CephalometricModel(encoder=B0, decoder_widths=(32, 16, 16, 16))
STAGES = [(v, s) for v, stages in RECIPE.variants.items() for s in stages]
LATER = [(v, s) for v, s in STAGES if RECIPE.variants[v][s].init.stage]


def _changed(**changes: object) -> CephalometricModel:
    return CephalometricModel(
        **{**{n: getattr(SMALL, n) for n in type(SMALL).model_fields}, **changes}
    )


def _on_meta(config: Section) -> MahtNet:
    assert isinstance(config, CephalometricModel)
    with torch.device("meta"):
        return MahtNet(config, num_landmarks=19)


def _count(module: nn.Module | None) -> int:
    assert module is not None
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("variant", "stage"), STAGES)
def test_every_parameter_has_one_group_and_every_pattern_owns_some(variant, stage):
    config = RECIPE.variants[variant][stage]
    owned: dict[str, list[str]] = {p: [] for g in config.optim.groups.values() for p in g.match}
    for name, _ in _on_meta(config.model).named_parameters():
        patterns = [p for p in owned if fnmatchcase(name, p)]
        assert patterns, f"{name} belongs to no group"
        owned[patterns[0]].append(name)
    assert [pattern for pattern, names in owned.items() if not names] == []


@pytest.mark.parametrize(("variant", "stage"), LATER)
def test_a_stage_fits_its_parent_as_its_init_says(variant, stage):
    config = RECIPE.variants[variant][stage]
    assert config.init.stage is not None
    parent = _on_meta(RECIPE.variants[variant][config.init.stage].model)
    child = _on_meta(config.model)
    report = load_parent(child, parent.state_dict(), config.init)
    encoder = [name for name in child.state_dict() if name.startswith("encoder.")]
    assert report.matched > len(encoder)
    parts = {name.split(".")[0] for name in report.missing}
    expected = {"transformer": {"bottleneck"}, "multitask": {"fusion", "coord_head"}}[stage]
    assert parts == expected | {"decoder"}


@pytest.mark.parametrize("pattern", ["encoder.blocks.*", "decoder.*", "bottleneck.layers.*"])
def test_blocks_whose_activations_can_be_recomputed_are_named_modules(pattern):
    config = RECIPE.variants["small"]["multitask"].model
    names = [name for name, _ in _on_meta(config).named_modules() if fnmatchcase(name, pattern)]
    assert len(names) >= 2


@pytest.mark.parametrize(
    ("name", "stem", "expected"),
    [
        ("efficientnet_b0", "repeat_rgb", 3_595_388),
        ("efficientnet_b0", "sum_rgb", 3_594_812),
        ("efficientnet_b3", "repeat_rgb", 10_103_336),
        ("efficientnet_b3", "sum_rgb", 10_102_616),
        ("efficientnet_b4", "repeat_rgb", 16_742_216),
        ("efficientnet_b4", "sum_rgb", 16_741_352),
        ("resnet34", "repeat_rgb", 21_284_672),
        ("resnet34", "sum_rgb", 21_278_400),
    ],
)
def test_encoders_have_the_published_number_of_parameters(name, stem, expected):
    encoder = Encoder(name=name, stem=stem)
    assert _count(_on_meta(_changed(encoder=encoder)).encoder) == expected


@pytest.mark.parametrize(
    ("channels", "dim", "heads", "layers", "expected"),
    [
        (384, 768, 12, 6, 43_119_744),
        (384, 384, 8, 4, 7_394_304),
        (384, 256, 8, 2, 1_777_280),
        (320, 192, 6, 2, 1_013_504),
    ],
)
def test_bottlenecks_have_the_specified_number_of_parameters(
    channels, dim, heads, layers, expected
):
    config = Transformer(dim=dim, heads=heads, layers=layers)
    with torch.device("meta"):
        assert _count(TransformerBottleneck(channels, config, dropout=0.1)) == expected


def test_encoder_and_base_bottleneck_together_have_17_496_920_parameters():
    model = _on_meta(RECIPE.variants["base"]["transformer"].model)
    assert _count(model.encoder) + _count(model.bottleneck) == 17_496_920


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_heatmaps_have_the_configured_stride(stride):
    model = _on_meta(_changed(heatmap=Heatmap(stride=stride), coord_head="gap_mlp"))
    output = model(torch.zeros(2, 1, 64, 96, device="meta"))
    assert output.heatmaps.shape == (2, 19, 64 // stride, 96 // stride)
    assert output.coordinates is not None
    assert output.coordinates.shape == (2, 19, 2)


def _two_stages(parent_config, child_config, init) -> tuple[torch.Tensor, torch.Tensor]:
    """Heatmaps of a trained-looking parent and of a child that starts from it."""
    torch.manual_seed(0)
    parent = MahtNet(parent_config, num_landmarks=5)
    film = torch.rand(2, 1, 64, 64)
    # A few passes in training mode: BatchNorm's statistics are then those of a network in use.
    for _ in range(20):
        parent(film)
    child = MahtNet(child_config, num_landmarks=5)
    load_parent(child, parent.state_dict(), init)
    with torch.no_grad():
        return parent.eval()(film).heatmaps, child.eval()(film).heatmaps


TRANSFORMER = Transformer(dim=32, heads=4, layers=2)


@pytest.mark.parametrize("attention", ["none", "spatial", "gate"])
def test_the_second_stage_starts_where_the_first_ended(attention):
    """E05: exactly without attention, within 5 % with it."""
    init = RECIPE.variants["default"]["transformer"].init
    first, second = _two_stages(SMALL, _changed(transformer=TRANSFORMER, attention=attention), init)
    if attention == "none":
        assert torch.equal(first, second)
    else:
        assert 0 < (first - second).abs().max() < 0.05 * first.abs().max()


@pytest.mark.parametrize("before", ["spatial", "none"])
def test_the_third_stage_starts_where_the_second_ended(before):
    init = RECIPE.variants["default"]["multitask"].init
    second, third = _two_stages(
        _changed(transformer=TRANSFORMER, attention=before),
        _changed(
            transformer=TRANSFORMER, attention="gate", fusion_channels=16, coord_head="gap_mlp"
        ),
        init,
    )
    assert (second - third).abs().max() < 0.05 * second.abs().max()


def test_every_parameter_of_the_full_network_can_learn():
    torch.manual_seed(0)
    config = _changed(
        transformer=TRANSFORMER, attention="gate", fusion_channels=16, coord_head="gap_mlp"
    )
    model = MahtNet(config, num_landmarks=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    film = torch.rand(2, 1, 64, 64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        output = model(film)
        assert output.coordinates is not None
        loss = (output.heatmaps - 1).square().mean() + output.coordinates.square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    still = [n for n, p in model.named_parameters() if torch.equal(p.detach(), before[n])]
    assert still == []


def test_new_weights_come_from_the_global_generator_alone():
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return MahtNet(_changed(transformer=TRANSFORMER), num_landmarks=3).state_dict()

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.conv_stem.weight"], other["encoder.conv_stem.weight"])
    layers = [first[f"bottleneck.layers.{n}.linear1.weight"] for n in (0, 1)]
    assert not torch.equal(*layers)


def test_both_stems_see_the_same_with_one_mean_and_deviation():
    """A summed stem is the RGB stem on a repeated film, when all colors share their statistics."""
    torch.manual_seed(0)
    rgb = MahtNet(
        _changed(encoder=Encoder(name="efficientnet_b0", stem="repeat_rgb")), num_landmarks=3
    )
    gray = MahtNet(SMALL, num_landmarks=3)
    assert rgb.mean.shape == (3, 1, 1)
    gray.encoder.conv_stem.weight.data = rgb.encoder.conv_stem.weight.data.sum(1, keepdim=True)
    film = torch.rand(2, 1, 64, 64)

    def seen_by(model: MahtNet) -> torch.Tensor:
        stem: torch.Tensor = model.encoder.conv_stem((film - model.mean) / model.std)
        return stem

    assert (seen_by(rgb) - seen_by(gray)).abs().max() > 1e-3
    rgb.mean, rgb.std = gray.mean.expand(3, 1, 1), gray.std.expand(3, 1, 1)
    assert (seen_by(rgb) - seen_by(gray)).abs().max() < 1e-5


def test_the_normalization_is_no_part_of_the_state():
    assert not {"mean", "std"} & set(_on_meta(SMALL).state_dict())


def test_position_codes_tell_every_place_apart():
    code = position_code(32, 5, 7)
    assert code.shape == (32, 5, 7)
    flat = code.flatten(1).T
    distances = torch.cdist(flat, flat) + torch.eye(35)
    assert distances.min() > 0.1
    assert torch.equal(position_code(32, 5, 9)[:, :, :7], code)


@pytest.mark.parametrize("attention", [SpatialAttention(), AttentionGate(6, 4)])
def test_fresh_attention_passes_nearly_everything_whatever_the_features(attention):
    skip, below = 50 * torch.randn(2, 4, 8, 8), 50 * torch.randn(2, 6, 8, 8)
    assert torch.allclose(attention(skip, below), 0.98201 * skip, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("efficientnet_b33", "must be a network of timm.*efficientnet_b0"),
        ("vit_tiny_patch16_224", "feature maps at strides"),
    ],
)
def test_unfit_encoders_are_named(name, words):
    with pytest.raises(ConfigError, match=words):
        _on_meta(_changed(encoder=Encoder(name=name)))


def test_a_width_without_position_code_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        Transformer(dim=10, heads=2, layers=1)
