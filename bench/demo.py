"""The demo as `make demo` runs it, then central LoRA runs on the pooled data with the same number of steps.

`bench/run.py demo`. Two central runs: at the job's batch, so of the same steps; and at a batch as large as those of all
devices together, so of the same samples, too. All are evaluated on the same held-out rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from coordinator.core.facts import Metrics
from muster.testbed import central
from muster.testbed.emulate import DEMO_JOB, Emulation, Outcome, carry_out
from muster.testbed.exported import quality
from shared.modeling.evaluation import Quality


def figure(name: str, what: str, value: float, unit: str, target: str, note: str) -> dict[str, Any]:
    """A result as `bench/README.md` wants it."""
    return {"name": name, "what": what, "value": value, "unit": unit, "target": target, "note": note}


def accuracy(metrics: Metrics | Quality | None) -> float:
    """Of a classification. Ends the benchmark where there is none."""
    if metrics is None or metrics.accuracy is None:
        raise SystemExit("bench: the demo was not evaluated")
    return metrics.accuracy


def measure(out: Path) -> list[dict[str, Any]]:
    """Run the demo in `out`, then the central run."""
    started = time.monotonic()
    outcome = carry_out(Emulation(job=DEMO_JOB, out=out), command="muster emulate")
    seconds = time.monotonic() - started
    if outcome.job.state != "finished":
        raise SystemExit(f"bench: the demo did not finish: {outcome.job.reason}")
    same_samples = central.effort_of(outcome.job)
    same_steps = central.Effort(same_samples.steps, outcome.spec.strategy.batch)
    references = [_central(outcome, effort) for effort in (same_steps, same_samples)]
    spec, rounds = outcome.spec, outcome.job.rounds
    chance = 1 / len(spec.task.labels)
    second = accuracy(rounds[1].metrics)
    # On every held-out row: the few that the demo evaluates on leave three points of chance in each.
    held_out = Path(spec.evaluation.data)
    last = accuracy(quality(spec, Path(outcome.model), outcome.out / "adapter", [held_out])[0])
    note = f"accuracy {second:.3f} on {spec.evaluation.rows} held-out rows after round 2, chance {chance:.3f}; one run"
    return [
        figure("demo.seconds", "`make demo` after set-up, 4 devices", round(seconds, 1), "s", "<= 300", "one run"),
        figure(
            "demo.accuracy_over_chance", "demo: held-out accuracy after round 2 over chance",
            round(second / chance, 2), "x", ">= 3", note,
        ),
        _behind("demo.behind_central", "the same steps", last, references[0], "<= 5"),
        _behind("demo.behind_central_samples", "the same steps and samples", last, references[1], ""),
    ]  # fmt: skip


def _central(outcome: Outcome, effort: central.Effort) -> central.Reference:
    return central.central_lora(outcome.spec, Path(outcome.model), outcome.train, effort)


def _behind(name: str, what: str, last: float, reference: central.Reference, target: str) -> dict[str, Any]:
    """How far the export, of accuracy `last`, is behind a central run."""
    pooled, effort = accuracy(reference.after), reference.effort
    note = (
        f"the export {last:.3f} on all {reference.after.rows} held-out rows, central {pooled:.3f} with {effort.steps} "
        f"steps of {effort.batch} samples; one run"
    )
    words = f"demo: points behind central LoRA on the pooled data with {what}"
    return figure(name, words, round(100 * (pooled - last), 2), "points", target, note)


def main() -> int:
    """0: measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the run; without it a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="muster-demo-") as temporary:
        for one in measure(arguments.out or Path(temporary) / "demo"):
            print(json.dumps(one))
    return 0


if __name__ == "__main__":
    sys.exit(main())
