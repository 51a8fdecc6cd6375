"""What only GCS does: checksums of its own, parts, broken connections and refusals."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medtrain.errors import ObjectDamaged, ObjectMissing, StorageError
from medtrain.storage import download
from medtrain.storage.stores import open_store
from medtrain.storage.uri import Store


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.cloud.storage.retry import DEFAULT_RETRY

    from medtrain.storage import gcs

    quick: Any = DEFAULT_RETRY.with_timeout(20.0).with_delay(initial=0.05, maximum=0.2)
    monkeypatch.setattr(gcs, "_RETRY", quick)


@pytest.fixture
def store(new_uri: Callable[[str], str]) -> Store:
    return open_store(new_uri("gs"))


@pytest.fixture
def through(faulty_gcs, new_uri: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose requests pass the proxy."""
    uri = new_uri("gs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_gcs.url)
    return open_store(uri)


def error(status: int) -> tuple[int, str]:
    return status, json.dumps({"error": {"code": status, "message": "no"}})


def test_the_checksum_of_others_objects_is_the_stores_own(store: Store, tmp_path: Path) -> None:
    blob = store._blob("a")  # type: ignore[attr-defined]
    blob.upload_from_string(b"123456789")

    assert store.info("a").checksum == store.list()[0].checksum == "crc32c:4waSgw=="
    got = store.download("a", tmp_path / "a", checksum="crc32c:4waSgw==")
    assert got.checksum == f"sha256:{hashlib.sha256(b'123456789').hexdigest()}"
    with pytest.raises(ObjectDamaged, match=r"must have the checksum crc32c:AAAAAA=="):
        store.download("a", tmp_path / "a", checksum="crc32c:AAAAAA==")


def test_a_listing_has_the_checksums(store: Store) -> None:
    store.write("a", b"content")

    assert store.list() == [store.info("a")]
    assert store.info("a").checksum == f"sha256:{hashlib.sha256(b'content').hexdigest()}"


def test_markers_of_folders_are_not_objects(store: Store) -> None:
    store._bucket.blob(  # type: ignore[attr-defined]
        f"{store._place.prefix}folder/"  # type: ignore[attr-defined]
    ).upload_from_string(b"")
    store.write("folder/a", b"")

    assert [info.key for info in store.list()] == ["folder/a"]


def test_a_large_file_goes_up_and_comes_down_in_parts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PART_SIZE", 1 << 20)
    monkeypatch.setattr("medtrain.storage.gcs.PART_SIZE", 1 << 20)
    content = os.urandom(1 << 20) * 9  # more than the client sends in one request
    (tmp_path / "large").write_bytes(content)

    sent = store.upload(tmp_path / "large", "large")
    got = store.download("large", tmp_path / "back")

    assert sent.checksum == got.checksum == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert (tmp_path / "back").read_bytes() == content


def test_a_download_goes_on_where_it_was_cut(
    through: Store, faulty_gcs, new_fault, tmp_path: Path
) -> None:
    content = os.urandom(3000)
    through.write("a", content)
    faulty_gcs.plan(new_fault("GET", "alt=media", cut_at=1200))

    through.download("a", tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == content
    assert faulty_gcs.ranges("GET", "alt=media") == ["bytes=0-2999", "bytes=1200-2999"]


def test_every_part_of_a_large_object_may_be_cut(
    through: Store, faulty_gcs, new_fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PART_SIZE", 1000)
    monkeypatch.setattr("medtrain.storage.gcs.PART_SIZE", 1000)
    content = os.urandom(3500)
    through.write("a", content)
    faulty_gcs.plan(new_fault("GET", "alt=media", cut_at=300, times=5))

    through.download("a", tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == content


def test_a_document_whose_answer_was_cut_is_read_again(
    through: Store, faulty_gcs, new_fault
) -> None:
    through.write("a", b"x" * 3000)
    faulty_gcs.plan(new_fault("GET", "alt=media", cut_at=100))

    assert through.read("a") == b"x" * 3000


def test_a_byte_that_changed_on_the_way_is_noticed(
    through: Store, faulty_gcs, new_fault, tmp_path: Path
) -> None:
    through.write("a", b"x" * 3000)
    (tmp_path / "target").mkdir()
    faulty_gcs.plan(new_fault("GET", "alt=media", flip_at=77, times=2))

    with pytest.raises(ObjectDamaged, match="must have the checksum sha256:"):
        through.download("a", tmp_path / "target" / "a")
    with pytest.raises(ObjectDamaged, match="is damaged"):
        through.read("a")

    assert list((tmp_path / "target").iterdir()) == []


def test_who_created_an_object_knows_it_though_the_answer_was_lost(
    through: Store, faulty_gcs, new_fault
) -> None:
    faulty_gcs.plan(new_fault("POST", "/upload", drop_answer=True))

    assert through.create("once", b"ours")
    assert not through.create("once", b"theirs")
    assert through.read("once") == b"ours"


# The client drops the refused answers without closing them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_store_that_is_unwell_for_a_moment_is_asked_again(
    through: Store, faulty_gcs, new_fault
) -> None:
    through.write("a", b"content")
    faulty_gcs.plan(new_fault("GET", "alt=media", answer=error(503), times=2))

    assert through.read("a") == b"content"
    gc.collect()


# The client drops an answer of 401 without closing it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (403, r"must be open to these credentials, but access is denied"),
        (401, r"the credentials for gs://.* have expired or are not accepted"),
        (400, r"cannot be used: 400"),
    ],
)
def test_a_refusal_says_why_and_is_not_repeated(
    through: Store, faulty_gcs, new_fault, tmp_path: Path, status: int, sentence: str
) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        faulty_gcs.plan(new_fault(method, "", answer=error(status), times=100))
    (tmp_path / "file").write_bytes(b"")
    calls: list[Callable[[], object]] = [
        lambda: through.read("a"),
        lambda: through.write("a", b""),
        lambda: through.create("a", b""),
        lambda: through.info("a"),
        lambda: through.exists("a"),
        lambda: through.list(),
        lambda: through.delete("a"),
        lambda: through.download("a", tmp_path / "a"),
        lambda: through.upload(tmp_path / "file", "a"),
    ]
    for call in calls:
        faulty_gcs.seen.clear()
        with pytest.raises(StorageError, match=sentence) as raised:
            call()
        assert not isinstance(raised.value, ObjectMissing)
        assert len(faulty_gcs.seen) <= 3
    gc.collect()


def test_an_absent_bucket_is_not_taken_for_absent_objects(
    gcs_environment: str, tmp_path: Path
) -> None:
    store = open_store("gs://no-such-bucket/x")
    (tmp_path / "file").write_bytes(b"")
    calls: list[Callable[[], object]] = [
        lambda: store.exists("a"),
        lambda: store.info("a"),
        lambda: store.list(),
        lambda: store.read("a"),
        lambda: store.write("a", b""),
        lambda: store.create("a", b""),
        lambda: store.delete("a"),
        lambda: store.upload(tmp_path / "file", "a"),
        lambda: store.download("a", tmp_path / "a"),
    ]
    for call in calls:
        with pytest.raises(
            StorageError, match=r"bucket 'no-such-bucket' of gs://.* none"
        ) as raised:
            call()
        assert not isinstance(raised.value, ObjectMissing)


def test_without_credentials_the_sentence_says_what_to_set(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))

    with pytest.raises(
        StorageError, match=r"needs credentials, but there are none.* Set GOOGLE_APP"
    ):
        open_store(store.uri)


def test_a_store_that_is_away_cannot_be_reached(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from google.cloud.storage.retry import DEFAULT_RETRY

    from medtrain.storage import gcs

    monkeypatch.setattr(gcs, "_RETRY", DEFAULT_RETRY.with_timeout(0.1))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")

    with pytest.raises(StorageError, match=r"gs://.* cannot be reached"):
        open_store(store.uri).read("a")
