"""The report of a run: its words, its numbers, its plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from msgspec.structs import replace

from coordinator.core.facts import Metrics
from coordinator.core.planning.base import Weights
from coordinator.web.views import JobView, ParticipantView, RoundView
from muster.testbed import report
from muster.testbed.cgroups import Available
from muster.testbed.profiles import MIB, Shape
from shared.jobs import BaseSpec, JobSpec, TaskSpec
from shared.messages import UpdateFacts, Work

BOTH = Available(True, True)


def _part(device: str, *, trained: bool = True) -> ParticipantView:
    facts = UpdateFacts(
        samples=40, steps=5, batch=4, bits=8, loss_first=2.0, loss_last=1.5, step_s=0.5, train_s=4.0,
        peak_bytes=500 * MIB,
    )  # fmt: skip
    work = Work(ranks={"a": 8}, batch=8, bits=8, steps=10, reasons={"batch": "batch 8: because"})
    return ParticipantView(
        device=device, work=work, status="done" if trained else "silent", reason="" if trained else "no word | 12 s",
        facts=facts if trained else None, predicted_s=5.0, update_bytes=2_000_000 if trained else 0,
        adapter_bytes=1_000_000,
    )  # fmt: skip


def _run(available: Available = BOTH) -> report.Run:
    rounds = [
        RoundView(
            round=number,
            phase="committed",
            plan_reason="round target 6 s",
            participants=[_part("edge-01"), late],
            metrics=Metrics(loss=2.0 / number, rows=100, accuracy=0.2 * number),
            accepted=True,
            seconds=12.5,
        )  # fmt: skip
        for number, late in ((1, _part("edge-02")), (2, _part("edge-02", trained=False)))
    ]
    job = JobView(
        id="demo-1", name="demo", state="finished", rounds_total=2, round=2, rounds=rounds,
        baseline=Metrics(loss=2.3, rows=100, accuracy=0.1), best=Metrics(loss=1.0, rows=100, accuracy=0.4),
    )  # fmt: skip
    spec = JobSpec(name="demo", base=BaseSpec(model="minilm"), task=TaskSpec(kind="classification", dataset="d"))
    shapes = [Shape("edge-01", 0.9, 900 * MIB), Shape("edge-02", 0.3, 600 * MIB)]
    return report.Run(
        command="muster emulate --devices 2", spec=spec, job=job, shapes=shapes, rows={"edge-01": 70, "edge-02": 30},
        available=available, committed_s={1: 15.0, 2: 29.0}, seconds=45.0, adapter="adapter",
    )  # fmt: skip


def test_the_report_and_its_plots_are_written(tmp_path: Path) -> None:
    path = report.write(_run(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["devices.png", "quality.png", "report.md"]
    assert all(
        (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in (report.QUALITY_PNG, report.DEVICES_PNG)
    )
    assert "![Quality" in path.read_text()


def test_the_report_sets_plan_against_reality() -> None:
    text = report.render(_run())
    assert "| edge-01 | 0.9 | 900 MiB | 70 |" in text
    assert "| 1 | accuracy 0.200, loss 2.000 | accepted | 2 of 2 | 12.5 | 15.0 s |" in text
    assert "| 8 -> 4 | 8 | 5 of 10 | 5.0 s | 4.0 s | 2.000 -> 1.500 | 500 MiB | 1.00 MB | 2.00 MB | done |" in text
    assert r"| silent: no word \| 12 s |" in text
    assert "- edge-02 batch: batch 8: because" in text
    assert "not unequal" not in text


def test_the_report_has_the_scores_of_each_scoring_round_and_what_was_chosen() -> None:
    run = _run()
    assert "## Weights" not in report.render(run)
    every, first, second = ["k", "o", "q"], {"q": 0.7, "k": 0.2, "o": 0.1}, {"q": 0.2, "k": 0.8}
    plans = [
        Weights(selected=every), Weights(scores=first, selected=["k", "q"], scored=1),
        Weights(scores=first, selected=every, scored=1), Weights(scores=second, selected=["k"], scored=3),
    ]  # fmt: skip
    rounds = [replace(run.job.rounds[0], round=n, weights=plan) for n, plan in enumerate(plans, start=1)]
    text = report.render(dataclasses.replace(run, job=replace(run.job, rounds=rounds)), plots=False)
    table = text[text.index("## Weights") :].splitlines()[2:7]
    assert table == [
        "| module | score of round 1 | score of round 3 |",
        "|---|---|---|",
        "| k | 0.200, tuned | 0.800, tuned |",
        "| q | 0.700, tuned | 0.200 |",
        "| o | 0.100 | 0.000 |",
    ]


def test_the_report_says_where_devices_are_not_unequal() -> None:
    text = report.render(_run(Available(False, False, "memory: read-only")))
    assert "**The devices are not unequal in memory**: no limit can be set here (memory: read-only)." in text
    assert "**The devices are unequal in speed by niceness alone**" in text
    assert "| edge-01 | not limited | not limited | 70 |" in text


def test_a_run_without_a_committed_round_has_a_report_too(tmp_path: Path) -> None:
    run = _run()
    failed = replace(run.job, state="failed", reason="no device can do it", rounds=[], baseline=None, best=None)
    bare = report.Run(
        command=run.command, spec=run.spec, job=failed, shapes=run.shapes, rows=run.rows, available=BOTH,
        committed_s={}, seconds=1.0,
    )  # fmt: skip
    text = report.write(bare, tmp_path).read_text()
    assert "# demo: failed" in text
    assert "**no device can do it**" in text
    assert "adapter:" not in text
