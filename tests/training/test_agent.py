"""The agent as the daemon runs it: a subprocess on a pair of pipes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest

from edge_daemon.protocol import (
    Beat,
    Failed,
    FromAgent,
    Pause,
    Probe,
    Probed,
    Progressed,
    Resume,
    Shutdown,
    Stop,
    Train,
    Trained,
)
from shared import adapter
from shared.frames import FrameReader, FrameWriter
from shared.jobs import TrainingSpec
from shared.messages import Assignment
from shared.modeling import base_model, checkpoint, weights
from shared.modeling.base_model import Base
from tests.training.tiny_models import (
    COLOURS,
    assignment,
    colour_rows,
    empty_adapter,
    global_adapter,
    write_adapter,
    write_jsonl,
)

T = TypeVar("T")
PATIENCE_S = 60.0


class Agent:
    """A running agent and what it says."""

    def __init__(self) -> None:
        agent_reads, writes = os.pipe()
        reads, agent_writes = os.pipe()
        command = [sys.executable, "-m", "edge_daemon.training.agent"]
        self.process = subprocess.Popen(
            [*command, "--read-fd", str(agent_reads), "--write-fd", str(agent_writes)],
            pass_fds=(agent_reads, agent_writes),
        )
        os.close(agent_reads)
        os.close(agent_writes)
        self._pipe = os.fdopen(writes, "wb")
        self._writer = FrameWriter(self._pipe)
        self._inbox: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, args=(os.fdopen(reads, "rb"),), daemon=True).start()

    def _read(self, pipe: Any) -> None:
        reader: FrameReader[Any] = FrameReader(pipe, FromAgent)  # type: ignore[arg-type]  # a union is no class
        while (message := reader.read()) is not None:
            self._inbox.put(message)
        self._inbox.put(None)

    def say(self, message: object) -> None:
        self._writer.write(message)

    def hear(self, wanted: type[T], suits: Callable[[T], bool] = lambda _: True) -> T:
        """The next message of type `wanted`; others before it are passed over, but not an answer to work."""
        while True:
            message = self._inbox.get(timeout=PATIENCE_S)
            assert message is not None, "the agent ended"
            if isinstance(message, wanted) and suits(message):
                return message
            assert not isinstance(message, Trained | Failed), message

    def ask(self, message: object, wanted: type[T]) -> T:
        self.say(message)
        return self.hear(wanted)

    def said_nothing_but(self, kind: type[object], seconds: float) -> bool:
        """Whether only messages of `kind` came in for so long."""
        until = time.monotonic() + seconds
        try:
            while (left := until - time.monotonic()) > 0.0:
                message = self._inbox.get(timeout=left)
                if not isinstance(message, kind):
                    return False
        except queue.Empty:
            pass
        return True

    def hang_up(self) -> None:
        self._pipe.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def probe(colours: Path, **more: str) -> Probe:
    return Probe(datasets={"colours": str(colours), **more}, share_labels=True, threads=1, beat_s=1.0)


@contextlib.contextmanager
def running(colours: Path) -> Iterator[Agent]:
    """A probed agent that leaves when it is told to."""
    agent = Agent()
    agent.ask(probe(colours), Probed)
    yield agent
    agent.say(Shutdown())
    assert agent.process.wait(timeout=PATIENCE_S) == 0


class Site:
    """A device's folder with everything a piece of work needs."""

    def __init__(self, folder: Path, model: Path, colours: Path) -> None:
        self.folder, self.model, self.colours = folder, model, colours
        self.digest = weights.base_digest(model)
        self.base: Base = base_model.load(model, COLOURS)

    def train(
        self, name: str, *, round: int = 1, data: Path | None = None, base: Path | None = None, **work: Any
    ) -> Train:
        """A request; keyword arguments as for `assignment` and `Train`."""
        given = self.folder / f"{name}.global"
        start = empty_adapter(self.base) if round == 1 else global_adapter(self.base, 3)
        content = write_adapter(given, adapter.Adapter(**{**vars(start), "base_digest": self.digest}))
        limits = {key: work.pop(key) for key in ("train_for_s", "batch_limit") if key in work}
        digest = work.pop("digest", self.digest)
        made: Assignment = assignment(self.base, digest=digest, content=content, round=round, **work)
        return Train(
            assignment=made, base_path=str(base or self.model), data_path=str(data or self.colours),
            adapter_path=str(given), update_path=str(self.folder / f"{name}.update"),
            checkpoint_dir=str(self.folder / "work" / name), **limits,
        )  # fmt: skip


@pytest.fixture(scope="module")
def agent(colours: Path) -> Iterator[Agent]:
    """One agent for the tests that leave it alive; each starts and ends with nothing under way."""
    with running(colours) as one:
        yield one


@pytest.fixture
def site(tmp_path: Path, bert: Path, colours: Path) -> Site:
    return Site(tmp_path, bert, colours)


def test_probing_gives_proven_bits_and_the_state_of_the_data(agent: Agent, colours: Path, tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    probed = agent.ask(probe(colours, gone=str(tmp_path / "none.jsonl"), empty=str(empty)), Probed)
    assert probed.bits == [32, 16, 8, 4]
    assert probed.datasets["colours"].rows == 60
    assert sum(probed.datasets["colours"].labels.values()) == 60
    assert set(probed.datasets) == {"colours"}
    assert "no such data file" in probed.notes["gone"]
    assert "no rows" in probed.notes["empty"]
    assert probed.flops > 1e7
    assert probed.agent_bytes > 50_000_000
    quiet = agent.ask(Probe(datasets={"colours": str(colours)}, threads=1), Probed)
    assert quiet.datasets["colours"].labels == {}


@pytest.mark.parametrize(("bits", "round"), [(32, 1), (32, 2), (16, 2), (8, 2), (4, 2)])
def test_work_gives_an_update_on_disk(agent: Agent, site: Site, bits: Any, round: int) -> None:
    request = site.train("w", bits=bits, round=round, steps=4, batch=5)
    trained = agent.ask(request, Trained)
    content = Path(request.update_path).read_bytes()
    assert (trained.sha, trained.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (trained.job, trained.round, trained.attempt) == ("test", round, 1)
    update = adapter.read(content)
    assert (update.kind, update.round, update.base_digest) == ("update", round, site.digest)
    assert {part.trained for part in update.factors.values()} == {0 if round == 1 else 2}
    facts = trained.facts
    assert (facts.samples, facts.steps, facts.batch, facts.batch_limit) == (20, 4, 5, 0)
    assert (facts.bits, facts.ended) == (bits, "complete")
    assert facts.peak_bytes >= facts.base_bytes > 50_000_000
    assert facts.step_s > 0 and facts.train_s > 0 and facts.cores_used > 0
    tensors = [t for part in update.factors.values() for t in (part.b, part.a)] + list(update.dense.values())
    assert facts.norm == pytest.approx(float(np.sqrt(sum(float((t.astype("f8") ** 2).sum()) for t in tensors))))


@pytest.mark.parametrize("bits", [32, 8])
def test_an_agent_tells_what_matters_if_it_is_asked(agent: Agent, site: Site, bits: Any) -> None:
    """In the first round, too, where B = 0 at the first step: that one step is left out."""
    facts = agent.ask(site.train("s", bits=bits, steps=5, score=True), Trained).facts
    assert set(facts.importance) == set(site.base.linears)
    assert sum(facts.importance.values()) == pytest.approx(1.0)
    assert min(facts.importance.values()) > 0
    again = agent.ask(site.train("t", bits=bits, steps=5, score=True), Trained).facts
    assert again.importance == facts.importance
    assert agent.ask(site.train("u", bits=bits, steps=1, score=True), Trained).facts.importance == {}, "B = 0 all along"
    assert agent.ask(site.train("v", bits=bits, steps=2), Trained).facts.importance == {}


def test_the_base_stays_loaded_between_rounds(agent: Agent, site: Site) -> None:
    assert agent.ask(site.train("a", bits=16), Trained).facts.load_s > 0
    assert agent.ask(site.train("b", bits=16, round=2), Trained).facts.load_s == 0
    assert agent.ask(site.train("c", bits=32, round=2), Trained).facts.load_s > 0


def test_the_same_work_gives_the_same_bytes(agent: Agent, site: Site) -> None:
    first = agent.ask(site.train("a"), Trained)
    agent.ask(site.train("b", round=2), Trained)
    assert agent.ask(site.train("c"), Trained).sha == first.sha


def test_rows_left_out_are_neither_trained_on_nor_counted(agent: Agent, site: Site, tmp_path: Path) -> None:
    """The same bytes as from a file that lacks them."""
    lines = site.colours.read_text().splitlines(keepends=True)
    rest = tmp_path / "rest.jsonl"
    rest.write_text("".join(line for number, line in enumerate(lines, start=1) if number % 5))
    order = msgspec.structs.replace(site.train("left-out"), hold_out=0.2)
    lacking = agent.ask(site.train("lacking", data=rest), Trained)
    assert agent.ask(order, Trained).sha == lacking.sha
    assert agent.ask(site.train("whole"), Trained).sha != lacking.sha
    counted = agent.ask(msgspec.structs.replace(probe(site.colours), hold_out=0.2), Probed).datasets["colours"]
    assert counted == agent.ask(probe(rest), Probed).datasets["colours"]


def test_codecs_shrink_the_update(agent: Agent, site: Site) -> None:
    sizes = [
        agent.ask(site.train(codec, training=TrainingSpec(codec=codec)), Trained).size
        for codec in ("fp32", "bf16", "int8")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert adapter.read_file(site.folder / "int8.update").factors


def test_a_pause_stops_the_steps_until_it_is_lifted(agent: Agent, site: Site) -> None:
    agent.say(site.train("p", steps=1500))
    agent.hear(Progressed)
    agent.say(Pause(reason="foreign load"))
    agent.hear(Beat, lambda beat: beat.what == "paused")
    assert agent.said_nothing_but(Beat, 0.8)
    agent.say(Resume())
    later = agent.hear(Progressed)
    agent.say(Stop())
    trained = agent.hear(Trained)
    assert later.step <= trained.facts.steps < 1500
    assert trained.facts.ended == "drain"
    assert trained.facts.paused_s > 0
    assert trained.facts.samples == 4 * trained.facts.steps


def test_the_time_limit_gives_partial_work(agent: Agent, site: Site) -> None:
    trained = agent.ask(site.train("t", steps=100_000, train_for_s=2.0), Trained)
    assert trained.facts.ended == "time"
    assert 0 < trained.facts.steps < 100_000
    assert adapter.read_file(Path(site.folder / "t.update")).factors


def test_while_there_is_time_it_goes_on(agent: Agent, site: Site) -> None:
    for name, extra, limit_s in (("more", 100_000, 2.0), ("few", 2, 600.0)):
        facts = agent.ask(site.train(name, steps=2, extra_steps=extra, train_for_s=limit_s), Trained).facts
        assert facts.ended == "complete" and facts.samples == 4 * facts.steps
        assert facts.steps == 4 if name == "few" else 2 < facts.steps < 100_000


def test_time_that_is_over_is_enough_for_a_step(agent: Agent, site: Site) -> None:
    """Loading, or fetching, took it all: what the step shows is known from then on."""
    trained = agent.ask(site.train("one", steps=100_000, train_for_s=1e-3), Trained)
    assert (trained.facts.ended, trained.facts.steps) == ("time", 1)
    again = agent.ask(site.train("two", steps=100_000, train_for_s=1e-3), Trained)
    assert again.facts.steps == 1, "what one work needed the next has, too"


def test_what_a_checkpoint_holds_is_delivered_by_an_agent_that_has_no_time(site: Site, colours: Path) -> None:
    """It has to load first, and no check of the time on the way may keep it from that."""
    request = site.train("g", steps=100_000)
    first = Agent()
    first.ask(probe(colours), Probed)
    first.say(request)
    first.hear(Progressed, lambda told: told.step >= 4)
    first.kill()
    last = Agent()
    last.ask(probe(colours), Probed)
    trained = last.ask(msgspec.structs.replace(request, train_for_s=1e-6), Trained)
    last.kill()
    assert trained.facts.ended == "time"
    assert trained.facts.steps >= 4 and trained.facts.steps % 2 == 0
    assert trained.facts.samples == 4 * trained.facts.steps


def test_told_that_its_time_is_over_it_ends_after_a_step(agent: Agent, site: Site) -> None:
    agent.say(site.train("early", steps=100_000))
    agent.say(Stop(after_step=True))
    assert (facts := agent.hear(Trained).facts).ended == "time" and facts.steps == 1
    agent.say(site.train("late", steps=100_000))
    seen = agent.hear(Progressed, lambda told: told.step >= 3)
    agent.say(Stop(after_step=True))
    assert (facts := agent.hear(Trained).facts).ended == "time" and seen.step <= facts.steps < 100_000
    assert agent.ask(site.train("next"), Trained).facts.steps == 6, "it held for that work alone"


def test_discarded_work_leaves_no_update(agent: Agent, site: Site) -> None:
    agent.say(site.train("d", steps=100_000))
    agent.hear(Progressed)
    agent.say(Stop(discard=True))
    failed = agent.hear(Failed)
    assert (failed.kind, failed.reason) == ("stopped", "discarded as asked")
    assert not (site.folder / "d.update").exists()


def test_newer_work_replaces_what_is_under_way(agent: Agent, site: Site) -> None:
    agent.say(site.train("old", steps=100_000))
    agent.hear(Progressed)
    agent.say(site.train("new", round=2))
    assert agent.hear(Failed).round == 1
    assert agent.hear(Trained).round == 2


def test_work_that_can_not_be_done_is_refused_in_one_line(agent: Agent, site: Site, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [*colour_rows(3), {"text": "sea", "label": 9}])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    nan = site.train("nan", training=TrainingSpec(lr=1e30, max_grad_norm=0.0), steps=30)
    foreign = site.train("foreign")
    write_adapter(Path(foreign.adapter_path), empty_adapter(site.base, digest="another"))
    torn = site.train("torn")
    Path(torn.adapter_path).write_bytes(b"\x81")
    lost = site.train("lost")
    Path(lost.adapter_path).unlink()
    cases = [
        (site.train("a", base=tmp_path / "none"), "model", "no such model folder"),
        (site.train("b", digest="0" * 64), "model", "the job's is 000000000000"),
        (site.train("c", data=tmp_path / "none.jsonl"), "data", "no such data file"),
        (site.train("d", data=bad), "data", "row 4 has label 9, the job has labels 0 to 2"),
        (site.train("e", data=empty), "data", "no rows"),
        (site.train("f", ranks={"nowhere": 2}), "adapter", "ranks name nowhere"),
        (foreign, "adapter", "made for another base"),
        (torn, "adapter", "not an adapter"),
        (lost, "adapter", "can't be read: No such file"),
        (nan, "internal", "the loss became"),
        (site.train("g", steps=3, train_for_s=1e-6), "stopped", "before the first step"),
    ]
    for request, kind, says in cases:
        failed = agent.ask(request, Failed)
        assert failed.kind == kind, failed
        assert says in failed.reason
        assert "\n" not in failed.reason
        assert not Path(request.update_path).exists()
    assert agent.ask(site.train("fine"), Trained).facts.steps == 6


def test_killed_in_the_middle_it_resumes_to_the_same_bytes(site: Site, colours: Path, agent: Agent) -> None:
    training = TrainingSpec(lr=1e-3, checkpoint_every=5)
    whole = agent.ask(site.train("whole", steps=400, training=training), Trained)
    request = site.train("cut", steps=400, training=training)
    first = Agent()
    first.ask(probe(colours), Probed)
    first.say(request)
    first.hear(Progressed, lambda progress: progress.step > 10)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    done = checkpoint.load_checkpoint(Path(request.checkpoint_dir), checkpoint.identity(request.assignment))
    assert done is not None
    assert 5 <= done[0].step < 400
    trained = agent.ask(request, Trained)
    assert trained.facts.steps == 400
    assert trained.sha == whole.sha


def test_without_its_daemon_it_saves_and_leaves(site: Site, colours: Path) -> None:
    running = Agent()
    running.ask(probe(colours), Probed)
    request = site.train("left", steps=100_000, training=TrainingSpec(checkpoint_every=100_000))
    running.say(request)
    running.hear(Progressed)
    running.hang_up()
    assert running.process.wait(timeout=PATIENCE_S) == 0
    assert checkpoint.load_checkpoint(Path(request.checkpoint_dir), checkpoint.identity(request.assignment))
