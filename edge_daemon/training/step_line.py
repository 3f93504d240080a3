"""The device's end of the steps of a work: packets through the daemon, messages of this work and run alone."""

from __future__ import annotations

import logging

from edge_daemon.protocol import StepOut
from edge_daemon.training.control import Control
from shared import steps
from shared.errors import DecodeError

log = logging.getLogger(__name__)


class StepLine:
    """Speaks with the top worker about `work`. `run`: the latest that was heard of."""

    def __init__(self, control: Control, work: str, packet: int) -> None:
        self.work = work
        self.run = 0
        self._control = control
        self._packet = packet
        self._number = control.stamp()  # after a restart other numbers than before
        self._assembler = steps.Assembler(down=True)
        control.forget_packets()

    def send(self, message: steps.Up) -> None:
        """Hand `message` to the daemon; it may be lost on its way."""
        self._number += 1
        for packet in steps.packets(message, self._number, self._packet):
            self._control.send(StepOut(packet=packet))

    def receive(self, what: str, until: float) -> steps.Down | None:
        """The next message of this work that is not of an earlier run; None: there was none to `until` (`Control.now`).

        Raises what `Control.poll` does.
        """
        while (packet := self._control.packet(what, until)) is not None:
            try:
                message = self._assembler.add(packet)
            except DecodeError as error:
                log.warning("a step message is no good: %s", error)
                continue
            if isinstance(message, steps.Down) and message.work == self.work and message.run >= self.run:
                return message
        return None
