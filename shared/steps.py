"""The steps of split learning on the wire: what a device and the top worker say to each other within a round.

They go over `up/step` and `down/step` at QoS 0, cut into packets that the broker takes; a packet carries the numbers of
its message, so nothing is announced and what is lost is sent again by whoever misses the answer. A *run* is a stretch
of steps that nobody went back in: it rises whenever all return to a checkpoint, and what belongs to an earlier run is
dropped. Needs numpy, so the daemon passes packets on unread.

| message | from | means |
|---|---|---|
| `Query` | top | run `run` begins: say which checkpoints you hold |
| `Hello` | device | here I am, with these checkpoints; again and again until `Begin` |
| `Begin` | top | go back to checkpoint `load`, the next step is `step` |
| `Features` | device | the output of its blocks for one batch, with what the loss needs |
| `Gradient` | top | of the device's own mean loss by those features |
| `Skip` | top | that step was taken without you; go on with `step` |
| `End` | top | the steps are done, deliver what you have |
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from shared.errors import DecodeError
from shared.tensors import WireTensor

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Identity = Annotated[str, Meta(max_length=120)]
"""`identity` of the work: job, round and attempt."""
MAX_STEP_BYTES = 256 * 1024 * 1024
"""Of a message, where its receiver does not know better."""
UNDER_WAY = 2
"""Steps whose features a device may have sent without a gradient, and gradients of each device that are kept."""
MAX_PARTS = 2**16 - 1
_HEAD = struct.Struct("<4sIHH")
"""Mark, number of the message, part, parts."""
_MARK = b"mst1"


class StepMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A message of `run` of the work."""

    work: Identity
    run: Count


class Query(StepMessage, frozen=True, kw_only=True):
    """Say which checkpoints you hold."""


class Hello(StepMessage, frozen=True, kw_only=True):
    """Ready for run `run` (0: no query was heard yet). `held`: steps of its checkpoints; the start, 0, always is."""

    held: Annotated[list[Count], Meta(max_length=64)]
    fetch_s: Seconds = 0.0
    """Of this round's download, as in `UpdateFacts`; 0: not known."""


class Begin(StepMessage, frozen=True, kw_only=True):
    """Load checkpoint `load` and go on with step `step`, which differs where the others are further."""

    load: Count
    step: Count
    batch: Count = 0
    """Samples of its steps from now on; 0: as the work says."""


class Features(StepMessage, frozen=True, kw_only=True):
    """A batch after the device's blocks. `targets`: int32 little-endian of shape (samples) or (samples, tokens);
    `mask`: a byte per token, empty where there are no tokens."""

    step: Count
    hidden: WireTensor
    targets: memoryview
    mask: memoryview = memoryview(b"")


class Gradient(StepMessage, frozen=True, kw_only=True):
    """Of the mean loss over the device's own samples; `loss` is that mean."""

    step: Count
    loss: float
    hidden: WireTensor


class Skip(StepMessage, frozen=True, kw_only=True):
    """The step you are at is over; the next is `step`."""

    step: Count


class End(StepMessage, frozen=True, kw_only=True):
    """No step follows."""


Up = Hello | Features
Down = Query | Begin | Gradient | Skip | End
_UP = msgspec.msgpack.Decoder(Up)
_DOWN = msgspec.msgpack.Decoder(Down)
_ENCODER = msgspec.msgpack.Encoder()


def identity(job: str, round: int, attempt: int) -> str:
    """The work that a step belongs to."""
    return f"{job}/{round}/{attempt}"


def packets(message: Up | Down, number: int, size: int) -> Iterator[bytes]:
    """`message`, the sender's `number`th, as payloads of at most `size` bytes.

    Raises `ValueError` where it takes more than `MAX_PARTS`.
    """
    body = memoryview(_ENCODER.encode(message))
    room = size - _HEAD.size
    parts = max(1, -(-len(body) // room)) if room > 0 else MAX_PARTS + 1
    if parts > MAX_PARTS:
        raise ValueError(f"a step of {len(body)} bytes in packets of {size}")
    for part in range(parts):
        yield _HEAD.pack(_MARK, number % 2**32, part, parts) + body[part * room : (part + 1) * room]


class Assembler:
    """Puts the packets of one sender together. A later message ends an earlier one that lacks packets.

    `limit`: bytes that a message may have, packets' heads included.
    """

    def __init__(self, *, down: bool, limit: int = MAX_STEP_BYTES) -> None:
        self.limit = limit
        self._decoder: msgspec.msgpack.Decoder[Up] | msgspec.msgpack.Decoder[Down] = _DOWN if down else _UP
        self._number = -1
        self._parts: list[bytes | memoryview | None] = []
        self._missing = self._bytes = 0

    def add(self, payload: bytes) -> Up | Down | None:
        """The message that `payload` completes, or None. Raises `DecodeError` for what is none of ours."""
        if len(payload) < _HEAD.size:
            raise DecodeError(f"a step packet of {len(payload)} bytes")
        mark, number, part, parts = _HEAD.unpack_from(payload)
        if mark != _MARK or not part < parts:
            raise DecodeError("no step packet")
        if number != self._number or parts != len(self._parts):
            self._number, self._parts, self._missing, self._bytes = number, [None] * parts, parts, 0
        if self._parts[part] is not None:
            return None
        self._parts[part] = memoryview(payload)[_HEAD.size :]
        self._missing -= 1
        self._bytes += len(payload)
        if self._bytes > self.limit:
            self._number, self._parts = -1, []
            raise DecodeError(f"a step of more than {self.limit} bytes")
        if self._missing:
            return None
        body = b"".join(piece for piece in self._parts if piece is not None)
        self._number, self._parts = -1, []
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise DecodeError(f"step message: {error}"[:200]) from error
