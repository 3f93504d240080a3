"""Fetching a base over HTTP from the coordinator's own application: whole, cut, forged, moved away."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn

from coordinator.web import api
from coordinator.web.desk import Desk
from coordinator.web.shelf import Shelf
from edge_daemon.training import fetching
from shared import bases, releases
from shared.messages import BaseSource
from shared.modeling import base_model, packing, weights
from shared.modeling.faults import ModelFault
from tests.training.tiny_models import COLOURS


@pytest.fixture(scope="module")
def shelf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coordinator") / bases.FOLDER


@pytest.fixture(scope="module")
def server(shelf_folder: Path) -> Iterator[str]:
    """Address of the coordinator's API over `shelf_folder`."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    application = api.create(cast(Desk, None), "a-token-of-the-operator", Shelf(shelf_folder))
    running = uvicorn.Server(uvicorn.Config(application, log_level="error", lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def source(bert: Path, shelf_folder: Path, server: str) -> BaseSource:
    sha = packing.pack(bert, COLOURS, 4, shelf_folder)
    return BaseSource(url=f"{server}/v1/bases/{sha}", sha=sha)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def served(shelf_folder: Path, bert: Path) -> Path:
    return shelf_folder / f"{weights.base_digest(bert)}-4"


def test_a_base_arrives_whole_and_loads(source: BaseSource, shelf_folder: Path, bert: Path, tmp_path: Path) -> None:
    folder = fetching.fetch(source, tmp_path)
    assert files(folder) == files(served(shelf_folder, bert))
    assert weights.base_digest(folder) == weights.base_digest(bert)
    assert base_model.load(folder, COLOURS, 4).linears
    before = folder.stat().st_ino
    assert fetching.fetch(source, tmp_path).stat().st_ino == before


def test_a_part_is_resumed(source: BaseSource, shelf_folder: Path, bert: Path, tmp_path: Path) -> None:
    part = tmp_path / f".{source.sha}.part"
    part.mkdir()
    whole = (served(shelf_folder, bert) / "model.safetensors").read_bytes()
    (part / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert files(fetching.fetch(source, tmp_path)) == files(served(shelf_folder, bert))


def test_a_part_that_rotted_is_fetched_anew_the_next_time(source: BaseSource, tmp_path: Path) -> None:
    part = tmp_path / f".{source.sha}.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelFault, match=r"model\.safetensors is not what its digest says"):
        fetching.fetch(source, tmp_path)
    assert fetching.fetch(source, tmp_path).is_dir()


def test_what_is_not_served_is_said_at_once(source: BaseSource, server: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFault, match="404"):
        fetching.fetch(BaseSource(url=f"{server}/v1/bases/{'0' * 64}", sha="0" * 64), tmp_path)
    with pytest.raises(ModelFault, match="digest"):
        fetching.fetch(BaseSource(url=source.url, sha="0" * 64), tmp_path)
    for path in ("/v1/jobs", "/v1/devices", "/v1/bases/../jobs"):
        with pytest.raises(ModelFault, match="40[14]"):
            fetching.fetch(BaseSource(url=server + path, sha="0" * 64), tmp_path)


def test_a_full_disk_is_said_before_anything_is_moved(source: BaseSource, tmp_path: Path) -> None:
    with pytest.raises(ModelFault, match=r"disk: \d+ MiB free"):
        fetching.fetch(source, tmp_path, reserve=1 << 60)


def test_the_oldest_bases_make_room(source: BaseSource, tmp_path: Path) -> None:
    for number in range(fetching.KEEP + 2):
        (tmp_path / f"{number:064d}").mkdir()
    folder = fetching.fetch(source, tmp_path)
    assert folder.is_dir() and len([path for path in tmp_path.iterdir() if path.is_dir()]) == fetching.KEEP


MIB = 1 << 20


class Disk:
    """A disk of so many MiB, whatever the real one holds, on which `root` is all there is."""

    def __init__(self, root: Path, mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.size = mib * MIB
        monkeypatch.setattr(shutil, "disk_usage", self._usage)

    def base(self, number: int, mib: int, used_at: float) -> Path:
        """One that was fetched before, and last used then."""
        folder = self.root / f"{number:064d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(mib * MIB))
        (folder / bases.MANIFEST).write_bytes(b"{}")
        os.utime(folder, (used_at, used_at))
        return folder

    def _usage(self, _path: Path) -> Any:
        held = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        return SimpleNamespace(total=self.size, used=held, free=self.size - held)


def test_a_disk_full_of_bases_makes_room_for_another(
    source: BaseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path / bases.FOLDER, 100, monkeypatch)
    old, young, middle = disk.base(1, 30, 1e9), disk.base(2, 30, 1e9 + 2), disk.base(3, 30, 1e9 + 1)
    folder = fetching.fetch(source, disk.root, 20 * MIB)
    assert (folder / bases.MANIFEST).is_file()
    assert (old.exists(), middle.exists(), young.exists()) == (False, True, True), "no more than it takes"


def test_where_no_removal_makes_room_nothing_is_removed(
    source: BaseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path / bases.FOLDER, 100, monkeypatch)
    there = [disk.base(number, 30, 1e9 + number) for number in (1, 2)]
    with pytest.raises(ModelFault, match=r"disk: 39 MiB free, 100 MiB needed \(base and the owner's reserve\)"):
        fetching.fetch(source, disk.root, 100 * MIB)
    assert all(map(Path.is_dir, there))


def test_what_was_abandoned_goes_before_any_base(
    source: BaseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path / bases.FOLDER, 100, monkeypatch)
    kept = disk.base(1, 30, 1e9)
    left, part = disk.root / f"{2:064d}", disk.root / f".{'3' * 64}.part"
    long_ago = time.time() - (fetching.PART_DAYS + 1) * 86400
    for folder, used_at in ((left, time.time()), (part, long_ago)):  # a removal that was cut off has just happened
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(30 * MIB))
        os.utime(folder, (used_at, used_at))
    fetching.fetch(source, disk.root, 60 * MIB)
    assert (left.exists(), part.exists(), kept.exists()) == (False, False, True)


def test_the_part_that_is_resumed_is_not_what_makes_room(
    source: BaseSource, shelf_folder: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path / bases.FOLDER, 50, monkeypatch)
    gone = disk.base(1, 40, 1e9)
    part = disk.root / f".{source.sha}.part"
    part.mkdir()
    shutil.copy(served(shelf_folder, bert) / "config.json", part)
    before = (part / "config.json").stat().st_ino
    os.utime(part, (1e9, 1e9))
    folder = fetching.fetch(source, disk.root, 20 * MIB)
    assert (folder / "config.json").stat().st_ino == before and not gone.exists()


def test_the_base_of_a_release_on_this_device_stays(
    source: BaseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path / bases.FOLDER, 100, monkeypatch)
    used, other = disk.base(1, 30, 1e9), disk.base(2, 30, 1e9 + 1)
    release = tmp_path / releases.FOLDER / "demo.r1-1"
    release.mkdir(parents=True)
    (release / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(used)}))
    (release.parent / "odd").mkdir()
    (release.parent / "odd" / "adapter_config.json").write_text("{")
    fetching.fetch(source, disk.root, 50 * MIB)
    assert used.exists() and not other.exists()
    for number in range(3, 3 + fetching.KEEP):
        disk.base(number, 0, time.time())
    shutil.rmtree(disk.root / source.sha)
    fetching.fetch(source, disk.root)
    assert used.exists(), "nor does it go for being one of many"


def test_agents_of_one_device_fetch_once(source: BaseSource, shelf_folder: Path, bert: Path, tmp_path: Path) -> None:
    found: list[Path] = []
    agents = [threading.Thread(target=lambda: found.append(fetching.fetch(source, tmp_path))) for _ in range(4)]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert files(found[0]) == files(served(shelf_folder, bert))


def test_a_removal_that_was_cut_off_is_no_base(source: BaseSource, tmp_path: Path) -> None:
    left = tmp_path / source.sha
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert (fetching.fetch(source, tmp_path) / bases.MANIFEST).is_file()


def test_a_part_that_nobody_asked_for_again_is_removed(source: BaseSource, tmp_path: Path) -> None:
    old, young = tmp_path / f".{'1' * 64}.part", tmp_path / f".{'2' * 64}.part"
    for part in (old, young):
        part.mkdir()
    long_ago = time.time() - (fetching.PART_DAYS + 1) * 86400
    os.utime(old, (long_ago, long_ago))
    fetching.fetch(source, tmp_path)
    assert young.is_dir() and not old.exists()


def test_no_header_opens_what_needs_the_token(server: str) -> None:
    host, port = server.removeprefix("http://").split(":")
    for name in ("x/v1/bases/", "/v1/bases/", "x"):
        with socket.create_connection((host, int(port)), timeout=10) as link:
            link.sendall(f"GET /v1/jobs HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
            answer = link.makefile("rb").readline()
        assert answer.split()[1] in (b"401", b"400"), answer


class _Cut(http.server.BaseHTTPRequestHandler):
    """Serves a folder, but ends each connection after 300 bytes of a file."""

    folder: Path

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        whole = (
            self.folder / (bases.MANIFEST if self.path.startswith("/manifest") and name == "manifest" else name)
        ).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(whole) - start))
        self.end_headers()
        self.wfile.write(whole[start : start + 300] if name != "manifest" else whole[start:])

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Away(http.server.BaseHTTPRequestHandler):
    """Sends everyone elsewhere."""

    target = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.target)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def listening(handler: type[http.server.BaseHTTPRequestHandler]) -> http.server.ThreadingHTTPServer:
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    return found


def test_a_connection_cut_again_and_again_ends_with_the_whole(
    source: BaseSource, shelf_folder: Path, bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    shutil.copytree(served(shelf_folder, bert), folder)
    cutting = listening(type("Cut", (_Cut,), {"folder": folder}))
    try:
        url = f"http://127.0.0.1:{cutting.server_address[1]}/manifest"
        found = fetching.fetch(BaseSource(url=url, sha=source.sha), tmp_path / "bases", base_s=0.0)
        assert files(found) == files(folder)
    finally:
        cutting.shutdown()


def test_a_redirect_is_not_followed(source: BaseSource, tmp_path: Path) -> None:
    leading = listening(type("Away", (_Away,), {"target": source.url}))
    try:
        with pytest.raises(ModelFault, match="302"):
            fetching.fetch(
                BaseSource(url=f"http://127.0.0.1:{leading.server_address[1]}/x", sha=source.sha), tmp_path, base_s=0.0
            )
    finally:
        leading.shutdown()
