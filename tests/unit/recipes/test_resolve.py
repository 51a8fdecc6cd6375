from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from medtrain import recipes as recipes_package
from medtrain.config import dump
from medtrain.errors import ConfigError
from medtrain.recipes import Recipe, RecipeName, chain, find, recipes, resolve

NAME = "cephalometric/small:transformer"


def problems(name: str, *overrides: str, **file: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(name, overrides, **file)
    return list(caught.value.problems)


class TestNames:
    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("a", RecipeName("a")),
            ("a/b", RecipeName("a", "b")),
            ("a:c", RecipeName("a", "default", "c")),
            ("a/b:c+d+e", RecipeName("a", "b", "c", ("d", "e"))),
            ("a+d", RecipeName("a", "default", None, ("d",))),
        ],
    )
    def test_a_name_reads_and_writes_itself(self, text: str, name: RecipeName) -> None:
        assert RecipeName.parse(text) == name
        assert str(name) == text

    @pytest.mark.parametrize("text", ["", "A", "a/", "a:", "a+", "a b", "a:c/b", "a\n", "1a"])
    def test_other_text_is_no_name(self, text: str) -> None:
        with pytest.raises(ConfigError, match="must have the form"):
            RecipeName.parse(text)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("cephalometrik:baseline", "Did you mean 'cephalometric'?"),
            ("cephalometric/smal:baseline", "Did you mean 'small'?"),
            ("cephalometric:basline", "Did you mean 'baseline'?"),
            ("cephalometric:baseline+oom_resc", "Did you mean 'oom_rescue'?"),
            ("cephalometric:zzz", "Known: baseline, transformer, multitask."),
            ("cephalometric", "must name a stage, one of: cephalometric:baseline"),
        ],
    )
    def test_what_does_not_exist_names_the_nearest(self, name: str, hint: str) -> None:
        (problem,) = problems(name)
        assert hint in problem

    def test_the_chain_leads_to_the_first_stage(self) -> None:
        assert chain("cephalometric:multitask") == ("baseline", "transformer", "multitask")
        assert chain("cephalometric:baseline") == ("baseline",)
        assert chain("cephalometric") == ("baseline", "transformer", "multitask")


class TestOrigins:
    def test_every_value_has_one(self) -> None:
        origins = resolve(
            f"{NAME}+oom_rescue",
            ["epochs=20", "optim.groups.extra={match: [x], lr: 1}"],
            file={"seed": 7, "epochs": 9},
            file_name="mine.yaml",
        ).origins
        expected = {
            "epochs": "override",
            "seed": "file mine.yaml",
            "batch.micro": "overlay oom_rescue",
            "precision": "overlay oom_rescue",
            "model.transformer.layers": "recipe",
            "batch.global": "default",
            "model.encoder.weights.hub_id": "default",
            "optim.groups.bottleneck.schedule.kind": "recipe",
            "optim.groups.decoder.schedule": "default",
            "optim.schedule.kind": "default",
            "optim.groups.extra.lr": "override",
            "optim.groups.extra.starts_epoch": "default",
            "name": "recipe",
        }
        assert {path: origins[path] for path in expected} == expected

    def test_a_value_set_to_what_it_was_is_still_set(self) -> None:
        assert resolve(NAME, ["epochs=50"]).origins["epochs"] == "override"

    def test_later_words_win(self) -> None:
        resolution = resolve(f"{NAME}+oom_rescue", ["batch.micro=8"], file={"batch": {"micro": 4}})
        assert resolution.stage.batch.micro == 8
        assert resolution.origins["batch.micro"] == "override"

    def test_values_of_a_kind_chosen_by_override_are_its_defaults(self) -> None:
        origins = resolve(NAME, ["optim.groups.bottleneck.schedule.kind=plateau"]).origins
        assert origins["optim.groups.bottleneck.schedule.kind"] == "override"
        assert origins["optim.groups.bottleneck.schedule.warmup"] == "default"

    def test_the_original_is_the_recipe_s_stage(self) -> None:
        resolution = resolve(NAME, ["epochs=1"])
        assert resolution.original.epochs == 50


class TestFiles:
    def saved(self, name: str, *overrides: str) -> dict[str, Any]:
        return dump(resolve(name, overrides).stage)

    def test_a_run_s_configuration_comes_back_equal_with_its_order(self) -> None:
        overrides = [
            "optim.groups.norm={match: [*.norm.*], lr: 1e-4}",
            "optim.groups.encoder_stem=null",
            "losses.ssim=null",
            "early_stop=null",
            "optim.schedule={kind: cosine, floor: 0.1}",
        ]
        before = resolve(f"{NAME}+oom_rescue", overrides).stage
        after = resolve(NAME, file=dump(before), file_name="config.yaml").stage
        assert after == before
        assert list(after.optim.groups) == list(before.optim.groups)

    def test_overrides_go_on_top(self) -> None:
        assert resolve(NAME, ["epochs=3"], file=self.saved(NAME, "epochs=2")).stage.epochs == 3

    def test_another_stage_s_configuration_is_refused(self) -> None:
        first, *_ = problems(
            NAME, file=self.saved("cephalometric/small:baseline"), file_name="config.yaml"
        )
        assert first == (
            "config.yaml must be a configuration of 'cephalometric/small:transformer', but is one "
            "of 'cephalometric/small:baseline'. Name that stage, or take the line 'name' out of "
            "the file."
        )

    def test_another_system_s_configuration_names_its_unknown_keys(self) -> None:
        file = {"name": "retina:train", "model": {"tower": "vit"}, "modalities": ["vision"]}
        found = problems(NAME, file=file)
        assert len(found) == 3
        assert any(problem.startswith("model.tower is not a key.") for problem in found)
        assert any(problem.startswith("modalities is not a key.") for problem in found)


class TestMistakes:
    def test_form_and_value_are_said_at_once(self) -> None:
        assert len(problems(NAME, "epochs", "seed=x", "modle.dropout=1", file={"epoch": 3})) == 4

    def test_a_later_stage_is_no_start(self) -> None:
        assert problems(NAME, "init.stage=multitask") == [
            "init.stage must be one of baseline, but is 'multitask'."
        ]

    def test_the_first_stage_starts_from_none(self) -> None:
        (problem,) = problems("cephalometric:baseline", "init={from: stage, stage: multitask}")
        assert "must be null, as this is the first stage" in problem


class TestList:
    @pytest.fixture(autouse=True)
    def _uncached(self) -> Iterator[None]:
        recipes.cache_clear()
        yield
        recipes.cache_clear()

    def with_entry(self, monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
        entry = SimpleNamespace(name="mine", value="mine.config:RECIPE", load=load)
        monkeypatch.setattr(recipes_package, "entry_points", lambda group: [entry])

    def test_a_user_s_system_joins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = replace(recipes()["cephalometric"], system="mine", package="mine")
        recipes.cache_clear()
        self.with_entry(monkeypatch, lambda: mine)
        assert list(recipes()) == ["cephalometric", "mine"]
        assert find("mine:baseline")[1] is mine

    def test_a_system_that_exists_is_not_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        twin = recipes()["cephalometric"]
        recipes.cache_clear()
        self.with_entry(monkeypatch, lambda: twin)
        with pytest.raises(ConfigError, match="repeats the system 'cephalometric'"):
            recipes()

    def test_what_is_no_recipe_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.with_entry(monkeypatch, lambda: 3)
        with pytest.raises(ConfigError, match="must be a Recipe"):
            recipes()

    def test_what_cannot_be_imported_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load() -> None:
            raise ImportError("No module named 'mine'")

        self.with_entry(monkeypatch, load)
        with pytest.raises(ConfigError, match=r"mine\.config:RECIPE is not: No module"):
            recipes()

    def test_stages_start_from_earlier_ones_only(self) -> None:
        ours = recipes()["cephalometric"]
        stages = ours.variants["small"]
        with pytest.raises(ConfigError, match="must be an earlier stage of turned"):
            Recipe(
                system="mine",
                title="Mine",
                stage_type=ours.stage_type,
                variants={"turned": dict(reversed(list(stages.items())))},
                gates={},
            )
