"""`split`: means over the holders of each side, buffers included, and what admission refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import Aggregator, Expectation, Wide, product
from coordinator.core.facts import ModuleSpec
from coordinator.fold import Reported, fold_round
from shared import adapter as adapters
from shared.adapter import Adapter, Factors
from shared.jobs import SplitSpec, StrategySpec
from shared.tensors import Array

LOW, TOP = ModuleSpec(name="low", out=6, inp=5, block=0), ModuleSpec(name="top", out=4, inp=6, block=1)
MODULES = [LOW, TOP]
SAMPLES = {"a": 30, "b": 10, "top/": 400}


def split(tuning: str = "lora") -> Aggregator:
    given = SplitSpec(tuning="full") if tuning == "full" else SplitSpec()
    return registry.create(StrategySpec(name="mergesfl", energy=1.0, global_rank=64, split=given))


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def factors(seed: int, module: ModuleSpec, rank: int, trained: int = 0) -> Factors:
    return Factors(
        b=random(seed, module.out, rank), a=random(seed + 50, rank, module.inp), scaling=2.0, trained=trained
    )


def directions(seed: int, module: ModuleSpec, rank: int) -> Factors:
    u, _ = np.linalg.qr(random(seed, module.out, rank))
    v, _ = np.linalg.qr(random(seed + 1, module.inp, rank))
    return Factors(
        b=np.ascontiguousarray(u), a=np.ascontiguousarray(v.T), sigma=np.linspace(2, 1, rank, dtype=np.float32)
    )


BEFORE = Adapter(
    kind="global", job="j", round=0, base_digest="b", 
    factors={"low": directions(1, LOW, 3), "top": directions(5, TOP, 3)},
    dense={"head": random(9, 2, 4)},
)  # fmt: skip
WHOLE = Adapter(
    kind="global", job="j", round=0, base_digest="b", factors={},
    dense={
        "low.weight": random(1, 6, 5), "low.norm.running_mean": random(2, 6),
        "low.norm.running_var": np.ones(6, np.float32),
        "low.norm.num_batches_tracked": np.zeros((), np.float32), "top.weight": random(3, 4, 6),
        "head": random(4, 2, 4),
    },
)  # fmt: skip
LOWER = frozenset(name for name in WHOLE.dense if name.startswith("low"))


def update(device: str, given: dict[str, Factors], dense: dict[str, Array]) -> Adapter:
    return Adapter(
        kind="update", job="j", round=1, base_digest="b", factors=given, dense=dense, attempt=1, device=device
    )


def tensors(seed: int, names: frozenset[str] | set[str]) -> dict[str, Array]:
    return {name: random(seed + row, *WHOLE.dense[name].shape) for row, name in enumerate(sorted(names))}


def reported(folder: Path, updates: list[Adapter]) -> list[Reported]:
    found = []
    for row, one in enumerate(updates):
        path = folder / str(row)
        path.write_bytes(adapters.write(one))
        found.append(Reported(one.device, SAMPLES[one.device], path))
    return found


def local(name: str, given: Factors) -> Wide:
    """The device's own model of a module: what it did not train stays."""
    before = BEFORE.factors[name]
    assert before.sigma is not None
    k = given.trained
    frozen = Factors(b=before.b[:, k:], a=before.a[k:], sigma=before.sigma[k:])
    return product(frozen) + product(given)


def test_lora_of_each_side_is_the_mean_over_its_holders(tmp_path: Path) -> None:
    one, two, top = factors(20, LOW, 2, 2), factors(30, LOW, 4, 3), factors(40, TOP, 3, 3)
    head = random(8, 2, 4)
    updates = [
        update("a", {"low": one}, {}),
        update("b", {"low": two}, {}),
        update("top/", {"top": top}, {"head": head}),
    ]
    made = fold_round(split(), MODULES, BEFORE, None, reported(tmp_path, updates), round=1).adapter
    # 30 and 10 samples of the holders, whatever the top worker's weight.
    wanted = 0.75 * local("low", one) + 0.25 * local("low", two)
    assert np.abs(product(made.factors["low"]) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(product(made.factors["top"]) - local("top", top)).max() < 1e-5 * np.abs(wanted).max()
    assert made.dense["head"] == pytest.approx(head)


def test_whole_tensors_and_buffers_are_means_over_their_holders(tmp_path: Path) -> None:
    one, two = tensors(20, LOWER), tensors(40, LOWER)
    top = tensors(60, WHOLE.dense.keys() - LOWER)
    updates = [update("a", {}, one), update("b", {}, two), update("top/", {}, top)]
    aggregator = split("full")
    made = fold_round(aggregator, MODULES, WHOLE, None, reported(tmp_path, updates), round=1).adapter
    assert aggregator.start == "dense" and split().start == "directions"
    assert made.factors == {} and made.dense.keys() == WHOLE.dense.keys()
    for name in LOWER:
        assert made.dense[name] == pytest.approx(0.75 * one[name] + 0.25 * two[name], abs=1e-6)
    for name, tensor in top.items():
        assert made.dense[name] == pytest.approx(tensor, abs=1e-6)


def test_tops_of_their_own_are_averaged_by_samples(tmp_path: Path) -> None:
    """Without merging: as many updates of the upper part as devices."""
    given = {"top/a": tensors(1, {"head"}), "top/b": tensors(2, {"head"})}
    found = []
    for (device, dense), samples in zip(given.items(), (30, 10), strict=True):
        path = tmp_path / device.replace("/", "-")
        path.write_bytes(adapters.write(update(device, {}, dense)))
        found.append(Reported(device, samples, path))
    made = fold_round(split("full"), MODULES, WHOLE, None, found, round=1).adapter
    assert made.dense["head"] == pytest.approx(0.75 * given["top/a"]["head"] + 0.25 * given["top/b"]["head"], abs=1e-6)
    assert np.array_equal(made.dense["low.weight"], WHOLE.dense["low.weight"]), "nobody held it"


def expected(before: Adapter, ranks: dict[str, int], dense: frozenset[str]) -> Expectation:
    return Expectation(
        job="j", round=1, attempt=1, device="a", base_digest="b", ranks=ranks,
        modules={one.name: one for one in MODULES}, alpha_ratio=2.0, before=before, dense=dense,
    )  # fmt: skip


GOOD, ASKED = update("a", {"low": factors(20, LOW, 2, 2)}, {}), expected(BEFORE, {"low": 2}, frozenset())
FULL, ALL = update("a", {}, tensors(20, LOWER)), expected(WHOLE, {}, LOWER)
NAN = np.full((6, 5), np.nan, np.float32)


def test_the_lower_part_is_admitted() -> None:
    assert split().admit(GOOD, ASKED) is None
    assert split("full").admit(FULL, ALL) is None


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (replace(GOOD, dense={"head": random(1, 2, 4)}), "dense tensor 'head' was not asked for"),
        (replace(GOOD, factors={}), "module 'low' is missing"),
        (replace(GOOD, factors={**GOOD.factors, "top": factors(3, TOP, 2, 2)}), "module 'top' was not asked for"),
        (replace(GOOD, factors={"low": factors(20, LOW, 3, 3)}), "module 'low': rank 3, expected 2"),
        (replace(GOOD, factors={"low": factors(20, TOP, 2, 2)}), "for a layer of 6 x 5"),
        (replace(GOOD, factors={"low": replace(GOOD.factors["low"], b=NAN[:, :2])}), "not finite"),
        (replace(GOOD, device="b"), "device is 'b', expected 'a'"),
    ],
)  # fmt: skip
def test_what_is_no_lower_part_of_lora_is_refused(sent: Adapter, told: str) -> None:
    assert told in (split().admit(sent, ASKED) or "")


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (replace(FULL, dense={**FULL.dense, "head": random(1, 2, 4)}), "dense tensor 'head' was not asked for"),
        (
            replace(FULL, dense={"low.weight": FULL.dense["low.weight"]}),
            "dense tensor 'low.norm.num_batches_tracked' is missing",
        ),
        (replace(FULL, dense={**FULL.dense, "low.weight": random(1, 5, 6)}), "shape (5, 6), expected (6, 5)"),
        (replace(FULL, dense={**FULL.dense, "low.weight": NAN}), "'low.weight' holds numbers that are not finite"),
        (replace(FULL, factors=GOOD.factors), "takes no factors"),
    ],
)  # fmt: skip
def test_what_is_no_lower_part_of_a_whole_model_is_refused(sent: Adapter, told: str) -> None:
    assert told in (split("full").admit(sent, ALL) or "")
