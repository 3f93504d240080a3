"""The sending side of a blob transfer: answers `Want`, and nothing else. See `shared.blobs` for the rules."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from shared.blob_folder import BlobFolder
from shared.fields import MAX_CHUNK_BYTES
from shared.messages import Missing, Want

PACKET_RESERVE = 4096
"""Bytes of the broker's largest packet that are not for the chunk: topic, properties, header."""
QUEUE_BYTES = 32 * 1024 * 1024
QUEUE_CHUNKS = 4096
"""What one peer may have asked for and not got; more is dropped, and asked for again by an honest receiver."""


def chunk_limit(max_packet: int) -> int:
    """The largest chunk that fits a broker's largest packet."""
    return max(1024, min(MAX_CHUNK_BYTES, max_packet - PACKET_RESERVE))


@dataclass(frozen=True)
class Chunk:
    """One chunk to publish to `peer`."""

    peer: str
    sha: str
    index: int
    data: bytes


class BlobSender:
    """Queues what peers want and hands it out in turns, read from `folder` at that moment.

    `max_chunk`: a `Want` of larger chunks is answered with `Missing`.
    """

    def __init__(self, folder: BlobFolder, max_chunk: int = MAX_CHUNK_BYTES) -> None:
        self.max_chunk = max_chunk
        self.sent_chunks = 0
        self.sent_bytes = 0
        self._folder = folder
        self._queues: OrderedDict[str, OrderedDict[tuple[str, int, int], None]] = OrderedDict()

    def limit_packet(self, max_packet: int) -> None:
        """The broker takes packets of at most `max_packet` bytes from now on."""
        self.max_chunk = chunk_limit(max_packet)

    def on_want(self, peer: str, want: Want) -> Missing | None:
        """Queue what `peer` wants, once each; `Missing` to send back if the content is not here or can't be cut so."""
        size = self._folder.size(want.sha)
        if size is None:
            return Missing(sha=want.sha, reason="not here")
        if want.chunk > self.max_chunk:
            return Missing(sha=want.sha, reason=f"chunks of {want.chunk} bytes, the limit here is {self.max_chunk}")
        count = -(-size // want.chunk)
        if any(first + length > count for first, length in want.ranges):
            return Missing(sha=want.sha, reason=f"a chunk beyond {count} of {want.chunk} bytes")
        queue = self._queues.setdefault(peer, OrderedDict())
        limit = max(1, min(QUEUE_CHUNKS, QUEUE_BYTES // want.chunk))
        for first, length in want.ranges:
            for index in range(first, first + length):
                if len(queue) >= limit:
                    return None
                queue[want.sha, want.chunk, index] = None
        return None

    def take(self, room: int) -> list[Chunk]:
        """At most `room` chunks to publish now, one peer after the other."""
        chunks: list[Chunk] = []
        while self._queues and len(chunks) < room:
            peer, queue = self._queues.popitem(last=False)
            while queue:
                (sha, size, index), _ = queue.popitem(last=False)
                data = self._folder.read(sha, index * size, size) if size <= self.max_chunk else None
                if data is not None:
                    chunks.append(Chunk(peer, sha, index, data))
                    self.sent_chunks += 1
                    self.sent_bytes += len(data)
                    break
            if queue:
                self._queues[peer] = queue
        return chunks

    def pending(self) -> int:
        """Chunks that are queued."""
        return sum(len(queue) for queue in self._queues.values())

    def cancel_peer(self, peer: str) -> None:
        """Forget what `peer` wants: it is gone, or begins anew."""
        self._queues.pop(peer, None)

    def cancel(self, sha: str) -> None:
        """Forget all wants of a content: it is about to be removed."""
        for queue in self._queues.values():
            for key in [key for key in queue if key[0] == sha]:
                del queue[key]
