"""Transfer of large contents in chunks, pulled by the receiver: who may send what, when. Nothing is sent unasked.

No threads, no clock, no sockets: `now` (monotonic seconds) is an argument, messages are return values, the disk is a
`BlobFolder`. The rules: the chunks asked for and not yet here never exceed a credit over all peers, nor a share per
peer; peers take turns; a window is refilled when half of it has come, so that a `Want` carries a batch.

What did not come: a chunk is asked for again when one that was asked for later has come and it is `retry_s` old, or
when its peer was silent for a wait that doubles. The second rule alone would ask again and again over a slow link,
where every chunk is late and none is lost; so it also shrinks the peer's window to one chunk, which grows with each
arrival as in TCP's slow start.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections import deque

from shared.blob_folder import BlobFolder, Corrupt, NoRoom
from shared.blob_pulls import Arrival, Asked, Content, Peer, Pull, ReceiverStats, ranges_of
from shared.blob_sender import BlobSender, Chunk, chunk_limit
from shared.errors import RemoteError
from shared.fields import MAX_CHUNK_BYTES
from shared.messages import BlobRef, Want

__all__ = ["Arrival", "BlobReceiver", "BlobSender", "Chunk", "ReceiverStats", "chunk_limit"]

MAX_RANGES = 1024
_LONGEST_WAIT = 8
_WRONG_SIZES = 2


class BlobReceiver:
    """Pulls contents into `folder`. `credit_bytes`: under way at once over all peers; `per_peer_bytes`: of one peer.
    A pull ends after `idle_s` without a chunk; a part that no one pulls goes after `part_s` (inf: only when told).

    Call `due` after `want`, `on_chunk`, `on_missing` and the cancels, and at `next_due`; publish what it returns.
    A peer that begins a new session has forgotten what it was asked: `cancel_peer`, then `want` again.
    """

    def __init__(
        self,
        folder: BlobFolder,
        *,
        credit_bytes: int,
        per_peer_bytes: int = 1024 * 1024,
        retry_s: float,
        idle_s: float = 900.0,
        part_s: float = 900.0,
    ) -> None:
        self.max_chunk = MAX_CHUNK_BYTES
        self.stats = ReceiverStats()
        self._folder = folder
        self._credit = credit_bytes
        self._per_peer = min(per_peer_bytes, credit_bytes)
        self._retry_s = retry_s
        self._idle_s = idle_s
        self._part_s = part_s
        self._now = 0.0
        self._outstanding = 0
        self._doubtful = 0
        """The part of it that silent peers were asked for."""
        self._peers: dict[str, Peer] = {}
        self._contents: dict[str, Content] = {}
        self._ready: deque[Peer] = deque()
        self._quiet: deque[Peer] = deque()
        """Silent peers that may be asked; after all others."""
        self._timers: list[tuple[float, str]] = []
        self._orphans: dict[str, float | None] = dict.fromkeys(folder.parts())
        """Parts that no one pulls -> since when, None: not yet known. They wait `part_s` to be resumed."""

    @property
    def outstanding(self) -> int:
        """Bytes asked for and neither come nor given up."""
        return self._outstanding

    def outstanding_of(self, peer: str) -> int:
        """The same for one peer."""
        return self._peers[peer].outstanding if peer in self._peers else 0

    def wanted(self, peer: str, sha: str) -> bool:
        """Whether this content is being pulled from this peer."""
        return peer in self._peers and sha in self._peers[peer].pulls

    def limit_packet(self, max_packet: int) -> None:
        """The broker takes packets of at most `max_packet` bytes from now on."""
        self.max_chunk = chunk_limit(max_packet)
        for content in list(self._contents.values()):
            with contextlib.suppress(NoRoom):
                self._resize(content, self.max_chunk)

    def want(self, peer: str, ref: BlobRef, chunk: int, now: float) -> bool:
        """Pull a content from `peer`, which sends chunks of at most `chunk` bytes; what is on disk of it is kept. True
        if all of it is. Idempotent. Raises `NoRoom`, and `RemoteError` for sizes that make no sense."""
        self._now = max(self._now, now)
        if self._folder.path(ref.sha) is not None:
            return True
        chunk = min(chunk, self.max_chunk, self._per_peer)
        content = self._contents.get(ref.sha)
        if content is None:
            content = self._open(ref, chunk)
            if content is None:
                return True
        elif content.spool.size != ref.size:
            raise RemoteError(f"a blob announced with {ref.size} bytes, before with {content.spool.size}")
        elif chunk < content.spool.chunk:
            self._resize(content, chunk)
        source = self._peers.get(peer)
        if source is None:
            # Two chunks to begin with: what the link carries is not known yet.
            window = min(2 * content.spool.chunk, self._per_peer)
            source = self._peers[peer] = Peer(peer, window, self._retry_s, now)
        if ref.sha not in source.pulls:
            source.pulls[ref.sha] = content.pulls[peer] = Pull(content)
        self._queue(source)
        return False

    def cancel(self, peer: str, sha: str) -> None:
        """This content is not needed from `peer` any more; its part goes when no other peer sends it."""
        if self.wanted(peer, sha):
            self._leave(self._peers[peer], self._contents[sha], keep=False)
        elif sha in self._orphans and sha not in self._contents:
            # It was pulled in a former session.
            del self._orphans[sha]
            self._folder.discard_part(sha)

    def cancel_peer(self, peer: str) -> None:
        """Ask `peer` for nothing any more. Parts stay, to be resumed by a later `want`."""
        source = self._peers.get(peer)
        if source is not None:
            for pull in list(source.pulls.values()):
                self._leave(source, pull.content, keep=True)

    def on_missing(self, peer: str, sha: str) -> bool:
        """`peer` does not have the content. False if it was not asked for it; else the pull has ended."""
        if not self.wanted(peer, sha):
            return False
        self._leave(self._peers[peer], self._contents[sha], keep=True)
        return True

    def on_chunk(self, peer: str, sha: str, index: int, data: bytes | memoryview, now: float) -> Arrival:
        """Take a chunk. Never raises on what a peer sends."""
        self._now = max(self._now, now)
        source, content = self._peers.get(peer), self._contents.get(sha)
        if source is None or content is None or peer not in content.pulls:
            return self._unasked(sha, len(data))
        spool, pull = content.spool, content.pulls[peer]
        if not 0 <= index < spool.count or len(data) != spool.length(index):
            return self._wrong_size(source, pull, index, len(data))
        self._heard(source, (sha, index), now)
        pull.active = now
        content.resized = False
        try:
            fresh = spool.write(index, data)
        except NoRoom as error:
            return Arrival("no_room", reason=str(error), peers=self._end(content))
        if not fresh:
            self.stats.duplicates += 1
            self.stats.retransmitted_bytes += len(data)
            return Arrival("more")
        self.stats.chunks += 1
        return Arrival("more") if spool.left else self._finish(source, content)

    def due(self, now: float) -> list[tuple[str, Want]]:
        """(peer, message) to publish now."""
        self._now = max(self._now, now)
        self._expire_orphans(now)
        while self._timers and self._timers[0][0] <= now:
            at, name = heapq.heappop(self._timers)
            source = self._peers.get(name)
            if source is not None and source.timer == at:
                source.timer = None
                self._expire(source, now)
        wants: list[tuple[str, Want]] = []
        quantum = self._per_peer // 2
        for queue in (self._ready, self._quiet):
            while queue:
                source = queue[0]
                first, room = source.first(), max(0, source.window - source.outstanding)
                if first and not source.outstanding:
                    room = max(room, first)
                if first and first <= room:
                    free = self._free(source, first)
                    if free < max(first, min(room, quantum, source.backlog())):
                        break
                    wants += self._ask(source, min(room, free), now)
                queue.popleft()
                source.queued = False
        return wants

    def next_due(self) -> float | None:
        """When `due` has something to do at the latest, if nothing arrives before; None: nothing to wait for."""
        times = [at for at, _ in self._timers[:1]]
        for since in self._orphans.values():
            times.append(self._now if since is None else since + self._part_s)
            break  # the oldest comes first
        return min((at for at in times if at < math.inf), default=None)

    # ---- asking

    def _free(self, source: Peer, first: int) -> int:
        """Credit for one more question; silent peers share half of it, or they could hold all and stop the others."""
        free = self._credit - self._outstanding
        if source.silent:
            return min(free, max(self._credit // 2, first) - self._doubtful)
        return free

    def _ask(self, source: Peer, budget: int, now: float) -> list[tuple[str, Want]]:
        wants: list[tuple[str, Want]] = []
        source.serial += 1
        for sha, pull in source.pulls.items():
            content, indexes = pull.content, list[int]()
            while (index := content.next(source.name)) is not None and len(indexes) < MAX_RANGES:
                size = content.spool.length(index)
                if size > budget:
                    break
                budget -= size
                content.todo.popleft()
                indexes.append(index)
                source.asked[sha, index] = Asked(now, source.serial, size)
                self._count(source, size)
            if indexes:
                pull.active = now if pull.active is None else pull.active
                wants.append((source.name, Want(sha=sha, chunk=content.spool.chunk, ranges=ranges_of(indexes))))
        self._arm(source)
        return wants

    def _queue(self, source: Peer) -> None:
        if not source.queued:
            source.queued = True
            (self._quiet if source.silent else self._ready).append(source)

    def _heard(self, source: Peer, key: tuple[str, int], now: float) -> None:
        asked = source.asked.get(key)
        if asked is not None:
            gap = now - max(asked.at, source.heard)
            source.wait = min(max(self._retry_s, 2 * gap, source.wait / 2), self._retry_s * _LONGEST_WAIT)
            source.window = min(source.window + asked.size, self._per_peer)
            source.seen = max(source.seen, asked.serial)
            self._release(source, key)
        source.heard = now
        self._set_silent(source, silent=False)
        if source.outstanding <= source.window // 2:
            self._queue(source)
        self._arm(source)

    def _release(self, source: Peer, key: tuple[str, int]) -> None:
        asked = source.asked.pop(key, None)
        if asked is not None:
            self._count(source, -asked.size)

    def _count(self, source: Peer, size: int) -> None:
        source.outstanding += size
        self._outstanding += size
        self._doubtful += size if source.silent else 0

    def _set_silent(self, source: Peer, *, silent: bool) -> None:
        if source.silent != silent:
            source.silent = silent
            self._doubtful += source.outstanding if silent else -source.outstanding
            if source.queued:
                (self._ready if silent else self._quiet).remove(source)
                source.queued = False
                self._queue(source)

    # ---- waiting

    def _arm(self, source: Peer) -> None:
        times = [pull.active + self._idle_s for pull in source.pulls.values() if pull.active is not None]
        if source.asked:
            times.append(source.overdue(next(iter(source.asked.values()))))
        at = min(times, default=None)
        if at is not None and (source.timer is None or at < source.timer):
            source.timer = at
            heapq.heappush(self._timers, (at, source.name))

    def _expire(self, source: Peer, now: float) -> None:
        for pull in list(source.pulls.values()):
            if pull.active is not None and now >= pull.active + self._idle_s:
                self.stats.expired += 1
                # Where parts are kept for no longer than a pull may be idle, its part has had that time by now.
                self._leave(source, pull.content, keep=self._part_s > self._idle_s)
        lost = [key for key, asked in source.asked.items() if now >= source.overdue(asked)]
        if lost:
            if now >= source.heard + source.wait:
                self._set_silent(source, silent=True)
                source.wait = min(source.wait * 2, self._retry_s * _LONGEST_WAIT)
                source.window = max(self._contents[sha].spool.chunk for sha, _ in lost)
            self.stats.rewanted += len(lost)
            self._give_back(source, lost)
        self._arm(source)

    def _give_back(self, source: Peer, keys: list[tuple[str, int]]) -> None:
        """Ask for these chunks again, anyone, before any other."""
        for sha, index in sorted(keys, reverse=True):
            content = self._contents[sha]
            self._release(source, (sha, index))
            content.todo.appendleft(index)
            for name in content.pulls:
                self._queue(self._peers[name])

    def _expire_orphans(self, now: float) -> None:
        while self._orphans:
            sha, since = next(iter(self._orphans.items()))
            if since is None:
                self._orphans = {name: now if at is None else at for name, at in self._orphans.items()}
            elif now >= since + self._part_s:
                del self._orphans[sha]
                self._folder.discard_part(sha)
            else:
                break

    # ---- beginnings and ends

    def _open(self, ref: BlobRef, chunk: int) -> Content | None:
        """The content, resumed; None if all of it was there already."""
        spool = self._folder.spool(ref.sha, ref.size, chunk)
        self._orphans.pop(ref.sha, None)
        if not spool.left:
            try:
                spool.finish()
                return None
            except Corrupt:
                if not ref.size:
                    self._folder.discard_part(ref.sha)
                    raise
        content = self._contents[ref.sha] = Content(ref.sha, spool)
        return content

    def _resize(self, content: Content, chunk: int) -> None:
        spool = content.spool
        if chunk >= spool.chunk:
            return
        self._release_all(content)
        try:
            self._folder.spool(content.sha, spool.size, chunk)
        except NoRoom:
            self._end(content)
            raise
        content.resized = True
        content.start_over()

    def _release_all(self, content: Content) -> None:
        for name in content.pulls:
            source = self._peers[name]
            for key in [key for key in source.asked if key[0] == content.sha]:
                self._release(source, key)
            self._queue(source)

    def _finish(self, source: Peer, content: Content) -> Arrival:
        try:
            path = content.spool.finish()
        except Corrupt as error:
            self.stats.corrupt += 1
            content.restarts += 1
            self._release_all(content)
            content.start_over()
            if content.restarts > 1:
                return self._blame(source, content, str(error))
            content.solo = source.name
            return Arrival("more", reason=f"{error}; fetched once more")
        return Arrival("complete", path=path, peers=self._end(content))

    def _blame(self, source: Peer, content: Content, reason: str) -> Arrival:
        content.restarts = 0
        self._leave(source, content, keep=False)
        return Arrival("corrupt", reason=reason, peers=(source.name,))

    def _wrong_size(self, source: Peer, pull: Pull, index: int, size: int) -> Arrival:
        content = pull.content
        reason = f"chunk {index} of {size} bytes in a blob of {content.spool.size} by {content.spool.chunk}"
        if content.resized:
            self.stats.unexpected += 1
            return Arrival("unexpected", reason=reason)
        self.stats.corrupt += 1
        pull.wrong_sizes += 1
        if pull.wrong_sizes < _WRONG_SIZES:
            return Arrival("unexpected", reason=reason)
        return self._blame(source, content, reason)

    def _unasked(self, sha: str, size: int) -> Arrival:
        if self._folder.path(sha) is None:
            self.stats.unexpected += 1
            return Arrival("unexpected", reason="not wanted")
        self.stats.duplicates += 1
        self.stats.retransmitted_bytes += size
        return Arrival("unexpected", reason="here already")

    def _leave(self, source: Peer, content: Content, *, keep: bool) -> None:
        """End one peer's pull. The last one out discards the part, or leaves it to be resumed."""
        self._give_back(source, [key for key in source.asked if key[0] == content.sha])
        del source.pulls[content.sha], content.pulls[source.name]
        if content.solo == source.name:
            content.solo = ""
        for name in content.pulls:
            self._queue(self._peers[name])
        self._forget_idle(source)
        if content.pulls:
            return
        del self._contents[content.sha]
        if keep:
            self._folder.release(content.sha)
            self._orphans[content.sha] = self._now
        else:
            self._folder.discard_part(content.sha)

    def _end(self, content: Content) -> tuple[str, ...]:
        """End all pulls of a content; the peers they were of."""
        names = tuple(content.pulls)
        for name in names:
            self._leave(self._peers[name], content, keep=False)
        return names

    def _forget_idle(self, source: Peer) -> None:
        if not source.pulls:
            del self._peers[source.name]
