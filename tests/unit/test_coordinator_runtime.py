"""The coordinator's runtime over a real event log and blob store: what is kept, what is begun, what is told."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.adapters.event_log import SqliteEventLog
from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core.release_records import Canaries
from coordinator.core.round_machine import step
from coordinator.performing import Performer
from coordinator.runtime import Runtime
from coordinator.web.desk import Desk
from coordinator.web.refusals import Conflict
from muster.testbed.memory_fleet import MemoryFleet
from shared import topics
from shared.codec import pack, unpack
from shared.errors import UserError
from shared.messages import BlobRef, Done
from tests.unit.machine_rig import A, Rig, facts, spec


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[MemoryFleet]:
    """A coordinator without devices, whose worker answers only when the fleet is run, and which has had a job."""
    with MemoryFleet(tmp_path / "fleet", []) as made:
        runtime = made.coordinator.runtime
        runtime.step(ev.JobRequested(job="job-0", spec=spec(), **runtime.now()))
        runtime.step(ev.CancelRequested(job="job-0", **runtime.now()))
        yield made


def asked(runtime: Runtime, name: str) -> ev.ReleaseRequested:
    return ev.ReleaseRequested(
        release=name, number=int(name.rpartition("-")[2]), job="job-0", round=1, adapter=BlobRef(sha=A, size=1),
        canaries=Canaries(count=1), worse_by=0.1, deadline_s=100.0, bits={}, **runtime.now(),
    )  # fmt: skip


def released(runtime: Runtime, name: str) -> None:
    """A release that comes to nothing, at whose end blobs are collected."""
    if name not in runtime.state.releases:
        runtime.step(asked(runtime, name))
    runtime.step(ev.PackingFailed(release=name, reason="disk", **runtime.now()))
    assert runtime.state.releases[name].phase == "failed"


@pytest.mark.parametrize("phase", ["preparing", "folding"])
def test_what_is_being_made_outlives_the_end_of_a_release(fleet: MemoryFleet, phase: str) -> None:
    """Its blob lies in the store before anything that is written down refers to it."""
    runtime = fleet.coordinator.runtime
    if phase == "preparing":
        runtime.step(ev.JobRequested(job="job-1", spec=spec(), **runtime.now()))
        runtime.step(ev.Tick(**runtime.now()))
    else:
        _fold(runtime)
    assert runtime.state.jobs["job-1"].phase == phase
    made = runtime.ports.blobs.put(b"the adapter that is being made")
    released(runtime, "job-0.r1-1")
    assert runtime.ports.blobs.path(made.sha) is not None
    runtime.step(ev.CancelRequested(job="job-1", **runtime.now()))
    released(runtime, "job-0.r1-2")
    assert runtime.ports.blobs.path(made.sha) is None, "nobody makes it any more"


def _fold(runtime: Runtime) -> None:
    """Bring a job to its fold."""
    rig = Rig()
    rig.open(spec(rounds={"min_devices": 1}), devices=("dev-a",))
    rig.deliver("dev-a", A)
    _take_over(runtime, rig)


def _take_over(runtime: Runtime, rig: Rig) -> None:
    """The state of `rig`, beside the jobs that there are."""
    runtime.ports.log.append(rig.log)
    runtime.state = replace(rig.state, jobs={**runtime.state.jobs, **rig.state.jobs})


@pytest.mark.parametrize("request_of", ["release", "rollback", "cancel", "resume"])
def test_what_was_answered_as_not_begun_is_not_begun_later(fleet: MemoryFleet, request_of: str) -> None:
    coordinator, runtime = fleet.coordinator, fleet.coordinator.runtime
    desk = Desk(runtime, runtime.handle)
    runtime.step(ev.JobRequested(job="job-1", spec=spec(), **runtime.now()))
    runtime.step(ev.Tick(**runtime.now()))
    runtime.step(asked(runtime, "job-0.r1-1"))
    coordinator.log_full = True
    if request_of == "release":
        runtime.step(asked(runtime, "job-0.r1-2"))
    elif request_of == "rollback":
        with pytest.raises(Conflict, match="can't be written down, nothing was begun: database or disk is full"):
            desk.releases.roll_back("last")
    elif request_of == "cancel":
        with pytest.raises(Conflict, match="job job-1 goes on as it was: database or disk is full"):
            desk.cancel("job-1")
    else:
        runtime.step(ev.ResumeRequested(job="job-1", **runtime.now()))
    before = [type(record) for record in runtime.ports.log.replay()]
    coordinator.log_full = False
    _later(runtime)
    assert [type(record) for record in runtime.ports.log.replay()] == before
    assert runtime.state.jobs["job-1"].phase == "preparing"


def _later(runtime: Runtime) -> None:
    """Let the wait for the disk pass, and nothing else happen."""
    now = runtime.ports.clock() + 5.0
    runtime.ports.clock = lambda: now
    for _ in range(3):
        runtime.tick()


def test_a_decision_of_its_own_is_made_up_for(fleet: MemoryFleet) -> None:
    """What nobody waits for an answer to is decided again once the disk takes it."""
    coordinator, runtime = fleet.coordinator, fleet.coordinator.runtime
    runtime.step(asked(runtime, "job-0.r1-1"))
    coordinator.log_full = True
    runtime.step(ev.PackingFailed(release="job-0.r1-1", reason="disk", **runtime.now()))
    assert runtime.state.releases["job-0.r1-1"].phase == "packing"
    coordinator.log_full = False
    _later(runtime)
    assert runtime.state.releases["job-0.r1-1"].phase == "failed"


def test_a_reason_is_cut_to_what_a_device_can_read(fleet: MemoryFleet) -> None:
    runtime = fleet.coordinator.runtime
    sent: list[tuple[topics.Topic, Any]] = []
    runtime.send = lambda topic, message, **_: sent.append((topic, message))  # type: ignore[method-assign]  # what it sends is looked at
    Performer(runtime).perform(cmd.Settle("dev-a", A, "refused", "x" * 5000))
    ((topic, done),) = sent
    assert topic is topics.DOWN_BLOB
    assert unpack(pack(done), Done).reason == "x" * 1000


def test_an_update_that_can_t_be_checked_is_refused_and_the_job_goes_on(fleet: MemoryFleet) -> None:
    runtime = fleet.coordinator.runtime
    rig = Rig()
    rig.open(spec(rounds={"min_devices": 1}), devices=("dev-a",))
    rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", A))
    _take_over(runtime, rig)
    offloaded: list[Any] = []
    runtime.ports.offload = lambda work, _post: offloaded.append(work)
    there = runtime.ports.blobs.put(b"no adapter")
    Performer(runtime).perform(cmd.CheckUpdate(rig.job, "dev-a", there, facts()))
    runtime.ports.blobs.remove(there.sha)
    (work,) = offloaded
    answer = work()
    assert isinstance(answer, ev.UpdateChecked) and answer.reason
    rig.feed(ev.UpdateStored, device="dev-a", sha=A)
    after = step(rig.state, answer).state
    assert after.jobs["job-1"].phase == "open"


def test_a_notice_ends_with_what_it_is_about() -> None:
    rig = Rig()
    rig.birth("dev-a")
    rig.submit()
    rig.prepared()
    assert "waiting for 2 able devices" in rig.state.notices["job-1"]
    rig.feed(ev.CancelRequested, job="job-1")
    assert rig.state.notices == {}


def test_an_event_log_that_can_t_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    log = SqliteEventLog(tmp_path / "events.sqlite")
    assert log.next_term() == 1
    other = sqlite3.connect(tmp_path / "events.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    log._db.execute("PRAGMA busy_timeout=10")
    with pytest.raises(UserError, match="can't be written .database is locked"):
        log.next_term()
    other.execute("ROLLBACK")
    assert log.next_term() == 2
    other.close()
    log.close()
