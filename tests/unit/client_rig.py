"""What tests of the client and the commands share: the coordinator's own API over HTTP, of a desk held in memory."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import msgspec
import uvicorn

from coordinator.web import api
from coordinator.web.refusals import Conflict, NotFound
from coordinator.web.shelf import Shelf
from coordinator.web.views import DeviceView, JobView
from muster.testbed.broker import free_port
from shared.jobs import JobSpec
from shared.messages import DeviceInfo, Load
from shared.settings import check, parse_toml

TOKEN = "a-token-of-many-letters"


class MemoryDesk:
    """What the API needs of a desk, over a dictionary of jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, JobView] = {}
        self.forgotten: set[str] = set()

    def health(self) -> dict[str, object]:
        return {"broker": "connected", "devices": 2}

    def submit(self, text: str) -> JobView:
        spec = check(JobSpec, parse_toml(text, "job"), "job")
        job = JobView(id=f"{spec.name}-{len(self.found)}", name=spec.name, state="queued", rounds_total=3)
        self.found[job.id] = job
        return job

    def jobs(self) -> list[JobView]:
        return list(self.found.values())

    def job(self, job: str) -> JobView:
        if job not in self.found:
            raise NotFound(f"no job {job!r}")
        return self.found[job]

    def cancel(self, job: str) -> JobView:
        self.found[job] = msgspec.structs.replace(self.job(job), state="cancelled")
        return self.found[job]

    def resume(self, job: str) -> JobView:
        raise Conflict(f"job {job} is not paused: it is {self.job(job).state}")

    def export_folder(self, job: str) -> Path:
        self.job(job)
        return self.folder

    def forget(self, device: str) -> None:
        if device not in {view.device for view in self.devices()} - self.forgotten:
            raise NotFound(f"no device {device!r}")
        self.forgotten.add(device)

    def devices(self) -> list[DeviceView]:
        load = Load(epoch=1, seq=2, cores=0.5, own_cores=0.25, memory_available=10**8, memory_limit=5 * 10**8)
        return [
            DeviceView(device="edge-01", state="ready", age_s=1.5, info=DeviceInfo(epoch=1), load=load),
            DeviceView(device="edge-02", state="lost", age_s=90.0),
        ]


class Server:
    """The API over `desk` on a port of its own, which can be taken away and brought back."""

    def __init__(self, desk: MemoryDesk, folder: Path) -> None:
        self.port = free_port()
        self._desk, self._folder = desk, folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        app = api.create(self._desk, TOKEN, Shelf(self._folder))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
