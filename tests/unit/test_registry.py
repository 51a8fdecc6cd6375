import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import medtrain.recipes
from medtrain.config import StageConfig
from medtrain.data.cases import Row, rows_to_csv
from medtrain.data.splits import SplitRow, record_look, splits_to_csv
from medtrain.errors import RegistryError, StorageError
from medtrain.recipes.recipe import Gate, Recipe
from medtrain.registry import (
    Registration,
    find_version,
    list_models,
    model_name,
    note,
    promote,
    pull,
    register,
    verify_package,
    write_package,
)
from medtrain.registry.gate import Contender, GateVerdict, decide, groups_of
from medtrain.settings import settings
from medtrain.storage.runs import Outcome, RunDirectory
from medtrain.storage.stores import open_store
from medtrain.storage.tracking import (
    artifact_root,
    ensure_experiment,
    ensure_run,
    open_client,
)

# MLflow builds its tables in a way that SQLAlchemy 2.1 wants to give up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def summarize(rows: Sequence[Row]) -> dict[str, float]:
    return {"error": float(np.mean([row["error"] for row in rows]))} if rows else {}


@pytest.fixture(autouse=True)
def tiny_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system `tiny` whose metric is the mean of `error`."""
    recipe = Recipe(
        system="tiny",
        title="Tiny",
        stage_type=StageConfig,
        variants={"default": {}, "smoke": {}, "ungated": {}},
        gates={
            "default": Gate(metric="test_error", at_most=2.0, min_cases=4),
            "smoke": Gate(metric="test_error", at_most=20.0, min_cases=2),
        },
        package="tiny_recipe",
    )
    metrics = ModuleType("tiny_recipe.metrics")
    metrics.summarize = summarize  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiny_recipe", ModuleType("tiny_recipe"))
    monkeypatch.setitem(sys.modules, "tiny_recipe.metrics", metrics)
    monkeypatch.setattr(medtrain.recipes, "recipes", lambda: {"tiny": recipe})


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one takes seconds, copying it nothing."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    open_client(f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def site(migrated_store: Path) -> Path:
    """The home of a site with an empty registry."""
    home = settings().home
    home.mkdir(exist_ok=True)
    shutil.copy(migrated_store, home / "mlflow.db")
    return home


def split_row(case_id: str, role: str, *, group: str = "", checksum: str = "v1") -> SplitRow:
    return SplitRow(case_id, group or f"group of {case_id}", role, f"{checksum} of {case_id}", 1)


TRAINED = [split_row("t1", "train"), split_row("t2", "train"), split_row("v1", "val")]
TEST = [split_row(f"s{n}", "test") for n in range(6)]

Evaluate = Callable[..., str]


@pytest.fixture
def evaluate(site: Path, tmp_path: Path) -> Evaluate:
    """Write the run directory of a finished evaluation; its URI."""

    def write(
        key: str,
        *,
        run: str | None = None,
        weights: float | None = None,
        errors: Mapping[str, float] | float = 1.0,
        variant: str = "default",
        trained: Sequence[SplitRow] = TRAINED,
        tested: Sequence[SplitRow] = TEST,
        membership: Sequence[SplitRow] | None = None,
        is_synthetic: bool = False,
        metric: str = "test_error",
    ) -> str:
        home = open_store(str(tmp_path / "storage/datasets/tiny/films"))
        home.write(
            "splits/holdout_5fold/1.csv",
            splits_to_csv(membership or [*trained, *tested]).encode(),
        )
        record_look(home, tested, key)
        if not isinstance(errors, Mapping):
            errors = {row.case_id: errors for row in tested}
        rows: list[Row] = [{"case_id": name, "error": error} for name, error in errors.items()]
        metrics = {metric: summarize(rows)["error"]}
        trained_run = run or key
        directory = tmp_path / f"storage/runs/tiny/{variant}/evaluate/{key}"
        run_directory = RunDirectory.open(str(directory))
        attempt = run_directory.claim_attempt({})
        config = f"name: tiny/{variant}:only\ndata: {{protocol: holdout_5fold}}\n"
        run_directory.write_text("config.yaml", config)
        run_directory.write_text("split.csv", splits_to_csv(tested))
        run_directory.write_json("facts.json", {"data_home": home.uri})
        run_directory.write_text(f"cases/{attempt}/test.csv", rows_to_csv(rows))
        weights_path = tmp_path / f"{key}.safetensors"
        save_file({"w": np.full(3, weights or len(trained_run), np.float32)}, weights_path)
        package = write_package(
            tmp_path / f"package of {key}",
            weights=weights_path,
            config_yaml=config,
            split_csv=splits_to_csv([*trained, *tested]),
            metrics=metrics,
            card="",
            details={
                "system": "tiny",
                "variant": variant,
                "stage": "only",
                "run_key": f"trained-{trained_run}",
                "data_fingerprint": "d1",
                "code_fingerprint": "c1",
                "commit": "abc",
                "is_synthetic": is_synthetic,
                "pretrained": {},
            },
        )
        names = sorted(path.name for path in package.folder.iterdir())
        for name in names:
            run_directory.store.upload(package.folder / name, f"package/{name}")
        run_directory.write_outcome(
            Outcome(
                "done",
                metrics=metrics,
                artifacts={f"package/{name}": f"package/{name}" for name in names},
                sha256={
                    f"package/{name}": hashlib.sha256(
                        (package.folder / name).read_bytes()
                    ).hexdigest()
                    for name in names
                },
            )
        )
        return run_directory.uri

    return write


@pytest.fixture
def champion(evaluate: Evaluate) -> str:
    """A registered and promoted model with an error of 1.5 on every case."""
    registration = register(evaluate("old", errors=1.5))
    return promote(reference(registration)).reference


def reference(registration: Registration) -> str:
    assert registration.version is not None, registration.verdict.reason
    return registration.version.reference


# --- registering ----------------------------------------------------------------------------------


def test_accepted_model_becomes_a_version_with_its_lineage_and_the_alias_candidate(evaluate):
    uri = evaluate("a", errors=1.25)
    registration = register(uri)
    assert registration.is_new
    assert registration.verdict.accepted
    assert registration.verdict.value == 1.25
    assert "no other champion" in registration.verdict.reason
    version = find_version("tiny@candidate")
    assert version == registration.version
    assert (version.name, version.version) == ("tiny", 1)
    assert version.metrics == {"test_error": 1.25}
    assert version.verdict == registration.verdict
    expected = {
        "run_key": "trained-a",
        "evaluation_uri": uri,
        "data_fingerprint": "d1",
        "code_fingerprint": "c1",
        "commit": "abc",
        "synthetic": "false",
        "looks": "1",
        "gate_accepted": "true",
    }
    assert {name: version.tags[name] for name in expected} == expected
    config = b"name: tiny/default:only\ndata: {protocol: holdout_5fold}\n"
    assert version.tags["config_digest"] == hashlib.sha256(config).hexdigest()


def test_refused_model_leaves_no_version_but_the_reason_on_its_mlflow_run(evaluate):
    uri = evaluate("a", errors=2.5)
    registration = register(uri)
    assert registration.version is None
    assert not registration.verdict.accepted
    assert "not test_error <= 2" in registration.verdict.reason
    assert list_models() == []
    assert run_tags(uri)["gate_accepted"] == "false"
    assert run_tags(uri)["gate_reason"] == registration.verdict.reason


def test_verdict_is_written_on_the_mlflow_run_that_tracked_the_evaluation(evaluate):
    uri = evaluate("a")
    client = open_client(settings().tracking)
    root = artifact_root(settings().tracking, home=settings().home)
    experiment = ensure_experiment(client, "medtrain/tiny", artifact_root=root)
    tracked = ensure_run(client, experiment, run_uri=uri, name="evaluate")
    assert find_version(reference(register(uri))).run_id == tracked
    assert client.get_run(tracked).data.tags["gate_accepted"] == "true"


def run_tags(uri: str) -> dict[str, str]:
    client = open_client(settings().tracking)
    root = artifact_root(settings().tracking, home=settings().home)
    experiment = ensure_experiment(client, "medtrain/tiny", artifact_root=root)
    run_id = ensure_run(client, experiment, run_uri=uri, name="evaluate")
    return dict(client.get_run(run_id).data.tags)


def test_registering_the_same_run_again_finds_the_first_version(evaluate):
    uri = evaluate("a")
    first = register(uri)
    # As champion it would not be better than itself.
    promote("tiny:1")
    second = register(uri)
    assert not second.is_new
    assert reference(second) == reference(first)
    assert second.verdict == first.verdict
    assert len(list_models()) == 1


GROWN = [*TEST, *(split_row(f"n{n}", "test") for n in range(6))]


def test_same_run_evaluated_anew_is_judged_anew_and_stays_one_version(evaluate):
    first = register(evaluate("a", errors=1.25))
    assert first.version is not None
    uri = evaluate("anew", run="a", errors=1.75, tested=GROWN)
    second = register(uri)
    assert (second.is_new, second.verdict.value, second.verdict.num_cases) == (False, 1.75, 12)
    assert run_tags(uri)["gate_accepted"] == "true"
    (version,) = list_models()
    assert version == second.version
    assert (version.metrics, version.verdict) == ({"test_error": 1.75}, second.verdict)
    assert version.tags["evaluation_uri"] == uri
    assert (version.source, version.run_id) == (first.version.source, first.version.run_id)
    assert version.tags["package_digest"] == first.version.tags["package_digest"]
    assert register(uri).verdict == second.verdict


def test_same_run_refused_on_a_new_test_leaves_its_version_as_it_is(evaluate):
    first = register(evaluate("a"))
    uri = evaluate("anew", run="a", errors=2.5, tested=GROWN)
    second = register(uri)
    assert second.version is None
    assert not second.verdict.accepted
    assert run_tags(uri)["gate_accepted"] == "false"
    assert list_models() == [first.version]


def test_champion_evaluated_anew_need_not_beat_itself(champion, evaluate):
    registration = register(evaluate("anew", run="old", errors=1.75, tested=GROWN))
    assert reference(registration) == champion
    assert find_version(champion).metrics == {"test_error": 1.75}


def test_judging_anew_that_was_interrupted_is_done_again(evaluate, monkeypatch):
    from mlflow import MlflowClient

    register(evaluate("a"))
    uri = evaluate("anew", run="a", errors=1.75, tested=GROWN)
    set_tag = MlflowClient.set_model_version_tag

    def interrupt(self: MlflowClient, name: str, version: str, tag: str, value: str) -> None:
        if tag == "gate":
            raise KeyboardInterrupt
        set_tag(self, name, version, tag, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "set_model_version_tag", interrupt)
        register(uri)
    verdict = register(uri).verdict
    assert find_version("tiny:1").verdict == verdict
    assert verdict.value == 1.75


def test_run_that_was_trained_once_more_does_not_lend_its_numbers_to_other_weights(evaluate):
    first = register(evaluate("a"))
    uri = evaluate("anew", run="a", weights=9.0, tested=GROWN)
    with pytest.raises(RegistryError, match="of others of the same run"):
        register(uri)
    assert list_models() == [first.version]


def test_interrupted_registration_is_completed_by_the_next_one(evaluate):
    uri = evaluate("a")
    register(uri)
    open_client(settings().tracking).delete_registered_model_alias("tiny", "candidate")
    register(uri)
    assert find_version("tiny@candidate").version == 1


def test_of_two_who_register_the_same_run_at_once_the_first_counts(evaluate, monkeypatch):
    from mlflow import MlflowClient

    uri = evaluate("a")
    create = MlflowClient.create_model_version

    def create_twice(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        create(self, *args, **kwargs)
        return create(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", create_twice)
    registration = register(uri)
    assert [version.version for version in list_models()] == [1]
    assert registration.version is not None
    assert registration.version.version == 1
    assert not registration.is_new


def test_candidate_never_moves_back_to_an_older_version(evaluate):
    older, newer = evaluate("older"), evaluate("newer")
    register(older)
    register(newer)
    register(older)
    assert find_version("tiny@candidate").version == 2


def test_variants_other_than_default_are_models_of_their_own(evaluate):
    assert model_name("tiny", "default") == "tiny"
    registration = register(evaluate("a", variant="smoke", errors=9.0, is_synthetic=True))
    assert registration.name == "tiny-smoke"
    version = find_version("tiny-smoke@candidate")
    assert version.is_synthetic


def test_variant_without_a_gate_is_an_error(evaluate):
    with pytest.raises(RegistryError, match="must have a gate"):
        register(evaluate("a", variant="ungated"))


def test_metric_that_the_evaluation_lacks_is_refused(evaluate):
    verdict = register(evaluate("a", metric="test_other")).verdict
    assert not verdict.accepted
    assert verdict.value is None
    assert "undefined" in verdict.reason


def test_tampered_package_is_never_registered(evaluate):
    uri = evaluate("a")
    path = Path(uri) / "package/config.yaml"
    path.write_text(path.read_text() + "# changed\n")
    with pytest.raises(StorageError):
        register(uri)
    assert list_models() == []


def test_package_that_came_back_damaged_is_not_registered(evaluate, monkeypatch):
    from mlflow import MlflowClient

    log_artifacts = MlflowClient.log_artifacts

    def log_and_damage(self: MlflowClient, run_id: str, local_dir: str, path: str) -> None:
        log_artifacts(self, run_id, local_dir, path)
        (stored,) = (settings().home / "mlartifacts").rglob("model.safetensors")
        stored.write_bytes(stored.read_bytes()[:-1])

    monkeypatch.setattr(MlflowClient, "log_artifacts", log_and_damage)
    uri = evaluate("a")
    with pytest.raises(StorageError, match="damaged"):
        register(uri)
    assert list_models() == []


def test_evaluation_that_is_not_done_is_an_error(evaluate, tmp_path):
    with pytest.raises(RegistryError, match="not finished"):
        register(str(tmp_path / "storage/runs/tiny/default/evaluate/none"))


def test_package_must_say_what_the_model_was_fitted_on(evaluate):
    uri = evaluate("a", trained=[])
    with pytest.raises(RegistryError, match="must name the cases that the model was fitted on"):
        register(uri)


def test_results_of_cases_that_are_in_no_split_are_an_error(evaluate):
    uri = evaluate("a", errors={"s0": 1.0, "stranger": 1.0})
    with pytest.raises(RegistryError, match=r"1 of its 2 cases"):
        register(uri)


# --- the champion ---------------------------------------------------------------------------------


def test_challenger_that_beats_the_champion_is_registered_with_the_evidence(champion, evaluate):
    verdict = register(evaluate("new", errors=1.0)).verdict
    assert verdict.accepted
    assert verdict.champion_version == 1
    assert (verdict.common_value, verdict.champion_value, verdict.num_cases) == (1.0, 1.5, 6)
    assert verdict.difference is not None
    assert verdict.difference.value == verdict.difference.high == -0.5
    assert GateVerdict.from_json(verdict.to_json()) == verdict


@pytest.mark.parametrize("error", [1.5, 1.6])
def test_challenger_within_the_bound_that_is_not_better_is_refused(champion, evaluate, error):
    registration = register(evaluate("new", errors=error))
    assert registration.version is None
    assert "not better" in registration.verdict.reason
    assert find_version("tiny@candidate").version == 1


def test_cases_that_the_champion_was_fitted_on_do_not_count(evaluate):
    """The champion shines on s0 because it has learnt it: counted, it would win."""
    others = {row.case_id: 1.5 for row in TEST[1:]}
    champion_errors = {**others, "s0": -9.0}
    learnt = [*TRAINED, split_row("s0", "train")]
    promote(reference(register(evaluate("old", errors=champion_errors, trained=learnt))))
    errors = {**dict.fromkeys(others, 1.2), "s0": 2.0}
    assert summarize(rows_of(errors))["error"] > summarize(rows_of(champion_errors))["error"]
    verdict = register(evaluate("new", errors=errors)).verdict
    assert verdict.accepted
    assert (verdict.num_cases, verdict.champion_value) == (5, 1.5)


def test_cases_that_the_challenger_was_fitted_on_do_not_count(champion, evaluate):
    """The challenger shines on s0 because it has learnt it: counted, it would win."""
    errors = {**{row.case_id: 1.6 for row in TEST}, "s0": -9.0}
    learnt = [*TRAINED, split_row("s0", "val")]
    verdict = register(evaluate("new", errors=errors, trained=learnt)).verdict
    assert not verdict.accepted
    assert verdict.num_cases == 5
    assert verdict.common_value == pytest.approx(1.6)


def rows_of(errors: Mapping[str, float]) -> list[Row]:
    return [{"case_id": name, "error": error} for name, error in errors.items()]


def test_groups_are_those_known_today(evaluate):
    """Case s0 proves to be a twin of the champion's training case t1 after both were judged."""
    errors = {row.case_id: 1.5 for row in TEST}
    promote(reference(register(evaluate("old", errors={**errors, "s0": 0.1}))))
    challenger_errors = {**dict.fromkeys(errors, 1.3), "s0": 1.9}
    today = [
        *TRAINED[1:],
        *TEST[1:],
        split_row("t1", "withheld", group="twins"),
        split_row("s0", "test", group="twins"),
    ]
    others = [row for row in TRAINED if row.case_id != "t1"]
    uri = evaluate("new", errors=challenger_errors, trained=others, membership=today)
    verdict = register(uri).verdict
    assert verdict.accepted
    assert verdict.num_cases == 5
    assert verdict.champion_value == pytest.approx(1.5)


def test_too_few_common_sealed_cases_are_refused_with_the_counts(champion, evaluate):
    learnt = [*TRAINED, *(split_row(f"s{n}", "train") for n in range(3))]
    registration = register(evaluate("new", errors=1.0, trained=learnt, tested=TEST[3:]))
    assert registration.version is None
    assert registration.verdict.num_cases == 3
    reason = registration.verdict.reason
    assert "3 cases are sealed" in reason
    assert "4 are needed" in reason
    assert "Of 3 test cases here and 6 there, 3 are in both" in reason


def test_cases_that_changed_since_are_not_compared(champion, evaluate):
    changed = [split_row(row.case_id, "test", checksum="v2") for row in TEST[:3]]
    verdict = register(evaluate("new", errors=1.0, tested=[*changed, *TEST[3:]])).verdict
    assert not verdict.accepted
    assert "3 of these changed since" in verdict.reason


def test_model_of_synthetic_data_cannot_challenge_one_of_real_data(champion, evaluate):
    verdict = register(evaluate("demo", errors=0.1, is_synthetic=True)).verdict
    assert not verdict.accepted
    assert "SYNTHETIC" in verdict.reason


def test_model_of_real_data_need_not_beat_one_of_synthetic_data(evaluate):
    promote(reference(register(evaluate("demo", errors=0.1, is_synthetic=True))))
    verdict = register(evaluate("new", errors=1.9)).verdict
    assert verdict.accepted
    assert verdict.champion_value is None


def test_champion_without_a_stored_evaluation_is_an_error_that_names_it(champion, evaluate):
    shutil.rmtree(find_version(champion).tags["evaluation_uri"])
    with pytest.raises(RegistryError, match="champion tiny:1 must have a stored evaluation"):
        register(evaluate("new"))


# --- the gate alone -------------------------------------------------------------------------------


def contender(errors: Mapping[str, float], **changes: Any) -> Contender:
    return Contender(
        **{
            "metrics": {"test_error": summarize(rows_of(errors))["error"]},
            "results": {row["case_id"]: row for row in rows_of(errors)},
            "tested": [split_row(case_id, "test") for case_id in errors],
            "fitted": TRAINED,
            **changes,
        }
    )


def test_gate_leaves_out_test_cases_of_a_group_that_the_model_itself_was_fitted_on():
    gate = Gate(metric="test_error", at_most=1.0)
    model = contender({"s0": 0.0, "s1": 1.6})
    twins = [split_row("t1", "train", group="twins"), split_row("s0", "test", group="twins")]
    assert decide(gate, challenger=model, champion=None, summarize=summarize).accepted
    verdict = decide(gate, challenger=model, champion=None, summarize=summarize, today=twins)
    assert not verdict.accepted
    assert (verdict.value, verdict.num_cases) == (1.6, 1)
    assert "left out: 1" in verdict.reason


def test_gate_whose_metric_shall_be_large_turns_the_comparison():
    gate = Gate(metric="test_error", at_least=1.0, min_cases=2)
    strong, weak = contender({"s0": 3.0, "s1": 3.0}), contender({"s0": 2.0, "s1": 2.0})

    def beats(challenger: Contender, champion: Contender) -> bool:
        return decide(
            gate, challenger=challenger, champion=replace(champion, version=1), summarize=summarize
        ).accepted

    assert beats(strong, weak)
    assert not beats(weak, strong)


def test_value_that_is_not_a_number_is_refused():
    gate = Gate(metric="test_error", at_most=1.0)
    model = contender({"s0": 0.0}, metrics={"test_error": float("nan")})
    assert not decide(gate, challenger=model, champion=None, summarize=summarize).accepted


def test_groups_join_over_tables_and_equal_names_of_two_tables_mean_nothing():
    first = [split_row("a", "train", group="1"), split_row("b", "train", group="1")]
    second = [split_row("b", "test", group="2"), split_row("c", "test", group="2")]
    third = [split_row("d", "test", group="1")]
    groups = groups_of([first, second, third])
    assert groups["a"] == groups["b"] == groups["c"] != groups["d"]


# --- promoting, noting, finding -------------------------------------------------------------------


def test_promoting_is_kept_apart_from_registering_and_remembers_the_former_champion(
    champion, evaluate
):
    newer = reference(register(evaluate("new", errors=1.0)))
    assert find_version("tiny@champion").reference == champion
    version = promote("tiny@candidate")
    assert version.reference == newer == find_version("tiny@champion").reference
    assert version.tags["former_champion"] == "1"
    assert find_version(champion).aliases == ()


def test_promoting_the_champion_again_changes_nothing(champion):
    before = find_version(champion)
    assert promote("tiny@champion") == before


def test_version_that_no_gate_accepted_cannot_be_champion(evaluate):
    register(evaluate("a"))
    client = open_client(settings().tracking)
    client.set_model_version_tag("tiny", "1", "gate_accepted", "false")
    with pytest.raises(RegistryError, match="must be accepted by the gate"):
        promote("tiny:1")
    by_hand = client.create_model_version("tiny", source="file:///nowhere")
    with pytest.raises(RegistryError, match="never judged"):
        promote(f"tiny:{by_hand.version}")


def test_version_whose_package_was_exchanged_cannot_be_champion(evaluate):
    register(evaluate("a"))
    tamper("config.yaml")
    with pytest.raises(RegistryError, match="changed or damaged"):
        promote("tiny:1")
    with pytest.raises(RegistryError, match="does not exist"):
        find_version("tiny@champion")


def test_notes_keep_who_said_what_and_when(evaluate):
    register(evaluate("a"))
    note("tiny:1", "8/10 on twenty films", author="Dr. Abe")
    version = note("tiny@candidate", "nasion drifts — look again", author="Dr. Ito")
    assert [(said["author"], said["text"]) for said in version.notes] == [
        ("Dr. Abe", "8/10 on twenty films"),
        ("Dr. Ito", "nasion drifts — look again"),
    ]
    assert all(said["time"].endswith("+00:00") for said in version.notes)


def test_note_needs_a_text_and_an_author(evaluate):
    register(evaluate("a"))
    with pytest.raises(RegistryError, match="text and an author"):
        note("tiny:1", "good", author=" ")


def test_listing_is_by_name_newest_first_and_leaves_out_what_others_registered(evaluate):
    register(evaluate("a"))
    register(evaluate("b"))
    register(evaluate("c", variant="smoke"))
    client = open_client(settings().tracking)
    client.create_registered_model("somebody-elses")
    client.create_model_version("somebody-elses", source="file:///nowhere")
    assert [version.reference for version in list_models()] == ["tiny:2", "tiny:1", "tiny-smoke:1"]


@pytest.mark.parametrize(
    "name", ["tiny:1", "tiny@candidate", "models:/tiny/1", "models:/tiny@candidate"]
)
def test_all_ways_to_name_a_version_find_it(evaluate, name):
    register(evaluate("a"))
    assert find_version(name).reference == "tiny:1"


def test_mistaken_reference_says_what_there_is(evaluate):
    register(evaluate("a"))
    with pytest.raises(RegistryError, match=r"tiny has the versions 1 \(@candidate\)"):
        find_version("tiny:7")
    with pytest.raises(RegistryError, match="Registered models: tiny"):
        find_version("tinny@champion")
    with pytest.raises(RegistryError, match="NAME@ALIAS or NAME:VERSION"):
        find_version("tiny")


# --- pulling --------------------------------------------------------------------------------------


def tamper(name: str) -> None:
    (stored,) = (settings().home / "mlartifacts").rglob(name)
    stored.write_bytes(stored.read_bytes() + b"\n")


def test_pulled_package_is_whole_and_leaves_nothing_beside_it(evaluate, tmp_path):
    register(evaluate("a"))
    package = pull("tiny@candidate", tmp_path / "models/mine")
    assert verify_package(tmp_path / "models/mine") == package
    assert package.details["run_key"] == "trained-a"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]


def test_pulling_again_into_the_same_folder_is_fine(evaluate, tmp_path):
    register(evaluate("a"))
    first = pull("tiny:1", tmp_path / "mine")
    assert pull("tiny:1", tmp_path / "mine") == first


def test_folder_with_another_model_or_anything_else_is_left_alone(evaluate, tmp_path):
    register(evaluate("a"))
    register(evaluate("other"))
    pull("tiny:1", tmp_path / "mine")
    with pytest.raises(RegistryError, match="holds another model \\(run trained-a\\)"):
        pull("tiny:2", tmp_path / "mine")
    assert verify_package(tmp_path / "mine").details["run_key"] == "trained-a"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/today.txt").write_text("keep")
    with pytest.raises(RegistryError, match="holds something else"):
        pull("tiny:1", tmp_path / "notes")
    assert (tmp_path / "notes/today.txt").read_text() == "keep"


def test_tampered_artifact_is_refused_and_nothing_is_left(evaluate, tmp_path):
    register(evaluate("a"))
    tamper("model.safetensors")
    with pytest.raises(RegistryError, match="changed or damaged"):
        pull("tiny:1", tmp_path / "models/mine")
    assert list((tmp_path / "models").iterdir()) == []


def test_artifacts_exchanged_together_with_their_sums_are_refused(evaluate, tmp_path):
    register(evaluate("a"))
    (stored,) = (settings().home / "mlartifacts").rglob("config.yaml")
    stored.write_text("name: another\n")
    sums = stored.with_name("SHA256SUMS")
    kept = [line for line in sums.read_text().splitlines() if "config.yaml" not in line]
    digest = hashlib.sha256(stored.read_bytes()).hexdigest()
    sums.write_text("\n".join([*kept, f"{digest}  config.yaml"]) + "\n")
    verify_package(stored.parent)
    with pytest.raises(RegistryError, match="exchanged"):
        pull("tiny:1", tmp_path / "mine")


def test_plain_mlflow_downloads_a_package_that_plain_libraries_read(evaluate, tmp_path):
    register(evaluate("a"))
    folder = tmp_path / "plain"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mlflow", "artifacts", "download"),
            *("--artifact-uri", "models:/tiny/1", "--dst-path", str(folder)),
        ],
        env={**os.environ, "MLFLOW_TRACKING_URI": settings().tracking},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, check=False)
    assert checked.returncode == 0
    assert load_file(folder / "model.safetensors")["w"].tolist() == [1.0, 1.0, 1.0]
    assert json.loads((folder / "model.json").read_text())["run_key"] == "trained-a"
