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
from edge_daemon.adapters.store import Store
from edge_daemon.adapters.systemd import notifier
from edge_daemon.adapters.team import TeamTrainer
from edge_daemon.adapters.telemetry.facts import static_facts
from edge_daemon.adapters.telemetry.host import HostReader
from edge_daemon.adapters.telemetry.nvidia import NvidiaReader
from edge_daemon.adapters.telemetry.sampler import Sampler
from edge_daemon.adapters.trainer import SubprocessTrainer
from edge_daemon.core import policy
from edge_daemon.core.state import Machine
from edge_daemon.placing import Placed
from edge_daemon.runtime import Asked, Examined, Ports, Runtime, Sampled
from edge_daemon.settings import EdgeSettings
from shared import logs, settings, topics
from shared.codec import pack
from shared.errors import MusterError, SettingsError, UserError
from shared.messages import DeviceState
from shared.transport.base import Outgoing
from shared.transport.credentials import read_credentials
from shared.transport.mqtt import MqttTransport
from shared.transport.watch import Watch
from shared.version import VERSION

log = logging.getLogger("edge_daemon")
TICK_S = 0.5


class Service:
    """The daemon as a process."""

    def __init__(self, config: EdgeSettings, runtime: type[Runtime] = Runtime) -> None:
        self._config = config
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._notify = notifier()
        read_credentials(config.broker)  # before anything is written
        self._store = Store(Path(config.state_dir))
        self._host = HostReader()
        self._gpus = NvidiaReader(config.agent.gpus)
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._transport = MqttTransport(
            config.broker, config.device, next_epoch=self._store.next_epoch, will=self._will, rng=random.Random()
        )
        self._transport.subscribe(topics.device_filters(config.fleet, config.device))
        self._sampler = Sampler(
            lambda load: self._queue.put(Sampled(load)),
            host=self._host, gpus=self._gpus, period_s=config.telemetry.idle_s,
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

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, then leave: partial work is kept, the fleet is told. Returns the exit code.

        1: the network thread is lost. The agent saves what it has when its pipe ends; the next daemon goes on with it.
        """
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: self._queue.put(Asked()))
        self._transport.start(self._queue.put)
        self._sampler.start()
        threading.Thread(target=self._examine, name="facts", daemon=True).start()
        self._notify("READY=1")
        log.info("device %s of fleet %s runs", self._config.device, self._config.fleet)
        phase = ""
        watch = Watch(self._transport, time.monotonic)
        while not self._runtime.left:
            if watch.lost():
                log.error("the network thread is dead or hangs: leaving, to be started again")
                return 1
            try:
                event = self._queue.get(timeout=TICK_S)
            except queue.Empty:
                self._guarded(self._runtime.tick)
            else:
                self._guarded(lambda event=event: self._runtime.handle(event))  # type: ignore[misc]  # bound now
            if self._runtime.state.phase != phase:
                phase = self._runtime.state.phase
                self._notify(f"STATUS={phase}")
        self._notify("STOPPING=1")
        log.info("left")
        return 0

    def _offload(self, work: Callable[[], Placed]) -> None:
        """Files of a release are read and written where it costs the loop nothing."""
        threading.Thread(target=lambda: self._queue.put(work()), name="releases", daemon=True).start()

    def _guarded(self, run: Callable[[], None]) -> None:
        """One turn of the loop: what goes wrong in it is logged, and the daemon lives on."""
        try:
            run()
        except (MusterError, OSError, ArithmeticError, LookupError, TypeError, ValueError, AssertionError):
            log.exception("a turn of the loop failed")

    def _examine(self) -> None:
        """Read the machine's facts where a hung driver costs only this thread."""
        facts = static_facts(self._host, self._gpus)
        machine = Machine(
            hardware=facts.hardware, cores=facts.cores, memory_bytes=facts.memory_bytes, gpus=tuple(facts.gpus)
        )
        self._queue.put(Examined(machine))

    def _will(self, epoch: int) -> Outgoing:
        name = topics.STATE.name(self._config.fleet, device=self._config.device)
        return Outgoing(topics.STATE, name, pack(DeviceState(s="lost", epoch=epoch, version=VERSION)))


def _minute() -> int:
    """Local minute of the day."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min


def _load(path: Path, *, strict: bool) -> EdgeSettings:
    """The settings; `strict`: what they name must be there. Raises `SettingsError` with every fault."""
    config = settings.load(path, EdgeSettings)
    faults = policy.faults(config) + (sources.faults(config) if strict else [])
    if faults:
        raise SettingsError(str(path), faults)
    return config


def main(argv: Sequence[str] | None = None, *, runtime: type[Runtime] = Runtime) -> int:
    """Run the daemon. Exit code 2: bad configuration, said in one line; 1: start it again."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in asking.COMMANDS:
        return asking.main(words)
    parser = argparse.ArgumentParser(
        prog="muster-edge",
        description="Trains on this device what a coordinator assigns.",
        epilog="muster-edge classify TEXT... and muster-edge generate PROMPT... ask the released model that is in use; "
        "--help after them says how.",
    )
    parser.add_argument("--config", default="/etc/muster/edge.toml", help="settings file (%(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="only check the settings file, and that what it names can be read"
    )
    parser.add_argument("--version", action="version", version=VERSION)
    arguments = parser.parse_args(words)
    try:
        config = _load(Path(arguments.config), strict=arguments.check)
        if arguments.check:
            return 0
        logs.set_up("muster-edge", config.log_level)
        service = Service(config, runtime)
        for fault in sources.faults(config):
            # It may be mounted later, and the other data sets are good: no reason to stay away from the fleet.
            log.error("%s: %s", arguments.config, fault)
        return service.run()
    except UserError as error:
        print(f"muster-edge: {error}", file=sys.stderr)  # noqa: T201 - the one line the owner sees
        return 2


if __name__ == "__main__":
    sys.exit(main())
