from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from medtrain.config import (
    Checkpoint,
    Criterion,
    Data,
    Ema,
    Entries,
    FrozenDict,
    LossTerm,
    Optim,
    ParamGroup,
    Section,
    StageConfig,
    dump,
    to_yaml,
)
from medtrain.errors import ConfigError
from medtrain.overrides import (
    apply_overrides,
    file_as_assignments,
    file_as_overrides,
    for_stage,
    format_assignment,
    is_whole,
    leaves,
    parse_assignment,
    parse_value,
    read_config_file,
    split_key,
    validate,
)


class Mesh(Section):
    """One kind of model."""

    kind: Literal["mesh"] = "mesh"
    width: int = Field(8, ge=1)
    title: str = "mesh"


class Unet(Section):
    """Another kind."""

    kind: Literal["unet"] = "unet"
    depth: int = 4


class Stage(StageConfig):
    """A stage whose model is of one of two kinds."""

    data: Data = Data()
    model: Mesh | Unet = Field(Mesh(), discriminator="kind")
    labels: Entries[str] = FrozenDict()


STAGE = Stage(
    name="tiny:train",
    epochs=4,
    optim=Optim(
        groups={
            "encoder": ParamGroup(match=("encoder.*",), lr=1e-5),
            "head": ParamGroup(match=("*",), lr=1e-3),
        }
    ),
    losses={"ce": LossTerm(), "ldam": LossTerm(weight=0.5)},
    checkpoint=Checkpoint(
        criteria={"best": Criterion(metric="val_loss", mode="min")}, monitor="best"
    ),
)


def applied(*texts: str, stage: Stage = STAGE) -> Stage:
    return apply_overrides(stage, [parse_assignment(text) for text in texts])


def problems(*texts: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        applied(*texts)
    return list(caught.value.problems)


@pytest.fixture(scope="module")
def parse_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    path = tmp_path_factory.mktemp("files") / "values.yaml"

    def parse(text: str) -> dict[str, Any]:
        path.write_text(text, encoding="utf-8")
        return read_config_file(path)

    return parse


@pytest.fixture(scope="module")
def from_file(parse_file: Callable[[str], dict[str, Any]]) -> Callable[[str], Stage]:
    def build(text: str) -> Stage:
        tree = parse_file(text)
        return apply_overrides(
            STAGE, file_as_overrides(tree, origin="file", replaces=is_whole(tree))
        )

    return build


class TestGrammar:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("null", None),
            ("true", True),
            ("false", False),
            ("0", 0),
            ("-12", -12),
            ("+3", 3),
            ("1e-4", 1e-4),
            ("-.5", -0.5),
            ("1.", 1.0),
            ("2.5E+3", 2500.0),
            ("[1, a]", [1, "a"]),
            ("{a: 1}", {"a": 1}),
            ("[1e-4, 010, on, *.bias, ~]", [1e-4, "010", "on", "*.bias", None]),
            ("[\"1\", 'null']", ["1", "null"]),
        ],
    )
    def test_these_have_a_type(self, text: str, value: Any) -> None:
        assert repr(parse_value(text)) == repr(value)

    @pytest.mark.parametrize(
        "text",
        [
            "on",
            "no",
            "yes",
            "010",
            "12:30",
            "*",
            "*.bias",
            "1_000",
            "0x10",
            "2024-01-01",
            "",
            "~",
            "True",
            "NULL",
            ".inf",
            "nan",
            "-",
            ".",
            "e5",
            "1e",
            "encoder.*",
            "a=b",
            "٣",
            "&a 1",
        ],
    )
    def test_all_else_is_text(self, text: str) -> None:
        assert parse_value(text) == text

    @pytest.mark.parametrize("text", ["[1", "{a: 1", "[!!python/name:os.system x]", "{a: 1, a: 2}"])
    def test_what_begins_like_yaml_must_be_yaml(self, text: str) -> None:
        with pytest.raises(ConfigError, match="begins like a YAML list or mapping, but is none"):
            parse_value(text)

    def test_endless_nesting_is_a_mistake_like_others(self) -> None:
        with pytest.raises(ConfigError, match="nested too deeply"):
            parse_value("[" * 5000 + "]" * 5000)

    @pytest.mark.parametrize(
        ("key", "path"),
        [
            ("a", ("a",)),
            ("a.b.c", ("a", "b", "c")),
            ('a."b.c".d', ("a", "b.c", "d")),
            ('"a.b"', ("a.b",)),
        ],
    )
    def test_keys_split_at_dots_outside_quotes(self, key: str, path: tuple[str, ...]) -> None:
        assert split_key(key) == path

    @pytest.mark.parametrize("key", ["", ".", "a.", ".a", "a..b", '"a', 'a"b"', '""'])
    def test_keys_of_another_form_are_refused(self, key: str) -> None:
        with pytest.raises(ConfigError, match="must be names joined by dots"):
            split_key(key)

    def test_an_assignment_has_an_equals_sign(self) -> None:
        with pytest.raises(ConfigError, match="must have the form key=value"):
            parse_assignment("epochs")

    def test_only_the_first_equals_sign_divides(self) -> None:
        assert parse_assignment("data.root=s3://a/b?c=d").value == "s3://a/b?c=d"

    def test_blanks_around_key_and_value_do_not_count(self) -> None:
        assert applied(" epochs = 7 ").epochs == 7

    def test_bytes_that_are_no_text_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="must be UTF-8"):
            parse_assignment("data.root=\udcff")

    @given(st.text(min_size=1), st.text())
    def test_what_is_formatted_reads_back(self, key: str, value: str) -> None:
        if '"' in key or "=" in key or key != key.strip():
            return
        override = parse_assignment(format_assignment(("model", key), value))
        tree = override.value if override.path == ("model",) else {override.path[1]: override.text}
        assert tree == {key: value}

    def test_a_pipeline_s_assignments_may_concern_one_stage(self) -> None:
        texts = ["epochs=3", "a:seed=1", "b:seed=2"]
        assert for_stage(texts, "a", stages=("a", "b")) == ["epochs=3", "seed=1"]
        assert for_stage(["data.root=s3://x"], "a", stages=("a",)) == ["data.root=s3://x"]

    def test_an_assignment_for_a_stage_that_is_none_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="Did you mean 'baseline'"):
            for_stage(["basline:seed=1"], "baseline", stages=("baseline", "other"))


class TestSetting:
    def test_a_leaf_is_set_and_all_else_stays(self) -> None:
        changed = applied("optim.groups.encoder.lr=1e-4")
        assert changed.optim.groups["encoder"].lr == 1e-4
        assert changed.optim.groups["head"] == STAGE.optim.groups["head"]

    def test_the_last_of_two_counts(self) -> None:
        assert applied("epochs=5", "epochs=6").epochs == 6

    def test_null_freezes_a_group(self) -> None:
        assert applied("optim.groups.encoder.lr=null").optim.groups["encoder"].lr is None

    def test_text_fields_take_what_looks_like_something_else(self) -> None:
        for text in ("1.10", "1e5", "007", "true", "on"):
            assert applied(f"model.title={text}").model == Mesh(title=text)
        assert applied("job.cpu=2").job.cpu == "2"

    def test_number_fields_take_decimal_text(self) -> None:
        assert applied("epochs=010").epochs == 10

    def test_a_mapping_sets_the_keys_it_names(self) -> None:
        changed = applied("batch={global: 16}", "optim={groups: {head: {match: [x], lr: 1}}}")
        assert (changed.batch.global_, changed.batch.micro) == (16, STAGE.batch.micro)
        assert changed.optim.kind == STAGE.optim.kind

    def test_an_absent_section_is_made_with_its_defaults(self) -> None:
        criteria = "checkpoint.criteria.ema={metric: val_ema_loss, mode: min}"
        assert applied("ema.decay=0.9", criteria).ema == Ema(decay=0.9)
        assert applied("ema={}").ema == Ema()

    def test_null_removes_a_section_that_may_be_absent(self) -> None:
        with_stop = applied("early_stop.patience=3")
        assert applied("early_stop=null", stage=with_stop).early_stop is None

    def test_the_name_is_the_recipe_s(self) -> None:
        assert applied("name=tiny:train") == STAGE
        (problem,) = problems("name=tiny:other")
        assert problem.startswith("name must be 'tiny:train'")


class TestDicts:
    def test_null_removes_an_entry(self) -> None:
        assert list(applied("losses.ldam=null").losses) == ["ce"]

    def test_removing_what_is_not_there_is_a_mistake(self) -> None:
        assert problems("losses.kl=null") == [
            "losses.kl cannot be removed: there is none. Known: ce, ldam."
        ]

    def test_a_new_group_goes_before_the_others(self) -> None:
        changed = applied("optim.groups.norm.match=[*.norm.*]", "optim.groups.norm.lr=1")
        assert list(changed.optim.groups) == ["norm", "encoder", "head"]
        assert changed.optim.groups["norm"] == ParamGroup(match=("*.norm.*",), lr=1.0)

    def test_two_new_groups_keep_their_order(self) -> None:
        one = "optim.groups.{}={{match: [x], lr: 1}}".format
        assert list(applied(one("b"), one("a")).optim.groups)[:2] == ["b", "a"]

    def test_a_later_origin_goes_before_an_earlier_one(self) -> None:
        texts = [f"optim.groups.{name}={{match: [x], lr: 1}}" for name in ("a", "b")]
        changed = apply_overrides(
            STAGE,
            [
                parse_assignment(texts[0], origin="overlay x"),
                parse_assignment(texts[1], origin="override"),
            ],
        )
        assert list(changed.optim.groups)[:2] == ["b", "a"]

    def test_a_mapping_given_for_a_dict_is_all_of_it(self) -> None:
        assert list(applied("losses={kl: {weight: 2}}").losses) == ["kl"]

    def test_entries_of_plain_values_are_set_and_removed(self) -> None:
        with_labels = applied("labels.a=x", "labels.b=1")
        assert with_labels.labels == {"a": "x", "b": "1"}
        assert applied("labels.a=null", stage=with_labels).labels == {"b": "1"}

    def test_a_new_entry_that_lacks_something_may_be_a_misspelt_one(self) -> None:
        assert problems("optim.groups.encodr.lr=1e-4") == [
            "optim.groups.encodr.match must be given. optim.groups.encodr is new here; "
            "did you mean 'optim.groups.encoder'?"
        ]

    def test_names_of_entries_have_a_form(self) -> None:
        assert problems("losses.Focal.weight=1") == [
            "losses.Focal: the name must consist of a to z, 0 to 9 and _."
        ]


class TestKinds:
    def test_another_kind_begins_with_its_own_defaults(self) -> None:
        wide = applied("model.width=32")
        assert applied("model.kind=unet", "model.depth=2", stage=wide).model == Unet(depth=2)

    def test_the_same_kind_changes_nothing(self) -> None:
        assert applied("model.width=32", "model.kind=mesh").model == Mesh(width=32)

    def test_a_kind_inside_a_mapping_is_set_first(self) -> None:
        assert applied("model={depth: 2, kind: unet}").model == Unet(depth=2)

    def test_a_literal_called_kind_chooses_no_section(self) -> None:
        changed = applied("optim.kind=sgd")
        assert changed.optim.kind == "sgd"
        assert changed.optim.groups == STAGE.optim.groups

    def test_an_absent_section_is_made_by_its_kind(self) -> None:
        changed = applied(
            "optim.groups.head.schedule.kind=cosine", "optim.groups.head.schedule.floor=.1"
        )
        assert dump(changed)["optim"]["groups"]["head"]["schedule"] == {
            "kind": "cosine",
            "warmup": "0epochs",
            "warmup_from": 0.0,
            "floor": 0.1,
        }

    def test_an_unknown_kind_names_the_nearest(self) -> None:
        assert problems("optim.schedule.kind=cosin") == [
            "optim.schedule.kind must be one of constant, cosine, cosine_restarts, plateau, "
            "but is 'cosin'. Did you mean 'cosine'?"
        ]

    def test_a_misspelt_key_of_a_kind_names_the_nearest(self) -> None:
        assert problems("optim.schedule={kind: cosine, flor: 0.1}") == [
            "optim.schedule.flor is not a key. Did you mean 'optim.schedule.floor'?"
        ]

    def test_a_key_of_another_kind_says_which(self) -> None:
        assert problems("model.depth=3") == [
            "model.depth belongs to kind unet, but the kind is 'mesh'. Set model.kind first."
        ]

    def test_a_section_without_kind_needs_it_first(self) -> None:
        assert problems("optim.groups.head.schedule={warmup: 1epochs}") == [
            "optim.groups.head.schedule.warmup belongs to kind constant or cosine or "
            "cosine_restarts or plateau, but the kind is null. "
            "Set optim.groups.head.schedule.kind first."
        ]


class TestMistakes:
    def test_all_are_said_at_once(self) -> None:
        found = problems("epochs=abc", "optim.groups.head.lrr=1", "seed=-1", "losses.kl=null")
        assert len(found) == 4

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("epochss=3", "epochss is not a key. Did you mean 'epochs'?"),
            ("width=3", "width is not a key. Did you mean model.width?"),
            (
                "optim.lr=1",
                "optim.lr is not a key. Did you mean optim.groups.encoder.lr, "
                "optim.groups.head.lr?",
            ),
            (
                "epochs.x=3",
                "epochs.x is not a key: 'epochs' is a single value. Set epochs itself.",
            ),
            ("epochs=1.5", "epochs must be an integer, but is 1.5."),
            ("epochs=true", "epochs must be an integer, but is 'true'."),
            ("epochs=0", "epochs must be greater than or equal to 1, but is 0."),
            ("epochs=null", "epochs must be an integer, but is null."),
            ("ema.decay=nan", "ema.decay must be a finite number, but is 'nan'."),
            ("data.root=[a]", "data.root must be text, but is [a]."),
            ("sync_batchnorm=maybe", "sync_batchnorm must be true or false, but is 'maybe'."),
            ("optim.betas=0.9", "optim.betas must be a list such as [a, b], but is 0.9."),
            ("optim.betas=[0.9, 2]", "optim.betas.1 must be less than 1, but is 2."),
            (
                "precision=fp1",
                "precision must be one of fp32, fp16, bf16, but is 'fp1'. Did you mean 'fp16'?",
            ),
            (
                "ema=0.9",
                "ema must hold keys and values, but is 0.9. Its keys are decay, warmup.",
            ),
            (
                "batch.micro=3",
                "batch.global=8 must be a whole multiple of batch.micro=3 x 1 processes = 3. "
                "Set batch.micro to one of [1, 2, 4, 8], or another batch.global.",
            ),
            (
                "losses.ce.ends_epoch=1",
                "losses.ce: ends_epoch must be after starts_epoch=1, but is 1.",
            ),
        ],
    )
    def test_each_says_what_is_allowed_and_what_was_given(self, text: str, problem: str) -> None:
        assert problems(text) == [problem]

    def test_long_values_are_shortened(self) -> None:
        (problem,) = problems(f"epochs={'x' * 5000}")
        assert len(problem) < 200

    def test_a_refused_assignment_leaves_nothing_behind(self) -> None:
        assert problems("ema.dekay=0.9", "optim.groups.new.lrr=1") == [
            "ema.dekay is not a key. Did you mean 'ema.decay'?",
            "optim.groups.new.lrr is not a key. Did you mean 'optim.groups.new.lr'?",
        ]

    def test_a_tree_is_explained_in_the_same_words(self) -> None:
        tree = {**dump(STAGE), "epochss": 3, "model": {"kind": "mash"}, "losses": {"A": {}}}
        with pytest.raises(ConfigError) as caught:
            validate(Stage, tree)
        assert set(caught.value.problems) == {
            "epochss is not a key. Did you mean 'epochs'?",
            "model.kind must be one of mesh, unet, but is 'mash'. Did you mean 'mesh'?",
            "losses.A: the name must consist of a to z, 0 to 9 and _.",
        }


class TestFiles:
    def test_a_few_values_are_assignments(self, from_file: Callable[[str], Stage]) -> None:
        changed = from_file("epochs: 9\noptim:\n  groups:\n    head: {lr: 1e-4}\n")
        assert changed == applied("epochs=9", "optim.groups.head.lr=1e-4")

    def test_values_mean_what_they_mean_in_assignments(
        self, from_file: Callable[[str], Stage]
    ) -> None:
        changed = from_file(
            "model: {title: on}\nearly_stop:\noptim: {groups: {head: {match: [*.fc]}}}"
        )
        assert changed.model == Mesh(title="on")
        assert changed.optim.groups["head"].match == ("*.fc",)

    def test_new_groups_go_first_in_the_file_s_order(
        self, from_file: Callable[[str], Stage]
    ) -> None:
        new = "{match: [x], lr: 1}"
        changed = from_file(f"optim: {{groups: {{b: {new}, a: {new}}}}}")
        assert list(changed.optim.groups) == ["b", "a", "encoder", "head"]

    def test_an_empty_dict_of_a_few_values_is_a_mistake(
        self, from_file: Callable[[str], Stage]
    ) -> None:
        with pytest.raises(ConfigError, match=r"losses.ce=null"):
            from_file("losses: {}")

    def test_a_whole_stage_comes_back_equal_with_its_order(
        self, from_file: Callable[[str], Stage]
    ) -> None:
        changed = applied(
            "optim.groups.norm={match: [*.norm.*], lr: 1}",
            "optim.groups.encoder=null",
            "losses.ldam=null",
            "model.kind=unet",
            "ema={decay: 0.5}",
            "labels={x: '1'}",
        )
        back = from_file(to_yaml(dump(changed)))
        assert back == changed
        assert list(back.optim.groups) == ["norm", "head"]

    def test_a_whole_stage_comes_back_from_its_assignments(self, tmp_path: Path) -> None:
        changed = applied(
            "losses={kl: {weight: 2}}",
            "model={title: '[x'}",
            "model.width=3",
            "optim.groups.norm={match: [*.norm.*], lr: 1}",
            "optim.groups.head.schedule={kind: cosine, floor: 0.5}",
            "labels={x: '1', y: 'true'}",
        )
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(dump(changed)))
        texts = file_as_assignments(path, stage_type=Stage)
        back = applied(*texts, stage=applied("labels.z=1"))
        assert back == changed
        assert list(back.optim.groups) == list(changed.optim.groups)
        assert "batch.micro=4" in texts

    def test_a_few_values_come_back_from_their_assignments(
        self, tmp_path: Path, from_file: Callable[[str], Stage]
    ) -> None:
        path = tmp_path / "values.yaml"
        path.write_text("model: {title: '[x'}\nlosses: {kl: {weight: 2}}\nepochs: 7\n")
        assert applied(*file_as_assignments(path)) == from_file(path.read_text())

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("- a\n- b\n", "must hold keys and values"),
            ("a: [1\n", "must be YAML"),
            ("epochs: 3\nepochs: 4\n", "line 2: key 'epochs' occurs twice"),
            ("? [a]\n: 1\n", "a key must be a name"),
            ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
            ("--- {a: 1}\n--- {b: 1}\n", "but found another document"),
            ("", "must hold keys and values"),
        ],
    )
    def test_other_files_are_refused_in_words(
        self, text: str, problem: str, parse_file: Callable[[str], dict[str, Any]]
    ) -> None:
        with pytest.raises(ConfigError, match=r"--config .*values\.yaml") as caught:
            parse_file(text)
        assert problem in str(caught.value)

    def test_files_that_cannot_be_read_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            read_config_file(tmp_path / "absent.yaml")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="cannot be read"):
            read_config_file(tmp_path / "binary")


class TestOrigins:
    def origins(self, *texts: str) -> dict[str, str]:
        found: dict[tuple[str, ...], str] = {}
        apply_overrides(STAGE, [parse_assignment(text) for text in texts], origins=found)
        return {".".join(path): origin for path, origin in found.items()}

    def test_each_value_that_was_set_has_one(self) -> None:
        assert self.origins("batch={global: 16, micro: 2}", "epochs=3") == {
            "batch.global": "override",
            "batch.micro": "override",
            "epochs": "override",
        }

    def test_what_another_kind_drops_has_none(self) -> None:
        assert self.origins("model.width=3", "model.kind=unet") == {"model.kind": "override"}

    def test_what_is_removed_has_none(self) -> None:
        assert self.origins("losses.ldam.weight=3", "losses.ldam=null") == {}


LEAVES = [path for path, _ in leaves(dump(STAGE))]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(LEAVES) | st.lists(st.text(max_size=6), min_size=1).map(tuple),
            VALUES,
        ),
        max_size=4,
    )
)
def test_any_assignments_give_a_stage_or_a_config_error(
    assignments: list[tuple[tuple[str, ...], Any]],
) -> None:
    texts = [format_assignment(path, value) for path, value in assignments]
    try:
        changed = applied(*texts)
    except ConfigError as error:
        assert all(error.problems)
    else:
        assert Stage.model_validate(dump(changed)) == changed


@given(st.text(), st.text())
def test_any_text_gives_a_stage_or_a_config_error(key: str, value: str) -> None:
    for text in (f"{key}={value}", f"epochs={value}", f"optim.{key}={value}", key, f"model=[{key}"):
        try:
            applied(text)
        except ConfigError as error:
            assert str(error)


@given(text=st.text())
def test_any_file_gives_a_tree_or_a_config_error(
    text: str, from_file: Callable[[str], Stage], parse_file: Callable[[str], dict[str, Any]]
) -> None:
    try:
        tree = parse_file(text)
        from_file(to_yaml(tree))
    except ConfigError as error:
        assert str(error)


@given(path=st.sampled_from(LEAVES), value=VALUES)
def test_a_value_means_the_same_in_text_and_in_a_file(
    path: tuple[str, ...], value: Any, from_file: Callable[[str], Stage]
) -> None:
    tree: Any = value
    for part in reversed(path):
        tree = {part: tree}
    answers: list[Stage | None] = []
    for way in (
        lambda: applied(format_assignment(path, value)),
        lambda: from_file(yaml.safe_dump(tree, sort_keys=False)),
    ):
        try:
            answers.append(way())
        except ConfigError:
            answers.append(None)
    assert answers[0] == answers[1]
