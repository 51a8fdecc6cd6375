"""One writer, checkpoints that exist or do not, one final word."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from medtrain.errors import CheckpointError, ObjectDamaged, StorageError
from medtrain.storage.runs import (
    EXIT_RETRY,
    EXIT_STOPPED,
    EXIT_VERDICT,
    AttemptEnd,
    Outcome,
    Pointer,
    RunDirectory,
)


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, new_uri: Callable[[str], str]) -> RunDirectory:
    return RunDirectory.open(new_uri(request.param))


@pytest.fixture
def local_run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path / "run"))


def publish(
    run: RunDirectory,
    attempt: int,
    *,
    name: str = "last",
    step: int = 10,
    content: bytes = b"state",
) -> Pointer:
    key = f"checkpoints/{attempt}/{name}-{step}.pt"
    run.store.write(key, content)
    pointer = Pointer(
        name,
        attempt,
        step,
        key,
        hashlib.sha256(content).hexdigest(),
        len(content),
        {"epoch": 2, "value": 0.1 + 0.2},
    )
    run.publish(pointer)
    return pointer


def test_attempts_are_numbered_from_one(run: RunDirectory) -> None:
    assert run.attempts() == []
    assert [run.claim_attempt({"job": "a"}) for _ in range(3)] == [1, 2, 3]
    run.end_attempt(2, AttemptEnd(0, "done"))
    run.write_text("attempts/3.verdict.json", "{}")
    assert run.attempts() == [1, 2, 3]
    record = run.read_json("attempts/1.json")
    assert record["job"] == "a" and record["host"] and record["time"].endswith("+00:00")


def test_the_tenth_attempt_comes_after_the_ninth(local_run: RunDirectory) -> None:
    for _ in range(10):
        local_run.claim_attempt({})

    assert local_run.attempts() == list(range(1, 11))
    assert local_run.claim_attempt({}) == 11


def test_racing_writers_never_share_an_attempt(run: RunDirectory) -> None:
    with ThreadPoolExecutor(4) as pool:
        claimed = list(pool.map(lambda n: run.claim_attempt({"writer": n}), range(8)))

    assert sorted(claimed) == run.attempts() == list(range(1, 9))
    for writer, number in enumerate(claimed):
        assert run.read_json(f"attempts/{number}.json")["writer"] == writer


def test_a_writer_learns_who_took_over(run: RunDirectory) -> None:
    first = run.claim_attempt({"job": "old"})
    assert run.newer_attempt(first) is None

    run.claim_attempt({"job": "between"})
    run.claim_attempt({"job": "new", "attempt": 99})

    newer = run.newer_attempt(first)
    assert newer is not None
    assert (newer["attempt"], newer["job"]) == (3, "new")
    assert run.newer_attempt(3) is None


def test_a_damaged_record_still_shows_that_somebody_took_over(local_run: RunDirectory) -> None:
    local_run.claim_attempt({})
    local_run.write_text("attempts/2.json", "{")

    assert local_run.newer_attempt(1) == {"attempt": 2}


def test_the_end_of_an_attempt_is_kept(run: RunDirectory) -> None:
    number = run.claim_attempt({})
    assert run.attempt_end(number) is None

    run.end_attempt(number, AttemptEnd(EXIT_STOPPED, "SIGTERM", 120, 100))

    end = run.attempt_end(number)
    assert end is not None and end.time
    assert replace(end, time="") == AttemptEnd(EXIT_STOPPED, "SIGTERM", 120, 100)


def test_starts_that_published_nothing_are_counted_from_the_newest(run: RunDirectory) -> None:
    assert run.fruitless_attempts() == 0
    run.claim_attempt({})
    publish(run, 1)
    assert run.fruitless_attempts() == 0

    run.claim_attempt({})  # killed: it never said how it ended
    assert run.fruitless_attempts() == 1
    run.end_attempt(run.claim_attempt({}), AttemptEnd(EXIT_RETRY, "peer lost"))
    assert run.fruitless_attempts() == 2
    run.end_attempt(run.claim_attempt({}), AttemptEnd(EXIT_STOPPED, "SIGTERM"))
    assert run.fruitless_attempts() == 2

    publish(run, run.claim_attempt({}))
    assert run.fruitless_attempts() == 0


def test_a_stopped_start_that_published_ends_the_count(local_run: RunDirectory) -> None:
    local_run.claim_attempt({})
    local_run.claim_attempt({})
    number = local_run.claim_attempt({})
    publish(local_run, number)
    local_run.end_attempt(number, AttemptEnd(EXIT_STOPPED, "SIGTERM", 10, 10))

    assert local_run.fruitless_attempts() == 0


def test_stops_count_only_when_more_than_twenty_come_in_a_row(local_run: RunDirectory) -> None:
    local_run.claim_attempt({})
    for _ in range(20):
        local_run.end_attempt(local_run.claim_attempt({}), AttemptEnd(EXIT_STOPPED, "SIGTERM"))
    assert local_run.fruitless_attempts() == 1

    local_run.end_attempt(local_run.claim_attempt({}), AttemptEnd(EXIT_STOPPED, "SIGTERM"))
    assert local_run.fruitless_attempts() == 22

    local_run.claim_attempt({})
    assert local_run.fruitless_attempts() == 23


def test_the_final_word_is_said_once(run: RunDirectory) -> None:
    assert run.outcome() is None
    first = Outcome("done", score=1.5, metrics={"mre_mm": 1.5}, artifacts={"model": "m"})

    said = run.write_outcome(first)
    answer = run.write_outcome(Outcome("failed", "somebody else's view"))

    assert replace(said, time="") == first and said.time
    assert answer == said == run.outcome()


def test_racing_final_words_agree(run: RunDirectory) -> None:
    with ThreadPoolExecutor(4) as pool:
        words = list(pool.map(lambda n: run.write_outcome(Outcome("done", str(n))), range(4)))

    assert len({word.reason for word in words}) == 1
    assert words[0] == run.outcome()


@pytest.mark.parametrize("state", ["failed", "gave_up"])
def test_a_retracted_verdict_stays_on_record_and_the_run_goes_on(
    run: RunDirectory, state: str
) -> None:
    for _ in range(3):
        run.claim_attempt({})
    assert run.fruitless_attempts() == 3
    run.write_outcome(Outcome(state, "no progress"))  # type: ignore[arg-type]

    run.retract_verdict()

    assert run.outcome() is None
    assert run.read_json("attempts/3.verdict.json")["reason"] == "no progress"
    assert run.attempts() == [1, 2, 3]
    assert run.fruitless_attempts() == 0
    run.claim_attempt({})
    assert run.fruitless_attempts() == 1
    assert run.write_outcome(Outcome("done")).state == "done"


def test_a_done_run_stays_done_while_what_it_names_is_there(run: RunDirectory) -> None:
    run.retract_verdict()
    run.store.write("checkpoints/1/model", b"")
    outcome = run.write_outcome(Outcome("done", artifacts={"model": "checkpoints/1/model"}))

    assert run.holds_what_it_names(outcome)
    run.retract_verdict()
    assert run.outcome() == outcome

    run.store.delete("checkpoints/1/model")
    assert not run.holds_what_it_names(outcome)
    run.retract_verdict()
    assert run.outcome() is None


def test_a_damaged_final_word_is_an_error_and_not_none(local_run: RunDirectory) -> None:
    for text in ("{", '{"state": "done", "unknown": 1}', "[1]"):
        local_run.write_text("outcome.json", text)
        with pytest.raises(StorageError, match=r"outcome\.json must be"):
            local_run.outcome()


def test_values_that_are_not_finite_are_not_written(local_run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        local_run.write_outcome(Outcome("done", score=float("nan")))
    assert local_run.outcome() is None


def test_pointers_come_newest_attempt_first(run: RunDirectory) -> None:
    for _ in range(3):
        run.claim_attempt({})
    old, new = publish(run, 1, step=50), publish(run, 3, step=20)
    best = publish(run, 1, name="best_mre_mm", step=40)

    assert run.pointers("last") == [new, old]
    assert run.pointers("best_mre_mm") == [best]
    assert run.pointers("none") == []
    assert sorted(run.all_pointers(), key=lambda p: p.step) == [new, best, old]


def test_publishing_again_replaces_the_pointer_of_ones_own_attempt_only(run: RunDirectory) -> None:
    run.claim_attempt({})
    run.claim_attempt({})
    publish(run, 2, step=30)
    later, stale = publish(run, 2, step=40), publish(run, 1, step=99)

    assert run.pointers("last") == [later, stale]


def test_pointers_without_an_attempt_are_not_seen(local_run: RunDirectory) -> None:
    publish(local_run, 1)

    assert local_run.pointers("last") == local_run.all_pointers() == []


def test_a_pointer_with_any_changed_bit_is_passed_over(
    local_run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    local_run.claim_attempt({})
    local_run.claim_attempt({})
    old = publish(local_run, 1)
    publish(local_run, 2, step=77)
    key = "checkpoints/2/last.json"
    content = local_run.store.read(key)
    believed = []
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        Path(local_run.uri, key).write_bytes(flipped)
        found = local_run.pointers("last")
        if found != [old]:
            believed.append((found, json.loads(flipped)))

    # Blanks between the words may change: they say nothing.
    assert all(json.loads(content) == record for _, record in believed)
    assert "is damaged and passed over" in caplog.text


def test_a_checkpoint_is_fetched_and_verified(run: RunDirectory, tmp_path: Path) -> None:
    run.claim_attempt({})
    pointer = publish(run, 1, content=b"tensors")

    path = run.fetch(pointer, tmp_path / "folder")

    assert path == tmp_path / "folder" / "last-10.pt"
    assert path.read_bytes() == b"tensors"


def test_a_checkpoint_that_is_there_is_not_fetched_again(run: RunDirectory, tmp_path: Path) -> None:
    run.claim_attempt({})
    pointer = publish(run, 1, content=b"tensors")
    run.fetch(pointer, tmp_path)
    run.store.delete(pointer.key)

    assert run.fetch(pointer, tmp_path).read_bytes() == b"tensors"
    (tmp_path / "last-10.pt").write_bytes(b"damaged here")
    with pytest.raises(CheckpointError, match="is gone, though pointer 'last' of attempt 1"):
        run.fetch(pointer, tmp_path)


@pytest.mark.parametrize("damage", [b"tensorz", b"tens", b"", b"tensors and more"])
def test_a_damaged_checkpoint_is_refused(run: RunDirectory, tmp_path: Path, damage: bytes) -> None:
    run.claim_attempt({})
    pointer = publish(run, 1, content=b"tensors")
    run.store.write(pointer.key, damage)

    with pytest.raises(CheckpointError, match=r"checkpoint 'last' of attempt 1 is damaged"):
        run.fetch(pointer, tmp_path / "folder")
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_store_that_is_away_is_not_a_bad_checkpoint(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer = publish(run, 1)

    def away(*args: object, **kwargs: object) -> None:
        raise StorageError("the store cannot be reached")

    monkeypatch.setattr(type(run.store), "download", away)

    with pytest.raises(StorageError, match="cannot be reached"):
        run.fetch(pointer, tmp_path)


def test_documents_are_read_as_they_were_written(run: RunDirectory) -> None:
    run.write_text("config.yaml", "seed: 1\nname: Röntgen\n")
    run.write_json("facts.json", {"a": [1, 2.5, None, "é"]})

    assert run.read_text("config.yaml") == "seed: 1\nname: Röntgen\n"
    assert run.read_json("facts.json") == {"a": [1, 2.5, None, "é"]}
    assert run.read_json("absent.json") is None
    assert RunDirectory.open(run.uri).read_json("facts.json")["a"][0] == 1


def test_a_pointer_survives_the_way_through_json(local_run: RunDirectory) -> None:
    pointer = publish(local_run, 1)

    assert Pointer(**json.loads(json.dumps(asdict(pointer)))) == pointer
    assert EXIT_VERDICT == 42


@pytest.mark.parametrize(
    "content", ["null", "[]", "{", '{"state": null}', '{"state": "done", "artifacts": [1]}']
)
def test_a_damaged_outcome_is_named_with_the_way_out(tmp_path: Path, content: str) -> None:
    run = RunDirectory.open(str(tmp_path))
    (tmp_path / "outcome.json").write_text(content)
    with pytest.raises(ObjectDamaged, match="Remove it and run again"):
        run.outcome()
    with pytest.raises(ObjectDamaged):
        run.write_outcome(Outcome("done"))
