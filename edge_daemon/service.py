"""`muster-edge`: reads its settings, wires the edges together, runs the loop until a signal."""

from __future__ import annotations

import argparse
import logging
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_daemon import asking
from edge_daemon.adapters import sources
from edge_daemon.adapters.inspection.machine import sandbox
from edge_daemon.adapters.store import Store
from edge_daemon.adapters.team import TeamTrainer
from edge_daemon.adapters.telemetry import gpus
from edge_daemon.adapters.telemetry.facts import static_facts
from edge_daemon.adapters.telemetry.host import HostReader
from edge_daemon.adapters.telemetry.sampler import Sampler
from edge_daemon.adapters.trainer import SubprocessTrainer
from edge_daemon.core import policy, vitals
from edge_daemon.core.state import Machine
from edge_daemon.placing import Placed
from edge_daemon.runtime import Asked, Examined, Ports, Runtime, Sampled
from edge_daemon.settings import EdgeSettings
from shared import logs, reload, service, settings, topics
from shared.codec import pack
from shared.errors import MusterError, SettingsError
from shared.messages import DeviceState, Load
from shared.transport.base import Outgoing
from shared.transport.credentials import read_credentials
from shared.transport.mqtt import MqttTransport
from shared.transport.watch import Watch
from shared.version import VERSION
from shared.vitals import complaint, ready

log = logging.getLogger("edge_daemon")
LOOSE = 1024
"""Packets of split learning's steps that may wait for a slow socket."""
CONFIG = "/etc/muster/edge.toml"
TICK_S = 0.5
FIXED = {
    "fleet", "device", "state_dir", "broker", "agent.command", "agent.gpus", "credit_bytes",
    "telemetry.budget_s", "telemetry.retry_s", "telemetry.power_mode_s",
}  # fmt: skip
"""Settings that only a restart changes."""


class Service:
    """The daemon as a process. `source`: its settings file, read again on SIGHUP."""

    def __init__(
        self, config: EdgeSettings, process: service.Process, source: Path, runtime: type[Runtime] = Runtime
    ) -> None:
        self._config = config
        self._process = process
        self._source = source
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        read_credentials(config.broker)  # before anything is written
        self._store = Store(Path(config.state_dir))
        self._store.check_writable()
        self._host = HostReader(disk=Path(config.state_dir))
        self._gpus = gpus.source(config.agent.gpus, config.telemetry)
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._transport = MqttTransport(
            config.broker,
            config.device,
            next_epoch=self._store.next_epoch,
            will=self._will,
            rng=random.Random(),
            loose=LOOSE,
        )
        self._transport.subscribe(topics.device_filters(config.fleet, config.device))
        self._known: frozenset[str] | None = None
        """UUIDs of the GPUs whose facts are known; None: they are being asked for."""
        self._sampler = Sampler(
            self._sampled,
            host=self._host, gpus=self._gpus, period_s=config.telemetry.idle_s, budget_s=config.telemetry.budget_s,
        )  # fmt: skip
        trainer = TeamTrainer(
            lambda post: SubprocessTrainer(config.agent.command, post, self._host.oom_kills), self._queue.put
        )
        ports = Ports(
            transport=self._transport,
            store=self._store,
            trainer=trainer,
            clock=time.monotonic,
            wall=time.time,
            minute=_minute,
            sample_every=self._sampler.set_period,
            offload=self._offload,
        )
        self._runtime = runtime(config, ports, boot_id=boot_id, version=VERSION)
        self._began = self._turned = 0.0
        self._started = self._leaving = False
        self._log_sources()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, then leave: partial work is kept, the fleet is told. Returns the exit code.

        1: something is beyond repair. The agent saves what it has when its pipe ends; the next daemon goes on with it.
        SIGHUP reads the settings again.
        """
        for name, word in ((signal.SIGTERM, Asked()), (signal.SIGINT, Asked()), (signal.SIGHUP, service.Reload())):
            signal.signal(name, lambda *_, word=word: self._queue.put(word))
        self._began = self._turned = time.monotonic()
        self._process.examine = self._complaint
        self._transport.start(self._queue.put)
        self._sampler.start()
        threading.Thread(target=self._examine, name="facts", daemon=True).start()
        log.info("device %s of fleet %s runs", self._config.device, self._config.fleet, extra=logs.event("started"))
        watch = Watch(self._transport, time.monotonic)
        while not self._runtime.left:
            if reason := "the network thread is dead or hangs" if watch.lost() else self._process.fatal:
                log.error("%s: leaving, to be started again", reason, extra=logs.event("lost"))
                return service.EX_LOST
            self._turn()
        self._process.end()
        log.info("left", extra=logs.event("left"))
        return 0

    def _offload(self, work: Callable[[], Placed]) -> None:
        """Files of a release are read and written where it costs the loop nothing."""
        threading.Thread(target=lambda: self._queue.put(work()), name="releases", daemon=True).start()

    def _turn(self) -> None:
        """One turn of the main loop."""
        self._process.turn(
            self._queue, TICK_S, tick=lambda: self._guarded(self._runtime.tick), handle=self._handle,
            reload=self._reload,
        )  # fmt: skip
        self._turned = time.monotonic()
        self._tell()

    def _handle(self, event: object) -> None:
        if isinstance(event, Asked) and not self._leaving:
            self._leaving = True
            self._process.stopping()
        self._guarded(lambda: self._runtime.handle(event))

    def _tell(self) -> None:
        """Tell systemd and the log where we stand."""
        state = self._runtime.state
        waited = self._turned - self._began
        if not self._started and not self._leaving and ready(state.connected, waited, self._config.health.ready_s):
            self._started = True
            self._process.running()
        self._process.status(vitals.status(state))
        work = state.work
        if work is None:
            logs.about()
        else:
            where = logs.trace(work.job, work.round, work.attempt)
            logs.about(job=work.job, round=work.round, attempt=work.attempt, trace=where)

    def _complaint(self) -> str:
        """What is wrong with us; called from the lifeline's thread."""
        found = vitals.signs(
            self._runtime.state, now=time.monotonic(), turned_at=self._turned, network_late_s=self._transport.late_s
        )
        return complaint(found)

    def _reload(self) -> str:
        """Take over the settings file as it is now; what was done, in words."""
        taken = reload.take_over(self._config, load(self._source, strict=False), FIXED)
        self._config = taken.settings
        logs.set_level(taken.settings.log_level)
        self._process.new_health(taken.settings.health)
        self._guarded(lambda: self._runtime.reconfigure(taken.settings))
        self._log_sources()
        return reload.told(taken)

    def _log_sources(self) -> None:
        for fault in sources.faults(self._config):
            # It may be mounted later, and the other data sets are good: no reason to stay away from the fleet.
            log.error("%s: %s", self._source, fault)

    def _guarded(self, run: Callable[[], None]) -> None:
        """One turn of the loop: what goes wrong in it is logged, and the daemon lives on."""
        try:
            run()
        except (
            MusterError,
            OSError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AssertionError,
            RecursionError,
        ):
            log.exception("a turn of the loop failed")

    def _sampled(self, load: Load) -> None:
        """On the telemetry thread. GPUs that were not there when the facts were read make them be read again."""
        self._queue.put(Sampled(load))
        if self._known is not None and not self._known.issuperset(gpu.uuid for gpu in load.gpus):
            self._known = None
            threading.Thread(target=self._examine, name="facts", daemon=True).start()

    def _examine(self) -> None:
        """Read the machine's facts where a hung driver costs only this thread."""
        try:
            facts = static_facts(self._host, self._gpus)
        except (OSError, ArithmeticError, LookupError, TypeError, ValueError):
            log.exception("the facts of this machine can't be read: its GPUs and cores stay unknown")
            return
        machine = Machine(
            hardware=facts.hardware, cores=facts.cores, memory_bytes=facts.memory_bytes, gpus=tuple(facts.gpus),
            driver=facts.driver, jetpack=facts.jetpack, sandbox=sandbox(),
        )  # fmt: skip
        self._queue.put(Examined(machine))
        self._known = frozenset(gpu.uuid for gpu in machine.gpus)

    def _will(self, epoch: int) -> Outgoing:
        name = topics.STATE.name(self._config.fleet, device=self._config.device)
        return Outgoing(topics.STATE, name, pack(DeviceState(s="lost", epoch=epoch, version=VERSION)))


def _minute() -> int:
    """Local minute of the day."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min


def load(path: Path, *, strict: bool) -> EdgeSettings:
    """The settings; `strict`: what they name must be there. Raises `SettingsError` with every fault."""
    config = settings.load(path, EdgeSettings)
    faults = policy.faults(config) + (sources.faults(config, whole=True) if strict else [])
    if faults:
        raise SettingsError(str(path), faults)
    return config


def main(argv: Sequence[str] | None = None, *, runtime: type[Runtime] = Runtime) -> int:
    """Run the daemon. Exit code 78: bad configuration, said in one line; 75, 1: start it again.

    `muster-edge enroll ...` (this machine's key and request), `muster-edge doctor ...`, `muster-edge classify ...` and
    `muster-edge generate ...` are other commands.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["enroll"]:
        from shared import enrolment  # a daemon that runs needs no X.509

        return enrolment.main("muster-edge", given[1:])
    if given[:1] == ["doctor"]:
        from edge_daemon import doctor  # nor what only examines

        return doctor.main(given[1:])
    if given and given[0] in asking.COMMANDS:
        return asking.main(given)
    parser = argparse.ArgumentParser(
        prog="muster-edge",
        description="Trains on this device what a coordinator assigns.",
        epilog="muster-edge doctor: examine this device (keys, broker, clock, disk, GPU, a real 4-bit kernel). "
        "muster-edge enroll --help: make this machine's key and request, install its certificate. "
        "muster-edge classify TEXT..., muster-edge generate PROMPT...: ask the released model that is in use.",
    )
    parser.add_argument("--config", default=CONFIG, help="settings file (%(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="only check the settings file, and every row and model that it names"
    )
    parser.add_argument("--version", action="version", version=VERSION)
    arguments = parser.parse_args(given)
    return service.guarded("muster-edge", lambda: _run(Path(arguments.config), arguments.check, runtime))


def _run(source: Path, check: bool, runtime: type[Runtime]) -> int:
    config = load(source, strict=check)
    if check:
        named = f"data sets: {', '.join(config.data) or 'none'}; models: {', '.join(config.models) or 'none'}"
        print(f"{source}: good ({named})")  # noqa: T201 - what the owner asked for
        return 0
    logs.set_up("muster-edge", config.log_level, device=config.device, fleet=config.fleet)
    process = service.Process("muster-edge")
    process.begin(config.health)
    return Service(config, process, source, runtime).run()


if __name__ == "__main__":
    sys.exit(main())
