"""The cost model: what a step asks for and a device has free, and how long it takes by what measurements taught."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning.base import RoundReport
from coordinator.core.planning.cost_model import BITS_TIME, CostModel
from coordinator.core.planning.demand import demand, traffic, tuned_modules
from coordinator.core.planning.fit import Fit
from coordinator.core.planning.readings import Capacity, budget, capacity
from shared.errors import UserError
from shared.messages import Work
from tests.unit.planning_cases import MIB, RANKS, device, gpu_device, job, minilm, needed, reported, result

ONE = Capacity(1.0, 0.0, 1.0, False)


# ---- demand


def test_flop_of_a_step_by_hand() -> None:
    # 64 tokens x (2 x 10.6 M forward + 2 x 10.6 M backward + 6 x 24 modules x 8 x 768)
    assert needed().flop == 64 * (4 * 10_616_832 + 6 * 24 * 8 * 768)


def test_tuning_only_the_upper_half_saves_backward_and_activations() -> None:
    upper = {name: rank for name, rank in RANKS.items() if int(name.split(".")[1]) >= 3}
    half, full = needed(upper), needed()
    assert half.flop == 64 * (3 * 10_616_832 + 6 * 12 * 8 * 768)
    assert half.activations == pytest.approx(full.activations / 2)


def test_activations_of_minilm_are_near_the_172_mib_that_were_measured() -> None:
    assert 16 * needed().activations / MIB == pytest.approx(172, rel=0.1)


def test_a_causal_model_pays_for_its_logits() -> None:
    causal = msgspec.structs.replace(job(), task=msgspec.structs.replace(job().task, kind="causal"))
    assert demand(minilm(), causal, RANKS).flop == 64 * (4 * (10_616_832 + 12_100_000) + 6 * 24 * 8 * 768)


def test_traffic_counts_the_whole_global_adapter_down_and_the_trained_factors_up() -> None:
    facts = ModelFacts(
        modules=[ModuleSpec(name="a", out=100, inp=50), ModuleSpec(name="b", out=100, inp=50)],
        dense={"head": [3, 10]}, base_digest="d", linear_params=10_000, other_params=0, blocks=0, hidden=50,
    )  # fmt: skip
    down, up, why = traffic(facts, {"a": 4, "b": 0}, 10, "bf16")
    assert down == 4 * (10 * 151 + 30)
    assert up == 2 * (4 * 150 + 30)
    assert "global rank 10" in why
    assert traffic(facts, {"a": 4}, 50, "fp32")[0] == 4 * (5000 + 30)  # the whole matrix is smaller than its factors
    assert traffic(facts, {"a": 4}, 10, "int8")[1] == 4 * 150 + 30 + 4 * (4 + 100 + 3)
    assert traffic(facts, {"a": 4}, 10, "fp32", global_codec="bf16")[:2] == (2 * (10 * 151 + 30), 4 * (4 * 150 + 30))
    assert traffic(facts, {"a": 4}, 10, "fp32", global_codec="int8")[0] == 10 * 151 + 30 + 4 * (10 + 100 + 3)


def test_targets_name_the_last_part_of_a_module() -> None:
    base = msgspec.structs.replace(job().base, targets=["q", "v"])
    assert [module.name for module in tuned_modules(minilm(), base)][:3] == ["layer.0.q", "layer.0.v", "layer.1.q"]
    with pytest.raises(UserError, match="there are k, o, q, v"):
        tuned_modules(minilm(), msgspec.structs.replace(base, targets=["query"]))


# ---- readings


@pytest.mark.parametrize(
    ("cores", "foreign", "free"),
    [
        (0.83, 0.0, 0.83),
        (0.83, 0.04, 0.83),  # jitter
        (0.83, 0.20, 0.63),
        (0.83, 0.52, 0.415),  # seen while the agent trains: the fair share
        (0.83, 0.83, 0.415),  # the same process, seen while the agent idles
        (2.0, 0.5, 1.5),
        (4.0, 3.9, 2.0),
    ],
)
def test_free_cores_are_at_least_the_fair_share(cores: float, foreign: float, free: float) -> None:
    case = device("edge-1", cores=cores, foreign=foreign)
    assert capacity(case.info, case.load).free == pytest.approx(free)


def test_a_busy_gpu_is_foreign_while_our_agent_idles_only() -> None:
    idle, training = gpu_device("a", used=0.4), gpu_device("a", used=0.97, phase="training")
    assert capacity(idle.info, idle.load).free == pytest.approx(0.6)
    assert capacity(training.info, training.load).free == 1.0


def test_a_driver_that_tells_processes_apart_is_believed_at_any_time() -> None:
    case = gpu_device("a", used=0.97, phase="training")
    assert case.load is not None
    gpus = [msgspec.structs.replace(case.load.gpus[0], foreign_utilization=0.3)]
    assert capacity(case.info, msgspec.structs.replace(case.load, gpus=gpus)).free == pytest.approx(0.7)
    gpus = [msgspec.structs.replace(case.load.gpus[0], foreign_utilization=0.0)]
    assert capacity(case.info, msgspec.structs.replace(case.load, gpus=gpus, phase="idle")).free == 1.0


def test_budget_leaves_a_reserve_and_what_others_use() -> None:
    case = device("edge-1", memory=2000, used=700)
    own = 300 * MIB
    found = budget(case.info, case.load, own)
    assert found.reserve == 100 * MIB
    assert found.foreign == (700 - 300 - 48) * MIB
    assert found.bytes == 2000 * MIB - found.reserve - found.foreign
    assert budget(case.info, case.load, 700 * MIB).foreign == 0  # all of it is the agent's own
    assert budget(case.info, case.load, 600 * MIB).foreign == 0  # absorbed by the reserve
    assert budget(case.info, None, own).bytes == 1900 * MIB
    assert case.load is not None
    large = msgspec.structs.replace(case.load, own_memory=690 * MIB)  # our agent at its worst moment
    assert budget(case.info, large, own).foreign == 0
    assert budget(case.info, msgspec.structs.replace(case.load, own_memory=500 * MIB), own).foreign == 200 * MIB


def test_budget_of_a_gpu_and_of_a_device_that_tells_nothing() -> None:
    case = gpu_device("a", memory=8000, foreign=1000)
    assert budget(case.info, case.load, 0).bytes == (8000 - 400 - 1000) * MIB
    silent = msgspec.structs.replace(case.info, gpus=[], memory_bytes=0)
    assert budget(silent, None, 0).holds(1e15)


# ---- step time


def test_unmeasured_devices_differ_by_their_free_cores_alone() -> None:
    model, need = CostModel(), needed()
    one, why = model.step("edge-1", need, 32, 8, ONE)
    half, _ = model.step("edge-2", need, 32, 8, Capacity(1.0, 0.5, 0.5, False))
    assert half == pytest.approx(2 * one)
    assert "assumed speed" in why
    assert "1.00 free cores" in why


def test_an_observation_is_reproduced_and_scales_with_what_is_free() -> None:
    model, need = CostModel().learn(reported(result(batch=8, step_s=0.8, cores_used=1.0))), needed()
    assert model.step("edge-1", need, 32, 8, ONE)[0] == pytest.approx(0.8)
    assert model.step("edge-1", need, 32, 8, Capacity(1.0, 0.6, 0.5, False))[0] == pytest.approx(1.6)
    assert "fitted on 1 round" in model.step("edge-1", need, 32, 8, ONE)[1]


def test_other_devices_take_the_median_of_the_fleet_per_core() -> None:
    model, need = CostModel().learn(reported(result(batch=8, step_s=0.8, cores_used=1.0))), needed()
    seconds, why = model.step("edge-9", need, 32, 8, Capacity(2.0, 0.0, 1.0, False))
    assert seconds == pytest.approx(0.8)
    assert "median of the fleet" in why


def _probed(flops: float, cores: float = 1.0, *, gpu: bool = False) -> Capacity:
    return Capacity(cores, 0.0, cores, gpu, flops)


def test_before_anything_was_measured_probes_tell_devices_apart() -> None:
    model, need = CostModel(), needed()
    slow, why = model.step("edge-1", need, 32, 8, _probed(1e9))
    assert slow == pytest.approx(4 * model.step("edge-2", need, 32, 8, _probed(4e9))[0])
    assert slow == pytest.approx(8 * model.step("edge-3", need, 32, 8, _probed(4e9, cores=2.0))[0])
    assert "assumed speed" in why


def test_a_device_not_yet_met_is_as_much_faster_as_its_probe() -> None:
    report, need = reported(result(batch=8, step_s=0.8, cores_used=1.0)), needed()
    info = msgspec.structs.replace(device("edge-1").info, flops=2e9)
    model = CostModel().learn(msgspec.structs.replace(report, infos={"edge-1": info}))
    seconds, why = model.step("edge-9", need, 32, 8, _probed(8e9))
    assert seconds == pytest.approx(0.2)
    assert "its probe against the fleet's" in why
    assert model.step("edge-9", need, 32, 8, ONE)[0] == pytest.approx(0.8), "without a probe the median stands for it"
    assert model.step("edge-1", need, 32, 8, _probed(8e9))[0] == pytest.approx(0.8), "what was measured counts"
    assert model.step("edge-9", need, 32, 8, _probed(8e9, gpu=True))[0] == pytest.approx(0.2), "no GPU was met"


def test_a_fleet_of_unequal_batches_tells_the_overhead_of_a_step() -> None:
    """Three devices of one probe: 0.4 s a step and 0.05 s a sample, which none of them could know alone."""
    batches, loads = {"a": 4, "b": 8, "c": 16}, {name: device(name).load for name in "abc"}
    report = RoundReport(
        round=1,
        works={name: Work(ranks=RANKS, batch=batch, bits=32, steps=10) for name, batch in batches.items()},
        results={
            name: result(batch=batch, step_s=0.4 + 0.05 * batch, cores_used=1.0) for name, batch in batches.items()
        },
        loads={name: load for name, load in loads.items() if load},
        infos={name: msgspec.structs.replace(device(name).info, flops=2e9) for name in "abc"},
        facts=minilm(),
        job=job(),
    )
    model, need = CostModel(), needed()
    for _ in range(3):
        model = model.learn(report)
    for batch in (1, 4, 32):
        expected = 0.4 + 0.05 * batch
        assert model.step("new", need, 32, batch, _probed(2e9))[0] == pytest.approx(expected, rel=0.05)
        assert model.step("new", need, 32, batch, _probed(4e9))[0] == pytest.approx(expected / 2, rel=0.05)
        # Each of them has met one batch alone; what it can't know it takes from the fleet.
        assert model.step("a", need, 32, batch, ONE)[0] == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("flops", [1e-300, 1.0, 2e8, 1e15])
def test_a_probe_that_can_not_be_true_moves_nobody_else(flops: float) -> None:
    names = "abcdefgh"
    told = {name: 2e9 if name != "a" else flops for name in names}
    loads = {name: device(name).load for name in names}
    report = RoundReport(
        round=1,
        works={name: Work(ranks=RANKS, batch=8, bits=32, steps=10) for name in names},
        results={name: result(batch=8, step_s=0.8, cores_used=1.0) for name in names},
        loads={name: load for name, load in loads.items() if load},
        infos={name: msgspec.structs.replace(device(name).info, flops=told[name]) for name in names},
        facts=minilm(),
        job=job(),
    )
    model, need = CostModel().learn(report), needed()
    for _ in range(2):
        assert model.step("new", need, 32, 8, _probed(2e9))[0] == pytest.approx(0.8, rel=0.05)
        assert model.step("b", need, 32, 16, ONE)[0] == pytest.approx(1.6, rel=0.1)
        model = model.learn(report)


def test_where_only_devices_without_a_probe_were_met_the_median_stands() -> None:
    model, need = CostModel().learn(reported(result(batch=8, step_s=0.8, cores_used=1.0))), needed()
    seconds, why = model.step("edge-9", need, 32, 8, _probed(8e9))
    assert seconds == pytest.approx(0.8)
    assert "median of the fleet" in why


def test_capacity_carries_the_probe() -> None:
    info = msgspec.structs.replace(device("a", cores=2.0, foreign=1.0).info, flops=3e9)
    free = capacity(info, device("a", cores=2.0, foreign=1.0).load)
    assert (free.flops, free.undisturbed()) == (3e9, Capacity(2.0, 0.0, 2.0, False, 3e9))
    gpu = msgspec.structs.replace(gpu_device("a").info, flops=5e12)
    assert capacity(gpu, None).flops == 5e12


def test_devices_met_keep_their_speed_undisturbed() -> None:
    model, need = CostModel().learn(reported(result(batch=8, step_s=0.8, cores_used=1.0), foreign=0.0)), needed()
    assert [pace.step_s(8) for pace in model.met(need, set())] == pytest.approx([0.8])
    assert model.met(need, {"edge-1"}) == []


def test_foreign_load_during_a_round_does_not_spoil_the_speed() -> None:
    quiet = CostModel().learn(reported(result(batch=8, step_s=0.8, cores_used=1.0)))
    loaded = quiet.learn(reported(result(batch=8, step_s=1.6, cores_used=0.5), foreign=0.5))
    assert loaded.step("edge-1", needed(), 32, 8, ONE)[0] == pytest.approx(0.8)


def test_bits_not_met_yet_take_the_known_speed_and_are_then_learned() -> None:
    need, model = needed(), CostModel().learn(reported(result(batch=8, step_s=0.8, cores_used=1.0)))
    seconds, why = model.step("edge-1", need, 4, 8, ONE)
    assert seconds == pytest.approx(0.8 * BITS_TIME[4])
    assert "from 1 round at 32 bits" in why
    model = model.learn(reported(result(batch=8, step_s=2.0, cores_used=1.0, bits=4)))
    assert model.step("edge-1", need, 4, 8, ONE)[0] == pytest.approx(2.0)
    assert model.step("edge-1", need, 32, 8, ONE)[0] == pytest.approx(0.8)


def test_overhead_and_speed_are_told_apart_once_batches_differ() -> None:
    need, model = needed(), CostModel()
    for batch in [4, 16, 4, 32, 8, 16, 4, 32]:
        model = model.learn(reported(result(batch=batch, step_s=0.5 + 0.05 * batch, cores_used=1.0)))
    for batch in (2, 8, 32):
        assert model.step("edge-1", need, 32, batch, ONE)[0] == pytest.approx(0.5 + 0.05 * batch, rel=0.15)


def test_a_device_that_really_slowed_down_is_followed() -> None:
    model, need = CostModel(), needed()
    for step_s in [0.8] * 5 + [1.6] * 6:
        model = model.learn(reported(result(batch=8, step_s=step_s, cores_used=1.0)))
    assert model.step("edge-1", need, 32, 8, ONE)[0] == pytest.approx(1.6, rel=0.2)


def test_one_wild_reading_moves_the_prediction_by_less_than_half() -> None:
    model, need = CostModel(), needed()
    for step_s in [0.8, 0.8, 0.8, 0.8, 800.0]:
        model = model.learn(reported(result(batch=8, step_s=step_s, cores_used=1.0)))
    assert model.step("edge-1", need, 32, 8, ONE)[0] < 1.2


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_ten_percent_never_moves_the_held_values(seed: int) -> None:
    rng, fit = random.Random(seed), Fit()
    fit = fit.learn(1.0, 1e9, 0.8 * rng.uniform(0.9, 1.1))
    held = (fit.overhead_s, fit.per_flop_s)
    for _ in range(40):
        fit = fit.learn(1.0, 1e9, 0.8 * rng.uniform(0.9, 1.1))
        assert (fit.overhead_s, fit.per_flop_s) == held


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 1e3), st.floats(0.02, 4)), min_size=1, max_size=12))
def test_predictions_stay_positive_and_rise_with_the_batch(rounds: list[tuple[int, float, float]]) -> None:
    model, need = CostModel(), needed()
    for batch, step_s, used in rounds:
        model = model.learn(reported(result(batch=batch, step_s=step_s, cores_used=used), cores=4.0))
    times = [model.step("edge-1", need, 32, batch, ONE)[0] for batch in (1, 2, 8, 64)]
    assert times[0] > 0
    assert times == sorted(times)


def test_an_agent_that_never_uses_its_whole_device_does_not_gain_by_more_cores_being_free() -> None:
    model = CostModel().learn(reported(result(batch=8, step_s=0.8, cores_used=1.0), cores=4.0))
    need = needed()
    assert model.step("edge-1", need, 32, 8, Capacity(4.0, 0.0, 4.0, False))[0] == pytest.approx(0.8)
    assert model.step("edge-1", need, 32, 8, Capacity(4.0, 2.0, 2.0, False))[0] == pytest.approx(0.8)


def test_without_load_and_cores_no_speed_is_learned() -> None:
    report = msgspec.structs.replace(reported(result(batch=8, step_s=0.8)), loads={})
    assert not CostModel().learn(report).devices["edge-1"].fits


def test_the_model_survives_its_way_to_disk_and_back() -> None:
    model = CostModel().learn(reported(result(batch=8, step_s=0.8, cores_used=1.0, batch_limit=8)))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(model), type=CostModel) == model
