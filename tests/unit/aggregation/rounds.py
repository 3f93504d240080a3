"""What the tests of aggregation build: random rounds, and the dense mathematics to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from coordinator.core.aggregation.base import Expectation, Wide, product
from coordinator.core.facts import ModuleSpec
from coordinator.fold import Reported
from shared import adapter as adapters
from shared.adapter import Adapter, Factors
from shared.tensors import Array

ALPHA_RATIO = 2.0
JOB = "topics-1"
BASE = "ab" * 32


def random(rng: np.random.Generator, *shape: int) -> Array:
    """Normal float32 numbers."""
    return rng.standard_normal(shape, dtype=np.float32)


def triplets(rng: np.random.Generator, module: ModuleSpec, rank: int) -> Factors:
    """Orthonormal directions with descending sigma, as the global adapter holds them."""
    u, _ = np.linalg.qr(rng.standard_normal((module.out, rank)))
    v, _ = np.linalg.qr(rng.standard_normal((module.inp, rank)))
    sigma = np.sort(rng.uniform(0.1, 3.0, rank))[::-1]
    as_float = [np.ascontiguousarray(x, dtype=np.float32) for x in (u, v.T, sigma)]
    return Factors(b=as_float[0], a=as_float[1], sigma=as_float[2])


@dataclass(frozen=True)
class Round:
    """A round: modules, the global adapter before it, the devices' updates and samples."""

    modules: list[ModuleSpec]
    before: Adapter
    updates: dict[str, Adapter]
    samples: dict[str, int]

    def write(self, folder: Path) -> list[Reported]:
        """The updates as files."""
        folder.mkdir(exist_ok=True)
        reported = []
        for device, update in self.updates.items():
            path = folder / device
            path.write_bytes(adapters.write(update))
            reported.append(Reported(device, self.samples[device], path))
        return reported

    def expected(self, device: str, ranks: Mapping[str, int] | None = None) -> Expectation:
        """What admission wants of `device`; ranks as in its update where not given."""
        if ranks is None:
            ranks = {name: part.rank for name, part in self.updates[device].factors.items()}
        return Expectation(
            job=JOB,
            round=self.before.round + 1,
            attempt=1,
            device=device,
            base_digest=BASE,
            ranks=ranks,
            modules={module.name: module for module in self.modules},
            alpha_ratio=ALPHA_RATIO,
            before=self.before,
        )

    def mean_of_local_models(self, name: str) -> Wide:
        """sum of p_i (G - what device i trained of G + s_i B_i A_i), densely in float64."""
        module = next(m for m in self.modules if m.name == name)
        before = self.before.factors.get(name)
        whole = np.zeros((module.out, module.inp)) if before is None else product(before)
        total = sum(self.samples.values())
        mean = np.zeros_like(whole)
        for device, update in self.updates.items():
            local = whole.copy()
            part = update.factors.get(name)
            if part is not None:
                local += product(part)
                if before is not None and part.trained:
                    local -= product(first(before, part.trained))
            mean += self.samples[device] / total * local
        return mean


def first(part: Factors, count: int) -> Factors:
    """The first `count` directions of triplets."""
    assert part.sigma is not None
    return replace(part, b=part.b[:, :count], a=part.a[:count], sigma=part.sigma[:count])


def make_round(
    seed: int,
    ranks: Sequence[Mapping[str, int]],
    modules: Sequence[ModuleSpec],
    *,
    global_rank: int = 0,
    samples: Sequence[int] = (),
    train_directions: bool = True,
) -> Round:
    """A round with random numbers; `ranks`: per device, by module."""
    rng = np.random.default_rng(seed)
    factors = {}
    for module in modules:
        rank = min(global_rank, module.out, module.inp)
        if rank:
            factors[module.name] = triplets(rng, module, rank)
    head = {"head.weight": random(rng, 3, 4), "head.bias": random(rng, 3)}
    before = Adapter(kind="global", job=JOB, round=4, base_digest=BASE, factors=factors, dense=head)
    updates = {}
    for index, assigned in enumerate(ranks):
        device = f"edge-{index:03d}"
        parts = {}
        for module in modules:
            rank = assigned.get(module.name, 0)
            if rank:
                known = factors[module.name].rank if module.name in factors else 0
                parts[module.name] = Factors(
                    b=random(rng, module.out, rank),
                    a=random(rng, rank, module.inp),
                    scaling=ALPHA_RATIO,
                    trained=min(rank, known) if train_directions else 0,
                )
        dense = {"head.weight": random(rng, 3, 4), "head.bias": random(rng, 3)}
        updates[device] = Adapter(
            kind="update", job=JOB, round=5, base_digest=BASE, factors=parts, dense=dense, attempt=1, device=device
        )
    counts = list(samples) or [10] * len(ranks)
    return Round(list(modules), before, updates, dict(zip(updates, counts, strict=True)))


@st.composite
def rounds(draw: st.DrawFn, *, train_directions: bool = True) -> Round:
    """Rounds with unequal ranks, unequal sets of modules, unequal samples, with and without a global adapter."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=3))
    modules = [ModuleSpec(name=f"m{i}", out=out, inp=inp) for i, (out, inp) in enumerate(shapes)]
    rank = st.sampled_from([0, 1, 2, 3, 8, 19])
    ranks = draw(st.lists(st.fixed_dictionaries({m.name: rank for m in modules}), min_size=1, max_size=6))
    samples = draw(st.lists(st.integers(1, 1000), min_size=len(ranks), max_size=len(ranks)))
    return make_round(
        draw(st.integers(0, 2**32 - 1)),
        ranks,
        modules,
        global_rank=draw(st.sampled_from([0, 1, 5, 12])),
        samples=samples,
        train_directions=train_directions,
    )
