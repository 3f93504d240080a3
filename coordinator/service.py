"""`muster-coordinator`: reads its settings, wires the edges together, runs the loop until a signal."""

# ruff: noqa: E402 - numpy reads the variables below when it is first imported
from __future__ import annotations

import os

# One thread per product: two were slower, and bytes must not depend on the number of cores.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import errno
import json
import logging
import queue
import random
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn

from coordinator.adapters.event_log import SqliteEventLog
from coordinator.adapters.worker import SubprocessWorker
from coordinator.core import vitals
from coordinator.core.events import AnyEvent
from coordinator.runtime import Finished, Ports, Runtime
from coordinator.settings import CoordinatorSettings
from coordinator.web import api
from coordinator.web.desk import Desk
from coordinator.web.shelf import Shelf
from shared import bases, logs, reload, service, settings, topics
from shared.allocator import collect_rarely, keep_small
from shared.blob_folder import BlobFolder
from shared.codec import pack
from shared.errors import MusterError, Occupied, SettingsError, UserError
from shared.files import model_fault, write_owned, write_whole
from shared.messages import CoordState
from shared.processes import lock_folder
from shared.transport.base import Outgoing
from shared.transport.credentials import read_credentials
from shared.transport.mqtt import MqttTransport
from shared.transport.watch import Watch
from shared.version import VERSION
from shared.vitals import complaint, of_service, ready

log = logging.getLogger("coordinator")
TICK_S = 0.25
FIXED = {
    "fleet",
    "name",
    "state_dir",
    "broker",
    "api",
    "worker",
    "top",
    "credit_bytes",
    "fsync",
    "keep_rounds",
    "waits.retry_s",
}
"""Settings that only a restart changes."""


class Service:
    """The coordinator as a process. `source`: its settings file, read again on SIGHUP."""

    def __init__(
        self, config: CoordinatorSettings, process: service.Process, source: Path, runtime: type[Runtime] = Runtime
    ) -> None:
        self._config = config
        self._process = process
        self._source = source
        self._began = self._turned = 0.0
        self._started = False
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fold")
        # What may be the operator's fault comes first: nothing is written then.
        read_credentials(config.broker)
        if config.api.token_file:
            _token(config)
        self._socket = _listen(config.api.host, config.api.port)
        state_dir = Path(config.state_dir)
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        except OSError as error:
            raise UserError(f"state_dir {state_dir}: can't be made: {error.strerror}") from error
        self._lock = lock_folder(state_dir, "coordinator")
        event_log = SqliteEventLog(state_dir / "events.sqlite", fsync=config.fsync)
        transport = MqttTransport(
            config.broker, config.name, next_epoch=lambda: self._runtime.term, will=self._will, rng=random.Random()
        )
        transport.subscribe(topics.coordinator_filters(config.fleet))
        worker = SubprocessWorker(config.worker, self._queue.put, time.monotonic, config.waits.worker_silence_s)
        top = SubprocessWorker(
            config.top.command, self._queue.put, time.monotonic, config.waits.worker_silence_s, top=True
        )
        ports = Ports(
            transport=transport,
            log=event_log,
            blobs=BlobFolder(state_dir / "blobs", fsync=config.fsync),
            worker=worker,
            top=top,
            clock=time.monotonic,
            wall=time.time,
            post=self._queue.put,
            offload=self._offload,
        )
        self._runtime = runtime(config, ports)
        self._transport = transport

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; SIGHUP reads the settings again. Returns the exit code.

        1: something is beyond repair.
        """
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: self._stopping.set())
        signal.signal(signal.SIGHUP, lambda *_: self._queue.put(service.Reload()))
        self._began = self._turned = time.monotonic()
        self._process.examine = self._complaint
        self._transport.start(self._queue.put)
        server = self._start_api()
        log.info("coordinator %s of fleet %s runs", self._config.name, self._config.fleet, extra=logs.event("started"))
        self._guarded(self._runtime.tick)
        watch = Watch(self._transport, time.monotonic)
        while not self._stopping.is_set():
            if reason := "the network thread is dead or hangs" if watch.lost() else self._process.fatal:
                log.error("%s: leaving, to be started again", reason, extra=logs.event("lost"))
                self._leave(server)
                return service.EX_LOST
            self._turn()
        self._process.stopping()
        log.info("stopping", extra=logs.event("left"))
        self._runtime.stop()
        self._leave(server)
        self._process.end()
        return 0

    def _turn(self) -> None:
        """One turn of the main loop."""
        self._process.turn(
            self._queue, TICK_S, tick=lambda: self._guarded(self._runtime.tick),
            handle=lambda event: self._guarded(lambda: self._runtime.handle(event)), reload=self._reload,
        )  # fmt: skip
        self._turned = time.monotonic()
        runtime, waited = self._runtime, self._turned - self._began
        if not self._started and ready(runtime.connected, waited, self._config.health.ready_s):
            self._started = True
            self._process.running()
        self._process.status(vitals.status(runtime.state, connected=runtime.connected, problem=runtime.problem))

    def _complaint(self) -> str:
        """What is wrong with us; called from the lifeline's thread."""
        health = self._config.health
        return complaint(
            of_service(
                now=time.monotonic(), turned_at=self._turned, network_late_s=self._transport.late_s,
                network_s=health.network_s, tick_s=health.tick_s,
            )
        )  # fmt: skip

    def _reload(self) -> str:
        """Take over the settings file as it is now; what was done, in words."""
        taken = reload.take_over(self._config, settings.load(self._source, CoordinatorSettings), FIXED)
        self._config = taken.settings
        logs.set_level(taken.settings.log_level)
        self._process.new_health(taken.settings.health)
        self._guarded(lambda: self._runtime.reconfigure(taken.settings))
        return reload.told(taken)

    def _leave(self, server: uvicorn.Server) -> None:
        server.should_exit = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _guarded(self, run: Callable[[], None]) -> None:
        """One turn of the loop. Disk faults end the process: the log must not fall behind the state."""
        try:
            run()
        except (MusterError, ArithmeticError, LookupError, TypeError, ValueError, AssertionError, RecursionError):
            log.exception("a turn of the loop failed")

    def _offload(self, work: Callable[[], AnyEvent], post: Callable[[Finished], None]) -> None:
        self._pool.submit(lambda: post(Finished(work())))

    def _will(self, epoch: int) -> Outgoing:
        name = topics.COORD_STATE.name(self._config.fleet, coordinator=self._config.name)
        return Outgoing(topics.COORD_STATE, name, pack(CoordState(online=False, term=epoch)))

    def _start_api(self) -> uvicorn.Server:
        token = _token(self._config)
        shelf = Shelf(Path(self._config.state_dir) / bases.FOLDER)
        application = api.create(Desk(self._runtime, self._queue.put), token, shelf)
        server = uvicorn.Server(uvicorn.Config(application, log_level="warning", access_log=False, lifespan="off"))
        threading.Thread(target=server.run, kwargs={"sockets": [self._socket]}, name="api", daemon=True).start()
        host, port = self._socket.getsockname()[:2]
        where: dict[str, Any] = {"url": f"http://{host}:{port}", "token_file": str(_token_file(self._config))}
        path = Path(self._config.state_dir) / "api.json"
        write_whole(path, json.dumps(where).encode())
        log.info("HTTP API at %s", where["url"])
        return server


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        hint = "choose another with [api] port, or 0 for a free one"
        kind = Occupied if error.errno == errno.EADDRINUSE else UserError
        raise kind(f"API address {host}:{port}: {error.strerror}; {hint}") from error
    listener.listen(128)
    return listener


def _token_file(config: CoordinatorSettings) -> Path:
    return Path(config.api.token_file or Path(config.state_dir) / "token")


def _token(config: CoordinatorSettings) -> str:
    path = _token_file(config)
    try:
        # An empty one of our own is what a crash left of the first start.
        if not config.api.token_file and not (path.exists() and path.stat().st_size):
            write_owned(path, secrets.token_urlsafe(32).encode(), mode=0o600)
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"[api] token_file {path}: {error.strerror}") from error
    if len(token) < 16:
        raise UserError(f"[api] token_file {path}: a token has at least 16 characters")
    return token


def main(argv: Sequence[str] | None = None, *, runtime: type[Runtime] = Runtime) -> int:
    """Run the coordinator. Exit code 78: bad configuration, said in one line; 75, 1: start it again.

    `muster-coordinator enroll ...` is another command: it makes this machine's key and request.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["enroll"]:
        from shared import enrolment  # a service that runs needs no X.509

        return enrolment.main("muster-coordinator", given[1:])
    parser = argparse.ArgumentParser(
        prog="muster-coordinator",
        description="Plans rounds and aggregates their updates.",
        epilog="muster-coordinator enroll --help: make this machine's key and request, install its certificate.",
    )
    parser.add_argument("--config", default="/etc/muster/coordinator.toml", help="settings file (%(default)s)")
    parser.add_argument("--check", action="store_true", help="only check the settings file, and the models it names")
    parser.add_argument("--version", action="version", version=VERSION)
    arguments = parser.parse_args(given)
    return service.guarded("muster-coordinator", lambda: _run(Path(arguments.config), arguments.check, runtime))


def _model_faults(config: CoordinatorSettings) -> list[str]:
    """What can't be read of `[models]`, as "key: reason". A hub id is not tried, nor a base of the test agent."""
    places = {name: Path(model).expanduser() for name, model in config.models.items()}
    local = {
        name: place for name, place in places.items() if place.is_absolute() or place.parts[:1] in ((".",), ("..",))
    }
    return [f"models.{name}: {fault}" for name, place in local.items() if (fault := model_fault(place))]


def _run(source: Path, check: bool, runtime: type[Runtime]) -> int:
    config = settings.load(source, CoordinatorSettings)
    if check:
        if faults := _model_faults(config):
            raise SettingsError(str(source), faults)
        print(f"{source}: good (models: {', '.join(config.models) or 'none'})")  # noqa: T201 - what the operator asked for
        return 0
    logs.set_up("muster-coordinator", config.log_level, fleet=config.fleet)
    # Updates come and go by the megabyte, in several threads.
    keep_small()
    collect_rarely()
    process = service.Process("muster-coordinator")
    process.begin(config.health)
    return Service(config, process, source, runtime).run()


if __name__ == "__main__":
    sys.exit(main())
