"""A round of split learning in the coordinator's machine: the top worker's question, its answer, its end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator import folding
from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.job import Round
from coordinator.core.release_records import ReleaseRecord
from coordinator.performing import referenced
from coordinator.web.history import job_view
from muster.cli.tables import notes
from shared import adapter, jobs
from shared.adapter import Adapter, Factors
from shared.blob_folder import BlobFolder
from shared.messages import BlobRef
from tests.unit.machine_rig import Rig, facts, spec

FACTS = ModelFacts(
    modules=[ModuleSpec(name=f"blocks.{n}.linear", out=8, inp=16, block=n) for n in range(2)], base_digest="b" * 64,
    linear_params=256, other_params=0, blocks=2, hidden=16,
)  # fmt: skip
TOP = (("", BlobRef(sha="7" * 64, size=60), 32),)


class SplitRig(Rig):
    """A job that splits its model, over two devices."""

    def prepared(self, job: str = "job-1") -> list[cmd.Command]:
        return self.feed(ev.BasePrepared, job=job, facts=FACTS, adapter=BlobRef(sha="0" * 64, size=100))

    def top_done(self, **changes: int) -> list[cmd.Command]:
        """The top worker answers."""
        assert self.job.round is not None
        number, attempt = self.job.round.number, self.job.round.attempt
        about = {"job": "job-1", "round": number, "attempt": attempt, **changes}
        return self.feed(ev.TopDone, updates=TOP, steps=4, loss=1.0, dropped=0, waited_s=0.5, **about)

    @property
    def round(self) -> Round:
        assert self.job.round is not None
        return self.job.round


def a_job() -> jobs.JobSpec:
    made = spec()
    task = jobs.TaskSpec(kind="classification", dataset="points", labels=["a", "b"])
    strategy = replace(made.strategy, name="mergesfl", split=jobs.SplitSpec(block=1))
    return replace(made, task=task, strategy=strategy)


@pytest.fixture
def rig() -> SplitRig:
    made = SplitRig()
    made.open(a_job())
    return made


def of(commands: list[cmd.Command], kind: type[cmd.Command]) -> list[cmd.Command]:
    return [one for one in commands if isinstance(one, kind)]


def test_an_open_round_asks_the_top_worker_and_asks_again_after_a_restart(rig: SplitRig) -> None:
    assert len(of(rig.last, cmd.RunTop)) == 1
    assert all(work.split is not None and work.split.block == 1 for work in rig.round.plan.participants.values())
    assert len(of(rig.restart(), cmd.RunTop)) == 1
    rig.top_done()
    (again,) = of(rig.restart(), cmd.RunTop)
    assert isinstance(again, cmd.RunTop) and again.job.round is not None and again.job.round.top, "only to answer"


def test_a_round_closes_once_devices_and_top_are_there(rig: SplitRig) -> None:
    rig.deliver("dev-a", "a" * 64)
    rig.deliver("dev-b", "b" * 64)
    assert rig.job.phase == "open" and of(rig.last, cmd.FinishTop)
    rig.top_done()
    assert rig.job.phase == "folding" and rig.round.top[0].samples == 32
    assert "7" * 64 in referenced(rig.job), "its blob is kept"


def test_the_top_may_be_the_first(rig: SplitRig) -> None:
    rig.top_done()
    rig.deliver("dev-a", "a" * 64)
    assert rig.job.phase == "open"
    rig.deliver("dev-b", "b" * 64)
    assert rig.job.phase == "folding"


@pytest.mark.parametrize("changes", [{"round": 2}, {"attempt": 2}])
def test_an_answer_of_other_work_does_not_count(rig: SplitRig, changes: dict[str, int]) -> None:
    rig.top_done(**changes)
    assert not rig.round.top and rig.state.counters == {"stale answers of the top worker": 1}


def test_a_second_answer_does_not_count(rig: SplitRig) -> None:
    rig.top_done()
    rig.top_done()
    assert sum(isinstance(one, rec.TopTrained) for one in rig.log) == 1


def test_the_top_is_told_who_will_not_come(rig: SplitRig) -> None:
    rig.now += 1.0
    rig.feed(ev.Decommissioned, device="dev-a")
    assert of(rig.last, cmd.TellTop) == [cmd.TellTop(("dev-a",))]
    rig.feed(ev.Tick)
    assert not of(rig.last, cmd.TellTop), "once"


def test_before_the_deadline_the_top_is_asked_to_finish(rig: SplitRig) -> None:
    began, asked = rig.now, False
    while not asked and rig.now < began + 200.0:
        rig.now += 1.0
        asked = any(of(rig.feed(ev.Heard, device=device), cmd.FinishTop) for device in ("dev-a", "dev-b"))
    assert 89.0 <= rig.now - began <= 91.0, "a tenth of the deadline is left for deliveries"
    rig.feed(ev.Heard, device="dev-a")
    assert not of(rig.last, cmd.FinishTop), "once"


def test_a_top_that_does_not_finish_costs_the_round(rig: SplitRig) -> None:
    rig.deliver("dev-a", "a" * 64)
    rig.deliver("dev-b", "b" * 64)
    rig.now += rig.state.waits.grace_s + 1.0
    rig.feed(ev.Heard, device="dev-a")
    repeated = [one for one in rig.log if isinstance(one, rec.RoundRepeated)]
    assert repeated and "top worker did not finish" in repeated[0].reason


def test_a_top_that_fails_pauses_the_job_and_a_cancelled_job_stops_it(rig: SplitRig) -> None:
    rig.feed(ev.TopFailed, job="job-1", round=1, attempt=1, reason="no certificate")
    assert rig.job.phase == "paused" and "no certificate" in rig.job.reason
    assert of(rig.last, cmd.StopTop)
    other = SplitRig()
    other.open(a_job())
    assert of(other.feed(ev.CancelRequested, job="job-1"), cmd.StopTop)


def test_a_failure_of_other_work_changes_nothing(rig: SplitRig) -> None:
    rig.feed(ev.TopFailed, job="job-1", round=7, attempt=1, reason="no certificate")
    assert rig.job.phase == "open"


def test_what_the_top_worker_did_is_told(rig: SplitRig) -> None:
    rig.deliver("dev-a", "a" * 64)
    rig.deliver("dev-b", "b" * 64)
    rig.feed(
        ev.TopDone, job="job-1", round=1, attempt=1, updates=TOP, steps=4, loss=1.25, dropped=2, waited_s=0.5
    )  # fmt: skip
    view = job_view([one for one in rig.log if not isinstance(one, ReleaseRecord)], rig.job)
    told = "4 steps, 32 samples, loss 1.250, 2 times without a device that was late; it waited 0.5 s for features"
    assert view.rounds[0].top == told
    assert notes(view.rounds[0]) == [f"top worker: {told}"]


def test_a_device_may_claim_the_samples_that_its_regulated_batch_allows() -> None:
    rig, job = SplitRig(), a_job()
    rig.open(replace(job, strategy=replace(job.strategy, batch=4, batch_max=8)))
    regulation, work = rig.round.plan.regulation, rig.round.plan.participants["dev-a"]
    assert regulation is not None and regulation.participants["dev-a"].most == 8 and work.batch == 4
    rig.deliver("dev-b", "b" * 64, facts=replace(facts(), samples=work.steps * 8 + 1))
    assert rig.round.participants["dev-b"].outcome == "refused"
    rig.deliver("dev-a", "a" * 64, facts=replace(facts(), samples=work.steps * 8))
    assert rig.round.participants["dev-a"].outcome == "done"


def test_devices_fetch_what_their_side_needs(tmp_path: Path) -> None:
    """Before a plan only where the job names the block; after it where the plan cut."""
    blobs = BlobFolder(tmp_path, fsync=False)
    factors = {
        f"blocks.{n}.linear": Factors(b=np.ones((8, 2), np.float32), a=np.ones((2, 16), np.float32), scaling=1.0)
        for n in range(2)
    }
    dense = {"blocks.0.bias": np.ones(3, np.float32), "head.weight": np.ones((2, 8), np.float32)}
    whole = Adapter(kind="global", job="job-1", round=0, base_digest="b" * 64, factors=factors, dense=dense)
    ref = blobs.put(adapter.write(whole))
    told = replace(FACTS, dense_blocks={"blocks.0.bias": 0, "head.weight": 2})
    made = SplitRig()
    made.open(a_job())
    assert folding.lower_blob(made.job, told, ref, 0, blobs) is None
    lower = folding.lower_blob(made.job, told, ref, 1, blobs)
    assert lower is not None
    path = blobs.path(lower.sha)
    assert path is not None
    found = adapter.read_file(path)
    assert (set(found.factors), set(found.dense)) == ({"blocks.0.linear"}, {"blocks.0.bias"})
    assert folding.lower_blob(replace(made.job, spec=spec()), told, ref, 1, blobs) is None, "it splits nothing"

    rig = SplitRig()
    for device in ("dev-a", "dev-b"):
        rig.birth(device)
    rig.submit(a_job())
    rig.feed(ev.BasePrepared, job="job-1", facts=told, adapter=ref, lower=lower)
    assert rig.job.fetched == lower and lower.sha in referenced(rig.job)
    orders = [one.assign.assignment for one in rig.last if isinstance(one, cmd.PublishAssign)]
    assert orders and all(one is not None and one.adapter == lower for one in orders)
    rig.restart()
    assert rig.job.lower == lower, "the log tells it"


@pytest.mark.parametrize("refused", [False, True])
def test_what_devices_fetch_changes_with_the_global_adapter_alone(refused: bool) -> None:
    first, second = (BlobRef(sha=digit * 64, size=10) for digit in "ef")
    rig = SplitRig()
    for device in ("dev-a", "dev-b"):
        rig.birth(device)
    made = a_job()
    rig.submit(replace(made, evaluation=replace(made.evaluation, data="held-out", worse_by=0.01)))
    rig.feed(ev.BasePrepared, job="job-1", facts=FACTS, adapter=BlobRef(sha="0" * 64, size=100), lower=first)
    rig.evaluated(1.0, round=0)
    rig.deliver("dev-a", "a" * 64)
    rig.deliver("dev-b", "b" * 64)
    rig.top_done()
    rig.feed(
        ev.Folded, job="job-1", round=1, adapter=BlobRef(sha="9" * 64, size=100), lower=second, residual=None, ranks={},
        lost_energy=0.0, norm=1.0,
    )  # fmt: skip
    rig.restart()
    assert rig.job.phase == "evaluating" and rig.job.lower == first, "it does not count yet"
    assert {first.sha, second.sha} <= referenced(rig.job)
    rig.evaluated(5.0 if refused else 0.5)
    assert rig.job.committed == 1 and rig.job.fetched == (first if refused else second)
    rig.restart()
    assert rig.job.fetched == (first if refused else second)
