"""What the daemon and its agent say to each other over the pipe (`shared.frames`).

The daemon starts `<agent command> --read-fd R --write-fd W` and sends `Probe` first. One agent serves one GPU (or the
CPU) for as long as it lives and keeps the base loaded between rounds. Where a device has several, each trains on its
own share of the rows, and one of them merges their updates. The agent must answer `Pause` and `Stop` between
micro-batches, and say something (`Beat` or `Progressed`) at least every `Probe.beat_s` seconds of work, from its
*working* thread: a beat from a thread of its own would hide a hang.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.fields import MAX_CHUNK_BYTES
from shared.jobs import BaseSpec, Bits, TaskSpec
from shared.messages import Assignment, BaseSource, DatasetFacts, UpdateFacts
from shared.release_messages import ReleaseKind, Score

INTEGRATED = "integrated"
"""In the place of a GPU's UUID: the one that shares the machine's memory (Jetson). CUDA knows it by its number, 0."""

NO_TIME_S = 1e-6
"""`Train.train_for_s` of work that is given up: what its checkpoint holds is delivered, and nothing else."""


class PipeMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A message on the agent's pipe."""


# ---- daemon -> agent


class Probe(PipeMessage, frozen=True, kw_only=True):
    """Find out what this device can do."""

    datasets: dict[str, str]
    """Name -> file, of the owner's `[data]` table."""
    hub: bool = False
    """Whether the owner lets data sets and bases come from the hub."""
    share_labels: bool = False
    """Whether the owner lets label counts leave the device."""
    threads: int = 1
    gpu: str = ""
    """UUID of the GPU to use, or `INTEGRATED`; empty: the CPU."""
    hold_out: float = 0.0
    """Share of every data set that is not trained on; it is not counted."""
    beat_s: float = 5.0


class Train(PipeMessage, frozen=True, kw_only=True):
    """Do this work; answer with `Trained` or `Failed`."""

    assignment: Assignment
    base_path: str
    """Folder of the base model; for hub ids allowed by the owner the id itself; empty: fetch `assignment.source`."""
    data_path: str
    adapter_path: str
    """The global adapter file to start from."""
    device: str = ""
    """Id of this device, written into the update."""
    hub: bool = False
    """Whether the owner lets data sets and bases come from the hub."""
    hold_out: float = 0.0
    """Share of the rows that is left out (`shared.held_out`)."""
    part: int = 0
    parts: int = 1
    """This agent takes the samples at places part, part + parts, part + 2 parts, ... of the order."""
    update_path: str
    """Where to write the update (temp file, then rename)."""
    checkpoint_dir: str
    """Folder for this work's checkpoints; a checkpoint of the same (job, round, attempt, part, parts) is resumed."""
    bases_dir: str = ""
    """Folder for bases that are fetched."""
    disk_reserve: int = 0
    """Bytes of disk that a fetch must leave free."""
    digests_path: str = ""
    """File in which to remember the digests of base models; empty: none."""
    train_for_s: float = 0.0
    """Seconds left of `Work.train_for_s`; 0: no limit. A step is done all the same where none was yet, but for
    `NO_TIME_S`."""
    batch_limit: int = 0
    """Largest batch known to fit; 0: not known. Set by the daemon after an agent was killed for memory."""
    packet: int = MAX_CHUNK_BYTES
    """Bytes of the largest `StepOut.packet` that the broker takes."""
    fetch_s: float = 0.0
    """Seconds that the download of the global adapter took."""


class Partial(msgspec.Struct, frozen=True, kw_only=True):
    """One agent's update of work that several did."""

    update_path: str
    samples: int


class Merge(PipeMessage, frozen=True, kw_only=True):
    """Make one update of these, weighted by their samples; answer with `Merged` or `Failed`."""

    assignment: Assignment
    partials: list[Partial]
    adapter_path: str
    """The global adapter file that all started from."""
    update_path: str


class Evaluate(PipeMessage, frozen=True, kw_only=True):
    """Measure a release on the device's own rows, and what it would replace; answer with `Evaluated` or `Unfit`.

    The base that was loaded for training is let go before.
    """

    release: str
    folder: str
    """Its files."""
    kind: ReleaseKind
    previous: str = ""
    """Folder of the release to compare with; empty, or one for another task: the untuned base."""
    task: TaskSpec
    base: BaseSpec
    base_path: str
    """As in `Train`."""
    base_digest: str
    source: BaseSource | None = None
    bits: Bits
    seed: int = 0
    """Of the untuned base's head."""
    data_path: str = ""
    """Empty: the release is only loaded."""
    hold_out: float = 0.0
    """Share of the rows there that training left out, and that are taken; 0, or where there are none: by `share`."""
    share: float = 1.0
    """Of the rows there."""
    trained_on: bool = False
    """Those taken by `share` were trained on here."""
    rows: int = 0
    """At most; 0: all of the share."""
    hub: bool = False
    bases_dir: str = ""
    disk_reserve: int = 0
    digests_path: str = ""


class Pause(PipeMessage, frozen=True, kw_only=True):
    """Stop between micro-batches until `Resume`."""

    reason: str = ""


class Resume(PipeMessage, frozen=True, kw_only=True):
    """Go on."""


class Stop(PipeMessage, frozen=True, kw_only=True):
    """Finish the work under way with what is done (partial work counts). `discard`: forget it instead; `after_step`:
    its time is over, and a step is done all the same where none was yet."""

    discard: bool = False
    after_step: bool = False


class StepIn(PipeMessage, frozen=True, kw_only=True):
    """A packet that came from the top worker (`shared.steps`), as it is."""

    packet: bytes


class Shutdown(PipeMessage, frozen=True, kw_only=True):
    """Exit."""


ToAgent = Probe | Train | Merge | Evaluate | Pause | Resume | Stop | StepIn | Shutdown

# ---- agent -> daemon


class Probed(PipeMessage, frozen=True, kw_only=True):
    """Capability, after real kernels ran."""

    bits: list[Bits]
    notes: dict[str, str] = {}
    """Bits not offered -> why; data set -> what is wrong with it."""
    datasets: dict[str, DatasetFacts] = {}
    agents: int = 1
    """Agents that this stands for."""
    agent_bytes: int = 0
    hardware: str = ""
    flops: float = 0.0
    """As in `DeviceInfo`."""


class Beat(PipeMessage, frozen=True, kw_only=True):
    """Alive and working at `what` (loading, training, saving, paused)."""

    what: str = ""


class StepOut(PipeMessage, frozen=True, kw_only=True):
    """A packet for the top worker, as it is."""

    packet: bytes


class Progressed(PipeMessage, frozen=True, kw_only=True):
    """After an optimizer step, at most twice a second."""

    step: int
    steps: int
    samples: int
    loss: float
    samples_per_s: float
    batch: int = 0
    """What it tries now, where that is not the work's own; 0: the work's."""


class Trained(PipeMessage, frozen=True, kw_only=True):
    """The update is on disk at `Train.update_path`, fsynced and renamed."""

    job: str
    round: int
    attempt: int
    sha: str
    size: int
    facts: UpdateFacts
    held_bytes: int = 0
    """Bytes of the machine's memory that the agent goes on holding through a GPU which shares it."""


class Merged(PipeMessage, frozen=True, kw_only=True):
    """The merged update is on disk at `Merge.update_path`, fsynced and renamed."""

    sha: str
    size: int
    norm: float
    """As in `UpdateFacts`."""


class Evaluated(PipeMessage, frozen=True, kw_only=True):
    """A release was measured, or where there are no rows for it, loaded."""

    release: str
    before: Score | None = None
    after: Score | None = None


class Unfit(PipeMessage, frozen=True, kw_only=True):
    """A release could not be measured. At fault is the release (`load`: it does not load, `score`: it gives no number),
    nobody (`stopped`), or else this device."""

    release: str
    kind: Literal["load", "score", "base", "bits", "memory", "data", "stopped"]
    reason: str


class Failed(PipeMessage, frozen=True, kw_only=True):
    """The work can't be done. `memory` carries the largest batch that fits (0: none does)."""

    job: str
    round: int
    attempt: int
    kind: Literal["memory", "data", "model", "bits", "adapter", "stopped", "internal"]
    reason: str
    batch_limit: int = 0
    held_bytes: int = 0
    """As in `Trained`."""


FromAgent = Probed | Beat | StepOut | Progressed | Trained | Merged | Failed | Evaluated | Unfit
