"""A fleet of real processes on this machine: mosquitto, the coordinator, and daemons in control groups of their own.

    with Fleet(folder, [DeviceSpec("edge-01", cores=0.5, data={"news": path})], {"minilm": model}) as fleet:
        job = fleet.client.submit(text)

Nothing is simulated: a daemon reads its quota and limits from its own control group. All processes die with this one,
however it ends; control groups of a killed run are removed by the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec

from coordinator.settings import CoordinatorSettings
from edge_daemon.core.team import CPU
from edge_daemon.settings import EdgeSettings
from muster.client import Client
from muster.testbed import cgroups, toml
from muster.testbed.broker import Broker, free_port
from muster.testbed.machines import Machines, files
from muster.testbed.relay import Relay
from shared import settings, topics
from shared.errors import UserError
from shared.processes import how_it_ended, lock_folder

Agent = Literal["torch", "numpy"]
FLEET = "emulated"
COORDINATOR = "coord-1"
HOST = "127.0.0.1"
AGENTS: Mapping[str, list[str]] = {
    "torch": [sys.executable, "-m", "edge_daemon.training.agent"],
    "numpy": [sys.executable, "-m", "muster.testbed.numpy_agent"],
}
WORKERS: Mapping[str, list[str]] = {
    "torch": [sys.executable, "-m", "coordinator.workers.model_worker"],
    "numpy": [sys.executable, "-m", "muster.testbed.numpy_worker"],
}
MARK = ".muster-fleet"
"""The file that says that a fleet has made the folder."""
START_WITHIN_S = 60.0
STOP_WITHIN_S = 10.0


@dataclass(frozen=True)
class DeviceSpec:
    """One device. `data`: name -> file; `settings`: over the daemon's settings, as in its file (tables nested).

    `cores`: CPU quota; `memory_bytes`: limit; None: not limited.
    """

    name: str
    cores: float | None = None
    memory_bytes: int | None = None
    data: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


class Program:
    """One of the fleet's processes; it can be killed and started again. Its output goes to `log`."""

    def __init__(self, name: str, command: Sequence[str], log: Path, group: cgroups.DeviceGroup) -> None:
        self.name = name
        self.log = log
        self.group = group
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running process; 0: it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    def start(self) -> None:
        """Start it inside its group. Call it from a thread that lives as long as the fleet."""
        self._process = start_in(self.group, self._command, self.log)

    def terminate(self) -> None:
        """SIGTERM; does not wait."""
        if self.pid and self._process is not None:
            self._process.terminate()

    def wait(self, seconds: float = STOP_WITHIN_S) -> int | None:
        """The exit code; after `seconds` it is killed. None: it was never started."""
        if self._process is None:
            return None
        try:
            return self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def end(self) -> str:
        """How it ended, in words; "" while it runs or was never started."""
        return how_it_ended(self._process.poll() if self._process is not None else None)

    def last_words(self) -> str:
        """The end of its log in one line."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        return _said(lines[-1])[:300] if lines else ""


def _said(line: str) -> str:
    """The text of a line that `shared.logs` wrote as JSON; another line as it is."""
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        return line


def is_fleet(folder: Path) -> bool:
    """Whether a fleet has made this folder, so that all in it may be removed."""
    return (folder / MARK).is_file()


def start_in(group: cgroups.DeviceGroup, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `command` in a device's control group, for example something that burns its CPU time."""
    with log.open("ab") as output:
        return subprocess.Popen(
            group.command(list(command)), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            # Ctrl-C on a terminal is for us alone: the job is cancelled before its fleet is stopped.
            start_new_session=True,
        )  # fmt: skip


class Fleet:
    """See the module. `folder`: logs, settings and all state; it is made anew, unless it is in use by another fleet.

    `models`: name -> folder, for the coordinator and the devices. `agent`: "numpy" is the small one for least squares.
    `secure`: mutual TLS and the generated ACL. `coordinator`: over its settings, as in its file. `limits`: whether
    devices get control groups at all. `broker`: over its configuration. `relay`: each device has a link of its own in
    `relays`, which counts its bytes and can be made a bad one. `commands`: program name -> what is started in its place
    (same arguments). `serve`: devices have no base model of their own and fetch it from the coordinator. `logs`: where
    the programs' output will be found once the fleet has ended, if not in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        devices: Sequence[DeviceSpec],
        models: Mapping[str, Path | str],
        *,
        agent: Agent = "torch",
        secure: bool = False,
        coordinator: Mapping[str, Any] | None = None,
        limits: bool = True,
        commands: Mapping[str, Sequence[str]] | None = None,
        broker: Mapping[str, str] | None = None,
        relay: bool = False,
        serve: bool = False,
        logs: Path | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self.logs = logs or self.folder
        self.devices = list(devices)
        self.edges: dict[str, Program] = {}
        self._models = {name: str(place) for name, place in models.items()}
        self._agent = agent
        self._secure = secure
        self._overrides = coordinator or {}
        self._limits = limits
        self._commands = commands or {}
        self._broker_overrides = dict(broker or {})
        self._relay = relay
        self._serve = serve
        self.relays: dict[str, Relay] = {}
        self._stack = contextlib.ExitStack()
        self.available = cgroups.Available(False, False, "not asked for")

    def __enter__(self) -> Fleet:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and wait until the coordinator hears every device. Raises `UserError`; then nothing runs."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def wait_until_able(self, seconds: float = 180.0) -> list[str]:
        """Wait until every device has proven some precision or named its problem; the devices that did not in time."""
        until = time.monotonic() + seconds
        while True:
            infos = {view.device: view.info for view in self.client.devices()}
            able = {device for device, info in infos.items() if info is not None and (info.bits or info.problem)}
            waiting = sorted(self.edges.keys() - able)
            if not waiting or self.ended or time.monotonic() > until:
                return waiting
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop devices, coordinator and broker in order; remove the control groups. Can be called twice."""
        self._stack.close()

    @property
    def ended(self) -> str:
        """Which program ended by itself, how, and where its log will be; "" while all run."""
        if not self.broker.pid:
            # First: without it the others end, too.
            return f"mosquitto {self.broker.end}; its log: {self.logs / self.broker.log_path.name}"
        for program in (self.coordinator, *self.edges.values()):
            if not program.pid:
                words = f": {program.last_words()}" if "exit code" in program.end else ""
                return f"{program.name} {program.end}{words}; its log: {self.logs / program.log.name}"
        return ""

    @property
    def log_paths(self) -> list[Path]:
        """The logs of all programs, the broker's included."""
        return [path for path in sorted(self.folder.glob("**/*.log")) if path.is_file()]

    def _start(self) -> None:
        cgroups.clean_leftovers()
        self._claim()
        groups = self._groups()
        self._machines = Machines(self.folder / "pki", FLEET) if self._secure else None
        self.broker = self._stack.enter_context(self._broker())
        self.coordinator = self._program("coordinator", "coordinator.service", self._coordinator_settings(), None)
        for spec in self.devices:
            group = self._group(groups, spec)
            self.edges[spec.name] = self._program(spec.name, "edge_daemon.service", self._edge_settings(spec), group)
        self._stack.callback(self._end)
        for program in (self.coordinator, *self.edges.values()):
            program.start()
        self.client = self._stack.enter_context(self._connect())
        self._wait_for_devices()

    def _claim(self) -> None:
        """An empty folder of our own; that of a killed run is emptied, one that no fleet has made is left alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stack.callback(os.close, lock_folder(self.folder, "fleet", "folder"))
        if {path.name for path in self.folder.iterdir()} > {"lock"} and not is_fleet(self.folder):
            raise UserError(f"{self.folder}: no fleet of Muster has made what lies there: move it away")
        (self.folder / MARK).write_text("A fleet of Muster made this folder; the next one there empties it.\n")
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in ("lock", MARK):
                path.unlink()

    def _groups(self) -> cgroups.Groups | None:
        if not self._limits:
            return None
        groups = self._stack.enter_context(cgroups.Groups())
        self.available = groups.available
        return groups

    def _group(self, groups: cgroups.Groups | None, spec: DeviceSpec) -> cgroups.DeviceGroup:
        if groups is None:
            return cgroups.DeviceGroup(spec.name)
        fastest = max((d.cores for d in self.devices if d.cores), default=1.0)
        nice = round(min(15.0, 5 * (fastest / spec.cores - 1))) if spec.cores else 0
        return groups.create(spec.name, cores=spec.cores, memory_bytes=spec.memory_bytes, nice=nice)

    def _broker(self) -> Broker:
        if self._machines is None:
            return Broker(self.folder / "broker", overrides=self._broker_overrides)
        acl, tls = topics.acl(FLEET, [COORDINATOR]), self._machines.broker()
        return Broker(self.folder / "broker", tls=tls, acl=acl, overrides=self._broker_overrides)

    def _broker_settings(self, name: str, **more: object) -> dict[str, Any]:
        identity: dict[str, object] = {}
        if self._machines is not None:
            identity = files(self._machines.enrol(name, "coordinator" if name == COORDINATOR else "device"))
        # All is on one machine, so no wait need be long.
        values = self.broker.settings(reconnect_min_s=0.1, reconnect_max_s=2.0, **identity, **more)
        plain: dict[str, Any] = msgspec.to_builtins(values)
        return plain

    def _link(self, name: str) -> dict[str, object]:
        """Where a device finds the broker, if not where it is: at a relay of its own."""
        if not self._relay:
            return {}
        self.relays[name] = Relay(self.broker.port)
        self._stack.callback(self.relays[name].close)
        return {"port": self.relays[name].port}

    def _coordinator_settings(self) -> Path:
        tables = {
            "fleet": FLEET,
            "name": COORDINATOR,
            "state_dir": str(self.folder / "coordinator"),
            "worker": WORKERS[self._agent],
            "broker": self._broker_settings(COORDINATOR, window=32, queue=4096),
            "api": self._api(),
            "waits": {"period_s": 5.0},
            "models": self._models,
            "top": self._top(),
        }
        return self._write("coordinator", CoordinatorSettings, toml.merged(tables, self._overrides))

    def _top(self) -> dict[str, Any]:
        if self._machines is None:
            return {}
        enrolled = files(self._machines.enrol(topics.top_name(COORDINATOR), "top"))
        return {key: enrolled[key] for key in ("certfile", "keyfile")}

    def _api(self) -> dict[str, Any]:
        if not self._serve:
            return {"port": 0}
        port = free_port()
        return {"port": port, "public_url": f"http://{HOST}:{port}"}

    def _edge_settings(self, spec: DeviceSpec) -> Path:
        tables: dict[str, Any] = {
            "fleet": FLEET,
            "device": spec.name,
            "state_dir": str(self.folder / spec.name),
            "broker": self._broker_settings(spec.name, **self._link(spec.name)),
            "data": {name: str(path.resolve()) for name, path in spec.data.items()},
            "models": {} if self._serve else self._models,
            # Its processor is what is divided here; a GPU of this machine would be the same for all.
            "agent": {"command": AGENTS[self._agent], "gpus": [CPU]},
            "telemetry": {"idle_s": 5.0, "busy_s": 2.0},
        }
        if not self.available.cpu:
            # Without a quota the other devices are foreign load, and each would wait for the others.
            tables["policy"] = {"foreign_limit": 1000.0}
        if self._serve:
            tables.setdefault("policy", {})["base_hosts"] = [HOST]
        return self._write(spec.name, EdgeSettings, toml.merged(tables, spec.settings))

    def _write(self, name: str, wanted: type[msgspec.Struct], tables: Mapping[str, Any]) -> Path:
        path = self.folder / f"{name}.toml"
        settings.check(wanted, dict(tables), name)
        path.write_text(toml.dumps(tables), encoding="utf-8")
        path.chmod(0o600)
        return path

    def _program(self, name: str, module: str, config: Path, group: cgroups.DeviceGroup | None) -> Program:
        command = [*self._commands.get(name, [sys.executable, "-m", module]), "--config", str(config)]
        return Program(name, command, self.folder / f"{name}.log", group or cgroups.DeviceGroup(name))

    def _connect(self) -> Client:
        """The client, once the coordinator serves."""
        path = self.folder / "coordinator" / "api.json"
        until = time.monotonic() + START_WITHIN_S
        while not path.exists():
            if not self.coordinator.pid or time.monotonic() > until:
                raise UserError(f"the coordinator does not start: {self.coordinator.last_words()}")
            time.sleep(0.05)
        where = json.loads(path.read_text(encoding="utf-8"))
        return Client(where["url"], Path(where["token_file"]).read_text(encoding="utf-8").strip())

    def _wait_for_devices(self) -> None:
        until = time.monotonic() + START_WITHIN_S + 2.0 * len(self.devices)
        while True:
            known = {view.device for view in self.client.devices() if view.info is not None}
            missing = sorted(self.edges.keys() - known)
            if not missing:
                return
            ended = [name for name in missing if not self.edges[name].pid]
            if ended or time.monotonic() > until:
                name = (ended or missing)[0]
                raise UserError(f"device {name} does not start: {self.edges[name].last_words()}")
            time.sleep(0.1)

    def _end(self) -> None:
        programs = [*self.edges.values(), self.coordinator]
        until = time.monotonic() + STOP_WITHIN_S
        for program in programs:
            program.terminate()
        for program in programs:
            program.wait(until - time.monotonic())
