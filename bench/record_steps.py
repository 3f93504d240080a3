"""Times the real agent under CPU quotas and writes `muster/testbed/profiles/steps.json`: constants of the simulation.

    python bench/record_steps.py [--out FILE]

MiniLM cut to three layers, 32 tokens, made-up texts, one thread; needs root for cgroups. Beside the wall time stands
the CPU time, which other programs on this machine disturb less. Nothing is fitted here: the
file holds what was measured, the device model interpolates.
"""

from __future__ import annotations

import argparse
import json
import platform
import queue
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_daemon import protocol
from muster.testbed import inputs
from muster.testbed.cgroups import DeviceGroup, Groups
from muster.testbed.device_model import Recorded, Steps
from shared import adapter as adapters
from shared.ids import digest_of
from shared.jobs import BaseSpec, TaskSpec, TrainingSpec
from shared.messages import Assignment, BlobRef, Work
from shared.modeling import base_model
from shared.modeling.weights import base_digest
from shared.starts import START_NOTE
from shared.subprocess_pipe import start_piped
from shared.tensors import Array

OUT = Path("muster/testbed/profiles/steps.json")
LABELS, TOKENS, STEPS, RANK, BATCH = 14, 32, 8, 8, 16
BATCHES = (1, 2, 4, 8, 16, 32)
QUOTAS = (0.4, 0.2, 0.1)
REPEATS = 4
WITHIN_S = 600.0


class Agent:
    """The agent as a subprocess in a control group."""

    def __init__(self, group: DeviceGroup, data: Path) -> None:
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        command = group.command([sys.executable, "-m", "edge_daemon.training.agent"])
        put = self._answers.put
        self._process, self._writer = start_piped(command, protocol.FromAgent, put, put, name="agent", quiet=True)
        self._writer.write(protocol.Probe(datasets={"bench": str(data)}))
        self.probed = self._answer(protocol.Probed)

    def train(self, order: protocol.Train) -> protocol.Trained:
        """Do one piece of work."""
        self._writer.write(order)
        trained: protocol.Trained = self._answer(protocol.Trained)
        return trained

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _answer(self, wanted: type[Any]) -> Any:
        while True:
            answer = self._answers.get(timeout=WITHIN_S)
            if isinstance(answer, (str, protocol.Failed)):
                raise SystemExit(f"record_steps: the agent: {answer}")
            if isinstance(answer, wanted):
                return answer


def main() -> int:
    """0: measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muster-steps-") as scratch, Groups() as groups:
        if not groups.available.cpu:
            print(f"not run: {groups.available.reason}", file=sys.stderr)
            return 1
        steps = measured(Path(scratch), groups.create("recorded", cores=1.0))
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(steps), indent=1) + b"\n")
    print(f"{len(steps.records)} records in {options.out}")
    return 0


def measured(folder: Path, group: DeviceGroup) -> Steps:
    """All records, on one agent whose quota is changed while it lives."""
    data = _texts(folder / "texts.jsonl")
    place = inputs.base_model(inputs.MINILM3, {}, None, print)
    task = TaskSpec(kind="classification", dataset="bench", labels=[str(i) for i in range(LABELS)], max_tokens=TOKENS)
    base = base_model.load(place, task)
    head = base_model.fresh_head(base, 0)
    start = _begun(place, head, {})
    everything = {name: base.model.get_parameter(name).detach().numpy() for name in base.shapes}
    whole = _begun(place, everything | head, {START_NOTE: "dense"})
    blocks = 1 + max(linear.block for linear in base.linears.values())
    agent = Agent(group, data)
    records = []
    try:
        for number, (quota, bits, batch, depth, rank) in enumerate(_plan(blocks)):
            group.set_cores(quota)
            ranks = {name: rank for name, linear in base.linears.items() if rank and linear.block >= blocks - depth}
            (folder / "start").write_bytes(begun := start if rank else whole)
            order = _order(folder, place, task, begun, number, Work(ranks=ranks, batch=batch, bits=bits, steps=STEPS))
            # The best of several: other programs on this machine can only make it slower.
            done = [agent.train(_again(order, folder / f"work-{number}-{i}")).facts for i in range(REPEATS)]
            facts = min((one for one in done if not one.load_s), key=lambda one: one.train_s * one.cores_used)
            records.append(
                Recorded(
                    quota=quota, bits=bits, batch=batch, blocks=depth, rank=rank, peak_bytes=facts.peak_bytes,
                    step_s=round(facts.train_s / facts.steps, 5), base_bytes=facts.base_bytes,
                    cpu_s=round(facts.cores_used * facts.train_s / facts.steps, 5), whole=not rank,
                )
            )  # fmt: skip
            print(json.dumps(msgspec.to_builtins(records[-1])), flush=True)
    finally:
        agent.close()
    linear, _ = base_model.count_parameters(base)
    return Steps(
        machine=_machine(), date=time.strftime("%Y-%m-%d", time.gmtime()), base=inputs.MINILM3, blocks=blocks,
        tokens=TOKENS, linear_params=linear, factor_params=sum(x.out + x.inp for x in base.linears.values()),
        agent_bytes=agent.probed.agent_bytes, records=records,
    )  # fmt: skip


def _plan(blocks: int) -> Iterator[tuple[float, Any, int, int, int]]:
    """(quota, bits, batch, tuned blocks, rank) of every record; rank 0: the whole base is tuned."""
    for batch in BATCHES:
        yield 1.0, 16, batch, blocks, RANK
    for depth in range(blocks):
        yield 1.0, 16, BATCH, depth, RANK
    for bits in (8, 4, 32):
        yield 1.0, bits, BATCH, blocks, RANK
    yield 1.0, 32, BATCH, blocks, 0
    for quota in QUOTAS:
        yield quota, 16, BATCH, blocks, RANK


def _begun(place: Path, dense: dict[str, Array], notes: dict[str, str]) -> bytes:
    """The global adapter that work begins with."""
    return adapters.write(
        adapters.Adapter(
            kind="global", job="bench", round=0, base_digest=base_digest(place), factors={}, dense=dense, notes=notes
        )
    )


def _again(order: protocol.Train, folder: Path) -> protocol.Train:
    """The same work from its beginning: a checkpoint would be resumed."""
    return msgspec.structs.replace(order, checkpoint_dir=str(folder))


def _order(folder: Path, base: Path, task: TaskSpec, start: bytes, number: int, work: Work) -> protocol.Train:
    assignment = Assignment(
        job="bench", round=1, attempt=1, work=work, base=BaseSpec(model="minilm3"), base_digest=base_digest(base),
        task=task, training=TrainingSpec(checkpoint_every=10**6), rounds=1, seed=number,
        adapter=BlobRef(sha=digest_of(start), size=len(start)),
    )  # fmt: skip
    return protocol.Train(
        assignment=assignment, base_path=str(base), data_path=str(folder / "texts.jsonl"),
        adapter_path=str(folder / "start"), update_path=str(folder / "update"),
        checkpoint_dir=str(folder / f"work-{number}"),
    )  # fmt: skip


def _texts(path: Path) -> Path:
    """Made-up texts long enough to fill every batch."""
    rng = np.random.default_rng(0)
    words = ["river", "engine", "violet", "market", "signal", "winter", "paper", "orbit", "garden", "copper"]
    with path.open("w", encoding="utf-8") as file:
        for index in range(400):
            text = " ".join(words[i] for i in rng.integers(len(words), size=60))
            file.write(json.dumps({"text": text, "label": index % LABELS}) + "\n")
    return path


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{name}, {platform.system()} {platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())
