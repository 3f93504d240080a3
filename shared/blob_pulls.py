"""What a receiver remembers of each content and each peer; the ledger behind `shared.blobs`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from shared.blob_folder import Spool


@dataclass(frozen=True)
class Arrival:
    """What a chunk meant. `more`: taken, or a copy of one that is here. `complete`: the content is at `path`.
    `corrupt`: its peer sent another content than it announced; the pull has ended. `unexpected`: ignored.
    `no_room`: the disk is full; all pulls of the content have ended."""

    kind: Literal["more", "complete", "corrupt", "unexpected", "no_room"]
    path: Path | None = None
    reason: str = ""
    peers: tuple[str, ...] = ()
    """Every peer whose pull has ended by this; several where they sent the same content."""


@dataclass
class ReceiverStats:
    """Counts since the start."""

    chunks: int = 0
    """Taken and stored."""
    duplicates: int = 0
    """Came although they were here already."""
    retransmitted_bytes: int = 0
    """Of the duplicates."""
    rewanted: int = 0
    """Chunks asked for again."""
    unexpected: int = 0
    corrupt: int = 0
    """Contents whose digest was wrong, and chunks of a wrong size."""
    expired: int = 0
    """Pulls given up after `idle_s` without a chunk."""


class Asked(NamedTuple):
    """A chunk that was asked for: when, by which question of its peer, how many bytes it will have."""

    at: float
    serial: int
    size: int


class Content:
    """A content on its way, from one peer or several."""

    def __init__(self, sha: str, spool: Spool) -> None:
        self.sha = sha
        self.spool = spool
        self.pulls: dict[str, Pull] = {}
        self.todo: deque[int] = deque(spool.missing())
        """Chunks to ask for; those that came unasked meanwhile are skipped."""
        self.restarts = 0
        self.solo = ""
        """After a wrong digest only this peer is asked, so that it is known who sends it."""
        self.resized = False
        """Chunks of the former size may still come."""

    def next(self, peer: str) -> int | None:
        """The chunk to ask `peer` for next."""
        while self.todo and self.spool.has(self.todo[0]):
            self.todo.popleft()
        return self.todo[0] if self.todo and self.solo in ("", peer) else None

    def start_over(self) -> None:
        """Ask for all that is missing; nothing is under way."""
        self.todo = deque(self.spool.missing())


@dataclass(eq=False)
class Pull:
    """A content from one peer."""

    content: Content
    active: float | None = None
    """When it last got on, counted from the first question."""
    wrong_sizes: int = 0


@dataclass(eq=False)
class Peer:
    """A peer that is pulled from. `window`: bytes it may be asked for at once; `wait`: seconds until it counts as
    silent, from `heard`, when its last chunk came; `outstanding`: bytes of all `asked`."""

    name: str
    window: int
    wait: float
    heard: float
    pulls: dict[str, Pull] = field(default_factory=dict)
    asked: dict[tuple[str, int], Asked] = field(default_factory=dict)
    outstanding: int = 0
    serial: int = 0
    seen: int = 0
    """The latest question that was answered."""
    queued: bool = False
    silent: bool = False
    """It did not answer in time; what it is asked for comes out of a small part of the credit."""
    timer: float | None = None

    def first(self) -> int:
        """Bytes of the chunk to ask for next; 0: there is none."""
        for pull in self.pulls.values():
            index = pull.content.next(self.name)
            if index is not None:
                return pull.content.spool.length(index)
        return 0

    def backlog(self) -> int:
        """Bytes that may be asked for, at most; an estimate that only batches depend on."""
        return sum(len(pull.content.todo) * pull.content.spool.chunk for pull in self.pulls.values())

    def overdue(self, asked: Asked) -> float:
        """When a chunk counts as lost."""
        since = asked.at if asked.serial < self.seen else max(asked.at, self.heard)
        return since + self.wait


def ranges_of(indexes: list[int]) -> list[tuple[int, int]]:
    """Indexes as [first, count], in the order given."""
    ranges: list[tuple[int, int]] = []
    for index in indexes:
        if ranges and sum(ranges[-1]) == index:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        else:
            ranges.append((index, 1))
    return ranges
