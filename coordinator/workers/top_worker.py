"""The top worker of split learning: holds the upper part of the model and conducts the steps of a round over its own
connection to the broker.

`python -m coordinator.workers.top_worker --read-fd R --write-fd W`. It decides by `coordinator.core.split_round`, and
computes by `coordinator.workers.top_model`. Killed, it is started again with the same request.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coordinator.core import split_round as conduct
from coordinator.core.planning.cost_model import measures_link
from coordinator.core.planning.regulation import again
from coordinator.core.split_round import SplitRound
from coordinator.workers.protocol import (
    Exit,
    TopFinish,
    TopRound,
    TopTrained,
    TopWithout,
    ToTop,
    WorkerFailed,
)
from coordinator.workers.pulse import Pulse, Writer
from coordinator.workers.top_link import Link
from shared import logs, steps
from shared.errors import DecodeError, MusterError, UserError
from shared.files import write_whole
from shared.frames import FrameReader, FrameWriter
from shared.subprocess_pipe import read_all
from shared.transport.base import Connected, Disconnected, Received, TransportFailed

log = logging.getLogger(__name__)
TICK_S = 0.2
REMEMBERED = 16
"""Works that are over, whose devices are told so."""


class _Closed:
    """The coordinator is gone."""


class Conductor:
    """One round: the decisions, the tensors, and what is said. Raises `MusterError` where the model can't be had."""

    def __init__(
        self, order: TopRound, link: Link, beat: Any, base: Any, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        from coordinator.workers.top_model import TopModel

        self.order = order
        self._link = link
        self._beat = beat
        self._clock = clock
        self._folder = Path(order.folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.model = TopModel(base, order)
        self.model.checkpoints.check()
        if 0 not in self.model.checkpoints.held():
            self.model.save(0)
        link.expect(dict.fromkeys(order.batches, self.model.message_bytes))
        self.round = SplitRound(
            order.work, order.batches, steps=order.steps, every=order.job.training.checkpoint_every,
            held=self.model.checkpoints.held(), run=self._next_run(), step_s=order.split.step_s,
            regulate=self._regulated if order.regulation is not None else None,
        )  # fmt: skip
        self._features: dict[tuple[str, int], steps.Features] = {}
        self._kept: dict[str, deque[steps.Gradient]] = {}
        """The last gradients of each device: they may be asked for again."""
        self._idle_since: float | None = None
        self.waited_s = 0.0

    def _next_run(self) -> int:
        """A number that no run of this work had; on the disk before it is said."""
        path = self._folder / "run"
        before = int(path.read_text(encoding="ascii")) if path.is_file() else 0
        # Runs may rise many times before the next death.
        write_whole(path, str(before + 1_000_000).encode())
        return before + 1

    def _regulated(self, fetched: Mapping[str, float]) -> dict[str, int]:
        """The batches of these devices by the links of this round; `fetched`: seconds that their downloads took."""
        regulation, size = self.order.regulation, self.order.fetched
        assert regulation is not None
        links = {device: size / took for device, took in fetched.items() if measures_link(size, took)}
        batches = {device: self.order.batches[device] for device in fetched}
        found = again(regulation, batches, links)
        for device, link in sorted(links.items()):
            if found[device] != batches[device]:
                link_mb = f"{link / 1e6:.2f} MB/s of its download"
                log.info(
                    "%s: %s: batch %d for %d by %s", self.order.work, device, found[device], batches[device], link_mb
                )
        return found

    def start(self) -> None:
        """Ask the devices."""
        self._do(self.round.start(self._clock()))

    def hear(self, device: str, message: steps.Up) -> None:
        """Take what a device says."""
        now = self._clock()
        if isinstance(message, steps.Hello):
            self._do(self.round.on_hello(device, message, now))
            return
        if self.round.wants(device, message):
            self._features[device, message.step] = message
        self._do(self.round.on_features(device, message, now))

    def without(self, devices: list[str]) -> None:
        """These will not come."""
        self._do(self.round.without(devices, self._clock()))

    def tick(self) -> None:
        """Let time pass."""
        self._do(self.round.tick(self._clock()))

    def finish(self) -> None:
        """End with what is done."""
        if self.round.phase != "over":
            self._do(self.round.end())

    def _do(self, actions: list[conduct.Action]) -> None:
        todo = deque(actions)
        while todo:
            match todo.popleft():
                case conduct.Say(device, message):
                    self._link.send(device, message)
                case conduct.Again(device, step):
                    for gradient in self._kept.get(device, ()):
                        if gradient.step == step:
                            self._link.send(device, gradient)
                case conduct.GoTo(step):
                    self._features.clear()
                    self._kept.clear()
                    self._idle_since = self._clock()
                    if not self.model.load(step):
                        raise UserError(f"checkpoint {step} of {self.order.work} can't be read any more")
                case conduct.Note(text):
                    log.info("%s: %s", self.order.work, text)
                case conduct.Take() as take:
                    todo.extend(self._take(take))

    def _take(self, take: conduct.Take) -> list[conduct.Action]:
        if self._idle_since is not None:
            self.waited_s += self._clock() - self._idle_since
        parts = {}
        for device in take.devices:
            features = self._features.pop((device, take.step), None)
            try:
                if features is None:
                    raise DecodeError("they are not there")
                parts[device] = self.model.part(features, device)
            except (DecodeError, ValueError) as error:
                self._refuse(device, take.step, error)
        self._beat("stepping")
        answers = self._computed(parts, take.step)
        self._idle_since = self._clock()
        if not answers:
            return self.round.untaken(self._idle_since)
        for device in parts.keys() - answers.keys():
            self.round.refuse(device, take.step)
        self._answer(take.step, answers)
        actions = self.round.taken(self._idle_since)
        if self.round.due_save:
            self.model.save(self.round.done)
            self.round.saved(self.model.checkpoints.held())
        return actions

    def _computed(self, parts: dict[str, Any], step: int) -> dict[str, Any]:
        """The answers of the step; whose features make no numbers of it is left out, the largest first."""
        while parts:
            try:
                found: dict[str, Any] = self.model.take(parts, step - 1)
                return found
            except DecodeError as error:
                worst = max(parts, key=lambda device: (float(parts[device].hidden.abs().max()), device))
                self._refuse(worst, step, error)
                del parts[worst]
        return {}

    def _refuse(self, device: str, step: int, error: Exception) -> None:
        log.warning("%s: features of %s refused: %s", self.order.work, device, error)
        self.round.refuse(device, step)

    def _answer(self, step: int, answers: dict[str, Any]) -> None:
        from shared import tensors

        for device, answer in answers.items():
            plain = answer.gradient.detach().to("cpu").float().numpy()
            message = steps.Gradient(
                work=self.order.work, run=self.round.run, step=step, loss=answer.loss,
                hidden=tensors.encode(plain, self.order.split.codec),
            )  # fmt: skip
            self._kept.setdefault(device, deque(maxlen=steps.UNDER_WAY)).append(message)
            self._link.send(device, message)


class TopWorker:
    """The main loop: requests from the pipe and messages from the broker, one after the other."""

    def __init__(
        self, writer: Writer, link: Link | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._writer = writer
        self._link = link or Link(self.inbox)
        self._clock = clock
        self._round: Conductor | None = None
        self._over: deque[str] = deque(maxlen=REMEMBERED)
        self._before: Conductor | None = None
        """The round that ended last: its last gradients may be asked for again."""
        self.beat = Pulse(writer)
        self._owes = False
        """Whether a request waits for its answer."""
        self._loaded: tuple[tuple[object, ...], Any] | None = None

    def serve(self) -> int:
        """Answer until the pipe ends or `Exit`; the exit status."""
        while True:
            try:
                event = self.inbox.get(timeout=TICK_S)
            except queue.Empty:
                event = None
            if isinstance(event, (_Closed, Exit)):
                self.close()
                return 0
            self.turn(event)

    def turn(self, event: object) -> None:
        """Take an event (None: there was none) and let time pass."""
        try:
            self._handle(event)
        except MusterError as error:
            self._fail(str(error), operator=isinstance(error, UserError))
        except MemoryError:
            self._fail("out of memory: the upper part of the model and the merged batch do not fit", operator=True)
        except Exception as error:  # noqa: BLE001  # the loop: a fault of ours becomes an answer
            log.exception("a turn failed")
            self._fail(f"{type(error).__name__}: {error}"[:300], operator=False)

    def close(self) -> None:
        """Leave the broker."""
        self._link.close()

    def _handle(self, event: object) -> None:
        match event:
            case TopRound():
                self._begin(event)
            case TopWithout():
                if self._round is not None:
                    self._round.without(event.devices)
            case TopFinish():
                if self._round is not None:
                    self._round.finish()
            case Connected():
                self._link.connected(event)
                if self._round is not None and self._round.round.phase == "gathering":
                    self._round.tick()
            case Received():
                self._hear(event)
            case Disconnected() | TransportFailed():
                log.warning("no broker: %s", event.reason)
            case _:
                pass
        if self._round is None:
            return
        self._round.tick()
        self.beat(self._round.round.phase)
        if self._round.round.phase == "over":
            self._end(self._round)

    def _hear(self, received: Received) -> None:
        heard = self._link.read(received)
        if heard is None:
            return
        device, message = heard
        here = (one for one in (self._round, self._before) if one is not None and one.order.work == message.work)
        if (conductor := next(here, None)) is not None:
            conductor.hear(device, message)
        elif message.work in self._over:
            self._link.send(device, steps.End(work=message.work, run=message.run))

    def _begin(self, order: TopRound) -> None:
        self._round = self._before = None
        self._owes = True
        self._link.open(order.broker, order.fleet, order.name)
        if order.over:
            self._over.append(order.work)
            # Whoever missed the end sends features, of a size that only the model could tell.
            self._link.expect(dict.fromkeys(order.batches, steps.MAX_STEP_BYTES))
            self._answer(TopTrained(updates=[], steps=0, loss=0.0))
            return
        self._round = Conductor(order, self._link, self.beat, self._upper(order), self._clock)
        self._round.start()

    def _upper(self, order: TopRound) -> Any:
        """The upper part of the base; loaded once for all rounds with the same cut."""
        from shared.modeling import base_model, split, weights

        task = order.job.task
        key = (order.base_path, order.base_digest, task, order.split.block)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self.beat("loading")
            folder = weights.resolve(order.base_path, order.job.base.revision, hub=True)
            if weights.base_digest(folder, None) != order.base_digest:
                raise UserError(f"{order.base_path}: another base than the job began with")
            base = base_model.load(folder, task, beat=self.beat)
            split.upper(base, order.split.block)
            self._loaded = (key, base)
        return self._loaded[1]

    def _end(self, done: Conductor) -> None:
        self._round, self._before = None, done
        self._over.append(done.order.work)
        updates = done.model.updates()
        answer = TopTrained(
            updates=updates, steps=done.round.done, loss=done.model.loss, dropped=done.round.dropped,
            waited_s=done.waited_s,
        )  # fmt: skip
        log.info("%s: %d steps, loss %.3f", done.order.work, answer.steps, answer.loss)
        self._answer(answer)

    def _fail(self, reason: str, *, operator: bool) -> None:
        log.error("%s", reason)
        self._round = None
        if self._owes:
            self._answer(WorkerFailed(reason=reason, operator=operator))

    def _answer(self, answer: TopTrained | WorkerFailed) -> None:
        self._writer.write(answer)
        self._owes = False


def main(argv: list[str] | None = None) -> int:
    """Entry point of the subprocess."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read-fd", type=int, required=True)
    parser.add_argument("--write-fd", type=int, required=True)
    arguments = parser.parse_args(argv)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    logs.set_up("muster-top", os.environ.get("MUSTER_LOG_LEVEL", "INFO"))
    with os.fdopen(arguments.read_fd, "rb") as read, os.fdopen(arguments.write_fd, "wb") as write:
        worker = TopWorker(FrameWriter(write))
        reader: FrameReader[ToTop] = FrameReader(read, ToTop)  # type: ignore[arg-type]  # a union is no class
        heard = (reader, worker.inbox.put, lambda _problem: worker.inbox.put(_Closed()), "coordinator")
        threading.Thread(target=read_all, args=heard, name="pipe-reader", daemon=True).start()
        code = worker.serve()
        # The reading thread may still hold its end of the pipe, which could then not be closed.
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
