"""Where pretrained weights come from, in which order, and when there may be none."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from medtrain.config import Weights
from medtrain.errors import ConfigError, StorageError
from medtrain.storage import weights as module
from medtrain.storage.stores import open_store
from medtrain.storage.weights import FoundWeights, find_weights

HUB_ID = "timm/tiny.test"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def folder_digest(files: dict[str, str]) -> str:
    lines = "".join(f"{name}\0{sha256(text)}\n" for name, text in sorted(files.items()))
    return f"sha256:{sha256(lines)}"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., FoundWeights]:
    """`find_weights` with a cache of its own, and neither weights root nor hub."""

    def call(
        weights: Weights, *, weights_root: str | None = None, allow_network: bool = False
    ) -> FoundWeights:
        return find_weights(
            weights,
            weights_root=weights_root,
            cache=tmp_path / "cache",
            allow_network=allow_network,
        )

    return call


@pytest.fixture
def asked_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub has nothing; the answer lists who asked."""
    asked: list[str] = []

    def ask(hub_id: str, cache: Path) -> str:
        asked.append(hub_id)
        return f"there is no {hub_id}"

    monkeypatch.setattr(module, "_ask_hub", ask)
    return asked


def test_a_named_file_comes_before_everything(find, tmp_path: Path, asked_hub: list[str]) -> None:
    file = write(tmp_path, {"own.pth": "own"}) / "own.pth"
    root = tmp_path / "root"
    write(root / HUB_ID, {"model.safetensors": "from the root"})

    found = find(Weights(hub_id=HUB_ID, file=str(file)), weights_root=str(root), allow_network=True)

    assert found == FoundWeights(file, f"sha256:{sha256('own')}", f"file {file}")
    assert asked_hub == []


def test_the_weights_root_comes_before_the_hub(find, tmp_path: Path, asked_hub: list[str]) -> None:
    files = {"model.safetensors": "from the root", "config.json": "{}"}
    write(tmp_path / "root" / HUB_ID, files)

    found = find(Weights(hub_id=HUB_ID), weights_root=str(tmp_path / "root"), allow_network=True)

    assert found.path == tmp_path / "root" / HUB_ID
    assert found.digest == folder_digest(files)
    assert found.source == f"weights root {tmp_path}/root/{HUB_ID}"
    assert asked_hub == []


def test_the_hub_comes_before_a_random_start(
    find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write(tmp_path / "snapshot", {"model.safetensors": "from the hub"})
    monkeypatch.setattr(module, "_ask_hub", lambda hub_id, cache: snapshot)

    found = find(
        Weights(hub_id=HUB_ID, allow_random_init=True),
        weights_root=str(tmp_path / "empty"),
        allow_network=True,
    )

    assert (found.path, found.source) == (snapshot, f"model hub {HUB_ID}")


@pytest.mark.parametrize("hub_id", [None, HUB_ID])
def test_a_random_start_happens_only_where_it_is_allowed(
    find, asked_hub: list[str], hub_id: str | None
) -> None:
    random = FoundWeights(None, "random", "random initialisation")
    assert find(Weights(hub_id=hub_id, allow_random_init=True), allow_network=True) == random

    with pytest.raises(ConfigError, match="pretrained weights must be found"):
        find(Weights(hub_id=hub_id), allow_network=True)


def test_the_hub_is_not_asked_without_permission(find, asked_hub: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"may not be asked \(job\.allow_network=false\)"):
        find(Weights(hub_id=HUB_ID))
    assert asked_hub == []


def test_the_refusal_names_everything_that_was_tried_and_the_mend(
    find, tmp_path: Path, asked_hub: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        find(Weights(hub_id=HUB_ID), weights_root=str(tmp_path / "root"), allow_network=True)

    message = str(raised.value)
    assert f"{tmp_path}/root/{HUB_ID} (no file of weights there)" in message
    assert f"the model hub (there is no {HUB_ID})" in message
    for mend in ("weights.file", "MEDTRAIN_WEIGHTS_ROOT", "weights.allow_random_init=true"):
        assert mend in message


@pytest.mark.parametrize("content", [None, {}, {"README.md": "x", "config.json": "{}"}])
def test_a_named_file_that_is_absent_is_never_replaced(
    find, tmp_path: Path, asked_hub: list[str], content: dict[str, str] | None
) -> None:
    if content is not None:
        write(tmp_path / "named", content).mkdir(exist_ok=True)
    write(tmp_path / "root" / HUB_ID, {"model.safetensors": "from the root"})

    with pytest.raises(ConfigError, match=rf"weights\.file must be .*{tmp_path}/named is none"):
        find(
            Weights(hub_id=HUB_ID, file=str(tmp_path / "named"), allow_random_init=True),
            weights_root=str(tmp_path / "root"),
            allow_network=True,
        )
    assert asked_hub == []


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin", "r50.pth"]
)
def test_a_folder_with_a_file_of_weights_is_found(find, tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "named", {name: "tensors", "config.json": "{}"})

    found = find(Weights(file=str(folder)))

    assert found.path == folder
    assert found.digest == folder_digest({name: "tensors", "config.json": "{}"})


def test_the_digest_of_a_folder_is_that_of_its_weights_alone(find, tmp_path: Path) -> None:
    files = {"model.safetensors": "tensors", "vocab/v.txt": "a"}
    plain = write(tmp_path / "plain", files)
    with_more = write(
        tmp_path / "more",
        {**files, "README.md": "read me", ".gitattributes": "x", ".cache/hub/x.bin": "y"},
    )
    renamed = write(tmp_path / "renamed", {"model.safetensors": "tensors", "vocab/w.txt": "a"})
    changed = write(tmp_path / "changed", {**files, "vocab/v.txt": "b"})

    digests = [
        find(Weights(file=str(folder))).digest for folder in (plain, with_more, renamed, changed)
    ]

    assert digests[0] == digests[1] == folder_digest(files)
    assert len(set(digests)) == 3


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_file_in_a_bucket_is_brought_once_and_again_when_it_changed(
    find, new_uri: Callable[[str], str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(new_uri(kind))
    store.write("own/model.safetensors", b"first")
    weights = Weights(file=f"{store.uri}/own/model.safetensors")
    fetched: list[str] = []
    real = type(store).download

    def download(self, key: str, path: Path, *, checksum: str | None = None):
        fetched.append(key)
        return real(self, key, path, checksum=checksum)

    monkeypatch.setattr(type(store), "download", download)

    found = [find(weights), find(weights)]
    store.write("own/model.safetensors", b"second")
    changed = find(weights)

    assert found[0] == found[1]
    assert found[0].digest == f"sha256:{sha256('first')}"
    assert found[0].source == f"file {weights.file}"
    assert found[0].path is not None and found[0].path.name == "model.safetensors"
    assert changed.digest == f"sha256:{sha256('second')}"
    assert len(fetched) == 2


@pytest.mark.parametrize("as_root", [False, True])
def test_a_folder_in_a_bucket_is_brought_whole(
    find, new_uri: Callable[[str], str], as_root: bool
) -> None:
    store = open_store(new_uri("s3"))
    files = {"config.json": "{}", "model.safetensors": "tensors"}
    for name, text in files.items():
        store.write(f"{HUB_ID}/{name}", text.encode())

    found = (
        find(Weights(hub_id=HUB_ID), weights_root=store.uri)
        if as_root
        else find(Weights(file=f"{store.uri}/{HUB_ID}/"))
    )

    assert found.path is not None
    assert sorted(path.name for path in found.path.iterdir()) == sorted(files)
    assert found.digest == folder_digest(files)


def test_a_folder_whose_transfer_failed_is_not_taken_for_whole(
    find, new_uri: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = open_store(new_uri("s3"))
    files = {"config.json": "{}", "model.safetensors": "tensors"}
    for name, text in files.items():
        store.write(f"w/{name}", text.encode())
    real = type(store).download

    def fail(self, key: str, path: Path, *, checksum: str | None = None):
        if key.endswith("model.safetensors"):
            raise StorageError("away")
        return real(self, key, path, checksum=checksum)

    weights = Weights(file=f"{store.uri}/w", allow_random_init=True)
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "download", fail)
        with pytest.raises(StorageError, match=r"model\.safetensors: away"):
            find(weights)

    assert find(weights).digest == folder_digest(files)


def test_nothing_in_the_bucket_is_nothing_found(find, new_uri: Callable[[str], str]) -> None:
    store = open_store(new_uri("s3"))
    store.write("docs/readme.txt", b"")

    for place in ("gone", "docs"):
        with pytest.raises(ConfigError, match=r"weights\.file must be"):
            find(Weights(file=f"{store.uri}/{place}"))
    with pytest.raises(ConfigError, match="no file of weights there"):
        find(Weights(hub_id=HUB_ID), weights_root=store.uri)


def test_a_bucket_that_cannot_be_asked_is_never_replaced_by_a_random_start(
    find, s3_environment: str
) -> None:
    with pytest.raises(StorageError, match="bucket 'no-such-bucket'"):
        find(Weights(hub_id=HUB_ID, allow_random_init=True), weights_root="s3://no-such-bucket/w")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, str]]]:
    """A model hub on loopback: id → name → text."""
    from huggingface_hub import constants

    repositories: dict[str, dict[str, str]] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, text: str = "", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text.encode())

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            for hub_id, files in repositories.items():
                if path == f"/api/models/{hub_id}/revision/main":
                    return self.answer(200, json.dumps({"id": hub_id, "sha": COMMIT}))
                if path == f"/api/models/{hub_id}/tree/{COMMIT}":
                    entries = [
                        {"type": "file", "path": name, "size": len(text), "oid": sha256(text)[:40]}
                        for name, text in files.items()
                    ]
                    return self.answer(200, json.dumps(entries))
                name = path.removeprefix(f"/{hub_id}/resolve/{COMMIT}/")
                if name in files:
                    return self.answer(
                        200,
                        files[name],
                        X_Repo_Commit=COMMIT,
                        ETag=f'"{sha256(files[name])[:40]}"',
                    )
            self.answer(404, "{}", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield repositories
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_snapshot_of_the_hub_has_safe_weights_where_there_are_any(find, hub) -> None:
    hub[HUB_ID] = {
        "README.md": "read me",
        "config.json": "{}",
        "model.safetensors": "safe",
        "pytorch_model.bin": "pickled",
    }

    found = find(Weights(hub_id=HUB_ID), allow_network=True)

    assert found.path is not None
    assert sorted(path.name for path in found.path.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert found.digest == folder_digest({"config.json": "{}", "model.safetensors": "safe"})
    assert found.source == f"model hub {HUB_ID}"


def test_a_snapshot_of_the_hub_has_pickled_weights_where_there_are_no_others(find, hub) -> None:
    hub[HUB_ID] = {"config.json": "{}", "pytorch_model.bin": "pickled"}

    found = find(Weights(hub_id=HUB_ID), allow_network=True)

    assert found.digest == folder_digest(hub[HUB_ID])


def test_a_repository_that_is_absent_or_empty_is_nothing_found(find, hub) -> None:
    hub["timm/empty"] = {"config.json": "{}"}
    allowed = {"allow_random_init": True}

    for hub_id, reason in (("timm/gone", "there is no timm/gone"), ("timm/empty", "has no file")):
        with pytest.raises(ConfigError, match=reason):
            find(Weights(hub_id=hub_id), allow_network=True)
        assert find(Weights(hub_id=hub_id, **allowed), allow_network=True).digest == "random"


def test_offline_the_snapshot_of_an_earlier_time_is_used(
    find, hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub[HUB_ID] = {"config.json": "{}", "model.safetensors": "safe"}
    earlier = find(Weights(hub_id=HUB_ID), allow_network=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert find(Weights(hub_id=HUB_ID), allow_network=True) == earlier
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        find(Weights(hub_id="timm/other"), allow_network=True)


def test_a_hub_that_is_away_is_never_replaced_by_a_random_start(
    find, hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(StorageError, match=rf"the model hub cannot be asked for {HUB_ID}"):
        find(Weights(hub_id=HUB_ID, allow_random_init=True), allow_network=True)


def test_without_the_hubs_client_the_refusal_names_the_command(
    find, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)

    with pytest.raises(ConfigError, match=r"pip install 'medtrain\[train\]'"):
        find(Weights(hub_id=HUB_ID), allow_network=True)
