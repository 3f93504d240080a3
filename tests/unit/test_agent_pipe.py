"""What is told to an agent that reads, that has stopped reading, and that is gone: real processes."""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from edge_daemon import protocol
from edge_daemon.adapters.agent_pipe import KEPT_ORDERS, KEPT_STEP_BYTES
from edge_daemon.adapters.trainer import AgentEnded, AgentSpoke, SubprocessTrainer

WITHIN_S = 30.0
PACKET = bytes(120 * 1024)
MANY = 2 * KEPT_STEP_BYTES // len(PACKET)
ECHO = """
import os, sys
from edge_daemon import protocol
from shared.frames import FrameReader, FrameWriter
reader = FrameReader(os.fdopen(int(sys.argv[2]), "rb"), protocol.ToAgent)
writer = FrameWriter(os.fdopen(int(sys.argv[4]), "wb"))
while (message := reader.read()) is not None:
    name = message.packet[:8].decode() if isinstance(message, protocol.StepIn) else type(message).__name__
    writer.write(protocol.Beat(what=name))
"""
"""Says what it is told."""


class Rig:
    """A trainer of an agent that says what it is told."""

    def __init__(self) -> None:
        # Other tests may have left some in this process.
        self.others, self.threads = set(psutil.Process().children()), set(threading.enumerate())
        self.spoken: queue.SimpleQueue[AgentSpoke] = queue.SimpleQueue()
        self.trainer = SubprocessTrainer([sys.executable, "-c", ECHO], self.spoken.put, lambda: 0)

    def start(self) -> None:
        self.trainer.start(protocol.Probe(datasets={}))
        assert self.heard() == "Probe"

    def heard(self) -> str:
        said = self.trainer.digest(self.spoken.get(timeout=WITHIN_S))
        assert isinstance(said, protocol.Beat), said
        return said.what

    def end(self) -> AgentEnded:
        """How it ends; what it says before is passed over."""
        while True:
            said = self.trainer.digest(self.spoken.get(timeout=WITHIN_S))
            if isinstance(said, AgentEnded):
                return said

    def process(self) -> psutil.Process:
        (child,) = (p for p in self.children() if p.status() != psutil.STATUS_ZOMBIE)
        return child

    def children(self) -> set[psutil.Process]:
        return set(psutil.Process().children()) - self.others

    def writers(self) -> int:
        return sum(thread.name == "agent-writer" for thread in set(threading.enumerate()) - self.threads)

    def stop(self) -> None:
        self.process().send_signal(signal.SIGSTOP)

    def tell(self, messages: list[protocol.ToAgent]) -> float:
        """Tell them from a thread; the seconds that took."""
        began = time.monotonic()
        main = threading.Thread(target=lambda: [self.trainer.tell(message) for message in messages], daemon=True)
        main.start()
        main.join(10.0)
        assert not main.is_alive(), "it waits for an agent that does not read"
        return time.monotonic() - began


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    for child in made.children():
        child.kill()
        child.wait(WITHIN_S)


def eventually(met: Callable[[], bool]) -> bool:
    until = time.monotonic() + WITHIN_S
    while not met() and time.monotonic() < until:
        time.sleep(0.01)
    return met()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_agent_that_stopped_reading_holds_up_nobody(rig: Rig) -> None:
    rig.start()
    rig.stop()
    # Not what is resident: tests before this one may have left gigabytes that come and go.
    tracemalloc.start()
    try:
        assert rig.tell([protocol.StepIn(packet=PACKET)] * MANY + [protocol.Stop(discard=True)]) < 5.0
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.5 * KEPT_STEP_BYTES < kept < 1.1 * KEPT_STEP_BYTES < MANY * len(PACKET)
    rig.trainer.kill("it hangs", hung=True)
    assert rig.end() == AgentEnded("it hangs", out_of_memory=False)
    assert eventually(lambda: rig.writers() == 0)
    rig.start()
    rig.trainer.kill("the test ends")
    rig.end()


def test_an_agent_that_reads_again_hears_all_in_order_but_the_packets_dropped(rig: Rig) -> None:
    rig.start()
    rig.stop()
    packets: list[protocol.ToAgent] = [protocol.StepIn(packet=b"%08d" % n + PACKET) for n in range(MANY)]
    orders: list[protocol.ToAgent] = [protocol.Pause(reason="busy"), protocol.Resume(), protocol.Stop()]
    rig.tell([*packets[:1], orders[0], *packets[1:], *orders[1:]])
    rig.process().send_signal(signal.SIGCONT)
    heard = [rig.heard()]
    while heard[-1] != "Stop":
        heard.append(rig.heard())
    kept = len(heard) - len(orders)
    numbers = [f"{n:08d}" for n in range(kept)]
    assert heard == [numbers[0], "Pause", *numbers[1:], "Resume", "Stop"]
    assert 0.9 * KEPT_STEP_BYTES < kept * len(PACKET) < 1.1 * KEPT_STEP_BYTES
    # There is room again.
    rig.tell([protocol.StepIn(packet=b"the next")])
    assert rig.heard() == "the next"
    rig.trainer.kill("the test ends")
    rig.end()


def test_an_agent_that_misses_too_many_orders_is_ended(rig: Rig) -> None:
    rig.start()
    rig.stop()
    fills_the_pipe = [protocol.Pause(reason="x" * 8192)] * 16
    rig.tell([*fills_the_pipe, *[protocol.Resume()] * (KEPT_ORDERS + 1)])
    assert rig.end() == AgentEnded("it reads nothing that it is told", out_of_memory=False)
    assert eventually(lambda: rig.writers() == 0)


def test_what_is_told_to_an_agent_that_is_gone_is_lost_and_its_end_heard(rig: Rig) -> None:
    rig.start()
    rig.process().kill()
    rig.tell([protocol.StepIn(packet=PACKET)] * 8)
    assert rig.end() == AgentEnded("killed by signal 9", out_of_memory=False)
    assert eventually(lambda: rig.writers() == 0)
    rig.tell([protocol.Resume()])


def test_restarts_leave_no_thread_and_no_descriptor(rig: Rig) -> None:
    def restart(*, full: bool) -> None:
        rig.start()
        rig.stop()
        if full:
            rig.tell([protocol.StepIn(packet=PACKET)] * 4)
        rig.trainer.kill("again")
        rig.end()

    restart(full=False)
    assert eventually(lambda: rig.writers() == 0)
    threads, before = threading.active_count(), descriptors()
    for turn in range(12):
        restart(full=bool(turn % 3))
    assert eventually(lambda: threading.active_count() <= threads and descriptors() <= before)
