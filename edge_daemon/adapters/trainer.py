"""The agent's supervisor: a subprocess, a pipe, a thread that only reports what it reads, and one that only writes."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_daemon import protocol
from edge_daemon.adapters.agent_pipe import AgentPipe
from shared.subprocess_pipe import start_piped

log = logging.getLogger(__name__)
FIRST_TO_DIE = 1000
"""`oom_score_adj` of an agent; the unit gives the daemon less."""
_GRACE_S = 0.2
_LAST_WORDS_S = 2.0
"""How long a hanging agent may take to write where it hangs."""


@dataclass(frozen=True)
class AgentSpoke:
    """A message, or the end (None), of agent process number `run`."""

    run: int
    message: protocol.FromAgent | None
    member: int = 0
    """Which of the device's agents spoke."""


@dataclass(frozen=True)
class AgentEnded:
    """How an agent process ended."""

    reason: str
    out_of_memory: bool


class Trainer(Protocol):
    """Runs one agent."""

    def start(self, probe: protocol.Probe) -> None:
        """Start the agent and probe it."""

    def tell(self, message: protocol.ToAgent) -> None:
        """Send it a message; does not wait until it reads."""

    def kill(self, reason: str, *, hung: bool = False) -> None:
        """End it at once; its end is reported like any other. `hung`: have it say where it hangs, if it still can."""

    def digest(self, spoke: AgentSpoke) -> protocol.FromAgent | AgentEnded | None:
        """What a report means; None: it comes from a process before the present one."""


class SubprocessTrainer:
    """`Trainer` over a real subprocess. `oom_kills`: how often the kernel killed for memory in our cgroup so far."""

    def __init__(
        self, command: Sequence[str], post: Callable[[AgentSpoke], None], oom_kills: Callable[[], int]
    ) -> None:
        self._command = list(command)
        self._post = post
        self._oom_kills = oom_kills
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: AgentPipe | None = None
        self._run = 0
        self._kills_before = 0
        self._why = ""

    def start(self, probe: protocol.Probe) -> None:
        """Start the agent and probe it; a command that can't be run is reported as its end."""
        self._run += 1
        self._why = ""
        self._kills_before = self._oom_kills()
        try:
            self._spawn()
        except OSError as error:
            self._why = f"{self._command[0]}: {error.strerror}"
            self._post(AgentSpoke(self._run, None))
            return
        self.tell(probe)

    def tell(self, message: protocol.ToAgent) -> None:
        """Send a message; a broken pipe shows as the agent's end, which its reader reports."""
        if self._pipe is not None and not self._pipe.tell(message):
            self.kill("it reads nothing that it is told")

    def kill(self, reason: str, *, hung: bool = False) -> None:
        """End the agent and all it started. `hung`: its faulthandler writes to the log where every thread is."""
        self._why = reason
        if self._process is None:
            return
        if hung:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGABRT)
                self._process.send_signal(signal.SIGCONT)
            _let_end(self._process, _LAST_WORDS_S)
        _kill_group(self._process)
        # Not before: an agent whose pipe ends leaves by itself, without its last words.
        self._hush()

    def digest(self, spoke: AgentSpoke) -> protocol.FromAgent | AgentEnded | None:
        """What a report means; None: it comes from a process before the present one."""
        if spoke.run != self._run:
            return None
        return spoke.message if spoke.message is not None else self._reap()

    def _reap(self) -> AgentEnded:
        code: int | None = None
        if self._process is not None:
            if not self._why:
                _let_end(self._process)
            _kill_group(self._process)
            code = self._process.wait()
        self._hush()
        self._process = None
        asked = self._why
        out_of_memory = not asked and code == -signal.SIGKILL and self._oom_kills() > self._kills_before
        reason = asked or ("out of memory" if out_of_memory else _ending(code))
        return AgentEnded(reason, out_of_memory)

    def _hush(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        self._pipe = None

    def _spawn(self) -> None:
        self._hush()
        run = self._run

        def ended(problem: str) -> None:
            if problem and run == self._run:
                self._why = self._why or f"its pipe is broken: {problem}"
            self._post(AgentSpoke(run, None))

        def heard(message: protocol.FromAgent) -> None:
            self._post(AgentSpoke(run, message))

        self._process, writer = start_piped(
            self._command, protocol.FromAgent, heard, ended, name="agent", own_group=True
        )
        self._pipe = AgentPipe(writer)
        # When memory runs out the agent dies, not the daemon.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text(str(FIRST_TO_DIE), encoding="ascii")


def _let_end(process: subprocess.Popen[bytes], seconds: float = _GRACE_S) -> None:
    """Wait a moment for a process that closed its pipe: killed on its way out it would lose its own exit status."""
    with contextlib.suppress(OSError):
        ended = os.pidfd_open(process.pid)
        try:
            # Not reaped here, so that its number still names its group.
            select.select([ended], [], [], seconds)
        finally:
            os.close(ended)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _ending(code: int | None) -> str:
    if code is None:
        return "it could not be started"
    if code < 0:
        return f"killed by signal {-code}"
    return f"exit status {code}; see the daemon's log for its last words"
