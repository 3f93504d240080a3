"""The memory that the cost model predicts: the sum of its parts, what measured peaks teach it, limits of the batch."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.facts import ActivationFacts
from coordinator.core.planning.base import RoundReport
from coordinator.core.planning.cost_model import CUDA_BYTES, CostModel
from coordinator.core.planning.demand import demand
from coordinator.core.planning.footprint import LOADING_BYTES, WORKING_BYTES, activations
from coordinator.core.planning.lower_part import lower_demand
from shared.jobs import Bits
from shared.messages import Gpu, Work
from tests.unit.planning_cases import MIB, RANKS, device, gpu_device, job, minilm, needed, reported, result


def test_memory_before_any_measurement_is_the_sum_of_its_parts() -> None:
    info, need = device("edge-1").info, needed()
    size, why = CostModel().memory("edge-1", need, 8, 16, info)
    adapter = 24 * 8 * 768 + 20 * 384 + 20
    activations = 16 * need.activation_bytes(8)
    base = 10_616_832 * (1 + 4 / 64) + 2 * 12_100_000
    assert size == pytest.approx(200 * MIB + WORKING_BYTES + base + 16 * adapter + activations)
    assert "agent 268 MiB at work" in why
    small, _ = CostModel().memory("edge-1", need, 8, 1, info)
    assert small == pytest.approx(200 * MIB + WORKING_BYTES + base + 16 * adapter + LOADING_BYTES + 8 * 384 * 384)


def test_fewer_bits_take_less_memory() -> None:
    info, bits = device("edge-1").info, (32, 16, 8, 4)
    sizes = [CostModel().memory("edge-1", needed(), b, 1, info)[0] for b in bits]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_a_measured_peak_replaces_the_sum() -> None:
    info, need = device("edge-1").info, needed()
    model = CostModel().learn(reported(result(batch=16, step_s=1.0, base=310, peak=456)))
    assert model.memory("edge-1", need, 32, 16, info)[0] == 456 * MIB
    assert model.memory("edge-1", need, 32, 32, info)[0] > 456 * MIB
    assert 310 * MIB * 0.9 < model.memory("edge-1", need, 32, 1, info)[0] < 456 * MIB
    assert "measured 456 MiB" in model.memory("edge-1", need, 32, 16, info)[1]


def test_a_peak_at_other_bits_is_moved_by_the_weights() -> None:
    info, need = device("edge-1").info, needed()
    model = CostModel().learn(reported(result(batch=4, bits=4, step_s=1.0, base=300, peak=340)))
    size, why = model.memory("edge-1", need, 8, 4, info)
    assert size - 340 * MIB == pytest.approx(need.weight_bytes(8) - need.weight_bytes(4))
    assert "measured 340 MiB at 4 bits" in why
    assert [model.memory("edge-1", need, b, 4, info)[0] for b in (4, 8, 16, 32)] == sorted(
        model.memory("edge-1", need, b, 4, info)[0] for b in (4, 8, 16, 32)
    )


COUNTED = msgspec.structs.replace(
    minilm(),
    activations={"32": ActivationFacts(fixed=4e6, block=2e6), "16": ActivationFacts(fixed=4e6, block=1.6e6)},
    activations_gpu={"32": ActivationFacts(fixed=4e6, block=9e5), "16": ActivationFacts(fixed=3e6, block=4e5)},
)
"""As of a causal model, much of whose activations are its logits: these don't go with the depth."""


@pytest.mark.parametrize("gpu", [False, True])
def test_a_peak_at_one_depth_tells_of_another(gpu: bool) -> None:
    candidate = gpu_device("edge-1") if gpu else device("edge-1")
    works = [Work(ranks=dict(list(RANKS.items())[first:]), batch=32, bits=16, steps=10) for first in (0, 20)]
    whole, upper = (demand(COUNTED, job(), work.ranks) for work in works)
    base = int(whole.weight_bytes(16)) + 4 * whole.adapter_params + 300 * MIB
    peak = int(base + 12 * whole.adapter_params + 32 * whole.activation_bytes(16, gpu=gpu))
    measured = msgspec.structs.replace(result(batch=32, bits=16, step_s=1.0), base_bytes=base, peak_bytes=peak)
    report = RoundReport(
        round=1, works={"edge-1": works[0]}, results={"edge-1": measured}, loads={"edge-1": candidate.load},
        infos={"edge-1": candidate.info}, facts=COUNTED, job=job(),
    )  # fmt: skip
    size, _ = CostModel().learn(report).memory("edge-1", upper, 16, 32, candidate.info)
    less = 32 * (whole.activation_bytes(16, gpu=gpu) - upper.activation_bytes(16, gpu=gpu))
    less += 16 * (whole.adapter_params - upper.adapter_params)
    assert size == pytest.approx(peak + (CUDA_BYTES if gpu else 0) - less, rel=0.05)
    assert less > 0.1 * peak, "or this would tell nothing"


def test_a_gpu_needs_what_was_counted_for_one() -> None:
    whole, old = (
        demand(COUNTED, job(), RANKS),
        demand(msgspec.structs.replace(COUNTED, activations_gpu={}), job(), RANKS),
    )
    assert [whole.activation_bytes(bits) for bits in (32, 16, 4)] == [16e6, 13.6e6, 13.6e6]
    assert [whole.activation_bytes(bits, gpu=True) for bits in (32, 16, 4)] == [9.4e6, 5.4e6, 5.4e6]
    assert old.on_gpu == (old.activations, old.activations_half), "facts of an older log"
    lower = lower_demand(COUNTED, job(), {}, 2)
    assert (lower.activations, lower.on_gpu) == (0.0, (0.0, 0.0)), "nothing is tuned there"
    lower = lower_demand(COUNTED, job(), dict(list(RANKS.items())[:8]), 2)
    assert lower.on_gpu == (2 * 9e5, 2 * 4e5) and lower.activations == 2 * 2e6


def test_accumulation_splits_the_activations() -> None:
    info = device("edge-1").info
    whole, _ = CostModel().memory("edge-1", needed(), 32, 32, info)
    split, _ = CostModel().memory("edge-1", needed(accumulation=4), 32, 32, info)
    assert whole - split == pytest.approx(24 * needed().activations)


def test_activations_are_corrected_at_once_upwards_unless_the_base_was_loaded() -> None:
    need = needed()
    estimate = 16 * need.activations / MIB
    high = int(300 + WORKING_BYTES / MIB + 3 * estimate)
    trained = CostModel().learn(reported(result(batch=16, step_s=1.0, base=300, peak=high)))
    loaded = CostModel().learn(reported(result(batch=16, step_s=1.0, base=300, peak=high, load_s=5.0)))
    assert trained.devices["edge-1"].activation_scale == pytest.approx(3.0, rel=0.05)
    assert loaded.devices["edge-1"].activation_scale == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("load_s", [0.0, 5.0])
@pytest.mark.parametrize("peak", [495, 551])
def test_a_small_batch_says_nothing_of_activations_that_loading_hides(load_s: float, peak: int) -> None:
    """The agent of a small base, as recorded: 451 MiB with the base, 495 at its highest with two samples; 551 would be
    what it adds for good and loading."""
    info, need = device("edge-1").info, needed()
    model = CostModel().learn(reported(result(batch=2, step_s=1.0, bits=16, base=451, peak=peak, load_s=load_s)))
    sample = need.activation_bytes(16) / MIB
    assert model.activation_scale == pytest.approx(1.0, abs=0.2)
    came = peak - 451 - WORKING_BYTES / MIB - 12 * need.adapter_params / MIB
    for batch in (2, 4, 8, 32):
        size = model.memory("edge-1", need, 16, batch, info)[0] / MIB
        own = (model.devices["edge-1"].activation_scale or 1.0) * sample
        seen = max(came if load_s else 0.0, 2 * own)
        assert size == pytest.approx(peak + max(0.0, batch * own - seen), abs=0.1)


@pytest.mark.parametrize("load_s", [0.0, 1.0])
@pytest.mark.parametrize(("working", "most"), [(40, 1.05), (70, 1.05), (100, 1.6)])
def test_small_batches_do_not_make_those_who_come_later_seem_to_need_more(
    working: int, most: float, load_s: float
) -> None:
    """What work adds for good differs from machine to machine; at small batches it is most of what is seen."""
    need, model = needed(), CostModel()
    sample = need.activation_bytes(16) / MIB
    for batch in (2, 3, 4, 2, 3, 2) * 3:
        held = working + (max(33, batch * sample) if load_s else batch * sample)
        told = result(batch=batch, step_s=1.0, bits=16, base=451, peak=int(451 + held), load_s=load_s)
        model = model.learn(reported(told))
    assert 0.95 <= model.activation_scale <= most


def test_what_large_batches_taught_of_activations_small_ones_do_not_change() -> None:
    need, model = needed(), CostModel()
    sample = 1.5 * need.activation_bytes(16) / MIB
    for batch in (32, 2, 2, 3, 2):
        held = 68 + max(33, batch * sample)
        model = model.learn(reported(result(batch=batch, step_s=1.0, bits=16, base=451, peak=int(451 + held))))
    assert model.activation_scale == pytest.approx(1.5, rel=0.05)
    for batch in (2, 32, 32, 32):
        held = 68 + max(33, batch * sample / 1.5)
        model = model.learn(reported(result(batch=batch, step_s=1.0, bits=16, base=451, peak=int(451 + held))))
    assert 1.0 <= model.activation_scale < 1.2, "large ones do, but for what work may add less than is thought"


def test_who_learned_nothing_of_activations_follows_those_who_did() -> None:
    need, model = needed(), CostModel()
    report = reported(result(batch=2, step_s=1.0, bits=16, base=451, peak=495, load_s=1.0))
    large = int(451 + 68 + 2 + 2 * 32 * need.activation_bytes(16) / MIB)
    works = dict.fromkeys("abcdefg", report.works["edge-1"])
    for _ in range(4):
        results = {name: result(batch=2, step_s=1.0, bits=16, base=451, peak=495, load_s=1.0) for name in "abcde"}
        results |= {name: result(batch=32, step_s=1.0, bits=16, base=451, peak=large) for name in "fg"}
        loads = dict.fromkeys(works, report.loads["edge-1"])
        model = model.learn(msgspec.structs.replace(report, works=works, results=results, loads=loads))
    assert model.activation_scale == pytest.approx(2.0, rel=0.05)
    assert {model.devices[name].activation_scale for name in "abcde"} == {0.0}


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_small_batch_does_not_shake_what_the_fleet_knows(batch: int) -> None:
    """Whatever it shows: that its activations are three times the estimate, or nothing of them."""
    need = needed()
    estimate = batch * need.activation_bytes(16)
    agrees, _ = activations((3.0, 0.0), 3.0, need, result(batch=batch, step_s=1.0, bits=16), 3 * estimate, 68 * MIB)
    assert agrees == pytest.approx(3.0)
    silent, _ = activations((3.0, 0.0), 3.0, need, result(batch=batch, step_s=1.0, bits=16), 0.0, 68 * MIB)
    assert silent > 2.8


def test_where_nothing_was_loaded_more_is_more() -> None:
    """A large layer: loading it would hide much, but its memory is not in the peak of a round that loads nothing."""
    need = msgspec.structs.replace(needed(), largest=45_000_000)
    estimate = 8 * need.activation_bytes(16)
    told = result(batch=8, step_s=1.0, bits=16)
    scale, share = activations((1.0, 0.0), 1.0, need, told, 6 * estimate, 0)
    assert (scale, share) == (pytest.approx(6.0, rel=0.1), pytest.approx(0.92, abs=0.01))
    loaded = msgspec.structs.replace(told, load_s=3.0)
    assert activations((1.0, 0.0), 1.0, need, loaded, 6 * estimate, 0)[0] == 1.0


def test_an_agent_that_had_worked_before_it_loaded_the_base_holds_what_work_adds_already() -> None:
    """After a change of bits, or an evaluation."""
    need, info = needed(), device("edge-1").info
    fresh = int((200 * MIB + need.weight_bytes(16) + 4 * need.adapter_params) / MIB)
    sample = 32 * need.activation_bytes(16) / MIB
    for base, added in ((fresh, 68), (fresh + 68, 0)):
        measured = result(batch=32, step_s=1.0, bits=16, base=base, peak=int(base + added + 2 + 2 * sample))
        report = msgspec.structs.replace(reported(measured), infos={"edge-1": info})
        assert CostModel().learn(report).activation_scale == pytest.approx(2.0, rel=0.05)


def test_a_limit_of_the_batch_alone_measures_no_speed() -> None:
    report = reported(result(batch=8, step_s=1.0))
    model = CostModel().learn(msgspec.structs.replace(report, results={}, batch_limits={"edge-1": 4}))
    assert model.devices and not model.measured


def test_a_gpu_holds_its_context_and_the_agent_where_it_shares_the_memory() -> None:
    need = needed()
    plain = CostModel().memory("a", need, 8, 1, device("a").info)[0] - 200 * MIB
    own = gpu_device("a").info
    assert CostModel().memory("a", need, 8, 1, own)[0] == plain + CUDA_BYTES
    shared = msgspec.structs.replace(own, gpus=[Gpu(uuid="GPU-1")])
    assert CostModel().memory("a", need, 8, 1, shared)[0] == plain + 500 * MIB + CUDA_BYTES


def test_batch_limits_are_kept_per_bits_and_only_fall() -> None:
    model = CostModel().learn(reported(result(batch=8, step_s=1.0, batch_limit=8)))
    model = model.learn(reported(result(batch=4, step_s=1.0, batch_limit=4)))
    model = model.learn(reported(result(batch=4, step_s=1.0, batch_limit=6)))
    assert model.batch_limit("edge-1", 32) == 4
    assert model.batch_limit("edge-1", 8) is None
    assert model.batch_limit("edge-2", 32) is None


def test_a_device_that_failed_for_memory_teaches_its_limit_without_a_result() -> None:
    report = reported(result(batch=8, step_s=1.0))
    failed = msgspec.structs.replace(report, results={}, batch_limits={"edge-1": 0})
    assert CostModel().learn(failed).batch_limit("edge-1", 32) == 0


BITS: list[Bits] = [4, 8, 16, 32]


@given(
    st.sampled_from(BITS), st.integers(1, 64), st.integers(50, 400), st.integers(0, 900), st.sampled_from([0.0, 3.0])
)
def test_memory_never_falls_with_the_batch(bits: Bits, batch: int, base: int, extra: int, load_s: float) -> None:
    measured = result(batch=batch, step_s=1.0, bits=bits, base=base, peak=base + extra, load_s=load_s)
    model, info = CostModel().learn(reported(measured)), device("edge-1").info
    for asked in BITS:
        sizes = [model.memory("edge-1", needed(), asked, size, info)[0] for size in (1, 2, 7, 64)]
        assert sizes == sorted(sizes)
        assert sizes[0] > 0
