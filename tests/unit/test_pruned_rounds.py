"""The coordinator's use of what pruned devices tell: admission against their orders, the model that a round gives; and
whether all of it fits the messages."""

from __future__ import annotations

from dataclasses import replace as changed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator import folding
from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core.facts import Metrics, ModelFacts, ModuleSpec
from coordinator.core.job import Job, Participant, Round, _best, apply
from coordinator.core.planning import registry
from coordinator.core.planning.base import Plan
from coordinator.core.planning.fedspine import FedSpinePlanner
from coordinator.performing import Performer
from shared import adapter as adapters
from shared import codec, units
from shared.adapter import Adapter, Factors
from shared.blob_folder import BlobFolder
from shared.codec import MAX_MESSAGE_BYTES
from shared.errors import DecodeError
from shared.jobs import StrategySpec
from shared.messages import Assign, Assignment, BlobRef, DeviceInfo, Manifest, UpdateFacts, Work
from shared.pruning_order import Pruning
from shared.starts import START_NOTE
from shared.units import Group, Slice
from tests.unit.machine_rig import facts as facts_of
from tests.unit.machine_rig import spec

RNG = np.random.default_rng(3)
GROUP = Group(
    name="0.channels", block=0, kind="channels", count=8,
    slices=(Slice(module="up", side="out", width=1), Slice(module="down", side="in", width=1)),
)  # fmt: skip
FACTS = ModelFacts(
    modules=[ModuleSpec(name="up", out=8, inp=6, block=0), ModuleSpec(name="down", out=6, inp=8, block=0)],
    base_digest="b" * 64, linear_params=96, other_params=0, blocks=1, hidden=6, groups=[GROUP],
)  # fmt: skip
ORDER = Pruning(ratio=0.5)
HALF = [0, 1, 2, 3]


def update(device: str, kept: list[int], scores: bytes = bytes(range(8, 0, -1))) -> bytes:
    """An update of rank 2 by a device that has these channels left."""
    left = np.array(kept)
    part = {
        "up": Factors(b=numbers(len(kept), 2), a=numbers(2, 6), rows=left),
        "down": Factors(b=numbers(6, 2), a=numbers(2, len(kept)), columns=left),
    }
    made = Adapter(
        kind="update", job="job-1", round=1, base_digest="b" * 64, factors=part, dense={}, attempt=1, device=device,
        scores={"0.channels": scores},
    )  # fmt: skip
    return adapters.write(made)


def numbers(rows: int, columns: int) -> Any:
    return RNG.standard_normal((rows, columns)).astype(np.float32)


def told(kept: list[int], **changes: Any) -> UpdateFacts:
    return facts_of(**{"kept": units.pack([GROUP], {"0.channels": kept}), **changes})


class Open:
    """An open round 1 of a job that prunes, with its blobs."""

    def __init__(self, folder: Path, devices: tuple[str, ...] = ("a",), **strategy: Any) -> None:
        self.folder, self.blobs = folder, BlobFolder(folder / "blobs")
        given = StrategySpec(name="fedspine", rank=2, **strategy)
        before = Adapter(
            kind="global", job="job-1", round=0, base_digest="b" * 64, factors={}, dense={},
            notes={START_NOTE: "directions"},
        )  # fmt: skip
        work = Work(ranks={"up": 2, "down": 2}, batch=4, bits=32, steps=4, prune=ORDER)
        plan = Plan(participants=dict.fromkeys(devices, work), deadline_s=9.0, reason="")
        self.job = Job(
            id="job-1", spec=changed_spec(given), phase="open", planner=registry.create(given), facts=FACTS,
            adapter=self.blobs.put(adapters.write(before)),
            round=Round(number=1, attempt=1, plan=plan, digest="", loads={}, participants={}),
        )  # fmt: skip

    def check(self, content: bytes, facts: UpdateFacts) -> str:
        path = self.folder / "update"
        path.write_bytes(content)
        return folding.check_update(self.job, "a", path, facts, self.blobs)

    def folded(self, updates: dict[str, tuple[bytes, UpdateFacts]]) -> Adapter:
        assert self.job.round is not None
        parts = {
            device: Participant(outcome="done", blob=self.blobs.put(content), facts=facts)
            for device, (content, facts) in updates.items()
        }
        counted = replace(self.job.round, participants=parts, counted=tuple(updates))
        made = folding.fold_job(replace(self.job, round=counted), self.blobs)
        path = self.blobs.path(made.adapter.sha)
        assert path is not None
        return adapters.read_file(path)


def changed_spec(strategy: StrategySpec) -> Any:
    given = spec()
    return replace(given, strategy=strategy, training=replace(given.training, alpha_ratio=1.0))


def test_an_update_is_held_against_what_its_device_was_ordered_and_tells(tmp_path: Path) -> None:
    one = Open(tmp_path)
    assert one.check(update("a", HALF), told(HALF)) == ""
    assert one.check(update("a", [0, 1]), told([0, 1])) == "0.channels: 2 units are left, 4 to 8 were asked for"
    odd = one.check(update("a", HALF), told([4, 5, 6, 7]))
    assert odd == "module 'down': its columns are not those of the units that it tells are left"
    silent = replace(told(HALF), kept={})
    assert one.check(update("a", HALF), silent) == "it does not tell which units of each group are left"
    assert one.check(update("a", HALF, b"123"), told(HALF)) == "3 scores for the units of '0.channels'"


def test_work_that_meets_a_fault_of_ours_says_so() -> None:
    told: list[Any] = []
    ports = SimpleNamespace(offload=lambda work, post: post(work()), post=told.append)
    runtime: Any = SimpleNamespace(ports=ports, now=lambda: {"now": 1.0, "ts": 1.0})

    def work() -> ev.AnyEvent:
        raise IndexError("out of bounds")

    job: Any = SimpleNamespace(id="job-1")
    Performer(runtime)._offload_of(work, job, "aggregation")
    assert isinstance(told[0], ev.WorkFailed) and told[0].reason == "IndexError: out of bounds"


def test_a_capped_device_has_a_capped_say_in_the_scores_and_the_size(tmp_path: Path) -> None:
    rising, falling = bytes(range(1, 9)), bytes(range(8, 0, -1))
    most = told(list(range(8)), samples=800)
    updates = {"a": (update("a", list(range(8)), rising), most), "b": (update("b", HALF, falling), told(HALF))}
    fair = Open(tmp_path / "fair", ("a", "b"), max_share=0.5).folded(updates)
    own = Open(tmp_path / "own", ("a", "b")).folded(updates)
    scores = [units.unpack_scores(one.scores)["0.channels"] for one in (fair, own)]
    assert scores[0] == pytest.approx(scores[0][::-1]), "both have half of it"
    assert scores[1].argmax() == 7
    assert [len(units.unpack([GROUP], one.kept)["0.channels"]) for one in (fair, own)] == [6, 8]


@pytest.mark.parametrize("accepted", [True, False])
def test_the_planner_learns_whether_the_gate_let_the_round_pass(accepted: bool, tmp_path: Path) -> None:
    job = Open(tmp_path).job
    assert job.round is not None
    done = Participant(outcome="done", blob=BlobRef(sha="1" * 64, size=1), facts=told(HALF))
    job = replace(
        job, phase="evaluating", told={"a": DeviceInfo(epoch=1, hardware="Orin")},
        round=replace(job.round, participants={"a": done}, counted=("a",), folded=BlobRef(sha="2" * 64, size=1)),
    )  # fmt: skip
    after = apply(job, rec.RoundCommitted(job="job-1", round=1, accepted=accepted, reason="", metrics=None, ts=1.0))
    planner = after.planner
    assert isinstance(planner, FedSpinePlanner)
    assert planner.ratios == ({"Orin": 0.5} if accepted else {})
    met = [region.mean for region in planner.bandits["Orin"].regions if region.pulls]
    assert met and (max(met) > 0.0) == accepted


def test_the_gate_keeps_the_best_of_models_as_small() -> None:
    whole, third = Metrics(loss=1.0, rows=9), Metrics(loss=1.5, rows=9, pruned=0.3)
    assert _best((whole,), third) == (third,)
    assert _best((third,), Metrics(loss=1.6, rows=9, pruned=0.3)) == (third,)
    assert _best((whole,), Metrics(loss=1.1, rows=9)) == (whole,)


def wide(blocks: int, channels: int) -> list[Group]:
    return [Group(name=f"{b}.channels", block=b, kind="channels", count=channels, slices=()) for b in range(blocks)]


@pytest.mark.parametrize(("blocks", "channels"), [(32, 11_008), (40, 13_824), (2, 32_768)])
def test_the_units_of_large_models_fit_the_messages(blocks: int, channels: int) -> None:
    known = wide(blocks, channels)
    assert units.too_many(known) == ""
    kept = units.pack(known, {})
    names = [f"model.layers.{b}.{part}" for b in range(blocks) for part in ("self_attn.q_proj", "mlp.gate_proj")]
    work = Work(
        ranks=dict.fromkeys(names, 16), batch=4, bits=4, steps=20, prune=Pruning(ratio=0.5, kept=kept, begin=0.25)
    )
    given = spec()
    assignment = Assignment(
        job="job-1", round=1, attempt=1, work=work, base=given.base, base_digest="b" * 64, task=given.task,
        training=given.training, rounds=9, seed=1, adapter=BlobRef(sha="0" * 64, size=1),
    )  # fmt: skip
    manifest = Manifest(
        sha="0" * 64, size=9, chunk=9, kind="update", job="job-1", round=1, attempt=1, facts=facts_of(kept=kept)
    )
    for message in (Assign(assignment=assignment), manifest):
        packed = codec.pack(message)
        assert len(packed) < min(MAX_MESSAGE_BYTES, 128 * 1024)
        assert codec.unpack(packed, type(message)) == message
    scores = units.pack_scores({group.name: np.arange(1.0, group.count + 1) for group in known})
    content = adapters.write(changed(adapters.read(update("a", HALF)), scores=scores))
    assert adapters.read(content).scores == scores


@pytest.mark.parametrize(
    ("blocks", "channels", "reason"),
    [(1, 32_769, "32769 units, a message holds 32768 of a group"), (80, 28_672, "a message holds 98304")],
)
def test_a_base_whose_units_fit_no_message_is_refused(blocks: int, channels: int, reason: str) -> None:
    assert reason in units.too_many(wide(blocks, channels))


def test_scores_of_another_model_are_refused() -> None:
    assert units.scores_of([GROUP], {})["0.channels"].tolist() == [0.0] * 8
    for odd in ({"0.channels": b"1"}, {"other": b"12345678"}):
        with pytest.raises(DecodeError, match="scores for the units"):
            units.scores_of([GROUP], odd)
