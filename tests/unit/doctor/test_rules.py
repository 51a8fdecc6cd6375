"""Each rule for all systems: a stage that it speaks of, and one that it does not."""

from typing import Any

import pytest

from medtrain.doctor.examine import RULES, examine
from medtrain.doctor.schedule import earliest_stop
from medtrain.recipes import resolve
from medtrain.recipes.recipe import Finding, NotEvaluated

SMALL = "cephalometric/small"
SMOKE = "cephalometric/smoke"
CASES = {"num_train_cases": 256}


def found(rule: str, name: str, *overrides: str, **facts: Any) -> list[Finding]:
    assert rule in {r.id for r in RULES}
    diagnosis = examine(resolve(name, overrides), facts)
    return [finding for finding in diagnosis.findings if finding.rule == rule]


def missed(rule: str, name: str, *overrides: str, **facts: Any) -> list[NotEvaluated]:
    diagnosis = examine(resolve(name, overrides), facts)
    return [missing for missing in diagnosis.not_evaluated if missing.rule == rule]


class TestBatch:
    def test_another_batch_with_the_same_rates(self) -> None:
        (finding,) = found("D-X02", f"{SMALL}:transformer", "batch.global=32")
        assert finding.severity == "warning"
        assert "from 8 to 32" in finding.message
        assert "lr x 4" in finding.message
        (finding,) = found("D-X02", f"{SMALL}:transformer", "batch.global=2", "batch.micro=2")
        assert "lr / 4" in finding.message
        assert "keep batch.global=8" in finding.message

    def test_another_batch_with_another_rate_is_a_decision(self) -> None:
        overrides = ("batch.global=32", "optim.groups.decoder.lr=4e-4")
        assert not found("D-X02", f"{SMALL}:transformer", *overrides)

    def test_smaller_micro_batches_keep_the_batch(self) -> None:
        assert not found("D-X02", f"{SMALL}:transformer+oom_rescue")

    def test_rates_far_apart(self) -> None:
        (finding,) = found("D-G05", f"{SMALL}:transformer")
        assert finding.severity == "info"
        assert "differ by 10x: encoder_deep 1e-05, bottleneck 0.0001" in finding.message

    def test_one_rate_for_trained_and_new_parts(self) -> None:
        (finding,) = found("D-G05", f"{SMOKE}:transformer")
        assert "all groups learn at 0.001" in finding.message

    def test_rates_a_little_apart(self) -> None:
        assert not found("D-G05", f"{SMOKE}:transformer", "optim.groups.encoder.lr=3e-4")

    def test_one_rate_from_scratch(self) -> None:
        assert not found("D-G05", f"{SMOKE}:baseline")

    def test_a_frozen_encoder_has_no_rate(self) -> None:
        assert not found("D-G05", f"{SMALL}:baseline")


class TestRestarts:
    def test_a_cycle_that_the_stage_cuts(self) -> None:
        (finding,) = found("D-X05", f"{SMALL}:multitask", "optim.schedule.first=20epochs",
                           "optim.schedule.factor=2")  # fmt: skip
        assert finding.severity == "warning"
        assert "end at epoch 140, but the stage ends at 100, 40 epochs into a cycle of 80" in (
            finding.message
        )
        assert "first=25epochs factor=3" in finding.message

    @pytest.mark.parametrize(
        ("first", "factor"), [("25epochs", 3), ("50epochs", 1), ("100epochs", 2), ("25%", 1)]
    )
    def test_cycles_that_end_with_the_stage(self, first: str, factor: int) -> None:
        overrides = (f"optim.schedule.first={first}", f"optim.schedule.factor={factor}")
        assert not found("D-X05", f"{SMALL}:multitask", *overrides)

    def test_a_first_cycle_longer_than_the_stage(self) -> None:
        assert found("D-X05", f"{SMALL}:multitask", "epochs=20")

    def test_a_late_group_counts_from_its_start(self) -> None:
        late = ("optim.groups.fusion.starts_epoch=51",)
        (finding,) = found("D-X05", f"{SMALL}:multitask", *late)
        assert "(fusion)" in finding.message
        schedule = "optim.groups.fusion.schedule={kind: cosine_restarts, first: 50epochs}"
        assert not found("D-X05", f"{SMALL}:multitask", *late, schedule)

    def test_a_frozen_group_has_no_cycles(self) -> None:
        frozen = ("optim.groups.fusion.starts_epoch=51", "optim.groups.fusion.lr=null")
        assert not found("D-X05", f"{SMALL}:multitask", *frozen)

    def test_cycles_in_steps_need_the_number_of_cases(self) -> None:
        steps = "optim.schedule={first: 800steps, factor: 3}"
        assert missed("D-X05", f"{SMALL}:multitask", steps)
        assert not found("D-X05", f"{SMALL}:multitask", steps, **CASES)
        (finding,) = found("D-X05", f"{SMALL}:multitask", steps, num_train_cases=250 + 8)
        assert "the stage ends at 3300" in finding.message

    def test_other_schedules_have_none(self) -> None:
        assert not found("D-X05", f"{SMALL}:transformer")
        assert not missed("D-X05", f"{SMALL}:transformer")


class TestStopping:
    @pytest.mark.parametrize(
        ("patience", "min_epochs", "every", "stop"),
        [(5, 0, 1, 6), (5, 10, 1, 15), (3, 10, 4, 24), (100, 0, 1, 50)],
    )
    def test_the_earliest_stop(self, patience: int, min_epochs: int, every: int, stop: int) -> None:
        stage = resolve(
            f"{SMALL}:transformer",
            [
                f"early_stop={{patience: {patience}, min_epochs: {min_epochs}}}",
                f"validation.every_epochs={every}",
            ],
        ).stage
        assert earliest_stop(stage) == stop

    def test_patience_beyond_the_last_epoch(self) -> None:
        (finding,) = found("D-X11", f"{SMALL}:baseline", "epochs=15")
        assert finding.severity == "warning"
        assert "cannot act within epochs=15" in finding.message

    def test_patience_that_can_run_out(self) -> None:
        assert not found("D-X11", f"{SMALL}:baseline")
        assert not found("D-X11", f"{SMALL}:baseline", "epochs=15", "early_stop=null")

    def test_parts_that_start_after_the_end(self) -> None:
        overrides = ("epochs=20", "losses.ssim.starts_epoch=30")
        (finding,) = found("D-X12", f"{SMALL}:transformer", *overrides)
        assert finding.severity == "warning"
        for late in ("optim.groups.encoder_stem (epoch 41)", "losses.ssim (epoch 30)"):
            assert late in finding.message
        assert "encoder_stride8" not in finding.message

    def test_parts_that_start_in_time(self) -> None:
        assert not found("D-X12", f"{SMALL}:transformer")


class TestWeights:
    def test_random_weights_where_pretrained_ones_are_meant(self) -> None:
        allowed = "model.encoder.weights.allow_random_init=true"
        (finding,) = found("D-X13", f"{SMALL}:baseline", allowed)
        assert finding.severity == "warning"
        assert "model.encoder.weights.allow_random_init is set" in finding.message

    def test_weights_that_a_checkpoint_overwrites(self) -> None:
        allowed = "model.encoder.weights.allow_random_init=true"
        assert not found("D-X13", f"{SMALL}:transformer", allowed)
        assert not found("D-X13", f"{SMALL}:baseline")

    def test_many_parameters_a_case(self) -> None:
        many = {"num_parameters": 12_000_000, "num_train_cases": 40}
        (finding,) = found("D-X07", f"{SMOKE}:baseline", **many)
        assert finding.severity == "info"
        assert "300,000 a case, more than 50,000" in finding.message
        (finding,) = found("D-X07", f"{SMALL}:baseline", **many)
        assert finding.severity == "warning"
        assert "more than 250,000" in finding.message

    def test_few_parameters_a_case(self) -> None:
        few = {"num_parameters": 12_000_000, "num_train_cases": 256}
        assert not found("D-X07", f"{SMOKE}:baseline", **few)
        assert not found("D-X07", f"{SMALL}:baseline", **few)

    def test_frozen_parameters_do_not_count(self) -> None:
        frozen = {"num_parameters": 10**9, "num_trainable_parameters": 10**6}
        assert not found("D-X07", f"{SMALL}:baseline", **frozen, **CASES)

    def test_parameters_are_counted_elsewhere(self) -> None:
        assert {missing.fact for missing in missed("D-X07", f"{SMALL}:baseline")} == {
            "num_parameters",
            "num_train_cases",
        }

    def test_an_average_slower_than_the_stage(self) -> None:
        slow = "ema.decay=0.999"
        (finding,) = found("D-G06", f"{SMOKE}:baseline", slow, **CASES)
        assert finding.severity == "warning"
        assert "half-life of 21.7 epochs" in finding.message
        suggested = finding.message.rpartition("Set ema.decay to ")[2].split(" ")[0]
        assert not found("D-G06", f"{SMOKE}:baseline", f"ema.decay={suggested}", **CASES)

    def test_an_average_without_lag(self) -> None:
        assert not found("D-G06", f"{SMOKE}:baseline", "ema.decay=0", **CASES)

    def test_a_stage_without_average_needs_no_fact(self) -> None:
        assert not missed("D-G06", f"{SMALL}:baseline")
        assert missed("D-G06", f"{SMOKE}:baseline")

    def test_an_average_that_is_never_kept(self) -> None:
        (finding,) = found("D-G06", f"{SMALL}:baseline", "ema={}")
        assert finding.severity == "error"
        cure = finding.message.rpartition("Set ")[2].rpartition(", or")[0]
        assert not found("D-G06", f"{SMALL}:baseline", "ema={}", cure)
