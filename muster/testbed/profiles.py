"""Named kinds of fleets: how many cores and how much memory each emulated device has.

Memory is given beyond the agent's own size (its libraries, before it holds a model), which differs by version and is
measured here with a real probe. So a device of a profile holds the same models wherever the emulation runs.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_daemon import protocol
from shared.errors import UserError
from shared.subprocess_pipe import start_piped

MIB = 2**20
PROBE_WITHIN_S = 120.0


@dataclass(frozen=True)
class Kind:
    """A kind of device. `cores`: CPU quota; `spare`: bytes of memory beyond the agent's own size."""

    cores: float
    spare: int


@dataclass(frozen=True)
class Shape:
    """One device of a fleet. `memory_bytes`: its limit."""

    name: str
    cores: float
    memory_bytes: int


PROFILES: Mapping[str, tuple[Kind, ...]] = {
    # MiniLM at batches from 4 starts at 32, 8, 16 and 4 bits there: at 4 from 199 to 204 MiB, and the size of an agent
    # differs by one from process to process. 2.4 cores in all, the slowest has a third.
    "mixed": (
        Kind(0.9, 640 * MIB),
        Kind(0.65, 212 * MIB),
        Kind(0.55, 240 * MIB),
        Kind(0.3, 202 * MIB),
    ),
    # `mixed` at 0.4 of its cores, so that two are enough for six devices (1.6 in all); all hold the cut MiniLM at 32
    # bits, at unequal batches.
    "light": (
        Kind(0.36, 640 * MIB),
        Kind(0.26, 320 * MIB),
        Kind(0.22, 360 * MIB),
        Kind(0.12, 280 * MIB),
    ),
    "equal": (Kind(0.6, 640 * MIB),),
    "tiny": (Kind(0.25, 202 * MIB),),
}
"""Name -> kinds, which a larger fleet repeats in turn."""


def kinds(profile: str) -> tuple[Kind, ...]:
    """The kinds of a profile. Raises `UserError` naming those there are."""
    try:
        return PROFILES[profile]
    except KeyError:
        raise UserError(f"unknown profile {profile!r}; there are {', '.join(sorted(PROFILES))}") from None


def shapes(profile: str, devices: int, agent_bytes: int) -> list[Shape]:
    """A fleet of `devices` around an agent of `agent_bytes`: device i is of the profile's kind i, in turn."""
    found = kinds(profile)
    width = max(2, len(str(devices)))
    return [
        Shape(f"edge-{i + 1:0{width}d}", kind.cores, agent_bytes + kind.spare)
        for i, kind in ((i, found[i % len(found)]) for i in range(devices))
    ]


def measure_agent(command: Sequence[str], data: Mapping[str, str]) -> int:
    """Resident bytes of the agent `command` after its probe over the files `data`, as a device would report it.

    Raises `UserError` where it does not start or answer.
    """
    answers: queue.SimpleQueue[protocol.FromAgent | str] = queue.SimpleQueue()
    line = " ".join(command)
    try:
        process, writer = start_piped(command, protocol.FromAgent, answers.put, answers.put, name="agent", quiet=True)
    except OSError as error:
        raise UserError(f"the agent can't be started: {command[0]}: {error.strerror}") from error
    until = time.monotonic() + PROBE_WITHIN_S
    try:
        writer.write(protocol.Probe(datasets=dict(data)))
        while not isinstance(answer := answers.get(timeout=max(0.0, until - time.monotonic())), protocol.Probed):
            if answer == "":
                raise UserError(f"the agent {line} ended before it answered its probe; try it by hand")
            if isinstance(answer, str):
                raise UserError(f"the agent {line} does not answer: {answer}")
        return answer.agent_bytes
    except OSError as error:
        raise UserError(f"the agent {line} does not answer: {error}") from error
    except queue.Empty:
        raise UserError(f"the agent {line} does not answer within {PROBE_WITHIN_S:.0f} s") from None
    finally:
        process.kill()
        process.wait()


def largest(paths: Sequence[Path]) -> Path:
    """The largest file: the one whose device has the largest agent."""
    return max(paths, key=lambda path: path.stat().st_size)
