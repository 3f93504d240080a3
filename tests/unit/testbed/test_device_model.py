"""The clock's device model: draws by hash, shares of classes, what slows a step, what memory holds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator

import pytest

from muster.testbed import device_model as dm
from muster.testbed.simulate import load_steps

STEPS = load_steps()
TABLE = dm.StepTable(STEPS)
MEMORY = dm.MemoryTable.of(STEPS)
SHAPE = dm.Shape(STEPS.blocks, STEPS.tokens, STEPS.linear_params, 12_000_000)
KINDS = {kind.name: kind for kind in dm.KINDS}


def _work(bits: int = 16, batch: int = 16, lowest: int = 0, rank: int = 8) -> dm.StepWork:
    share = (STEPS.blocks - lowest) / STEPS.blocks
    return dm.StepWork(bits, batch, lowest, int(rank * STEPS.factor_params * share))


def _device(name: str = "sim-01", kind: str = "nx", seed: int = 0) -> dm.Device:
    return dm.Device(name, KINDS[kind], seed)


def test_draws_are_uniform_and_depend_on_their_key_alone() -> None:
    values = [dm.draw(1, "a", number) for number in range(4000)]
    assert all(0.0 < value < 1.0 for value in values)
    assert statistics.fmean(values) == pytest.approx(0.5, abs=0.02)
    assert dm.draw(1, "a", 7) == values[7] != dm.draw(2, "a", 7)
    normals = [dm.normal("b", number) for number in range(4000)]
    assert statistics.fmean(normals) == pytest.approx(0.0, abs=0.05)
    assert statistics.pstdev(normals) == pytest.approx(1.0, abs=0.05)


def test_classes_have_their_shares_and_one_device_more_moves_no_other() -> None:
    many = dm.fleet("jetson", 80, 3)
    counts = {kind.name: sum(device.kind is kind for device in many) for kind in dm.KINDS}
    for kind in dm.KINDS:
        assert counts[kind.name] == pytest.approx(80 * kind.share, abs=2), counts
    assert dm.fleet("jetson", 81, 3)[:80] == many
    assert len({device.kind.name for device in dm.fleet("equal", 5, 3)}) == 1


def test_the_power_mode_changes_after_twenty_rounds_only() -> None:
    device = _device()
    modes = [device.power(round) for round in range(1, 61)]
    assert [len(set(modes[start : start + 20])) for start in (0, 20, 40)] == [1, 1, 1]
    assert len(set(modes)) == 3 and all(0.5 <= mode <= 1.0 for mode in modes)


def test_bandwidth_is_log_uniform_and_correlated() -> None:
    logs = [
        math.log(_device(f"d{number}").bandwidth(round) * 8 / 1e6) / math.log(30.0)
        for number in range(60)
        for round in range(40)
    ]
    assert min(logs) >= 0.0 and max(logs) <= 1.0
    assert statistics.fmean(logs) == pytest.approx(0.5, abs=0.06)
    assert statistics.pstdev(logs) == pytest.approx(math.sqrt(1 / 12), abs=0.05)
    pairs = [(logs[i], logs[i + 1]) for i in range(len(logs) - 1) if (i + 1) % 40]
    assert statistics.correlation(*zip(*pairs, strict=True)) == pytest.approx(0.8, abs=0.08)


def test_foreign_programs_come_and_go() -> None:
    device = _device()
    shares = [device.foreign(10.0 * tick).share for tick in range(3000)]
    busy = sum(share > 0 for share in shares) / len(shares)
    assert 0.03 < busy < 0.3 and max(shares) <= 0.85
    changes = sum(before != after for before, after in zip(shares, shares[1:], strict=False))
    assert 10 < changes < 200


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"batch": 32}, {"batch": 16}),
        ({"lowest": 0}, {"lowest": 2}),
        ({"rank": 32}, {"rank": 8}),
    ],
)
def test_more_work_takes_longer(slower: dict[str, int], faster: dict[str, int]) -> None:
    assert TABLE.seconds(_work(**slower), SHAPE, 0.2) >= TABLE.seconds(_work(**faster), SHAPE, 0.2)


def test_recorded_points_are_met_and_a_sample_gets_cheaper_with_the_batch() -> None:
    for record in STEPS.records:
        if (record.quota, record.bits, record.blocks, record.rank) == (1.0, 16, STEPS.blocks, 8):
            assert TABLE.seconds(_work(batch=record.batch), SHAPE, 1.0) == pytest.approx(record.cpu_s, rel=1e-3)
    per_sample = [TABLE.seconds(_work(batch=batch), SHAPE, 1.0) / batch for batch in (1, 4, 16)]
    assert per_sample == sorted(per_sample, reverse=True)


def test_classes_are_as_fast_as_their_quota_says() -> None:
    times = [TABLE.seconds(_work(), SHAPE, KINDS[name].quota) for name in ("tx2", "nx", "agx", "gpu")]
    assert [times[0] / time for time in times[1:]] == pytest.approx([2.0, 4.0, 10.0], rel=0.35)


def _step_s(device: dm.Device, *, heat: float = 0.0, noise: float = 1.0, foreign: float = 0.0, batch: int = 4) -> float:
    return device.step_s(TABLE, _work(batch=batch), SHAPE, round=1, heat=heat, noise=noise, foreign=foreign)


def test_heat_noise_and_other_programs_slow_a_step() -> None:
    device = _device()
    plain = _step_s(device)
    assert _step_s(device, noise=1.1) == pytest.approx(1.1 * plain)
    assert _step_s(device, foreign=0.4) == pytest.approx(plain * (1 + dm.CONTENTION * 0.4))
    assert _step_s(device, heat=1.0) == pytest.approx(plain / (1 - dm.HOTTEST_LOSS))
    assert _step_s(device, heat=dm.HOT) == pytest.approx(plain)


def test_large_batches_saturate_a_small_device_first() -> None:
    small, large = _device(kind="tx2"), _device(kind="gpu")
    ratio = [_step_s(one, batch=32) / _step_s(one, batch=8) for one in (small, large)]
    assert ratio[0] > 1.1 * ratio[1]


def test_a_busy_device_heats_up_and_cools_down() -> None:
    heat = dm.heated(0.0, 150.0, busy=True)
    assert heat == pytest.approx(1 - math.exp(-1))
    assert dm.heated(dm.heated(0.0, 70.0, busy=True), 80.0, busy=True) == pytest.approx(heat)
    assert dm.heated(heat, 1e6, busy=False) == pytest.approx(0.0, abs=1e-9)
    assert dm.throttled(0.5) == 0.0 and dm.throttled(1.0) == dm.HOTTEST_LOSS


def test_memory_rises_with_bits_batch_and_depth() -> None:
    assert MEMORY.peak(SHAPE, _work(4)) < MEMORY.peak(SHAPE, _work(8)) < MEMORY.peak(SHAPE, _work(16))
    assert MEMORY.peak(SHAPE, _work(batch=32)) - MEMORY.peak(SHAPE, _work(batch=16)) == pytest.approx(
        16 * MEMORY.per_sample, rel=0.01
    )
    assert MEMORY.peak(SHAPE, _work(lowest=2)) < MEMORY.peak(SHAPE, _work())
    # While the base is loaded a batch of one takes no less than a batch of two.
    assert MEMORY.peak(SHAPE, _work(batch=1)) == MEMORY.peak(SHAPE, _work(batch=2))


def _until(story: Iterator[tuple[float, dm.Happening]], end: float) -> list[tuple[float, dm.Happening]]:
    return list(itertools.takewhile(lambda one: one[0] <= end, story))


def test_devices_join_leave_and_crash_in_order() -> None:
    stories = [_until(dm.happenings(_device(f"d{number}")), 20_000.0) for number in range(40)]
    found = [what for story in stories for what in story]
    kinds = [what for _, what in found]
    assert 20 < kinds.count("crash") < kinds.count("leave")
    for story in stories:
        assert [at for at, _ in story] == sorted(at for at, _ in story)
        assert [what == "join" for _, what in story] == [place % 2 == 0 for place in range(len(story))]
    late = sum(next(dm.happenings(_device(f"d{number}")))[0] > 1.0 for number in range(100))
    assert 3 <= late <= 20
    calm = dm.Device("a", KINDS["nx"], 0, restless=False)
    assert list(dm.happenings(calm)) == [(0.0, "join")]
    assert (calm.power(50), calm.foreign(1000.0)) == (1.0, dm.Foreign())
