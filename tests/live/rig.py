"""What live tests share: rows of generated text, job files, and waiting for what the coordinator's job view shows."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.adapters.event_log import SqliteEventLog
from coordinator.core import records as rec
from coordinator.core.planning.base import Plan
from coordinator.web.views import JobView, ParticipantView
from muster.testbed.fleet import Fleet

LABELS = ("sea", "hill", "road", "bird")
_FILLING = ("the", "cold", "warm", "sun", "rain", "over", "near", "and", "old", "green", "under", "this")
ENDED = ("finished", "cancelled", "failed", "paused")


def write_texts(path: Path, count: int, seed: int, *, words: int = 14) -> Path:
    """Rows for classification: texts that name one of `LABELS` among other words."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        label = rng.randrange(len(LABELS))
        text = [rng.choice(_FILLING) for _ in range(words - 1)]
        text.insert(rng.randrange(words), LABELS[label])
        lines.append(json.dumps({"text": " ".join(text), "label": label}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def wait_until_heard(fleet: Fleet) -> None:
    """Wait until every device has proven some precision and told its load, so that no first plan is a cautious one."""
    assert fleet.wait_until_able() == []
    until = time.monotonic() + 60.0
    while missing := [view.device for view in fleet.client.devices() if view.load is None]:
        assert time.monotonic() < until, f"no load from {missing}"
        time.sleep(0.1)


def wait_for(fleet: Fleet, job: str, met: Callable[[JobView], bool], *, seconds: float) -> JobView:
    """The job once `met` says so. Fails where it ends before, or a program of the fleet does."""
    until = time.monotonic() + seconds
    while True:
        view = fleet.client.job(job)
        if met(view):
            return view
        told = f"{view.state} in round {view.round}: {view.reason}; {history(view)}"
        assert view.state not in ENDED, f"ended too early: {told}"
        assert not fleet.ended, fleet.ended
        assert time.monotonic() < until, f"not within {seconds:.0f} s: {told}"
        time.sleep(0.1)


def ended(view: JobView) -> bool:
    """For `wait_for`: the job has ended, however it did."""
    return view.state in ENDED


def committed(count: int) -> Callable[[JobView], bool]:
    """For `wait_for`: so many rounds are committed."""
    return lambda view: sum(r.phase == "committed" for r in view.rounds) >= count


def parts_of(view: JobView, device: str) -> list[ParticipantView]:
    """The device's part in each round that it took part in."""
    return [part for r in view.rounds for part in r.participants if part.device == device]


def records_of(fleet: Fleet, job: str) -> list[rec.AnyRecord]:
    """The job's part of the event log."""
    return SqliteEventLog(fleet.folder / "coordinator" / "events.sqlite").of_job(job)


def plans_of(fleet: Fleet, job: str) -> list[Plan]:
    """Every plan of the job, as recorded."""
    return [record.plan for record in records_of(fleet, job) if isinstance(record, rec.RoundPlanned)]


def history(view: JobView) -> str:
    """Batch and bits of every device and round, for the message of a failed assertion."""
    return "; ".join(
        f"round {r.round} " + ", ".join(f"{p.device} {p.work.batch}@{p.work.bits} {p.status}" for p in r.participants)
        for r in view.rounds
    )
