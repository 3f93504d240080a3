"""The agent: the subprocess of an edge daemon that holds the model and trains (`edge_daemon.protocol`).

`python -m edge_daemon.training.agent --read-fd R --write-fd W`. It keeps the base loaded between rounds; torch is
imported once the pipe is open.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import hashlib
import logging
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from edge_daemon.protocol import (
    INTEGRATED,
    NO_TIME_S,
    Beat,
    Evaluate,
    Evaluated,
    Failed,
    Merge,
    Merged,
    Probe,
    Probed,
    Shutdown,
    StepIn,
    ToAgent,
    Train,
    Trained,
    Unfit,
)
from edge_daemon.training.control import Control, PipeClosed, Stopped
from edge_daemon.training.memory import MemoryGauge, let_go, resident_bytes, shares_memory
from shared import logs
from shared.allocator import give_back
from shared.errors import DecodeError, UserError
from shared.files import write_whole
from shared.frames import FrameReader, FrameWriter
from shared.jobs import Bits
from shared.messages import Assignment, DatasetFacts, UpdateFacts
from shared.modeling.faults import OutOfMemory, is_out_of_memory

if TYPE_CHECKING:  # they import torch, which is loaded once the pipe is open
    from edge_daemon.training.loop import Loop
    from edge_daemon.training.split_loop import SplitLoop
    from shared.modeling.base_model import Base
    from shared.modeling.data import DataStore, TokenData

log = logging.getLogger(__name__)
Kind = Literal["memory", "data", "model", "bits", "adapter", "stopped", "internal"]
_LAST_WORDS_S = 10.0


class Refused(Exception):
    """The work can't be done; becomes `Failed`."""

    def __init__(self, kind: Kind, reason: str, batch_limit: int = 0) -> None:
        super().__init__(reason)
        self.kind = kind
        self.batch_limit = batch_limit


@dataclass
class _Loaded:
    """A base with its data, and what loading cost."""

    base: Base
    digest: str
    base_bytes: int


class Agent:
    """Serves the daemon's requests one after the other. `data_sets`: how many stay tokenised."""

    def __init__(self, control: Control, *, data_sets: int = 2) -> None:
        self._control = control
        self._data_sets = data_sets
        self._device = "cpu"
        self._bits: list[Bits] = []
        self._notes: dict[str, str] = {}
        self._loaded: _Loaded | None = None
        self._store: DataStore | None = None

    def serve(self) -> int:
        """Answer until `Shutdown` or the end of the pipe; the exit status."""
        while True:
            match self._control.next():
                case Probe() as probe:
                    self._control.send(self.probe(probe))
                case Train() as train:
                    self._serve(train)
                case Merge() as order:
                    self._control.send(self.merge(order))
                case Evaluate() as release:
                    answer = self.evaluate(release)
                    give_back()
                    let_go(self._device)
                    self._control.send(answer)
                case Shutdown() | None:
                    return 0
                case StepIn():
                    pass  # of work that is over
                case other:
                    log.debug("nothing under way for %s", type(other).__name__)

    def _serve(self, train: Train) -> None:
        answer = self.train(train)
        # Its factors and moments are held by cycles alone: the next work would find them still there.
        if shares_memory(self._device):
            give_back()
            self._control.send(msgspec.structs.replace(answer, held_bytes=let_go(self._device)))
        else:
            self._control.send(answer)
            give_back()

    def probe(self, probe: Probe) -> Probed:
        """Find out what this device can do, with real kernels and the real files."""
        self._control.beat_s = probe.beat_s
        self._control.send(Beat(what="starting"))
        _set_environment(probe)
        import torch

        self._control.beat("starting")
        torch.set_num_threads(max(1, probe.threads))
        self._device = "cuda" if probe.gpu and torch.cuda.is_available() else "cpu"
        from shared.modeling import base_model, data, quantization, speed

        self._store = data.DataStore(keep=self._data_sets)
        self._bits, self._notes = quantization.probe_bits(self._device, self._control.beat)
        if probe.gpu and self._device == "cpu":
            self._bits, self._notes = [], {"gpu": f"{probe.gpu}: torch does not see this GPU"}
        flops = speed.measured(self._device, 16 in self._bits, self._control.beat) if self._bits else 0.0
        base_model.import_libraries(self._control.beat)
        notes = dict(self._notes)
        datasets: dict[str, DatasetFacts] = {}
        for name, source in sorted(probe.datasets.items()):
            self._control.beat("reading data sets")
            try:
                datasets[name] = data.describe(
                    source, share_labels=probe.share_labels, hub=probe.hub, hold_out=probe.hold_out
                )
            except UserError as error:
                notes[name] = str(error)
        return Probed(
            bits=self._bits, notes=notes, datasets=datasets, agent_bytes=resident_bytes(),
            hardware=_hardware(self._device), flops=flops,
        )  # fmt: skip

    def train(self, request: Train) -> Trained | Failed:
        """Do one piece of work."""
        assignment = request.assignment
        where = logs.trace(assignment.job, assignment.round, assignment.attempt)
        about = {"job": assignment.job, "round": assignment.round, "attempt": assignment.attempt, "trace": where}
        logs.about(device=request.device, **about)
        try:
            return self._work(request)
        except Refused as refused:
            kind, reason, limit = refused.kind, str(refused), refused.batch_limit
        except Stopped as stop:
            kind, reason, limit = "stopped", _stop_reason(stop), 0
        except PipeClosed:
            raise
        except Exception as error:  # noqa: BLE001  # the work loop: a fault of ours becomes an answer
            log.exception("work failed")
            if is_out_of_memory(error):
                kind, reason, limit = "memory", "out of memory while loading the model or the data", 0
            else:
                kind, reason, limit = "internal", f"{type(error).__name__}: {error}"[:300], 0
        finally:
            self._control.deadline = None
        return Failed(
            job=assignment.job, round=assignment.round, attempt=assignment.attempt, kind=kind, reason=reason,
            batch_limit=limit,
        )  # fmt: skip

    def merge(self, order: Merge) -> Merged | Failed:
        """Make one update of what the agents of this device trained."""
        from edge_daemon.training import merging

        try:
            return merging.merge(order)
        except (DecodeError, OSError, ValueError, MemoryError) as error:
            return merging.failure(order, error)

    def evaluate(self, order: Evaluate) -> Evaluated | Unfit:
        """Measure a release. The base of the last work is let go: there may be no room for two."""
        from edge_daemon.training.evaluating import Trial

        assert self._store is not None
        self._loaded = None
        gc.collect()
        return Trial(order, self._control, self._device, self._store).run()

    def _work(self, request: Train) -> Trained:
        from edge_daemon.training import carrying, loop

        assignment = request.assignment
        gauge = MemoryGauge(self._device)
        started = self._control.now()
        loaded, fresh = self._load(request)
        data, data_fresh = self._data(request, loaded)
        try:
            carried, pruner = carrying.carry(request, loaded.base)
        except carrying.Unfit as error:
            raise Refused(error.kind, str(error)) from error
        load_s = self._control.now() - started if fresh or data_fresh else 0.0
        given = (loaded.base, carried, data, assignment, self._control, Path(request.checkpoint_dir))
        parts = (request.batch_limit, request.part, request.parts, pruner)
        if assignment.work.split is None:
            work = loop.Loop(*given, *parts)
        else:
            work = self._split_loop()(*given, *parts, packet=request.packet, fetch_s=request.fetch_s)
        # Not before: work whose time is over has to be loaded to deliver what its checkpoint holds.
        self._control.deadline = started + request.train_for_s if request.train_for_s > 0 else None
        self._control.heeds_time = 0 < request.train_for_s <= NO_TIME_S
        try:
            ended = work.run()
        except OutOfMemory as error:
            raise Refused("memory", str(error)) from error
        except loop.Diverged as error:
            raise Refused("internal", str(error)) from error
        if not work.position.step:
            raise Stopped(ended)
        work.forget_moments()
        self._control.beat("saving")
        return self._deliver(request, work, ended, load_s, gauge.peak(), loaded)

    def _split_loop(self) -> type[SplitLoop]:
        from edge_daemon.training.split_loop import SplitLoop

        return SplitLoop

    def _load(self, request: Train) -> tuple[_Loaded, bool]:
        """The base the work wants, loaded now (True) or still there (False)."""
        from shared.modeling import base_model, weights
        from shared.modeling.faults import BitsFault, ModelFault

        assignment = request.assignment
        bits = assignment.work.bits
        if bits not in self._bits:
            raise Refused("bits", f"{bits} bits: {self._notes.get(str(bits), 'not proven on this device')}")
        cache = Path(request.digests_path) if request.digests_path else None
        try:
            folder = self._folder(request)
            digest = weights.base_digest(folder, cache)
            if digest != assignment.base_digest:
                raise Refused(
                    "model", f"{request.base_path}: digest {digest[:12]}, the job's is {assignment.base_digest[:12]}"
                )
            held = self._loaded
            if held and held.digest == digest and _same_model(held.base, assignment):
                return held, False
            self._loaded = held = None
            gc.collect()  # the old base is full of cycles, and there may be no room for two
            base = base_model.load(folder, assignment.task, bits, self._device, self._control.poll)
            if assignment.work.split is not None:
                from shared.modeling import split

                split.lower(base, assignment.work.split.block)
        except (ModelFault, BitsFault) as error:
            raise Refused("model", str(error)) from error
        self._loaded = _Loaded(base, digest, MemoryGauge.held(self._device))
        return self._loaded, True

    def _folder(self, request: Train) -> Path:
        """The base's folder, fetched where the device lacks it and the owner allows it."""
        from edge_daemon.training import fetching
        from shared.modeling import weights

        base, source = request.assignment.base, request.assignment.source
        if request.base_path or source is None:
            return weights.resolve(request.base_path, base.revision, hub=request.hub)
        return fetching.fetch(source, Path(request.bases_dir), request.disk_reserve, self._control.poll)

    def _data(self, request: Train, loaded: _Loaded) -> tuple[TokenData, bool]:
        from shared.modeling.faults import DataFault

        assert self._store is not None
        before = self._store.loads
        try:
            data = self._store.load(
                request.data_path, request.assignment.task, loaded.base.tokenizer, loaded.digest, hub=request.hub,
                beat=self._control.poll,
            )  # fmt: skip
        except DataFault as error:
            raise Refused("data", str(error)) from error
        return data.learned(request.hold_out), self._store.loads > before

    def _deliver(self, request: Train, work: Loop, ended: str, load_s: float, peak: int, loaded: _Loaded) -> Trained:
        from edge_daemon.training.loop import mean_ends
        from edge_daemon.training.merging import norm
        from shared import adapter, units
        from shared.modeling import lora
        from shared.norms import change_norm

        assignment, position = request.assignment, work.position
        update = lora.read_update(
            work.carried, job=assignment.job, round=assignment.round, attempt=assignment.attempt,
            base_digest=assignment.base_digest, device=request.device,
        )  # fmt: skip
        pruner = work.pruner
        if pruner is not None:
            update = dataclasses.replace(update, scores=units.pack_scores(pruner.scores))
        # A part of several is merged here, at full precision: only what travels is coded.
        content = adapter.write(update, assignment.training.codec if request.parts == 1 else "fp32")
        write_whole(Path(request.update_path), content)
        first, last = mean_ends(position.losses)
        facts = UpdateFacts(
            samples=position.samples,
            steps=position.step,
            batch=position.batch,
            batch_limit=position.batch_limit,
            bits=assignment.work.bits,
            loss_first=first,
            loss_last=last,
            step_s=statistics.median(position.step_seconds),
            train_s=position.train_s,
            load_s=load_s,
            paused_s=position.paused_s,
            peak_bytes=peak,
            base_bytes=loaded.base_bytes,
            cores_used=position.cpu_s / position.train_s if position.train_s > 0 else 0.0,
            ended="complete" if ended == "complete" else "time" if ended == "time" else "drain",
            norm=norm(update),
            importance=work.importance,
            change=change_norm(update, pruner.given, dense=False) if pruner else 0.0,
            kept=units.pack(pruner.known, pruner.kept) if pruner else {},
            requantized=pruner.requantized if pruner else 0.0,
            wait_s=statistics.fmean(position.waits) if position.waits else 0.0,
        )
        return Trained(
            job=assignment.job, round=assignment.round, attempt=assignment.attempt,
            sha=hashlib.sha256(content).hexdigest(), size=len(content), facts=facts,
        )  # fmt: skip


def _same_model(base: Base, assignment: Assignment) -> bool:
    task = assignment.task
    half = ("lower", assignment.work.split.block) if assignment.work.split is not None else None
    wanted = (assignment.work.bits, task.kind, len(task.labels), task.max_tokens, half)
    return (base.bits, base.kind, base.labels, base.max_tokens, base.half) == wanted


def _stop_reason(stop: Stopped) -> str:
    if stop.discard:
        return "discarded as asked"
    return "the time was up before the first step" if stop.ended == "time" else "stopped before the first step"


def _set_environment(probe: Probe) -> None:
    """What libraries read when they are first imported."""
    # CUDA's UUID of a Jetson is not one that it takes here.
    os.environ["CUDA_VISIBLE_DEVICES"] = "0" if probe.gpu == INTEGRATED else probe.gpu
    os.environ["OMP_NUM_THREADS"] = str(max(1, probe.threads))
    # Nothing here is compiled, and bitsandbytes would load the compiler: 40 MB.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if probe.threads > 1 else "false")


def _hardware(device: str) -> str:
    if device != "cpu":
        import torch

        return str(torch.cuda.get_device_name(0))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # no Path for one line
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""


def _leave() -> None:
    """The daemon is gone: the working thread has this long to save a checkpoint, and may hang in a kernel."""
    time.sleep(_LAST_WORDS_S)
    os._exit(1)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the subprocess."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read-fd", type=int, required=True)
    parser.add_argument("--write-fd", type=int, required=True)
    arguments = parser.parse_args(argv)
    faulthandler.enable()
    logs.set_up("muster-agent", os.environ.get("MUSTER_LOG_LEVEL", "INFO"))
    with os.fdopen(arguments.read_fd, "rb") as read, os.fdopen(arguments.write_fd, "wb") as write:
        reader: FrameReader[ToAgent] = FrameReader(read, ToAgent)  # type: ignore[arg-type]  # a union is no class
        try:
            return Agent(Control(reader, FrameWriter(write), _leave)).serve()
        except PipeClosed:
            # The reading thread may still hold its end of the pipe, which could then not be closed.
            os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
