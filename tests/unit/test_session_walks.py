"""The daemon's machine under events in any order, restarts among them: what must always hold does (`daemon_model`)."""

from __future__ import annotations

import random

import pytest

from edge_daemon.core import events as ev
from edge_daemon.core.state import identity_of
from shared.messages import Assignment, BlobRef, Command, DeviceState
from tests.unit.daemon_model import Daemon, update_sha
from tests.unit.session_rig import SETTINGS, assignment, load

WORKS = [
    assignment(number, attempt, adapter=BlobRef(sha=f"{number:064x}", size=100))
    for number in (1, 2, 3)
    for attempt in (1, 2)
]
CALM, BUSY = load(), load(foreign_cores=4.0)


def _deliver(work: Assignment) -> Command:
    return Command(kind="deliver", job=work.job, round=work.round, attempt=work.attempt)


def _turn(daemon: Daemon, draw: random.Random, leaving: float) -> None:
    """One event that the world allows now."""
    one, now, state = draw.choice(WORKS), daemon.now, daemon.state
    term = draw.choice([1, 2])
    acts = [
        (8, lambda: daemon.tick(draw.choice([0.2, 1.0, 30.0, 100.0]))),
        (2, lambda: daemon.relink(term)),
        (1, daemon.examine),
        (4, lambda: daemon.assign(draw.choice([one, one, one, None]), term)),
        (4, lambda: daemon.store(state.work or one)),
        (1, lambda: daemon.feed(ev.AdapterLost(now=now, sha=one.adapter.sha, reason="gone"))),
        (3, lambda: daemon.read(draw.choice([CALM, BUSY]))),
        (2, lambda: daemon.settle(identity_of(one), draw.choice(["stored", "refused", "late"]))),
        (1, lambda: daemon.feed(ev.Wanted(now=now, sha=update_sha(identity_of(one))))),
        (1, lambda: daemon.feed(ev.WantUnfit(now=now, sha=update_sha(identity_of(one)), reason="why"))),
        (1, lambda: daemon.feed(ev.OwnStateSeen(now=now, state=DeviceState(s="lost", epoch=daemon.epoch)))),
        (1, lambda: daemon.feed(ev.CommandReceived(now=now, command=Command(kind="rebirth")))),
        (1, lambda: daemon.feed(ev.CommandReceived(now=now, command=_deliver(one)))),
        (1, lambda: daemon.coordinator(online=draw.random() < 0.7, term=term)),
        (1, daemon.restart),
        (leaving, lambda: daemon.feed(ev.Drain(now=now))),
    ]
    if daemon.agent == "starting":
        acts.append((8, daemon.probe))
    if daemon.agent == "busy":
        acts += [(6, daemon.train), (1, daemon.fail), (2, lambda: daemon.feed(ev.AgentBeat(now=now)))]
    if daemon.agent != "absent":
        acts.append((1, lambda: daemon.die(out_of_memory=draw.random() < 0.3)))
    draw.choices([act for _, act in acts], [weight for weight, _ in acts])[0]()


def _ends(daemon: Daemon, work: Assignment) -> str:
    """How `work` ends when nothing disturbs the daemon any more."""
    if not daemon.linked:
        daemon.relink(3)
    daemon.examine()
    daemon.assign(work, 3)
    daemon.read(CALM)
    for _ in range(200):
        match daemon.agent:
            case "starting":
                daemon.probe()
            case "busy" if daemon.order is not None:
                daemon.train()
            case _:
                daemon.tick(30.0)
        daemon.store(work)
        daemon.settle(identity_of(work), "stored")
        over = [done.verdict for done in daemon.journal.finished if done.identity == identity_of(work)]
        if over:
            return over[0]
    return daemon.state.phase


@pytest.mark.parametrize("seed", range(30))
def test_any_events_in_any_order(seed: int) -> None:
    draw = random.Random(seed)
    daemon = Daemon(SETTINGS, "points")
    for _ in range(300):
        _turn(daemon, draw, leaving=0.3)
        if daemon.state.phase == "stopped":
            daemon.restart()
    stored = [done.identity for done in daemon.journal.finished if done.verdict == "stored"]
    assert all(identity in daemon.trained for identity in stored)
    assert _ends(daemon, assignment(9, adapter=BlobRef(sha="9" * 64, size=100))) == "stored"


def test_the_walks_reach_every_phase() -> None:
    draw, seen = random.Random(1), set[str]()
    for turn in range(4000):
        if turn % 400 == 0:  # in the end all works are over
            daemon = Daemon(SETTINGS, "points")
        _turn(daemon, draw, leaving=1.0)
        seen.add(daemon.state.phase)
        if daemon.state.phase == "stopped":
            daemon.restart()
    assert seen == {"probing", "idle", "fetching", "training", "paused", "offering", "draining", "stopped"}
