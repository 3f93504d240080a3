"""What the coordinator and its model worker say to each other over the pipe (`shared.frames`).

The coordinator starts `<worker command> --read-fd R --write-fd W`; the worker keeps base and held-out data loaded.
"""

from __future__ import annotations

import msgspec

from coordinator.core.facts import Metrics, ModelFacts
from coordinator.core.planning.regulation import Regulation, most
from shared.jobs import JobSpec, SplitSpec
from shared.settings import BrokerSettings
from shared.steps import identity


class PipeMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A message on the worker's pipe."""


class Prepare(PipeMessage, frozen=True, kw_only=True):
    """Look at the base, write the global adapter of round 0 (fresh head, no factors) to `adapter_path`."""

    job: JobSpec
    base_path: str
    adapter_path: str
    pack_into: str = ""
    """Folder for the base at each bit width, to be served; empty: none is made."""


class Evaluate(PipeMessage, frozen=True, kw_only=True):
    """Evaluate the base with the global adapter at `adapter_path` on the job's held-out data."""

    job: JobSpec
    base_path: str
    adapter_path: str
    rows: int = 0
    """0: all."""


class TopRound(PipeMessage, frozen=True, kw_only=True):
    """Conduct the steps of a round of split learning over the broker (`shared.steps`); the top worker's request.

    Asked again after a death, it goes on from the last checkpoint that all hold.
    """

    job: JobSpec
    job_id: str
    round: int
    attempt: int
    fleet: str
    name: str
    """Of the top worker on the broker."""
    broker: BrokerSettings
    base_path: str
    base_digest: str
    adapter_path: str
    """The global adapter to start from."""
    update_path: str
    """Beginning of the paths of the updates."""
    folder: str
    """For checkpoints of this work."""
    batches: dict[str, int]
    """Participant -> samples of a step at most."""
    steps: int
    split: SplitSpec
    fetched: int = 0
    """Bytes that a participant fetched for the round."""
    regulation: Regulation | None = None
    """By what batches follow this round's links; None: they stay."""
    over: bool = False
    """Its part is on disk already: only tell devices that still ask that the steps are over."""
    merges: bool
    """Whether features are merged into one batch; else every device has a top of its own."""

    @property
    def work(self) -> str:
        """As steps name it."""
        return identity(self.job_id, self.round, self.attempt)

    def most(self, device: str) -> int:
        """Samples that its features may have."""
        return most(self.regulation, device, self.batches[device])


class TopWithout(PipeMessage, frozen=True, kw_only=True):
    """These devices will not come (any more)."""

    devices: list[str]


class TopFinish(PipeMessage, frozen=True, kw_only=True):
    """End the round with the steps that are done."""


class Exit(PipeMessage, frozen=True, kw_only=True):
    """Leave."""


ToWorker = Prepare | Evaluate | Exit
ToTop = TopRound | TopWithout | TopFinish | Exit


class Prepared(PipeMessage, frozen=True, kw_only=True):
    """Answer to `Prepare`."""

    facts: ModelFacts
    packed: dict[str, str] = {}
    """Bits as text -> digest of the manifest of the packed base."""


class Evaluated(PipeMessage, frozen=True, kw_only=True):
    """Answer to `Evaluate`."""

    metrics: Metrics


class TopUpdate(PipeMessage, frozen=True, kw_only=True):
    """What a top model became: an update file. `of`: the device whose it is, "" for that of all."""

    path: str
    samples: int
    of: str = ""


class TopTrained(PipeMessage, frozen=True, kw_only=True):
    """Answer to `TopRound`: the steps are done."""

    updates: list[TopUpdate]
    steps: int
    loss: float
    dropped: int = 0
    """How often a step went on without a device."""
    waited_s: float = 0.0
    """Seconds in which the top worker had nothing to do but wait for features, over all steps."""


class WorkerFailed(PipeMessage, frozen=True, kw_only=True):
    """The request can't be served; one line. `operator`: the job file or the machine is at fault, not the worker."""

    reason: str
    operator: bool = False


class WorkerBeat(PipeMessage, frozen=True, kw_only=True):
    """Still at it."""

    what: str = ""


FromWorker = Prepared | Evaluated | TopTrained | WorkerFailed | WorkerBeat
