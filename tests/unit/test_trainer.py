"""The agent's supervisor with a real subprocess under the daemon's own loop; the broker stays away all the while."""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from edge_daemon import protocol
from edge_daemon.adapters.store import Store
from edge_daemon.adapters.team import TeamTrainer
from edge_daemon.adapters.trainer import AgentEnded, AgentSpoke, SubprocessTrainer
from edge_daemon.core import events as ev
from edge_daemon.core.state import Machine
from edge_daemon.runtime import Asked, Ports, Runtime
from edge_daemon.settings import AgentSettings, EdgeSettings
from edge_daemon.training.merging import mean_update
from muster.testbed import least_squares
from shared import adapter as adapters
from shared import topics
from shared.fields import MAX_CHUNK_BYTES
from shared.jobs import BaseSpec, TaskSpec, TrainingSpec
from shared.messages import Assign, Assignment, BlobRef, Work
from shared.transport.base import Received
from shared.transport.memory import MemoryTransport
from shared.transport.memory_network import MemoryNetwork

MODEL = "6x4"
AGENT = [sys.executable, "-m", "muster.testbed.numpy_agent"]
ROWS = least_squares.make_rows(MODEL, 40, seed=1)
START = least_squares.initial_adapter("toy", MODEL)


def work(adapter: BlobRef, steps: int = 10, batch: int = 4) -> Assignment:
    return Assignment(
        job="toy",
        round=1,
        attempt=1,
        work=Work(ranks={least_squares.MODULE: 2}, batch=batch, bits=32, steps=steps),
        base=BaseSpec(model=MODEL),
        base_digest=least_squares.base_digest(MODEL),
        task=TaskSpec(kind="least_squares", dataset="points"),
        training=TrainingSpec(lr=0.05, checkpoint_every=2),
        rounds=1,
        seed=3,
        adapter=adapter,
    )


class Daemon:
    """A runtime over a real agent, turned by the test; `kills`: what the cgroup counts."""

    def __init__(self, folder: Path, command: list[str], silence_s: float, gpus: list[str]) -> None:
        least_squares.write_rows(folder / "points.jsonl", ROWS)
        settings = EdgeSettings(
            fleet="lab",
            device="edge-01",
            data={"points": str(folder / "points.jsonl")},
            agent=AgentSettings(command=command, silence_s=silence_s, gpus=gpus),
        )
        self.kills = 0
        self.events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.spoken: list[object] = []
        self.store = Store(folder / "state", fsync=False)
        self.trainer = TeamTrainer(lambda post: SubprocessTrainer(command, post, lambda: self.kills), self._post)
        ports = Ports(
            transport=MemoryTransport(MemoryNetwork(1), "edge-01", self.store.next_epoch),
            store=self.store,
            trainer=self.trainer,
            clock=time.monotonic,
            wall=time.time,
            minute=lambda: 720,
            sample_every=lambda _seconds: None,
            offload=lambda work: self.events.put(work()),
        )
        self.runtime = Runtime(settings, ports, boot_id="boot", version="test")
        self.runtime.tick()  # tidies the disk
        self.adapter = self.store.blobs.put(START)
        self.runtime.step(ev.MachineRead(now=time.monotonic(), machine=Machine(cores=1.0)))

    def _post(self, spoke: AgentSpoke) -> None:
        self.events.put(spoke)

    @property
    def phase(self) -> str:
        return self.runtime.state.phase

    def turn_until(self, met: Callable[[], bool]) -> None:
        """Turn the loop until `met`; the test's timeout is the limit."""
        while not met():
            try:
                event = self.events.get(timeout=0.05)
            except queue.Empty:
                self.runtime.tick()
            else:
                if isinstance(event, AgentSpoke):
                    self.spoken.append(event.message)
                self.runtime.handle(event)

    def assign(self, wanted: Assignment) -> None:
        assign = Assign(term=1, assignment=wanted)
        self.runtime.step(ev.AssignReceived(now=time.monotonic(), assign=assign))

    def agents(self) -> list[psutil.Process]:
        """The agents' processes, the first to start first."""
        living = (p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE)
        return [p for p in living if "muster.testbed.numpy_agent" in p.cmdline()]

    def agent(self) -> psutil.Process:
        """The one agent's process."""
        (child,) = self.agents()
        return child

    def update(self) -> bytes:
        """The update in the outbox."""
        (offer,) = self.runtime.state.journal.outbox
        path = self.store.blobs.path(offer.sha)
        assert path is not None
        return path.read_bytes()

    def progressed(self) -> bool:
        return any(isinstance(message, protocol.Progressed) for message in self.spoken)


Start = Callable[..., Daemon]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    made: list[Daemon] = []

    def make(
        command: list[str] = AGENT, *, silence_s: float = 60.0, gpus: tuple[str, ...] = (), **environment: str
    ) -> Daemon:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        made.append(Daemon(tmp_path, command, silence_s, list(gpus)))
        return made[-1]

    yield make
    for daemon in made:
        daemon.trainer.kill("the test ends")
        if not daemon.runtime.left:
            daemon.turn_until(lambda daemon=daemon: daemon.runtime.state.agent.status == "absent")  # type: ignore[misc]  # bound now
        daemon.store.close()


def expected(daemon: Daemon, **changes: int) -> bytes:
    return least_squares.train(work(daemon.adapter, **changes), START, ROWS, device="edge-01")[0]


def test_probe_train_and_leave(start: Start) -> None:
    daemon = start()
    daemon.turn_until(lambda: daemon.phase == "idle")
    agent = daemon.agent()
    assert os.getpgid(agent.pid) == agent.pid
    assert (Path("/proc") / str(agent.pid) / "oom_score_adj").read_text().strip() == "1000"
    capability = daemon.runtime.state.capability
    assert capability is not None
    assert capability.datasets["points"].rows == 40
    daemon.assign(work(daemon.adapter))
    daemon.turn_until(lambda: daemon.phase == "offering")
    assert daemon.update() == expected(daemon)
    assert not daemon.store.work_folder(daemon.runtime.state.journal.outbox[0].identity).exists()
    daemon.runtime.handle(Asked())
    assert daemon.runtime.left
    agent.wait(20)


def test_a_killed_agent_resumes_to_the_same_bytes(start: Start) -> None:
    daemon = start(MUSTER_TEST_STEP_S="0.1")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(work(daemon.adapter))
    daemon.turn_until(daemon.progressed)
    first = daemon.agent()
    first.send_signal(signal.SIGKILL)
    daemon.turn_until(lambda: daemon.phase == "offering")
    assert daemon.agent().pid != first.pid
    assert daemon.update() == expected(daemon)
    assert daemon.runtime.state.journal.deaths == 1


def test_a_hanging_agent_is_killed_and_resumes_to_the_same_bytes(start: Start) -> None:
    daemon = start(silence_s=1.5, MUSTER_TEST_HANG="5")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(work(daemon.adapter))
    daemon.turn_until(lambda: daemon.phase == "offering")
    assert daemon.update() == expected(daemon)
    assert daemon.runtime.state.journal.deaths == 1


def test_packets_for_an_agent_that_stopped_reading_do_not_hide_its_silence(start: Start) -> None:
    daemon = start(silence_s=1.5, MUSTER_TEST_STEP_S="0.1")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(work(daemon.adapter))
    daemon.turn_until(daemon.progressed)
    daemon.agent().suspend()
    name = topics.DOWN_STEP.name("lab", device="edge-01")
    for _ in range(64):
        daemon.runtime.handle(Received(name, bytes(MAX_CHUNK_BYTES)))
    daemon.turn_until(lambda: daemon.phase == "offering")
    assert daemon.update() == expected(daemon)
    assert daemon.runtime.state.journal.deaths == 1


def test_a_kill_for_memory_halves_the_batch(start: Start) -> None:
    daemon = start(MUSTER_TEST_STEP_S="0.1")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(work(daemon.adapter, batch=8))
    daemon.turn_until(daemon.progressed)
    daemon.kills += 1
    daemon.agent().send_signal(signal.SIGKILL)
    daemon.turn_until(lambda: daemon.phase == "offering")
    (offer,) = daemon.runtime.state.journal.outbox
    assert (offer.facts.batch, offer.facts.batch_limit) == (4, 4)
    assert daemon.runtime.state.journal.deaths == 0


def test_an_agent_that_always_crashes_fails_its_work_not_the_daemon(start: Start) -> None:
    daemon = start(MUSTER_TEST_CRASH_AT="0!")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(work(daemon.adapter))
    daemon.turn_until(lambda: bool(daemon.runtime.state.journal.finished))
    (done,) = daemon.runtime.state.journal.finished
    assert done.verdict == "failed"
    assert "died 3 times, last: exit status 70" in done.reason
    daemon.turn_until(lambda: daemon.runtime.state.agent.status == "ready")


def test_the_checkpoint_of_an_agent_that_always_crashes_counts(start: Start) -> None:
    daemon = start(MUSTER_TEST_CRASH_AT="7!", MUSTER_TEST_STEP_S="0.15")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(work(daemon.adapter))
    daemon.turn_until(lambda: daemon.phase == "offering")
    (offer,) = daemon.runtime.state.journal.outbox
    assert (offer.facts.steps, offer.facts.samples, offer.facts.ended) == (6, 24, "time")
    six = least_squares.begin(work(daemon.adapter), adapters.read(START), ROWS)
    for _ in range(6):
        six.step()
    assert daemon.update() == six.update("edge-01")


def test_a_leaving_daemon_keeps_the_partial_update(start: Start) -> None:
    daemon = start(MUSTER_TEST_STEP_S="0.1")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(work(daemon.adapter, steps=10_000))
    daemon.turn_until(daemon.progressed)
    daemon.runtime.handle(Asked())
    assert daemon.phase == "draining"
    daemon.turn_until(lambda: daemon.runtime.left)
    (offer,) = daemon.store.load().outbox
    assert offer.facts.ended == "drain"
    assert daemon.update()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["/nowhere/agent"], "/nowhere/agent: No such file or directory"),
        ([sys.executable, "-c", "raise SystemExit(7)"], "exit status 7"),
        (
            [sys.executable, "-c", "import os; os.write(int(__import__('sys').argv[4]), b'\\xff' * 64)"],
            "its pipe is broken",
        ),
    ],
)
def test_a_command_that_is_no_agent_is_a_problem_of_the_device(start: Start, command: list[str], reason: str) -> None:
    daemon = start(command)
    daemon.turn_until(lambda: daemon.phase == "idle")
    capability = daemon.runtime.state.capability
    assert capability is not None
    assert capability.problem.startswith(f"the agent does not start: {reason}")


def test_the_word_of_a_former_agent_does_not_count(tmp_path: Path) -> None:
    posted: queue.SimpleQueue[AgentSpoke] = queue.SimpleQueue()
    trainer = SubprocessTrainer(["/nowhere/agent"], posted.put, lambda: 0)
    trainer.start(protocol.Probe(datasets={}))
    old = posted.get_nowait()
    trainer.start(protocol.Probe(datasets={}))
    assert trainer.digest(old) is None
    end = trainer.digest(posted.get_nowait())
    assert isinstance(end, AgentEnded)
    assert not end.out_of_memory


def test_an_agent_dies_with_its_daemon(tmp_path: Path) -> None:
    """The daemon is killed with SIGKILL: the kernel ends the agent."""
    probe = (
        "import time\n"
        "from edge_daemon import protocol\n"
        "from edge_daemon.adapters.trainer import SubprocessTrainer\n"
        f"trainer = SubprocessTrainer({AGENT!r}, print, lambda: 0)\n"
        "trainer.start(protocol.Probe(datasets={}))\n"
        "print(trainer._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    daemon = psutil.Popen([sys.executable, "-c", probe], stdout=-1)
    agent = psutil.Process(int(daemon.stdout.readline()))
    daemon.kill()
    daemon.wait()
    agent.wait(20)


def test_the_settings_of_work_reach_the_agent(start: Start) -> None:
    """Time that is over: the agent returns after its first step."""
    daemon = start(MUSTER_TEST_STEP_S="0.1")
    daemon.turn_until(lambda: daemon.phase == "idle")
    wanted = work(daemon.adapter, steps=10_000)
    daemon.assign(msgspec.structs.replace(wanted, work=msgspec.structs.replace(wanted.work, train_for_s=0.4)))
    daemon.turn_until(lambda: daemon.phase == "offering")
    (offer,) = daemon.runtime.state.journal.outbox
    assert offer.facts.ended == "time"
    assert 0 < offer.facts.samples < 10_000 * 4


# ---- several agents, one a GPU

TWO = ("GPU-1", "GPU-2")


def shared(adapter: BlobRef, agents: int = 2, **changes: int) -> Assignment:
    wanted = work(adapter, **changes)
    return msgspec.structs.replace(wanted, work=msgspec.structs.replace(wanted.work, agents=agents))


def merged(daemon: Daemon, agents: int = 2) -> bytes:
    """The update that two undisturbed agents make together."""
    updates = []
    for part in range(agents):
        training = least_squares.begin(shared(daemon.adapter), adapters.read(START), ROWS, part=part, parts=agents)
        while not training.finished:
            training.step()
        updates.append(adapters.read(training.update("edge-01")))
    return adapters.write(mean_update(updates, [1 / agents] * agents, stack=True))


def test_each_gpu_has_its_agent_and_the_device_one_update(start: Start) -> None:
    daemon = start(gpus=TWO)
    daemon.turn_until(lambda: daemon.phase == "idle")
    assert len(daemon.agents()) == 2
    capability = daemon.runtime.state.capability
    assert capability is not None
    assert (capability.agents, capability.datasets["points"].rows) == (2, 40)
    daemon.assign(shared(daemon.adapter))
    daemon.turn_until(lambda: daemon.phase == "offering")
    assert daemon.update() == merged(daemon)
    (offer,) = daemon.runtime.state.journal.outbox
    assert (offer.facts.agents, offer.facts.samples, offer.facts.steps) == (2, 80, 10)
    assert not daemon.store.work_folder(offer.identity).exists()


def test_work_for_one_agent_leaves_the_other_idle(start: Start) -> None:
    daemon = start(gpus=TWO)
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(work(daemon.adapter))
    daemon.turn_until(lambda: daemon.phase == "offering")
    assert daemon.update() == expected(daemon)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_end_of_one_agent_costs_no_work(start: Start, victim: int) -> None:
    """All start again and resume; the bytes are those of the undisturbed run."""
    daemon = start(gpus=TWO, MUSTER_TEST_STEP_S="0.1")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(shared(daemon.adapter))
    daemon.turn_until(daemon.progressed)
    before = daemon.agents()
    before[victim].send_signal(signal.SIGKILL)
    daemon.turn_until(lambda: daemon.phase == "offering")
    assert not any(agent.is_running() for agent in before)
    assert daemon.update() == merged(daemon)
    assert daemon.runtime.state.journal.deaths == 1


def test_the_hang_of_one_agent_is_not_hidden_by_the_other(start: Start) -> None:
    daemon = start(gpus=TWO, silence_s=2.0, MUSTER_TEST_STEP_S="0.1")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(shared(daemon.adapter, steps=10_000))
    daemon.turn_until(daemon.progressed)
    daemon.agents()[1].send_signal(signal.SIGSTOP)
    daemon.turn_until(lambda: daemon.runtime.state.journal.deaths == 1)
    daemon.turn_until(lambda: daemon.phase == "training" and daemon.runtime.state.agent.status == "busy")


def test_a_kill_of_one_for_memory_halves_the_batch_of_all(start: Start) -> None:
    daemon = start(gpus=TWO, MUSTER_TEST_STEP_S="0.1")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(shared(daemon.adapter, batch=8))
    daemon.turn_until(daemon.progressed)
    daemon.kills += 1
    daemon.agents()[1].send_signal(signal.SIGKILL)
    daemon.turn_until(lambda: daemon.phase == "offering")
    (offer,) = daemon.runtime.state.journal.outbox
    assert (offer.facts.batch, offer.facts.batch_limit, offer.facts.agents) == (4, 4, 2)


def test_a_leaving_daemon_keeps_what_all_its_agents_did(start: Start) -> None:
    daemon = start(gpus=TWO, MUSTER_TEST_STEP_S="0.1")
    daemon.turn_until(lambda: daemon.phase == "idle")
    daemon.assign(shared(daemon.adapter, steps=10_000))
    daemon.turn_until(daemon.progressed)
    daemon.runtime.handle(Asked())
    daemon.turn_until(lambda: daemon.runtime.left)
    (offer,) = daemon.store.load().outbox
    assert (offer.facts.ended, offer.facts.agents) == ("drain", 2)
    assert adapters.read(daemon.update()).factors[least_squares.MODULE].rank == 4
