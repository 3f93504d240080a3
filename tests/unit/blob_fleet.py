"""Devices that send contents to one receiver over a wire that the test owns."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.blob_folder import BlobFolder
from shared.blobs import Arrival, BlobReceiver, BlobSender, Chunk
from shared.messages import BlobRef, Want

RETRY_S = 5.0


def content(size: int, seed: int = 0) -> bytes:
    """Bytes that have no pattern; the same for the same seed."""
    return random.Random(seed).randbytes(size)


class Fleet:
    """Devices that send to one receiver, over a wire that the test owns. Checks the credit after each step."""

    def __init__(self, root: Path, contents: dict[str, bytes], *, chunk: int, credit: int, per_peer: int) -> None:
        self.root, self.chunk, self.credit, self.per_peer = root, chunk, credit, per_peer
        self.now = 100.0
        self.contents = contents
        self.refs: dict[str, BlobRef] = {}
        self.senders: dict[str, BlobSender] = {}
        shared = BlobFolder(root / "outbox", fsync=False)
        for device, data in contents.items():
            self.refs[device] = shared.put(data)
            self.senders[device] = BlobSender(shared)
        self.wire: list[Chunk] = []
        self.wants: list[tuple[str, Want]] = []
        self.arrived: dict[str, bytes] = {}
        self.corrupt = 0
        self.folder = BlobFolder(root / "inbox", fsync=False)
        self.receiver = self._receiver()
        self.announce()

    def _receiver(self) -> BlobReceiver:
        return BlobReceiver(self.folder, credit_bytes=self.credit, per_peer_bytes=self.per_peer, retry_s=RETRY_S)

    def announce(self) -> None:
        """Every device says what it has."""
        for device, ref in self.refs.items():
            if self.receiver.want(device, ref, self.chunk, self.now):
                self._keep(device)
        self.step()

    def restart(self) -> None:
        """The receiver is killed; what it had asked for is still on its way."""
        self.folder.close()
        self.folder = BlobFolder(self.root / "inbox", fsync=False)
        self.receiver = self._receiver()
        self.announce()

    def step(self) -> None:
        """Publish what is due and let the senders answer."""
        for device, want in self.receiver.due(self.now):
            self.wants.append((device, want))
            assert self.senders[device].on_want("coord", want) is None
        for device, sender in self.senders.items():
            self.wire += [Chunk(device, c.sha, c.index, c.data) for c in sender.take(1000)]
        self.check()

    def check(self) -> None:
        """The credit, over all and each, and of it the part of the silent ones."""
        each = {device: self.receiver.outstanding_of(device) for device in self.senders}
        assert self.receiver.outstanding == sum(each.values()) <= self.credit
        assert all(0 <= held <= self.per_peer for held in each.values())
        silent = sum(source.outstanding for source in self.receiver._peers.values() if source.silent)
        assert self.receiver._doubtful == silent

    def deliver(self, chunk: Chunk) -> Arrival:
        """One chunk comes off the wire."""
        arrival = self.receiver.on_chunk(chunk.peer, chunk.sha, chunk.index, chunk.data, self.now)
        if arrival.kind == "complete":
            assert arrival.path is not None
            for device in arrival.peers:
                self._keep(device)
        elif arrival.kind == "corrupt":
            self.corrupt += 1
            self.announce()
        self.step()
        return arrival

    def _keep(self, device: str) -> None:
        path = self.folder.path(self.refs[device].sha)
        assert path is not None
        self.arrived[device] = path.read_bytes()

    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.step()

    def finish(self, *, steps: int = 20_000) -> None:
        """Deliver in order without faults until all is there."""
        for _ in range(steps):
            if len(self.arrived) == len(self.contents):
                return
            if self.wire:
                self.deliver(self.wire.pop(0))
            else:
                due = self.receiver.next_due()
                assert due is not None, "nothing under way and nothing to wait for"
                self.wait(max(0.0, due - self.now))
        raise AssertionError(f"{len(self.arrived)} of {len(self.contents)} contents after {steps} steps")


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that is gone after the test."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
