"""The agent for fault tests: the same pipe protocol as the real one, least squares in numpy, no torch.

    python -m muster.testbed.numpy_agent --read-fd R --write-fd W

Faults are asked for by environment variables, so that the daemon under test is the ordinary one:
MUSTER_TEST_STEP_S: seconds to sleep per step, and before a release is measured.
MUSTER_TEST_ECHO=1: return the initial factors at once.
MUSTER_TEST_CRASH_AT=N and MUSTER_TEST_HANG=N: exit with 70, or say nothing for ever, before step N (from 0): once per
work, or every time with "N!". MUSTER_TEST_SAMPLE_BYTES: memory to hold per sample of the batch.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import queue
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_daemon import protocol
from edge_daemon.training import merging
from muster.testbed import least_squares, least_squares_release
from muster.testbed.least_squares import Ended, Rows, Training
from shared import adapter as adapters
from shared.errors import DecodeError, MusterError, UserError
from shared.files import write_whole
from shared.frames import FrameReader, FrameWriter
from shared.held_out import places
from shared.ids import digest_of
from shared.messages import DatasetFacts

CRASH_CODE = 70
_PROGRESS_S = 0.5
FailureKind = Literal["data", "adapter", "stopped"]


class Leave(Exception):
    """The daemon is gone or said `Shutdown`."""


class Discarded(Exception):
    """The work under way is to be forgotten."""


@dataclass
class Hooks:
    """The faults this process was asked for."""

    step_s: float = float(os.environ.get("MUSTER_TEST_STEP_S", "0"))
    echo: bool = os.environ.get("MUSTER_TEST_ECHO", "") == "1"
    crash_at: str = os.environ.get("MUSTER_TEST_CRASH_AT", "")
    hang_at: str = os.environ.get("MUSTER_TEST_HANG", "")
    sample_bytes: int = int(os.environ.get("MUSTER_TEST_SAMPLE_BYTES", "0"))

    def before(self, step: int, folder: Path) -> None:
        """Crash or hang here, if that was asked for."""
        if _due(self.crash_at, step, folder / "crashed"):
            os._exit(CRASH_CODE)
        if _due(self.hang_at, step, folder / "hung"):
            while True:
                time.sleep(3600)


def _due(wanted: str, step: int, marker: Path) -> bool:
    if not wanted or int(wanted.rstrip("!")) != step:
        return False
    if wanted.endswith("!"):
        return True
    if marker.exists():
        return False
    marker.touch()
    return True


@dataclass
class Clock:
    """Seconds of one piece of work in this process."""

    limit_s: float
    started: float = field(default_factory=time.monotonic)
    paused_s: float = 0.0
    steps: list[float] = field(default_factory=list)
    said: float = 0.0

    @property
    def over(self) -> bool:
        """Whether the time of the assignment is used up."""
        return self.limit_s > 0 and time.monotonic() - self.started >= self.limit_s


class Agent:
    """Answers one daemon over a pair of pipes until it says `Shutdown` or closes them."""

    def __init__(self, reader: FrameReader[protocol.ToAgent], writer: FrameWriter) -> None:
        self._writer = writer
        self._inbox: queue.SimpleQueue[protocol.ToAgent | None] = queue.SimpleQueue()
        self._hooks = Hooks()
        self._beat_s = 5.0
        self._rows: dict[tuple[str, str], Rows] = {}
        threading.Thread(target=self._read, args=(reader,), name="pipe", daemon=True).start()

    def _read(self, reader: FrameReader[protocol.ToAgent]) -> None:
        try:
            while (message := reader.read()) is not None:
                self._inbox.put(message)
        except (DecodeError, OSError):
            pass  # the daemon's end is broken: the same as its end
        self._inbox.put(None)

    def run(self) -> None:
        """Serve until the daemon is gone."""
        try:
            while True:
                match self._next(None):
                    case protocol.Probe() as probe:
                        self._probe(probe)
                    case protocol.Train() as train:
                        self._train(train)
                    case protocol.Merge() as order:
                        self._merge(order)
                    case protocol.Evaluate() as release:
                        self._writer.write(self._evaluate(release))
        except (Leave, BrokenPipeError):
            return

    def _next(self, timeout: float | None) -> protocol.ToAgent | None:
        """The next message within `timeout` seconds, else None. Raises `Leave`."""
        try:
            message = self._inbox.get(timeout=timeout) if timeout is None or timeout > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None
        if message is None or isinstance(message, protocol.Shutdown):
            raise Leave
        return message

    def _probe(self, probe: protocol.Probe) -> None:
        self._beat_s = probe.beat_s
        datasets: dict[str, DatasetFacts] = {}
        notes: dict[str, str] = {}
        for name, path in probe.datasets.items():
            try:
                with Path(path).open("rb") as file:
                    rows = sum(1 for _ in file)
                datasets[name] = DatasetFacts(rows=rows - len(places(rows, probe.hold_out)))
            except OSError as error:
                notes[name] = str(error)
        self._writer.write(
            protocol.Probed(
                bits=[16, 32],
                notes=notes,
                datasets=datasets,
                agent_bytes=_resident_bytes(),
                hardware="numpy",
                flops=_flops(),
            )
        )

    def _train(self, order: protocol.Train) -> None:
        try:
            self._work(order)
        except Discarded:
            self._fail(order, "stopped", "told to discard")
        except UserError as error:
            self._fail(order, "data", str(error))
        except MusterError as error:
            self._fail(order, "adapter", str(error))

    def _merge(self, order: protocol.Merge) -> None:
        try:
            self._writer.write(merging.merge(order))
        except (DecodeError, OSError) as error:
            self._writer.write(merging.failure(order, error))

    def _evaluate(self, order: protocol.Evaluate) -> protocol.Evaluated | protocol.Unfit:
        time.sleep(self._hooks.step_s)
        try:
            path = Path(order.data_path)
            rows = least_squares.read_rows(path, order.base.model) if order.data_path else None
        except UserError as error:
            return protocol.Unfit(release=order.release, kind="data", reason=str(error))
        return least_squares_release.evaluate(order, rows)

    def _fail(self, order: protocol.Train, kind: FailureKind, reason: str) -> None:
        work = order.assignment
        self._writer.write(
            protocol.Failed(job=work.job, round=work.round, attempt=work.attempt, kind=kind, reason=reason)
        )

    def _work(self, order: protocol.Train) -> None:
        folder = Path(order.checkpoint_dir)
        folder.mkdir(parents=True, exist_ok=True)
        work = order.assignment
        batch = min(work.work.batch, order.batch_limit) if order.batch_limit else work.work.batch
        training = least_squares.begin(
            work, adapters.read_file(Path(order.adapter_path)), self._data(order), batch=batch, fill=self._hooks.echo,
            part=order.part, parts=order.parts,
        )  # fmt: skip
        saved = folder / f"{work.job}-{work.round}-{work.attempt}-{order.part}-{order.parts}.npz"
        if saved.exists():
            training.restore(saved.read_bytes())
        clock = Clock(order.train_for_s)
        ballast = b"\x01" * (self._hooks.sample_bytes * batch)
        if self._hooks.echo:
            # Nothing was trained; claim the work, so that the coordinator takes the update.
            training.step_done, training.drawn = work.work.steps, work.work.steps * batch
        ended = "complete" if self._hooks.echo else self._steps(training, clock, saved)
        del ballast
        self._finish(order, training, clock, ended)
        saved.unlink(missing_ok=True)

    def _steps(self, training: Training, clock: Clock, saved: Path) -> Ended:
        every = training.assignment.training.checkpoint_every
        while not training.finished:
            if clock.over and (training.step_done or clock.limit_s <= protocol.NO_TIME_S):
                return training.assignment.work.ended(training.step_done)
            self._hooks.before(training.step_done, saved.parent)
            begun = time.monotonic()
            paused = clock.paused_s
            loss = training.step()
            drained = self._listen(clock, self._hooks.step_s)
            clock.steps.append(time.monotonic() - begun - (clock.paused_s - paused))
            if training.step_done % every == 0:
                write_whole(saved, training.save())
            self._report(training, clock, loss)
            if drained:
                return "drain"
        return "complete"

    def _listen(self, clock: Clock, seconds: float) -> bool:
        """Obey what arrives within `seconds` (pauses excluded); whether the work is to end now."""
        until = time.monotonic() + seconds
        while True:
            message = self._next(until - time.monotonic())
            match message:
                case None:
                    return False
                case protocol.Pause():
                    begun = time.monotonic()
                    stopped = self._paused()
                    clock.paused_s += time.monotonic() - begun
                    until += time.monotonic() - begun
                    if stopped:
                        return True
                case protocol.Stop(discard=True):
                    raise Discarded
                case protocol.Stop(after_step=True):
                    clock.limit_s = time.monotonic() - clock.started
                    return False
                case protocol.Stop():
                    return True

    def _paused(self) -> bool:
        while True:
            self._writer.write(protocol.Beat(what="paused"))
            match self._next(self._beat_s):
                case protocol.Resume():
                    return False
                case protocol.Stop(discard=True):
                    raise Discarded
                case protocol.Stop():
                    return True

    def _report(self, training: Training, clock: Clock, loss: float) -> None:
        now = time.monotonic()
        if now - clock.said < _PROGRESS_S and not training.finished:
            return
        clock.said = now
        self._writer.write(
            protocol.Progressed(
                step=training.step_done,
                steps=training.assignment.work.told_steps(training.step_done),
                samples=training.drawn,
                loss=loss,
                samples_per_s=training.batch * len(clock.steps) / max(sum(clock.steps), 1e-9),
            )
        )

    def _finish(self, order: protocol.Train, training: Training, clock: Clock, ended: Ended) -> None:
        data = training.update(order.device)
        write_whole(Path(order.update_path), data)
        facts = least_squares.facts_of(
            training,
            ended=ended,
            step_s=statistics.median(clock.steps) if clock.steps else 0.0,
            train_s=sum(clock.steps),
            paused_s=clock.paused_s,
            batch_limit=order.batch_limit,
            peak_bytes=_resident_bytes(),
        )
        work = order.assignment
        self._writer.write(
            protocol.Trained(
                job=work.job,
                round=work.round,
                attempt=work.attempt,
                sha=digest_of(data),
                size=len(data),
                facts=facts,
            )
        )

    def _data(self, order: protocol.Train) -> Rows:
        model = order.assignment.base.model
        key = (order.data_path, model)
        if key not in self._rows:
            self._rows[key] = least_squares.read_rows(Path(order.data_path), model)
        return least_squares_release.learned(self._rows[key], order.hold_out)


def _flops() -> float:
    """FLOP per second of a core in matrix products."""
    import numpy as np

    matrix = np.full((256, 256), 1 / 256, dtype=np.float32)
    matrix @ matrix
    begun, count = time.process_time(), 0
    while (took := time.process_time() - begun) < 0.02:
        matrix @ matrix
        count += 1
    return float(2 * 256**3 * count / took)


def _resident_bytes() -> int:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str] | None = None) -> int:
    """Entry point of the subprocess."""
    parser = argparse.ArgumentParser(prog="numpy_agent")
    parser.add_argument("--read-fd", type=int, required=True)
    parser.add_argument("--write-fd", type=int, required=True)
    options = parser.parse_args(argv)
    faulthandler.enable()
    with os.fdopen(options.read_fd, "rb") as incoming, os.fdopen(options.write_fd, "wb") as outgoing:
        wanted: type[protocol.ToAgent] = protocol.ToAgent  # type: ignore[assignment]  # a union is a type to msgspec
        Agent(FrameReader(incoming, wanted), FrameWriter(outgoing)).run()
        # The reader thread may still hold the pipe's lock; leave without waiting for it.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
