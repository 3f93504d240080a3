"""A round of split learning in one process: the device's loop in a thread for each, the top's conductor, and between
them packets that can be lost. Everything but the broker is real."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.core.planning.regulation import Regulation
from coordinator.workers.protocol import TopRound, TopUpdate
from coordinator.workers.top_worker import Conductor
from edge_daemon.protocol import StepIn, StepOut, Stop
from edge_daemon.training.control import Control, Stopped
from edge_daemon.training.split_loop import SplitLoop
from shared import adapter, steps
from shared.adapter import Adapter
from shared.jobs import BaseSpec, Bits, JobSpec, RoundsSpec, SplitSpec, StrategySpec, TaskSpec, TrainingSpec
from shared.messages import Assignment, BlobRef, Work
from shared.modeling import base_model, lora, split
from shared.modeling.data import TokenData, tokenize
from shared.settings import BrokerSettings
from tests.training.tiny_models import COLOURS

PACKET = 2048


class Wired(Control):
    """A control whose packets go to `rig` instead of a pipe."""

    def __init__(self, rig: Rig, device: str) -> None:
        self.beat_s, self.deadline, self.paused_s = 5.0, None, 0.0
        self._rig, self._device = rig, device
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._waiting: list[Any] = []
        self._steps: deque[bytes] = deque()
        self._said = self._progressed = time.monotonic()

    def send(self, message: Any) -> None:
        if isinstance(message, StepOut):
            self._rig.sent(self._device, message.packet)

    def deliver(self, packet: bytes) -> None:
        self._inbox.put(StepIn(packet=packet))

    def end(self) -> None:
        """As a kill, as far as the work can tell: nothing more is written."""
        self._inbox.put(Stop(discard=True))


class Rig:
    """`shares`: device -> its rows. `loss`: share of the packets that never arrive."""

    def __init__(
        self, folder: Path, model: Path, shares: Mapping[str, Path], *, count: int = 8, batch: int = 4, rank: int = 2,
        task: TaskSpec = COLOURS, bits: Bits = 32, lost: float = 0.0, merges: bool = True, every: int = 2,
        training: TrainingSpec | None = None, asked: SplitSpec | None = None, given: Adapter | None = None,
        regulation: Regulation | None = None, fetched: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.model, self.shares, self.task, self.bits = folder, model, dict(shares), task, bits
        self.asked = asked or SplitSpec(block=1, codec="fp32", step_s=5.0, overlap=False)
        self.training = training or TrainingSpec(lr=5e-3, checkpoint_every=every, max_grad_norm=0.0)
        self.count, self.batch, self.rank, self.merges, self.lost = count, batch, rank, merges, lost
        self.regulation, self.fetched = regulation, dict(fetched or {})
        self.rng = random.Random(1)
        self.box: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.loops: dict[str, SplitLoop] = {}
        self.ended: dict[str, str] = {}
        self.threads: dict[str, threading.Thread] = {}
        whole = base_model.load(model, task, 32)
        dense = base_model.fresh_head(whole, 3)
        if self.asked.tuning == "full":
            dense = {name: tensor.detach().numpy().copy() for name, tensor in whole.model.named_parameters()} | dense
        self.modules = {one.name: one.block for one in whole.linears.values()}
        notes = {"start": "dense" if self.asked.tuning == "full" else "directions"}
        self.given = given or adapter.Adapter(
            kind="global", job="job", round=0, base_digest="digest", factors={}, dense=dense, notes=notes
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "global").write_bytes(adapter.write(self.given))
        self.top = self.start_top()
        for device in self.shares:
            self.start(device)

    # ---- the two sides

    def start_top(self) -> Conductor:
        """The top worker of the round, as a new process would begin it."""
        strategy = StrategySpec(name="mergesfl", rank=self.rank, batch=self.batch, split=self.asked)
        job = JobSpec(
            name="job", base=BaseSpec(model="tiny"), task=self.task, seed=3, strategy=strategy,
            rounds=RoundsSpec(count=1, local_steps=self.count), training=self.training,
        )  # fmt: skip
        order = TopRound(
            job=job, job_id="job", round=1, attempt=1, fleet="f", name="coord-1-top", broker=BrokerSettings(),
            base_path=str(self.model), base_digest="digest", adapter_path=str(self.folder / "global"),
            update_path=str(self.folder / "top-update"), folder=str(self.folder / "top"),
            batches=dict.fromkeys(self.shares, self.batch), steps=self.count, split=self.asked, merges=self.merges,
            regulation=self.regulation, fetched=(self.folder / "global").stat().st_size,
        )  # fmt: skip
        base = base_model.load(self.model, self.task, 32)
        split.upper(base, self.asked.block)
        self.top = Conductor(order, self, lambda _what: None, base)  # type: ignore[arg-type]  # we are its link
        self._numbers = self.rng.randrange(2**20) * 1000
        self.top.start()
        return self.top

    def start(self, device: str) -> None:
        """The device's work, as a new process would begin it."""
        base = base_model.load(self.model, self.task, self.bits)
        data: TokenData = tokenize(str(self.shares[device]), self.task, base.tokenizer)
        split.lower(base, self.asked.block)
        full = self.asked.tuning == "full"
        ranks = {} if full else {name: self.rank for name, block in self.modules.items() if block < self.asked.block}
        work = Assignment(
            job="job", round=1, attempt=1, base=BaseSpec(model="tiny"), base_digest="digest", task=self.task,
            work=Work(ranks=ranks, batch=self.batch, bits=self.bits, steps=self.count, split=self.asked),
            training=self.training, rounds=1, seed=3, adapter=BlobRef(sha="0" * 64, size=1),
        )  # fmt: skip
        carried = lora.carry(
            base, split.part_of(self.given, base), ranks, alpha_ratio=self.training.alpha_ratio, seed=3, round=1
        )
        place = self.folder / device
        place.mkdir(exist_ok=True)
        fetch_s = self.fetched.get(device, 0.0)
        loop = SplitLoop(base, carried, data, work, Wired(self, device), place, packet=PACKET, fetch_s=fetch_s)
        self.loops[device] = loop

        def run() -> None:
            try:
                self.ended[device] = loop.run()
            except Stopped:
                self.ended[device] = "killed"

        self.threads[device] = threading.Thread(target=run, daemon=True)
        self.threads[device].start()

    def kill(self, device: str) -> None:
        """End the device's work where it stands."""
        self.loops[device].control.end()  # type: ignore[attr-defined]  # it is ours
        self.threads[device].join(30)

    # ---- the link between them

    def sent(self, device: str, packet: bytes) -> None:
        """A device sent a packet."""
        if self.rng.random() >= self.lost:
            self.box.put((device, packet))

    def expect(self, sizes: Mapping[str, int]) -> None:
        """The largest messages: the link's part."""
        self._in = {device: steps.Assembler(down=False, limit=size) for device, size in sizes.items()}

    def send(self, device: str, message: steps.Down) -> None:
        """The top sends a message: the link's part."""
        self._numbers += 1
        for packet in steps.packets(message, self._numbers, PACKET):
            if device in self.loops and self.rng.random() >= self.lost:
                self.loops[device].control.deliver(packet)  # type: ignore[attr-defined]  # it is ours

    def turn(self, seconds: float = 0.05) -> None:
        """Hand the top what came, and let time pass."""
        try:
            device, packet = self.box.get(timeout=seconds)
        except queue.Empty:
            self.top.tick()
            return
        message = self._in[device].add(packet)
        if isinstance(message, steps.Up):
            self.top.hear(device, message)
        self.top.tick()

    def to(self, step: int, within_s: float = 60.0) -> None:
        """Until the top has done so many steps."""
        until = time.monotonic() + within_s
        while self.top.round.done < step and self.top.round.phase != "over":
            assert time.monotonic() < until, f"stuck at step {self.top.round.done}, {self.top.round.phase}"
            self.turn()

    def finish(self, within_s: float = 90.0) -> list[TopUpdate]:
        """To the end of the round on all sides."""
        until = time.monotonic() + within_s
        while self.top.round.phase != "over" or any(thread.is_alive() for thread in self.threads.values()):
            assert time.monotonic() < until, f"{self.top.round.done} steps, {self.top.round.phase}, ended {self.ended}"
            self.turn()
        return self.top.model.updates()

    def values(self, device: str) -> dict[str, Any]:
        """What a device trained."""
        return {n: t.detach().float().numpy().copy() for n, t in self.loops[device].carried.named().items()}

    def top_values(self) -> dict[str, Any]:
        """What the top trained."""
        return {n: t.detach().float().numpy().copy() for n, t in self.top.model.carried.named().items()}
