"""What waits for room on the disk, and what asks a team of agents that is gone."""

from __future__ import annotations

from typing import Any

import pytest

from edge_daemon import protocol
from edge_daemon.adapters.team import TeamTrainer
from edge_daemon.adapters.trainer import AgentEnded, AgentSpoke
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.backlog import Backlog, behind, passes
from muster.testbed import least_squares
from muster.testbed.memory_trainer import Behaviour, MemoryTrainer
from shared.messages import Assign
from tests.unit.session_rig import SETTINGS, Rig, load

PROBE = protocol.Probe(datasets={})
STOP = protocol.Stop(discard=True)


def _beat(step: int | None = None) -> ev.AgentBeat:
    if step is None:
        return ev.AgentBeat(now=1.0)
    done = protocol.Progressed(step=step, steps=9, samples=1, loss=1.0, samples_per_s=1.0)
    return ev.AgentBeat(now=1.0, progressed=done)


GONE = ev.AgentGone(now=1.0, reason="exit status 1", out_of_memory=False)
AGAIN = ev.AgentGone(now=2.0, reason="there is no agent", out_of_memory=False)
ASSIGN = ev.AssignReceived(now=1.0, assign=Assign(term=1))
TICK = ev.Tick(now=1.0)
LOAD = ev.LoadRead(now=1.0, reading=load())
LEAVE = ev.Drain(now=1.0)
LINKED = ev.Linked(now=1.0, epoch=2, max_chunk=1000)
UNLINKED = ev.Unlinked(now=1.0, reason="timed out")
LIMITS = ev.Reconfigured(now=1.0, settings=SETTINGS)


@pytest.mark.parametrize(
    ("waiting", "event", "held_up"),
    [
        ((), ASSIGN, False),
        ((ASSIGN,), ASSIGN, True),
        ((ASSIGN,), GONE, True),
        ((ASSIGN,), _beat(), True),
        ((ASSIGN,), TICK, False),
        ((ASSIGN,), LOAD, False),
        ((ASSIGN,), LEAVE, False),
        ((ASSIGN,), LIMITS, False),
        ((LIMITS,), LIMITS, True),
        ((ASSIGN,), LINKED, False),
        ((ASSIGN, GONE), UNLINKED, False),
        ((UNLINKED,), LINKED, True),
    ],
)
def test_who_waits(waiting: Backlog, event: Any, held_up: bool) -> None:
    assert passes(waiting, event) is not held_up


@pytest.mark.parametrize(
    ("waiting", "event", "then"),
    [
        ((ASSIGN,), GONE, (ASSIGN, GONE)),
        ((GONE,), ASSIGN, (GONE, ASSIGN)),
        ((GONE, ASSIGN), AGAIN, (GONE, ASSIGN)),
        ((), TICK, ()),
        ((ASSIGN,), LOAD, (ASSIGN,)),
        ((_beat(3),), _beat(), (_beat(3),)),
        ((_beat(3),), _beat(4), (_beat(4),)),
        ((_beat(3), ASSIGN), _beat(4), (_beat(3), ASSIGN, _beat(4))),
    ],
)
def test_what_is_kept(waiting: Backlog, event: Any, then: Backlog) -> None:
    assert behind(waiting, event) == then


def test_silence_counts_from_where_the_agent_is_heard_again() -> None:
    rig = Rig().training()
    limit = rig.settings.agent.silence_s
    rig.now += 2 * limit
    assert not [one for one in rig.feed(ev.Tick, behind=True) if isinstance(one, cmd.KillAgent)]
    rig.tick(limit)
    assert not rig.did(cmd.KillAgent)
    rig.tick(1.0)
    assert len(rig.did(cmd.KillAgent)) == 1


def test_an_end_that_is_known_changes_nothing() -> None:
    rig = Rig().training()
    rig.gone()
    before = rig.state
    rig.gone()
    assert rig.state == before


class Team:
    """A team of one agent that never gets further than its start; what it posts is kept."""

    def __init__(self) -> None:
        self.said: list[AgentSpoke] = []
        rows = least_squares.make_rows("6x4", 4, 1)
        self.trainer = TeamTrainer(
            lambda post: MemoryTrainer(rows, Behaviour(), post, lambda _seconds, _call: None, lambda: 0.0),
            self.said.append,
        )

    def digested(self) -> list[Any]:
        """What it said since the last time."""
        said, self.said[:] = list(self.said), []
        return [self.trainer.digest(one) for one in said]


def test_a_team_that_is_gone_says_so_to_whoever_asks() -> None:
    team = Team()
    team.trainer.start(PROBE, [])
    team.trainer.tell(STOP)
    assert team.digested() == []
    team.trainer.kill("an accident")
    assert team.digested() == [AgentEnded("an accident", out_of_memory=False)]
    team.trainer.tell(STOP)
    team.trainer.kill("it says nothing")
    assert team.digested() == [AgentEnded("there is no agent", out_of_memory=False)] * 2


def test_what_is_said_of_a_former_team_is_not_the_next_ones() -> None:
    team = Team()
    team.trainer.start(PROBE, [])
    team.trainer.kill("an accident")
    team.digested()
    team.trainer.tell(STOP)
    team.trainer.start(PROBE, [])
    assert team.digested() == [None]
