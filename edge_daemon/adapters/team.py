"""Runs the agents of a device, one a GPU, as the one agent that the session knows. `core.team` decides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from edge_daemon import protocol
from edge_daemon.adapters.trainer import AgentEnded, AgentSpoke, Trainer
from edge_daemon.core import team as crew
from edge_daemon.core.team import Team

log = logging.getLogger(__name__)
Post = Callable[[AgentSpoke], None]
_NOBODY = -1
"""In the place of a member that speaks."""


class TeamTrainer:
    """All agents. `make`: a trainer of one agent, given where it posts what it hears.

    The end of one ends all, and is reported once the last is gone: the session starts them again together, and each
    goes on from its own checkpoint. It is reported once more for what is asked of a team that is gone: whoever asks
    does not know, and would wait for good.
    """

    def __init__(self, make: Callable[[Post], Trainer], post: Post) -> None:
        self._make = make
        self._post = post
        self.trainers: list[Trainer] = []
        self._team = Team(members=())
        self._alive: set[int] = set()
        self._end: AgentEnded | None = None
        self._starts = 0

    def start(self, probe: protocol.Probe, gpus: Sequence[str]) -> None:
        """Start an agent for each GPU and probe them all."""
        turn = crew.assemble(probe, gpus)
        while len(self.trainers) < len(turn.orders):
            self.trainers.append(self._make(self._posted_by(len(self.trainers))))
        self._team, self._end = turn.team, None
        self._starts += 1
        self._alive = {index for index, _ in turn.orders}
        for index, order in turn.orders:
            assert isinstance(order, protocol.Probe)
            self.trainers[index].start(order)

    def tell(self, message: protocol.ToAgent) -> None:
        """Order something of the team."""
        if not self._alive:
            self._post(AgentSpoke(self._starts, None, _NOBODY))
        elif self._end is None:
            self._perform(crew.tell(self._team, message))

    def kill(self, reason: str, *, hung: bool = False) -> None:
        """End them all at once; their end is reported like any other. `hung`: have them say where they hang."""
        if not self._alive:
            self._post(AgentSpoke(self._starts, None, _NOBODY))
        for index in self._alive:
            self.trainers[index].kill(reason, hung=hung)

    def digest(self, spoke: AgentSpoke) -> protocol.FromAgent | AgentEnded | None:
        """What the report of one agent means for the team; None: nothing (yet), or it comes from a former process."""
        if spoke.member == _NOBODY:
            alone = spoke.run == self._starts and not self._alive
            return AgentEnded("there is no agent", out_of_memory=False) if alone else None
        if spoke.member >= len(self.trainers):
            return None
        message = self.trainers[spoke.member].digest(spoke)
        if message is None or spoke.member not in self._alive:
            return None
        if isinstance(message, AgentEnded):
            return self._ended(spoke.member, message)
        if isinstance(message, protocol.Failed) and len(self._team.members) > 1:
            # Where others trained, the session hears of it only by what is missing.
            log.warning("agent of %s: %s: %s", self._team.members[spoke.member].gpu, message.kind, message.reason)
        return self._perform(crew.hear(self._team, spoke.member, message)) if self._end is None else None

    def _ended(self, member: int, end: AgentEnded) -> AgentEnded | None:
        self._alive.discard(member)
        if self._end is None:
            self._end = end
            if self._alive:
                self.kill("another agent of this device ended")
        return None if self._alive else self._end

    def _perform(self, turn: crew.Turn) -> protocol.FromAgent | None:
        self._team = turn.team
        for index, order in turn.orders:
            self.trainers[index].tell(order)
        return turn.said

    def _posted_by(self, member: int) -> Post:
        def post(spoke: AgentSpoke) -> None:
            self._post(AgentSpoke(spoke.run, spoke.message, member))

        return post
