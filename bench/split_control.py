"""MergeSFL's control by itself: how even the labels are and how long devices wait, before and after each step of it.

    python -m bench.split_control

80 devices of speeds 1:2:4 (30/40/10), links of 1-30 Mb/s (log-uniform), 24 KiB of features a sample; ten are selected,
D is 64. Labels: Dirichlet per device over 14 classes, or one dominant owner per class and device (half of its rows).
"Random": the mean over 100 draws of ten. Waiting: mean share of a step. Figures are means over `--seeds` fleets; the
clock here is the control's own mu and beta, so these are figures of the search, not of training.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import fmean

import numpy as np

from coordinator.core.planning import split_control as control
from coordinator.core.planning.split_control import Fleet, Floats

DEVICES, SELECTED, CLASSES, DEFAULT = 80, 10, 14, 64
FEATURES = 24 * 1024
SPEEDS, SHARES = (4.0, 2.0, 1.0), (0.375, 0.5, 0.125)
SKEWS = ("Dirichlet 0.1", "Dirichlet 0.2", "dominant owner 0.5")
COLUMNS = (
    "labels", "KL random", "KL selected", "KL tuned", "waiting, regulated", "waiting, tuned", "waiting, uniform",
    "s per plan",
)  # fmt: skip


def labels(skew: str, rng: np.random.Generator) -> list[dict[str, int]]:
    """Rows by class of every device."""
    if skew.startswith("Dirichlet"):
        shares = rng.dirichlet([float(skew.split()[1])] * CLASSES, DEVICES)
    else:
        own = np.eye(CLASSES)[rng.integers(0, CLASSES, DEVICES)]
        shares = 0.5 * own + 0.5 * rng.dirichlet([0.5] * CLASSES, DEVICES)
    return [{str(one): round(1000 * share) for one, share in enumerate(row)} for row in shares]


def drawn(skew: str, seed: int) -> tuple[Fleet, Floats]:
    """A fleet and seconds of a sample on each device."""
    rng = np.random.default_rng(seed)
    compute = 0.004 * rng.choice(SPEEDS, DEVICES, p=SHARES) * rng.uniform(1.0, 2.0, DEVICES)
    rates = np.exp(rng.uniform(np.log(1e6), np.log(30e6), DEVICES)) / 8
    times = compute + 2 * FEATURES / rates
    batches = control.regulated(times, DEFAULT, 1, np.full(DEVICES, 4 * DEFAULT))
    mixes, goal, _ = control.mixes_of(labels(skew, rng))
    return Fleet(batches, mixes, goal, np.ones(DEVICES), 0.0, 1, SELECTED), times


def measure(skew: str, seed: int) -> list[float]:
    """A row of the table, of one fleet."""
    fleet, times = drawn(skew, seed)
    rng = np.random.default_rng(seed + 1)
    alike = []
    for _ in range(100):
        chosen = np.zeros(DEVICES, dtype=np.bool_)
        chosen[rng.choice(DEVICES, SELECTED, replace=False)] = True
        alike.append(control.kl_of(fleet, chosen))
    begun = time.process_time()
    chosen = control.select(fleet, seed)
    tuned = control.tuned(fleet, chosen, times, np.full(DEVICES, 4 * DEFAULT))
    took = time.process_time() - begun
    uniform = np.full(DEVICES, DEFAULT)
    return [
        fmean(alike), control.kl_of(fleet, chosen), control.kl_of(fleet, chosen, tuned),
        *(control.waiting(batches, chosen, times) for batches in (fleet.batches, tuned, uniform)), took,
    ]  # fmt: skip


def table(seeds: int) -> list[str]:
    """Rows of Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for skew in SKEWS:
        random, selected, tuned, *waits, took = (
            fmean(one) for one in zip(*(measure(skew, seed) for seed in range(seeds)), strict=True)
        )
        cells = [f"{random:.3f}", f"{selected:.4f}", f"{tuned:.4f}", *(f"{wait:.0%}" for wait in waits), f"{took:.2f}"]
        lines.append(f"| {skew} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="fleets for each kind of skew")
    print("\n".join(table(parser.parse_args().seeds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
