"""What an emulation shows while it runs."""

from __future__ import annotations

import io

from msgspec.structs import replace
from rich.console import Console

from coordinator.core.facts import Metrics
from coordinator.web.views import DeviceView, JobView, ParticipantView, RoundView
from muster.testbed import live
from shared.messages import Load, Work

WORK = Work(ranks={"a": 8, "b": 4}, batch=16, bits=4, steps=20)
PART = ParticipantView(device="edge-01", work=WORK, status="training", step=5, loss=1.25, samples_per_s=7.5)
JOB = JobView(
    id="demo-1", name="demo", state="open", round=1, rounds_total=3,
    rounds=[RoundView(round=1, phase="open", participants=[PART])],
)  # fmt: skip
LOAD = Load(epoch=1, seq=1, cores=0.9, own_cores=0.8, foreign_cores=0.1, temperature_c=61.0, paused="heat")
DEVICES = [
    DeviceView(device="edge-01", state="training", age_s=0.5, load=LOAD),
    DeviceView(device="edge-02", state="ready", age_s=0.5),
]


def _committed() -> JobView:
    view = RoundView(
        round=1, phase="committed", metrics=Metrics(loss=1.0, rows=10, accuracy=0.5), accepted=True, seconds=9.0,
        participants=[replace(PART, status="done")],
    )  # fmt: skip
    return replace(JOB, state="planning", rounds=[view])


def test_elsewhere_than_on_a_terminal_each_change_is_one_line() -> None:
    stream = io.StringIO()
    with live.screen(stream) as shown:
        for job in (JOB, JOB, _committed(), _committed()):
            shown.show(job, DEVICES)
    assert stream.getvalue().splitlines() == [
        "round 1: open",
        "  round 1 edge-01: rank 4-8, batch 16, 4 bits, 20 steps, training",
        "round 1 committed: accuracy 0.500, loss 1.000, 1 of 1 updates, 9.0 s",
        "round 1: planning",
        "  round 1 edge-01: rank 4-8, batch 16, 4 bits, 20 steps, done",
    ]


def test_the_table_shows_plan_progress_and_load_of_each_device() -> None:
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(live.table(JOB, DEVICES))
    first, second = console.export_text().splitlines()[1:3]
    for word in (
        "edge-01",
        "4-8",
        "16",
        "training (paused: heat)",
        "5/20",
        "1.250",
        "7.5",
        "0.80 + 0.10 of 0.90",
        "61 °C",
    ):
        assert word in first
    assert "ready" in second


def test_a_committed_round_stays_above_the_live_table() -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    with live.LiveTable(console) as shown:
        shown.show(JOB, DEVICES)
        shown.show(_committed(), DEVICES)
        shown.show(_committed(), DEVICES)
    written = console.file
    assert isinstance(written, io.StringIO)
    assert written.getvalue().count("round 1 committed: accuracy 0.500") == 1
