"""The daemon's machine: from assignment to settled update, and interruptions."""

from __future__ import annotations

import msgspec
import pytest

from edge_daemon import protocol
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.settings import AgentSettings, PolicySettings
from shared.messages import Ack, Command, CoordState, DeviceInfo, DeviceState, Load, Manifest, Progress
from tests.unit.session_rig import ADAPTER, FIRST, GIB, SETTINGS, UPDATE, Rig, assignment, load


def test_an_assignment_becomes_a_settled_update() -> None:
    rig = Rig().up()
    assert rig.state.phase == "idle"
    rig.assign(assignment())
    assert rig.state.phase == "fetching"
    assert [ack.verdict for ack in rig.said(Ack)] == ["accept"]
    assert [fetch.ref.sha for fetch in rig.did(cmd.Fetch)] == [ADAPTER]
    rig.feed(ev.AdapterStored, sha=ADAPTER)
    (order,) = rig.did(cmd.Train)
    assert order.train_for_s == 100.0
    assert [state.s for state in rig.said(DeviceState)] == []  # it said "training" with its first fetch
    rig.trained()
    assert rig.state.phase == "offering"
    assert rig.did(cmd.Adopt) == [cmd.Adopt(FIRST, UPDATE)]
    (manifest,) = rig.said(Manifest)
    assert (manifest.sha, manifest.round, manifest.facts.samples) == (UPDATE, 1, 32)
    rig.settle()
    assert rig.state.phase == "idle"
    assert rig.done() == [(FIRST, "stored")]
    assert cmd.DropBlob(UPDATE) in rig.last


def test_the_time_of_an_assignment_counts_from_its_receipt() -> None:
    rig = Rig().up()
    rig.assign(assignment())
    rig.tick(30.0)
    rig.feed(ev.AdapterStored, sha=ADAPTER)
    (order,) = rig.did(cmd.Train)
    assert order.train_for_s == pytest.approx(70.0)


@pytest.mark.parametrize(("boot", "left"), [("boot-1", 58.0), ("boot-2", 58.0)])
def test_time_spent_before_a_restart_counts(boot: str, left: float) -> None:
    rig = Rig().training()
    rig.tick(40.0)
    again = rig.restart(boot).up()
    again.feed(ev.AdapterStored, sha=ADAPTER)
    (order,) = again.did(cmd.Train)
    assert order.train_for_s == pytest.approx(left)


def test_a_fetch_that_a_restart_cut_in_two_measures_no_link() -> None:
    rig = Rig().up()
    rig.assign(assignment())
    rig.tick(10.0)
    rig.feed(ev.AdapterStored, sha=ADAPTER)
    assert rig.did(cmd.Train)[-1].fetch_s == pytest.approx(10.0)
    again = rig.restart().up()
    again.tick(2.0)
    again.feed(ev.AdapterStored, sha=ADAPTER)
    assert again.did(cmd.Train)[-1].fetch_s == pytest.approx(10.0), "as it was measured before the restart"
    rig = Rig().up()
    rig.assign(assignment())
    rig.tick(10.0)
    for boot, lost_s in (("boot-1", 0.0), ("boot-2", 0.0), ("boot-2", 40_000.0)):  # the last has lost its clock
        rig.wall -= lost_s
        again = rig.restart(boot).up()
        again.tick(2.0)
        again.feed(ev.AdapterStored, sha=ADAPTER)
        assert again.did(cmd.Train)[-1].fetch_s == 0.0, "the rest alone came in 2 s"


def test_time_that_is_over_still_gives_an_order() -> None:
    rig = Rig().up()
    rig.assign(assignment())
    rig.tick(500.0)
    rig.feed(ev.AdapterStored, sha=ADAPTER)
    (order,) = rig.did(cmd.Train)
    assert protocol.NO_TIME_S < order.train_for_s < 0.1, "enough for a step"


def test_newer_work_replaces_the_old_and_waits_for_the_agent() -> None:
    rig = Rig().training()
    rig.assign(assignment(round=2))
    assert rig.did(cmd.Tell) == [cmd.Tell(protocol.Stop(discard=True))]
    assert rig.state.phase == "fetching"
    rig.feed(ev.AdapterStored, sha=ADAPTER)
    assert rig.did(cmd.Train) == []
    rig.failed("stopped")
    (order,) = rig.did(cmd.Train)
    assert order.assignment.round == 2
    assert cmd.DropWork(FIRST) in rig.last


def test_work_that_was_done_at_the_moment_of_the_stop_is_forgotten() -> None:
    rig = Rig().training()
    rig.assign(assignment(round=2))
    rig.trained()
    assert rig.state.journal.outbox == ()
    assert rig.state.phase == "fetching"


@pytest.mark.parametrize("old", [assignment(round=1, attempt=1), assignment(round=2, attempt=1)])
def test_messages_that_were_overtaken_are_ignored(old: object) -> None:
    rig = Rig().up()
    rig.assign(assignment(round=2, attempt=2))
    rig.assign(old)  # type: ignore[arg-type]  # an assignment
    assert rig.state.journal.assignment == assignment(round=2, attempt=2)


def test_an_old_coordinator_is_not_obeyed_and_a_new_one_may_begin_anew() -> None:
    rig = Rig().up()
    rig.assign(assignment(round=5), term=3)
    rig.assign(None, term=2)
    assert rig.state.phase == "fetching"
    rig.assign(assignment(round=1), term=4)
    assert rig.state.journal.assignment == assignment(round=1)
    assert rig.state.journal.term == 4


def test_withdrawn_work_stops_and_keeps_what_is_offered() -> None:
    rig = Rig().training()
    rig.trained()
    rig.assign(assignment(round=2))
    rig.assign(None)
    assert rig.state.phase == "offering"
    assert [offer.sha for offer in rig.state.journal.outbox] == [UPDATE]
    rig.settle("late")
    assert rig.done() == [(FIRST, "late")]
    assert rig.state.phase == "idle"


def test_the_same_assignment_again_changes_nothing_but_is_answered() -> None:
    rig = Rig().training()
    rig.assign(assignment())
    assert rig.state.phase == "training"
    assert rig.did(cmd.Train) == []
    assert [ack.verdict for ack in rig.said(Ack)] == ["accept"]
    rig.trained()
    rig.assign(assignment(), term=2)
    assert len(rig.said(Manifest)) == 1
    rig.settle()
    rig.assign(assignment(), term=3)
    assert rig.state.phase == "idle"


def test_a_rejection_names_its_reason_and_is_repeated_on_demand() -> None:
    settings = msgspec.structs.replace(SETTINGS, policy=PolicySettings(memory_reserve_bytes=2 * GIB))
    rig = Rig(settings=settings).up()
    rig.feed(ev.LoadRead, reading=load())
    rig.assign(assignment())
    (ack,) = rig.said(Ack)
    assert (ack.verdict, ack.reason[:6]) == ("reject", "memory")
    assert rig.state.phase == "idle"
    rig.assign(assignment(), term=2)
    assert [again.verdict for again in rig.said(Ack)] == ["reject"]


def test_foreign_load_pauses_training_and_goes_on_well_below_the_limit() -> None:
    rig = Rig().training()
    rig.feed(ev.LoadRead, reading=load(foreign_cores=3.9))
    assert rig.state.phase == "paused"
    assert [tell.message for tell in rig.did(cmd.Tell)] == [protocol.Pause(reason=rig.state.paused)]
    assert rig.said(Load)[0].paused.startswith("foreign load")
    rig.feed(ev.LoadRead, reading=load(foreign_cores=3.5))
    assert rig.state.phase == "paused"
    rig.feed(ev.LoadRead, reading=load(foreign_cores=2.0))
    assert rig.state.phase == "training"
    assert rig.did(cmd.Tell) == [cmd.Tell(protocol.Resume())]


def test_work_begins_paused_under_load() -> None:
    rig = Rig().up()
    rig.feed(ev.LoadRead, reading=load(foreign_cores=4.0))
    rig.assign(assignment())
    rig.feed(ev.AdapterStored, sha=ADAPTER)
    assert rig.state.phase == "paused"
    kinds = [type(command) for command in rig.last if isinstance(command, cmd.Train | cmd.Tell)]
    assert kinds == [cmd.Train, cmd.Tell]


def test_an_agent_that_dies_is_started_again_and_given_up_after_some_times() -> None:
    rig = Rig().training()
    for _ in range(SETTINGS.agent.tries - 1):
        rig.gone()
        assert rig.state.phase == "training"
        rig.tick(60.0)
        assert len(rig.did(cmd.StartAgent)) == 1
        rig.probe()
        assert len(rig.did(cmd.Train)) == 1
    rig.gone()
    (ack,) = rig.said(Ack)
    assert (ack.verdict, ack.out_of_memory) == ("failed", False)
    assert "died 3 times" in ack.reason
    assert rig.state.phase == "idle"


def test_a_kill_for_memory_halves_the_batch_until_none_fits() -> None:
    rig = Rig().training()
    for limit in (2, 1):
        rig.gone(out_of_memory=True)
        rig.tick(60.0)
        rig.probe()
        (order,) = rig.did(cmd.Train)
        assert order.batch_limit == limit
    rig.gone(out_of_memory=True)
    (ack,) = rig.said(Ack)
    assert (ack.verdict, ack.out_of_memory, ack.batch_limit) == ("failed", True, 0)


def test_a_memory_failure_of_the_agent_tells_the_planner_its_limit() -> None:
    rig = Rig().training()
    rig.failed("memory", batch_limit=0)
    (ack,) = rig.said(Ack)
    assert (ack.verdict, ack.out_of_memory, ack.batch_limit) == ("failed", True, 0)
    other = Rig().training()
    other.failed("data")
    assert not other.said(Ack)[0].out_of_memory


def test_what_an_agent_died_of_is_told_whatever_the_next_one_could_not_do() -> None:
    """Else the next round asks for the same batch, and the same happens."""
    rig = Rig().training()
    rig.gone(out_of_memory=True)
    rig.tick(60.0)
    rig.probe()
    rig.failed("stopped")
    (ack,) = rig.said(Ack)
    assert (ack.verdict, ack.out_of_memory, ack.batch_limit) == ("failed", True, 2)


def test_a_silent_agent_is_killed() -> None:
    rig = Rig().training()
    heard_at = rig.state.agent.heard_at
    rig.tick(SETTINGS.agent.silence_s + 1)
    assert [kill.hung for kill in rig.did(cmd.KillAgent)] == [True], "it should say where it hangs"
    rig.tick(1.0)
    assert rig.did(cmd.KillAgent) == []
    # One that the kernel can't end is told again and again, and never counts as heard.
    rig.tick(SETTINGS.agent.silence_s)
    assert len(rig.did(cmd.KillAgent)) == 1
    assert rig.state.agent.heard_at == heard_at


def test_an_agent_that_never_starts_is_a_problem_the_fleet_hears_of() -> None:
    rig = Rig(settings=msgspec.structs.replace(SETTINGS, agent=AgentSettings(tries=2)))
    rig.link()
    for _ in range(2):
        rig.tick(60.0)
        assert len(rig.did(cmd.StartAgent)) == 1
        rig.gone()
    (info,) = rig.said(DeviceInfo)
    assert "does not start" in info.problem
    assert rig.state.phase == "idle"
    rig.tick(61.0)
    rig.probe()
    assert rig.said(DeviceInfo)[0].problem == ""


def test_training_goes_on_without_a_broker_and_the_update_is_offered_when_it_is_back() -> None:
    rig = Rig().training()
    rig.feed(ev.Unlinked, reason="gone")
    rig.feed(ev.AgentBeat, progressed=protocol.Progressed(step=1, steps=8, samples=4, loss=1.0, samples_per_s=1.0))
    assert rig.said(Progress) == []
    rig.trained()
    assert rig.state.phase == "offering"
    assert not [command for command in rig.last if isinstance(command, cmd.Publish)]
    rig.link()
    assert [state.s for state in rig.said(DeviceState)] == ["ready"]
    assert rig.said(Manifest) == []  # nobody there to take it
    rig.feed(ev.CoordinatorSeen, coordinator="coord-1", state=CoordState(online=True, term=1))
    assert len(rig.said(Manifest)) == 1


def test_an_offer_is_announced_again_after_growing_waits_unless_it_is_being_pulled() -> None:
    rig = Rig().training()
    rig.trained()
    assert rig.tick(4.0) is not None and rig.said(Manifest) == []
    rig.feed(ev.Wanted, sha=UPDATE)
    rig.tick(2.0)
    assert rig.said(Manifest) == []
    rig.tick(4.0)
    assert len(rig.said(Manifest)) == 1
    rig.tick(6.0)
    assert rig.said(Manifest) == []
    rig.tick(5.0)
    assert len(rig.said(Manifest)) == 1


def test_a_lost_update_of_current_work_is_trained_again() -> None:
    rig = Rig().training()
    rig.trained()
    rig.feed(ev.OfferLost, sha=UPDATE, reason="no such file")
    assert rig.state.phase == "fetching"
    rig.feed(ev.AdapterStored, sha=ADAPTER)
    assert len(rig.did(cmd.Train)) == 1


def test_an_adapter_that_cannot_be_had_ends_the_work() -> None:
    rig = Rig().up()
    rig.assign(assignment())
    rig.feed(ev.AdapterLost, sha=ADAPTER, reason="no room")
    assert rig.done() == [(FIRST, "failed")]
    assert rig.said(Ack)[0].verdict == "failed"


def test_the_own_will_is_contradicted() -> None:
    rig = Rig().up()
    rig.feed(ev.OwnStateSeen, state=DeviceState(s="lost", epoch=rig.epoch))
    assert [state.s for state in rig.said(DeviceState)] == ["ready"]
    rig.feed(ev.OwnStateSeen, state=DeviceState(s="ready", epoch=rig.epoch))
    assert rig.said(DeviceState) == []
    rig.feed(ev.OwnStateSeen, state=DeviceState(s="lost", epoch=900))
    assert rig.did(cmd.RaiseEpoch) == [cmd.RaiseEpoch(901)]
    assert [state.epoch for state in rig.said(DeviceState)] == [901]


def test_a_reading_from_before_the_session_is_told_once_it_stands() -> None:
    rig = Rig()
    rig.feed(ev.LoadRead, reading=load())
    assert rig.said(Load) == []
    rig.link()
    assert [one.memory_available for one in rig.said(Load)] == [GIB]
    rig.tick()
    assert rig.said(Load) == []


def test_a_rebirth_says_everything_again() -> None:
    rig = Rig().training()
    rig.feed(ev.LoadRead, reading=load())
    rig.trained()
    rig.feed(ev.CommandReceived, command=Command(kind="rebirth"))
    assert len(rig.said(Load)) == 1
    assert (len(rig.said(DeviceState)), len(rig.said(DeviceInfo)), len(rig.said(Manifest))) == (1, 1, 1)


def test_a_new_coordinator_is_asked_for_the_adapter_again() -> None:
    rig = Rig().up()
    rig.assign(assignment())
    rig.feed(ev.CoordinatorSeen, coordinator="coord-1", state=CoordState(online=True, term=2))
    assert len(rig.did(cmd.Fetch)) == 1
    rig.feed(ev.CoordinatorSeen, coordinator="coord-1", state=CoordState(online=False, term=1))
    assert rig.state.coordinator_online
