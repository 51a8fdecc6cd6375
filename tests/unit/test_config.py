import copy
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from medtrain.config import (
    Batch,
    Checkpoint,
    ConstantSchedule,
    CosineRestartsSchedule,
    Criterion,
    Data,
    Duration,
    FrozenDict,
    Init,
    Job,
    LossTerm,
    Optim,
    ParamGroup,
    PlateauSchedule,
    Section,
    StageConfig,
    digest,
    dump,
    identity,
    to_flow,
    to_yaml,
)
from medtrain.errors import ConfigError
from medtrain.overrides import leaves, parse_value


class Model(Section):
    """A model of one number."""

    width: int = 8


class Stage(StageConfig):
    """A stage of the tests."""

    data: Data = Data()
    model: Model = Model()


def stage(**changes: Any) -> Stage:
    fields: dict[str, Any] = {
        "name": "tiny:train",
        "epochs": 4,
        "optim": Optim(
            groups={
                "encoder": ParamGroup(match=("encoder.*",), lr=1e-5),
                "head": ParamGroup(match=("*",), lr=1e-3),
            }
        ),
        "losses": {"ce": LossTerm()},
        "checkpoint": Checkpoint(
            criteria={"best": Criterion(metric="val_loss", mode="min")}, monitor="best"
        ),
    }
    return Stage(**{**fields, **changes})


class TestDuration:
    @pytest.mark.parametrize(
        ("text", "duration"),
        [
            ("5epochs", Duration(5, "epochs")),
            ("1 epoch", Duration(1, "epochs")),
            ("500steps", Duration(500, "steps")),
            ("0.5epochs", Duration(0.5, "epochs")),
            ("10%", Duration(0.1, "fraction")),
            ("7%", Duration(0.07, "fraction")),
        ],
    )
    def test_text_says_amount_and_unit(self, text: str, duration: Duration) -> None:
        assert ConstantSchedule.model_validate({"warmup": text}).warmup == duration

    @pytest.mark.parametrize("text", ["5", "5 days", "-1epochs", "1e3steps", "٣epochs", "9" * 400])
    def test_other_text_is_refused(self, text: str) -> None:
        with pytest.raises(ValidationError, match="must be a duration such as"):
            ConstantSchedule.model_validate({"warmup": text})

    @given(
        st.floats(min_value=0, max_value=1e15, allow_nan=False),
        st.sampled_from(["epochs", "steps", "fraction"]),
    )
    def test_text_reads_back_as_the_same_duration(self, amount: float, unit: Any) -> None:
        duration = Duration(amount, unit)
        assert ConstantSchedule.model_validate({"warmup": str(duration)}).warmup == duration

    def test_steps_are_counted_by_epochs_steps_or_the_whole_stage(self) -> None:
        scale = {"steps_per_epoch": 10, "total_steps": 40}
        assert Duration(2, "epochs").in_steps(**scale) == 20
        assert Duration(7, "steps").in_steps(**scale) == 7
        assert Duration(0.1, "fraction").in_steps(**scale) == 4


class TestForm:
    def test_a_job_has_no_cache_of_its_own_beside_the_sites(self) -> None:
        with pytest.raises(ValidationError, match="cache_dir"):
            Job.model_validate({"cache_dir": "/scratch"})

    def test_accumulation_is_global_over_micro_and_processes(self) -> None:
        assert Batch(global_=32, micro=4).accumulation(world_size=2) == 4

    def test_a_batch_that_does_not_divide_names_micro_batches_that_do(self) -> None:
        with pytest.raises(ConfigError, match=r"micro=3 x 2 processes = 6.*one of \[1, 2, 4, 8\]"):
            Batch(global_=16, micro=3).accumulation(world_size=2)

    def test_more_processes_than_cases_name_a_multiple(self) -> None:
        with pytest.raises(ConfigError, match="multiple of 3"):
            Batch(global_=8, micro=1).accumulation(world_size=3)

    def test_a_huge_batch_is_refused_at_once(self) -> None:
        with pytest.raises(ConfigError, match="one of"):
            Batch(global_=10**6, micro=7).accumulation(world_size=1)

    def test_true_is_no_number(self) -> None:
        for wrong in ({"weight": True}, {"starts_epoch": True}):
            with pytest.raises(ValidationError):
                LossTerm.model_validate(wrong)
        with pytest.raises(ValidationError):
            Optim(betas=(0.9, True), groups=stage().optim.groups)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "inf", "1e999"])
    def test_numbers_are_finite(self, value: Any) -> None:
        with pytest.raises(ValidationError, match="finite number"):
            ParamGroup(match=("*",), lr=value)

    def test_text_takes_numbers(self) -> None:
        assert Job.model_validate({"cpu": 2}).cpu == "2"

    @pytest.mark.parametrize("memory", ["16Gi", "512Mi", "1.5Gi", "2G", "1000"])
    def test_memory_is_a_kubernetes_quantity(self, memory: str) -> None:
        assert Job(memory=memory).memory == memory

    @pytest.mark.parametrize("memory", ["16GB", "lots", "-1Gi", ""])
    def test_other_memory_is_refused(self, memory: str) -> None:
        with pytest.raises(ValidationError, match="amount of memory"):
            Job(memory=memory)

    def test_a_first_cycle_has_a_length(self) -> None:
        with pytest.raises(ValidationError, match="longer than nothing"):
            CosineRestartsSchedule(first=Duration(0, "epochs"))

    def test_a_loss_term_ends_after_its_start(self) -> None:
        with pytest.raises(ValidationError, match="ends_epoch must be after starts_epoch=5"):
            LossTerm(starts_epoch=5, ends_epoch=5)

    def test_one_loss_is_active(self) -> None:
        with pytest.raises(ValidationError, match="one of the losses must be active"):
            stage(losses={"ce": LossTerm(starts_epoch=5)})

    def test_something_is_trained(self) -> None:
        with pytest.raises(ValidationError, match="lr is null in all"):
            Optim(groups={"all": ParamGroup(match=("*",), lr=None)})

    def test_a_group_has_a_pattern(self) -> None:
        with pytest.raises(ValidationError, match="at least 1 item"):
            ParamGroup(match=(), lr=1.0)

    @pytest.mark.parametrize("name", ["last", "previous", "step_7"])
    def test_names_of_training_states_are_not_for_criteria(self, name: str) -> None:
        with pytest.raises(ValidationError, match="must not be called last, previous or step"):
            Checkpoint(criteria={name: Criterion(metric="val_loss", mode="min")}, monitor=name)

    def test_the_monitor_is_a_criterion(self) -> None:
        with pytest.raises(ValidationError, match="must be one of the criteria"):
            Checkpoint(criteria={"best": Criterion(metric="val_loss", mode="min")}, monitor="other")

    def test_a_criterion_of_averaged_weights_needs_them(self) -> None:
        checkpoint = Checkpoint(
            criteria={"best": Criterion(metric="val_ema_loss", mode="min")}, monitor="best"
        )
        with pytest.raises(ValidationError, match="ema is null"):
            stage(checkpoint=checkpoint)

    def test_a_start_from_a_stage_names_it(self) -> None:
        with pytest.raises(ValidationError, match="must name the earlier stage"):
            Init(source="stage")

    def test_another_start_says_what_must_go_with_the_stage(self) -> None:
        with pytest.raises(ValidationError, match=r"set also stage=null, new_parts=\[\]"):
            Init(source="scratch", stage="baseline", new_parts=("a.*",))


class TestFrozen:
    def test_nothing_in_a_stage_can_be_changed(self) -> None:
        config = stage()
        with pytest.raises(ValidationError, match="frozen"):
            config.epochs = 5  # type: ignore[misc]
        losses: Any = config.losses
        for change in (
            lambda: losses.__setitem__("kl", LossTerm()),
            lambda: losses.pop("ce"),
            lambda: losses.clear(),
            lambda: losses.update({}),
            lambda: losses.setdefault("kl", LossTerm()),
            lambda: losses.__ior__({}),
        ):
            with pytest.raises(TypeError, match="frozen"):
                change()

    def test_equal_stages_have_equal_hashes(self) -> None:
        assert stage() == stage()
        assert hash(stage()) == hash(stage())
        assert len({stage(), stage(), stage(seed=1)}) == 2

    def test_a_stage_survives_pickle_and_copy(self) -> None:
        config = stage()
        for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
            assert twin == config
            assert isinstance(twin.losses, FrozenDict)


class TestIdentity:
    def test_it_leaves_out_job_and_locations(self) -> None:
        moved = stage(
            job=Job(processes=2, memory="1Gi"),
            data=Data(root="/elsewhere", name="films"),
            checkpoint=stage().checkpoint.model_copy(update={"every_steps": 10, "keep": 3}),
        )
        assert identity(moved) == identity(stage())
        assert "job" not in identity(moved)

    def test_it_knows_a_section_called_job_elsewhere(self) -> None:
        class Other(Section):
            job: Model = Model()

        assert identity(Other()) == {"job": {"width": 8}}

    def test_the_order_of_groups_counts_since_the_first_match_owns_a_parameter(self) -> None:
        groups = dict(stage().optim.groups)
        turned = stage(optim=Optim(groups=dict(reversed(groups.items()))))
        assert turned == stage()
        assert digest(identity(turned)) != digest(identity(stage()))

    def test_the_order_of_losses_and_criteria_does_not_count(self) -> None:
        losses = {"a": LossTerm(), "b": LossTerm(weight=2)}
        turned = dict(reversed(losses.items()))
        assert digest(identity(stage(losses=losses))) == digest(identity(stage(losses=turned)))

    def test_equal_values_written_differently_are_one_identity(self) -> None:
        one = stage(losses={"ce": LossTerm.model_validate({"weight": "1"})})
        assert digest(identity(one)) == digest(identity(stage()))

    def test_a_part_has_an_identity_too(self) -> None:
        assert identity(Data(root="/a")) == identity(Data(root="/b"))

    def test_digests_refuse_what_json_lacks(self) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            digest({"a": float("nan")})


class TestText:
    def test_the_kind_comes_first(self) -> None:
        for schedule in (ConstantSchedule(), PlateauSchedule()):
            assert next(iter(dump(schedule))) == "kind"

    def test_keys_are_those_of_overrides(self) -> None:
        tree = dump(stage())
        assert "from" in tree["init"]
        assert "global" in tree["batch"]

    def test_json_and_dump_read_back_as_an_equal_stage(self) -> None:
        config = stage()
        assert Stage.model_validate(dump(config)) == config
        assert Stage.model_validate_json(config.model_dump_json(by_alias=True)) == config

    @given(st.text())
    def test_text_stays_on_one_line_and_keeps_its_type(self, text: str) -> None:
        line = to_flow([text])
        assert len(line.splitlines()) == 1
        assert parse_value(line) == [text]

    @given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**20), 10**20))
    def test_numbers_keep_value_and_type(self, number: float) -> None:
        (back,) = parse_value(to_flow([number]))
        assert (back, type(back)) == (number, type(number))

    def test_text_that_looks_like_a_number_to_somebody_is_quoted(self) -> None:
        for text in ("1e-4", "-.5", "010", "on", "12:30", "null", "~", "2020-01-01"):
            assert to_yaml({"a": text}) == f"a: '{text}'\n"

    def test_values_are_the_leaves(self) -> None:
        assert dict(leaves({"a": {"b": 1}, "c": {}, "d": [1]})) == {
            ("a", "b"): 1,
            ("c",): {},
            ("d",): [1],
        }
