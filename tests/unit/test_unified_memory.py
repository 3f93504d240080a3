"""A GPU that shares the machine's memory: the planner's budget, the device's policy, what the agent tells of itself."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator.core.planning.cost_model import CUDA_BYTES, CostModel
from coordinator.core.planning.demand import demand
from coordinator.core.planning.readings import DAEMON_BYTES, budget, has_gpu_memory
from edge_daemon import protocol
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.state import Machine
from edge_daemon.training import memory
from shared.messages import Ack, DeviceInfo, Gpu, GpuLoad, Load
from shared.unified_memory import reserve
from tests.unit.planning_cases import MIB, device, job, minilm
from tests.unit.session_rig import GIB, Rig, assignment, facts, load

OWN = Gpu(uuid=protocol.INTEGRATED, integrated=True)


def jetson(**reading: Any) -> tuple[DeviceInfo, Load]:
    """8 GiB, shared by the GPU."""
    info = DeviceInfo(epoch=1, cores=6.0, memory_bytes=8 * GIB, gpus=[OWN], bits=[4, 16], agent_bytes=GIB)
    values = {"memory_limit": 8 * GIB, "memory_available": 6 * GIB, "gpus": [GpuLoad(uuid=OWN.uuid)], **reading}
    return info, Load(epoch=1, seq=1, cores=6.0, **values)


@pytest.mark.parametrize(("total", "stays"), [(4, 1.0), (8, 1.0), (10, 1.0), (32, 3.2), (64, 6.4)])
def test_the_reserve(total: int, stays: float) -> None:
    assert reserve(total * GIB) == int(stays * GIB)


def test_the_budget_is_what_is_available_less_the_reserve() -> None:
    assert budget(*jetson(), own_bytes=0).bytes == 6 * GIB - GIB
    roomy = jetson(memory_limit=64 * GIB, memory_available=50 * GIB)
    roomy = msgspec.structs.replace(roomy[0], memory_bytes=64 * GIB), roomy[1]
    assert budget(*roomy, own_bytes=0).bytes == 50 * GIB - int(6.4 * GIB)


def test_the_reserve_absorbs_nothing_here() -> None:
    """On a card small foreign use moves nothing. Here it is missing when the last byte is asked for."""
    info, reading = jetson(memory_available=8 * GIB - 300 * MIB)
    assert budget(info, reading, 0).bytes == 7 * GIB - 300 * MIB
    assert budget(msgspec.structs.replace(info, gpus=[]), reading, 0).foreign == 0


def test_what_the_agent_holds_is_not_counted_against_it() -> None:
    """Between two rounds it keeps its base in memory: available falls by it, the budget does not."""
    before = budget(*jetson(own_memory=DAEMON_BYTES), own_bytes=0)
    after = budget(*jetson(memory_available=3 * GIB, own_memory=DAEMON_BYTES + 3 * GIB), own_bytes=0)
    assert before.bytes == after.bytes == 5 * GIB


def test_a_measured_peak_that_is_not_held_now_gives_no_room() -> None:
    """An agent that was started anew holds nothing: its former peak is not there to be given back."""
    assert budget(*jetson(), own_bytes=4 * GIB).bytes == 5 * GIB


def test_gpu_memory_is_not_counted_twice() -> None:
    info, reading = jetson()
    claimed = msgspec.structs.replace(info, gpus=[msgspec.structs.replace(OWN, memory_bytes=8 * GIB)])
    assert not has_gpu_memory(claimed)
    assert budget(claimed, reading, 0) == budget(info, reading, 0)
    # Nor is the context of CUDA: the device has it since the probe.
    need = demand(minilm(), job(), {})
    card = msgspec.structs.replace(info, gpus=[Gpu(uuid="GPU-1", memory_bytes=8 * GIB)])
    shared, own = (CostModel().memory("edge-1", need, 16, 4, each)[0] for each in (info, card))
    assert shared - own == info.agent_bytes - CUDA_BYTES


def test_the_tighter_memory_bounds_a_device_that_has_a_card_too() -> None:
    info, reading = jetson()
    small = msgspec.structs.replace(info, gpus=[OWN, Gpu(uuid="GPU-1", memory_bytes=2 * GIB)])
    assert budget(small, reading, 0).limit == 2 * GIB
    large = msgspec.structs.replace(info, gpus=[OWN, Gpu(uuid="GPU-1", memory_bytes=80 * GIB)])
    assert budget(large, reading, 0).bytes == 5 * GIB


def test_a_device_that_told_nothing_yet_has_its_reserve() -> None:
    assert budget(jetson()[0], None, 0).bytes == 7 * GIB


def test_a_cpu_device_is_planned_as_before() -> None:
    case = device("edge-1", memory=2000, used=700)
    assert budget(case.info, case.load, 300 * MIB).reserve == 100 * MIB


# ---- the device


def unified_rig(**reading: Any) -> Rig:
    rig = Rig().up(Machine(cores=6.0, memory_bytes=8 * GIB, gpus=(OWN,)))
    rig.feed(ev.LoadRead, reading=load(memory_limit=8 * GIB, **reading))
    return rig


def test_case_29_low_memory_is_rejected_before_anything_is_allocated() -> None:
    rig = unified_rig(memory_available=GIB - 1)
    rig.assign(assignment())
    (ack,) = rig.said(Ack)
    assert ack.verdict == "reject"
    assert ack.reason == "memory: 1024 MiB available, 1024 MiB stay free where the GPU shares it"
    assert not [c for c in rig.all if isinstance(c, cmd.Train | cmd.Fetch)]
    assert rig.done() == [(rig.state.journal.finished[0].identity, "rejected")]
    # The next round finds memory again.
    rig.feed(ev.LoadRead, reading=load(memory_limit=8 * GIB, memory_available=2 * GIB))
    rig.assign(assignment(round=2))
    assert [ack.verdict for ack in rig.said(Ack)] == ["accept"]


def test_case_29_the_planner_does_not_even_ask() -> None:
    found = budget(*jetson(memory_available=GIB - 1), own_bytes=0)
    assert found.bytes == 0
    assert not found.holds(1)


def test_a_card_of_its_own_needs_no_such_reserve() -> None:
    rig = Rig().up(Machine(gpus=(Gpu(uuid="GPU-1", memory_bytes=GIB),)))
    rig.feed(ev.LoadRead, reading=load(memory_limit=8 * GIB, memory_available=GIB - 1))
    rig.assign(assignment())
    assert [ack.verdict for ack in rig.said(Ack)] == ["accept"]


def test_the_load_tells_what_the_agent_holds_through_the_gpu() -> None:
    rig = unified_rig(memory_available=6 * GIB)
    rig.assign(assignment())
    rig.feed(ev.AdapterStored, sha=assignment().adapter.sha)
    done = protocol.Trained(
        job="job-1", round=1, attempt=1, sha="d" * 64, size=200, facts=facts(), held_bytes=3 * GIB
    )  # fmt: skip
    rig.feed(ev.AgentTrained, trained=done)
    rig.now += 60.0
    rig.feed(ev.LoadRead, reading=load(memory_limit=8 * GIB, memory_available=3 * GIB, own_memory=GIB))
    (told,) = rig.said(Load)
    assert told.own_memory == 4 * GIB
    rig.gone()
    rig.now += 60.0
    rig.feed(ev.LoadRead, reading=load(memory_limit=8 * GIB, memory_available=6 * GIB, own_memory=GIB // 2))
    (told,) = rig.said(Load)
    assert told.own_memory == GIB // 2, "a dead agent holds nothing"


def test_a_failure_tells_it_too() -> None:
    rig = unified_rig(memory_available=6 * GIB)
    rig.assign(assignment())
    rig.feed(ev.AdapterStored, sha=assignment().adapter.sha)
    failure = protocol.Failed(job="job-1", round=1, attempt=1, kind="memory", reason="x", held_bytes=2 * GIB)
    rig.feed(ev.AgentFailed, failed=failure)
    assert rig.state.agent.held_bytes == 2 * GIB


# ---- the agent, with a torch that answers as on such a GPU: not run on hardware


class Cuda:
    """`torch.cuda` of an integrated GPU, or of a card."""

    def __init__(self, integrated: bool) -> None:
        self.integrated = integrated
        self.emptied = 0

    def get_device_properties(self, _device: int) -> Any:
        return type("Properties", (), {"is_integrated": int(self.integrated)})()

    def reset_peak_memory_stats(self) -> None: ...

    def max_memory_allocated(self) -> int:
        return 300

    def memory_allocated(self) -> int:
        return 200

    def memory_reserved(self) -> int:
        return 250

    def empty_cache(self) -> None:
        self.emptied += 1


@pytest.mark.parametrize("integrated", [True, False])
def test_the_agents_memory_is_both_kinds_where_they_are_one(monkeypatch: pytest.MonkeyPatch, integrated: bool) -> None:
    import torch

    cuda = Cuda(integrated)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1000)
    monkeypatch.setattr(memory, "_status", lambda _name: 1100)
    assert memory.MemoryGauge.held("cuda") == (1200 if integrated else 200)
    assert memory.MemoryGauge("cuda").peak() == (1400 if integrated else 300)
    assert memory.let_go("cuda") == (250 if integrated else 0)
    assert cuda.emptied == integrated
    assert memory.MemoryGauge.held("cpu") == 1000
    assert memory.let_go("cpu") == 0


@pytest.mark.parametrize(("gpu", "visible"), [("", ""), ("GPU-1", "GPU-1"), (protocol.INTEGRATED, "0")])
def test_cuda_is_shown_the_gpu_by_a_name_that_it_knows(monkeypatch: pytest.MonkeyPatch, gpu: str, visible: str) -> None:
    import os

    from edge_daemon.training import agent

    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")
    agent._set_environment(protocol.Probe(datasets={}, gpu=gpu))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
