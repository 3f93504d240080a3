"""The daemon's session: how it leaves, and how it goes on after a restart."""

from __future__ import annotations

import pytest

from edge_daemon import protocol
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.state import Identity
from edge_daemon.core.transitions import TABLE
from shared.machines import phases
from shared.messages import DeviceInfo, DeviceState
from tests.unit.session_rig import ADAPTER, FIRST, SETTINGS, UPDATE, Rig, assignment, load

# ---- leaving


def test_leaving_keeps_partial_work() -> None:
    rig = Rig().training()
    rig.feed(ev.Drain)
    assert rig.state.phase == "draining"
    assert rig.did(cmd.Tell) == [cmd.Tell(protocol.Stop())]
    assert [state.s for state in rig.said(DeviceState)] == ["draining"]
    rig.trained()
    assert rig.state.phase == "stopped"
    assert [state.s for state in rig.said(DeviceState)] == ["disconnected"]
    again = rig.restart().up()
    assert again.state.phase == "offering"


def test_leaving_waits_no_longer_than_it_must() -> None:
    rig = Rig().training()
    rig.feed(ev.Drain)
    rig.tick(rig.state.settings.agent.drain_s - 1.0)
    assert rig.state.phase == "draining"
    rig.tick(1.0)
    assert rig.state.phase == "stopped"
    assert rig.state.work is not None  # its checkpoint stays


@pytest.mark.parametrize("end", ["trained", "failed", "gone"])
def test_leaving_ends_with_whatever_the_agent_does(end: str) -> None:
    rig = Rig().training()
    rig.feed(ev.Drain)
    {"trained": rig.trained, "failed": rig.failed, "gone": rig.gone}[end]()
    assert rig.state.phase == "stopped"
    assert rig.feed(ev.Drain) == []


# ---- recovery


def _interrupted() -> dict[str, Rig]:
    """A machine in every phase, with what its journal then holds."""
    idle, fetching, training, paused, offering, draining, stopped = (Rig() for _ in range(7))
    idle.up()
    fetching.up().assign(assignment())
    training.training()
    paused.training().feed(ev.LoadRead, reading=load(foreign_cores=4.0))
    offering.training().trained()
    draining.training().feed(ev.Drain)
    stopped.up().feed(ev.Drain)
    return {
        "probing": Rig(), "idle": idle, "fetching": fetching, "training": training, "paused": paused,
        "offering": offering, "draining": draining, "stopped": stopped,
    }  # fmt: skip


def test_there_is_a_recovery_for_every_phase() -> None:
    found = _interrupted()
    assert set(found) == set(phases(TABLE))
    assert {name: rig.state.phase for name, rig in found.items()} == {name: name for name in found}


@pytest.mark.parametrize("phase", phases(TABLE))
def test_a_restart_resumes_from_the_journal(phase: str) -> None:
    rig = _interrupted()[phase]
    journal = rig.state.journal
    again = rig.restart().up()
    assert again.state.journal.outbox == journal.outbox
    if journal.assignment is None:
        assert again.state.phase == "idle"
        again.assign(assignment())
    if journal.outbox:
        assert again.state.phase == "offering"
        assert cmd.Adopt(FIRST, UPDATE) in again.all  # a crash may have come before it was moved
    else:
        assert again.state.phase == "fetching"
        again.feed(ev.AdapterStored, sha=ADAPTER)
        assert len(again.did(cmd.Train)) == 1
        again.trained()
    again.settle()
    assert again.done() == [(FIRST, "stored")]
    assert again.state.phase == "idle"


def test_a_restart_tidies_what_nothing_refers_to() -> None:
    rig = Rig().training()
    rig.trained()
    rig.assign(assignment(round=2))
    again = rig.restart()
    (tidy,) = [command for command in again.all if isinstance(command, cmd.Tidy)]
    assert set(tidy.identities) == {FIRST, Identity("job-1", 2, 1)}
    assert set(tidy.shas) == {ADAPTER, UPDATE}


def test_a_data_set_that_can_not_be_read_is_a_warning_and_told_to_the_fleet() -> None:
    rig = Rig().up()
    (name,) = SETTINGS.data
    rig.gone()
    rig.tick(60.0)
    notes = {name: "notes.jsonl: row 3 is not JSON", "4": "no kernel"}
    rig.feed(ev.AgentProbed, probed=protocol.Probed(bits=[32], notes=notes))
    levels = {note.text: note.level for note in rig.did(cmd.Note)}
    assert levels[f"probe: {name}: notes.jsonl: row 3 is not JSON"] == "warning"
    assert levels["probe: 4: no kernel"] == "info"
    (info,) = rig.said(DeviceInfo)
    assert info.faulty == {name: "notes.jsonl: row 3 is not JSON"}
