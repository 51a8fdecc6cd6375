"""What only S3 does: pages, parts, broken connections and refusals."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from medtrain.errors import ObjectDamaged, ObjectMissing, StorageError
from medtrain.storage import download, s3
from medtrain.storage.stores import open_store
from medtrain.storage.uri import Store

BUCKET = "medtrain-test"


@pytest.fixture
def store(new_uri: Callable[[str], str]) -> Store:
    return open_store(new_uri("s3"))


@pytest.fixture
def through(faulty_s3, new_uri: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose requests pass the proxy."""
    uri = new_uri("s3")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", faulty_s3.url)
    return open_store(uri)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Objects count as large above 1000 bytes."""
    monkeypatch.setattr(download, "PART_SIZE", 1000)
    monkeypatch.setattr(s3, "PART_SIZE", 1000)
    return 1000


def address(store: Store, key: str) -> dict[str, Any]:
    return {"Bucket": BUCKET, "Key": f"{store.uri.removeprefix(f's3://{BUCKET}/')}/{key}"}


def error(code: str, status: int = 403) -> tuple[int, str]:
    return status, f"<Error><Code>{code}</Code><Message>no</Message></Error>"


def test_a_listing_of_more_than_a_page_is_whole(store: Store) -> None:
    keys = [f"many/{n:04d}" for n in range(1001)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.write(key, b""), keys))

    assert [info.key for info in store.list("many/")] == keys


def test_markers_of_folders_are_not_objects(store: Store) -> None:
    boto3.client("s3").put_object(**address(store, "folder/"), Body=b"")
    store.write("folder/a", b"")

    assert [info.key for info in store.list()] == ["folder/a"]


def test_keys_of_others_that_lead_elsewhere_are_listed_but_not_fetched(
    store: Store, tmp_path: Path
) -> None:
    boto3.client("s3").put_object(**address(store, "a//b"), Body=b"")

    assert [info.key for info in store.list()] == ["a//b"]
    with pytest.raises(StorageError, match="key must be names"):
        store.download("a//b", tmp_path / "b")


def test_the_checksum_of_others_objects_is_the_stores_own(store: Store, tmp_path: Path) -> None:
    boto3.client("s3").put_object(
        **address(store, "a"), Body=b"123456789", ChecksumAlgorithm="CRC32"
    )

    assert store.info("a").checksum == "crc32:y/Q5Jg=="
    got = store.download("a", tmp_path / "a", checksum="crc32:y/Q5Jg==")
    assert got.checksum == f"sha256:{hashlib.sha256(b'123456789').hexdigest()}"
    with pytest.raises(ObjectDamaged, match=r"must have the checksum crc32:AAAAAA=="):
        store.download("a", tmp_path / "a", checksum="crc32:AAAAAA==")


def test_a_large_file_goes_up_in_parts_and_is_verified(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smallest_part = 5 << 20
    parts = TransferConfig(multipart_threshold=smallest_part, multipart_chunksize=smallest_part)
    monkeypatch.setattr(s3, "_TRANSFER", parts)
    content = os.urandom(1 << 20) * 11
    (tmp_path / "large").write_bytes(content)

    sent = store.upload(tmp_path / "large", "large")
    got = store.download("large", tmp_path / "back")

    assert "-" in (sent.version or "")  # the ETag of an object in parts
    assert sent.checksum == got.checksum == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert (tmp_path / "back").read_bytes() == content


def test_a_small_file_goes_up_in_one_request(through: Store, faulty_s3, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"content")

    through.upload(tmp_path / "small", "small")

    assert [s.method for s in faulty_s3.seen] == ["PUT"]


def test_a_large_object_comes_down_in_parts(
    through: Store, faulty_s3, small_parts: int, tmp_path: Path
) -> None:
    content = os.urandom(4500)
    through.write("large", content)

    through.download("large", tmp_path / "large")

    assert (tmp_path / "large").read_bytes() == content
    assert sorted(map(str, faulty_s3.ranges("GET", "large"))) == [
        f"bytes={start}-{stop}"
        for start, stop in [(0, 999), (1000, 1999), (2000, 2999), (3000, 3999), (4000, 4499)]
    ]


def test_a_small_object_comes_down_in_one_request(
    through: Store, faulty_s3, tmp_path: Path
) -> None:
    through.write("small", b"content")
    faulty_s3.seen.clear()

    through.download("small", tmp_path / "small")

    assert [s.method for s in faulty_s3.seen] == ["GET"]


def test_a_download_goes_on_where_it_was_cut(
    through: Store, faulty_s3, new_fault, tmp_path: Path
) -> None:
    content = os.urandom(3000)
    through.write("a", content)
    faulty_s3.plan(new_fault("GET", "/a", cut_at=1200))
    faulty_s3.plan(new_fault("GET", "/a", cut_at=700))

    through.download("a", tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == content
    ranges = faulty_s3.ranges("GET", "/a")
    assert ranges[1:] == ["bytes=1200-2999", "bytes=1900-2999"]


def test_every_part_of_a_large_object_may_be_cut(
    through: Store, faulty_s3, new_fault, small_parts: int, tmp_path: Path
) -> None:
    content = os.urandom(3500)
    through.write("a", content)
    faulty_s3.plan(new_fault("GET", "/a", cut_at=300, times=6))

    through.download("a", tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == content


def test_a_download_that_never_gets_on_ends_with_one_sentence(
    through: Store, faulty_s3, new_fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_TRIES", 3)
    through.write("a", b"x" * 3000)
    faulty_s3.plan(new_fault("GET", "/a", cut_at=0, times=100))

    with pytest.raises(StorageError, match=r"/a cannot be read or written in full: 3 tries in a"):
        through.download("a", tmp_path / "target" / "a")
    with pytest.raises(StorageError, match=r"/a cannot be read or written in full"):
        through.read("a")

    assert list((tmp_path / "target").iterdir()) == []


def test_a_document_whose_answer_was_cut_is_read_again(
    through: Store, faulty_s3, new_fault
) -> None:
    through.write("a", b"x" * 3000)
    faulty_s3.plan(new_fault("GET", "/a", cut_at=100))

    assert through.read("a") == b"x" * 3000


def test_a_byte_that_changed_on_the_way_is_noticed(
    through: Store, faulty_s3, new_fault, tmp_path: Path
) -> None:
    through.write("a", b"x" * 3000)
    (tmp_path / "target").mkdir()
    faulty_s3.plan(new_fault("GET", "/a", flip_at=77, times=2))

    with pytest.raises(ObjectDamaged, match="must have the checksum sha256:"):
        through.download("a", tmp_path / "target" / "a")
    with pytest.raises(ObjectDamaged, match="is damaged"):
        through.read("a")

    assert list((tmp_path / "target").iterdir()) == []


def test_an_object_that_changes_between_two_parts_is_not_glued_together(
    through: Store, faulty_s3, small_parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through.write("a", b"x" * 1500)
    real = s3.S3Store._pour_range

    def change_first(self, info, start, stop, sink) -> None:
        through.write("a", b"y" * 1500)
        real(self, info, start, stop, sink)

    monkeypatch.setattr(s3.S3Store, "_pour_range", change_first)

    with pytest.raises(StorageError, match="has changed while it was being read"):
        through.download("a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_who_created_an_object_knows_it_though_the_answer_was_lost(
    through: Store, faulty_s3, new_fault
) -> None:
    faulty_s3.plan(new_fault("PUT", "/once", drop_answer=True))

    assert through.create("once", b"ours")
    assert not through.create("once", b"theirs")
    assert through.read("once") == b"ours"


def test_a_conflict_of_two_writers_is_asked_again(through: Store, faulty_s3, new_fault) -> None:
    faulty_s3.plan(new_fault("PUT", "/x", answer=error("ConditionalRequestConflict", 409)))
    assert through.create("x", b"ours")

    faulty_s3.plan(new_fault("PUT", "/x", answer=error("ConditionalRequestConflict", 409)))
    assert not through.create("x", b"theirs")


def test_a_store_that_is_unwell_for_a_moment_is_asked_again(
    through: Store, faulty_s3, new_fault
) -> None:
    through.write("a", b"content")
    faulty_s3.plan(new_fault("GET", "/a", answer=error("SlowDown", 503), times=2))

    assert through.read("a") == b"content"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("AccessDenied", r"/a must be open to these credentials, but access is denied"),
        ("InvalidAccessKeyId", r"credentials for s3://.* are not accepted \(InvalidAccessKeyId\)"),
        ("SignatureDoesNotMatch", r"are not accepted \(SignatureDoesNotMatch\)"),
        ("ExpiredToken", r"the credentials for s3://.* have expired \(ExpiredToken\)\. Renew them"),
        ("AuthorizationHeaderMalformed", r"/a cannot be used: AuthorizationHeaderMalformed"),
    ],
)
def test_a_refusal_says_why_and_is_not_repeated(
    through: Store, faulty_s3, new_fault, tmp_path: Path, code: str, sentence: str
) -> None:
    faulty_s3.plan(new_fault("GET", "", answer=error(code), times=100))
    faulty_s3.plan(new_fault("PUT", "", answer=error(code), times=100))
    # An answer to HEAD has no body that could say why.
    faulty_s3.plan(new_fault("HEAD", "", answer=(403, ""), times=100))
    (tmp_path / "file").write_bytes(b"")
    calls: list[Callable[[], object]] = [
        lambda: through.read("a"),
        lambda: through.write("a", b""),
        lambda: through.create("a", b""),
        lambda: through.info("a"),
        lambda: through.exists("a"),
        lambda: through.download("a", tmp_path / "a"),
        lambda: through.upload(tmp_path / "file", "a"),
    ]
    for call in calls:
        faulty_s3.seen.clear()
        with pytest.raises(StorageError, match=sentence) as raised:
            call()
        assert not isinstance(raised.value, ObjectMissing)
        # At most: ask, ask why, and both once more with credentials that were read anew.
        assert len(faulty_s3.seen) <= 4


def test_expired_credentials_are_read_anew_once(
    through: Store, faulty_s3, new_fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    through.write("a", b"content")
    faulty_s3.plan(new_fault("GET", "/a", answer=error("ExpiredToken")))

    assert through.read("a") == b"content"


def test_an_absent_bucket_is_not_taken_for_absent_objects(
    s3_environment: str, tmp_path: Path
) -> None:
    store = open_store("s3://no-such-bucket/x")
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
            StorageError, match=r"bucket 'no-such-bucket' of s3://.* none"
        ) as raised:
            call()
        assert not isinstance(raised.value, ObjectMissing)


def test_without_credentials_the_sentence_says_what_to_set(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))

    with pytest.raises(StorageError, match="needs credentials, but there are none"):
        open_store(store.uri).read("a")


def test_an_unknown_profile_is_one_sentence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")

    with pytest.raises(StorageError, match=r"cannot be used: .*nobody"):
        open_store(store.uri)


def test_an_endpoint_that_is_no_url_is_one_sentence(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "not a url")

    with pytest.raises(StorageError, match="Correct AWS_ENDPOINT_URL"):
        open_store(store.uri)


def test_a_store_that_is_away_cannot_be_reached(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setattr(s3, "_CONFIG", s3._CONFIG.merge(Config(retries={"total_max_attempts": 1})))

    with pytest.raises(StorageError, match=r"s3://.* cannot be reached"):
        open_store(store.uri).read("a")
