"""Releases on the wire: which trained model a device is to have active, and how far it is with that.

The desired state is retained and absolute, like an assignment: a device that was away, or joins late, finds what holds
for it. A rollback is a desired state, too, that of the release before.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.fields import MAX_CHUNK_BYTES, Amount, Finite, JobName, Natural, Share, Text
from shared.jobs import BaseSpec, Bits, TaskSpec
from shared.messages import BaseSource, BlobRef, Message

ReleaseId = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\.r\d{1,9}-\d{1,9}\Z")]
"""JOB.rROUND-NUMBER; becomes a folder's name on devices, so nothing else is let in."""
ReleaseKind = Literal["lora", "model", "bottleneck"]
"""A PEFT folder, a whole model's folder, or a folder of bottleneck adapters."""
Stage = Literal["none", "wanted", "received", "verified", "staged", "active", "committed", "failed", "skipped"]
"""`none`: nothing is to be active. `wanted`: told, not all here. `failed`: the release does not work here; `skipped`:
this device can't try it. In both the model that was active stays."""


class ReleaseSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One release with all a device needs to fetch it, to judge it and to put it in place."""

    id: ReleaseId
    number: Natural
    """Rises with every release of the fleet; a desired number below the active one's is a rollback."""
    job: JobName
    round: Natural
    kind: ReleaseKind
    blob: BlobRef
    """The files in one content (`shared.release_pack`)."""
    chunk: Natural = MAX_CHUNK_BYTES
    base: BaseSpec
    base_digest: Text
    source: BaseSource | None = None
    """For devices that don't have the base and whose owner allows the host."""
    bits: Bits = 32
    """Precision of the base to evaluate at; where memory does not hold it, the next one below."""
    task: TaskSpec
    seed: Natural = 0
    """Of the untuned base's head, the first thing to compare with."""
    worse_by: Amount = 0.1
    """A loss of more than this share above that of what is active now is refused."""


class Release(Message, frozen=True, kw_only=True):
    """Retained on `down/release`: the release that a device is to have active. None: no release at all."""

    term: Natural = 0
    seq: Natural = 0
    """Orders what one coordinator says; a lower (term, seq) than the highest seen is old."""
    release: ReleaseSpec | None = None
    commit: bool = False
    """Once active it stays. Else it is a trial: the release before is kept until this is said."""
    reason: Text = ""


MOST = 1e15
"""A loss above is no number that a message may hold."""


def number_of(release: str) -> int:
    """The number at the end of a release's id, such as 2 of `demo-3f2a1c.r3-2`; 0: it has none."""
    number = release.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdecimal() and len(number) < 10 else 0


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """A model on the device's own rows: mean loss per row (classification) or completion token (causal)."""

    loss: Finite
    rows: Natural
    accuracy: Share | None = None
    trained_on: bool = False
    """The device trains on these rows, too: it keeps none aside."""
    of: Text = ""
    """What was measured: a release's id, or "base", the model as it came."""


class ReleaseState(Message, frozen=True, kw_only=True):
    """On `up/release`: how far the device is with what it is to have active. Said at every change, and now and then."""

    epoch: Natural
    seq: Natural
    """Rises within an epoch."""
    release: Text = ""
    """Id of the desired release; empty: none."""
    stage: Stage = "none"
    active: Text = ""
    """Id of the release that is really in place; empty: none."""
    reason: Text = ""
    """Why it failed or was skipped."""
    waits: Text = ""
    """What it waits for, such as the end of a round or its owner's hours; empty: it goes on by itself."""
    before: Score | None = None
    """Of what was active before, else of the untuned base."""
    after: Score | None = None
    """Of the release. None with stage `active`: there is no data for it here, it was only loaded."""
