"""The messages that cross the broker, but for releases (`shared.release_messages`) and steps (`shared.steps`).

Rule of versions: unknown fields are ignored, unknown majors of `schema` are refused (`shared.codec.unpack`).
The identity of work is `(fleet, job, round, attempt, device, kind)`: it makes every delivery idempotent.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.codec import SCHEMA
from shared.fields import MAX_BLOB_BYTES, MAX_CHUNK_BYTES, Amount, Finite, JobName, Natural, Sha, Share, Text, untell
from shared.jobs import BaseSpec, Bits, SplitSpec, TaskSpec, TrainingSpec
from shared.pruning_order import Pruning, UnitBits

Lifecycle = Literal["init", "ready", "training", "draining", "disconnected", "lost"]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message of major version `SCHEMA`."""

    schema: int = SCHEMA


# ---- presence and load -------------------------------------------------------------------------------------------


class DeviceState(Message, frozen=True, kw_only=True):
    """Retained on `device/{device}/state`: birth, lifecycle, and the will (`lost`)."""

    s: Lifecycle
    epoch: Natural
    """Rises with every connection; a state with a lower epoch than the highest seen is stale."""
    boot_id: Text = ""
    version: Text = ""
    ts: Amount = 0.0
    """Unix seconds of the device's clock; for people, never for decisions."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One GPU or MIG instance that the owner listed. Fields at their default are not sent."""

    uuid: Text
    """Of a Jetson's own GPU "integrated": it has none that CUDA knows."""
    name: Text = ""
    memory_bytes: Natural = 0
    """Of its own; 0 where it shares the machine's."""
    compute: Text = ""
    integrated: bool = False
    """It shares the machine's memory: what it takes is missing there."""
    power_limit_w: Amount | None = None
    clock_max_mhz: Natural | None = None
    memory_clock_max_mhz: Natural | None = None


class DatasetFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A data set as its device describes it."""

    rows: Natural
    labels: dict[str, int] = {}
    """Label number as text -> rows; empty where the owner does not allow it."""


class DeviceInfo(Message, frozen=True, kw_only=True):
    """Retained on `device/{device}/info`: capability, which changes by the boot."""

    epoch: Natural
    version: Text = ""
    hardware: Text = ""
    cores: Amount = 0.0
    """CPU cores usable, by quota."""
    memory_bytes: Natural = 0
    """Limit of the memory that training may use: cgroup limit, else RAM."""
    gpus: list[Gpu] = []
    bits: list[Bits] = []
    """Precisions of the base that passed a real quantize-dequantize-matmul in bounds; empty: not yet probed."""
    agents: Annotated[int, Meta(ge=1, le=64)] = 1
    """Agents that train side by side: one for each listed GPU that passed the probe, or those on the CPU."""
    agent_bytes: Natural = 0
    """Resident memory of an agent before it holds a model."""
    flops: Amount = 0.0
    """FLOP per second of matrix products in the probe: of one CPU core, or of the slowest listed GPU; 0: not measured.
    Tells devices apart before their first round."""
    datasets: dict[str, DatasetFacts] = {}
    max_chunk: Natural = MAX_CHUNK_BYTES
    problem: Text = ""
    """Why this device cannot train now, if it can't (agent does not start, a broken GPU, ...)."""
    driver: Text = ""
    """Version of the GPU driver, and of CUDA that it serves."""
    jetpack: Text = ""
    """Of a Jetson: JetPack and L4T."""
    sandbox: Literal["", "full", "degraded"] = ""
    """What confines the daemon: its unit as shipped, the unit without its device filter, or nothing that is known."""
    releases: bool = False
    """Whether this daemon knows `down/release`."""
    faulty: Annotated[dict[str, Text], Meta(max_length=64)] = {}
    """Data sets that the owner named and the agent can't read -> why. The device works on its others."""

    def __post_init__(self) -> None:
        untell(self, "cores", "flops")  # planners divide by them


class GpuLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Reading of one GPU; None: the field is not supported there. Fields at their default are not sent."""

    uuid: Text
    utilization: Finite | None = None
    memory_free: Natural | None = None
    memory_total: Natural | None = None
    temperature_c: Finite | None = None
    power_w: Finite | None = None
    """Of a Jetson: of the whole module, or of the board where it has a sensor for that."""
    energy_j: Amount | None = None
    """Since the driver was loaded."""
    clock_mhz: Natural | None = None
    memory_clock_mhz: Natural | None = None
    throttled: bool | None = None
    throttle: Annotated[list[Text], Meta(max_length=16)] = []
    """Why it is throttled: "power cap", "heat", "hardware", "hardware heat", "power brake", "over-current"."""
    power_mode: Text = ""
    """Of a Jetson, as `nvpmodel` names it."""
    xids: Annotated[list[Natural], Meta(max_length=32)] = []
    """The driver's errors (XID) since the daemon began. A lost GPU counts as 79, failed row remapping as 64."""
    fault: Text = ""
    """What is broken, in words."""
    foreign_memory: Natural | None = None
    """Bytes held by processes other than the agents."""
    foreign_utilization: Finite | None = None
    """Share of the GPU's time that processes other than the agents used since the last reading."""


class HostLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What people want to see of a machine and no planner reads; None: not told there. Defaults are not sent."""

    disk_free: Natural | None = None
    """Bytes, where the daemon keeps its state."""
    received_per_s: Amount | None = None
    """Bytes per second over all network cards since the last reading."""
    sent_per_s: Amount | None = None
    cpu_stalled: Share | None = None
    """Share of the last 10 s in which some task waited for a CPU (pressure stall information)."""
    memory_stalled: Share | None = None
    disk_stalled: Share | None = None


class Load(Message, frozen=True, kw_only=True):
    """On `up/load`, QoS 0: every 10 s idle, every 3 s while assigned, and at once after a change of over 20 %."""

    epoch: Natural
    seq: Natural
    phase: Text = "idle"
    job: Text = ""
    round: Natural = 0
    attempt: Natural = 0
    cores: Amount = 0.0
    """CPU cores usable now, by quota."""
    own_cores: Amount = 0.0
    """Cores used by the daemon and its agents since the last reading."""
    foreign_cores: Amount = 0.0
    """Cores used by anything else in the same cgroup (or on the host where there is no quota)."""
    throttled: Amount = 0.0
    """Share of the scheduler's periods in which the quota stopped us since the last reading."""
    memory_available: Natural = 0
    memory_limit: Natural = 0
    own_memory: Natural = 0
    """Resident memory of the daemon and its agents together, shared pages left out; with an integrated GPU also what
    they hold through it, as far as they told. 0: not told."""
    temperature_c: Finite | None = None
    on_battery: bool | None = None
    gpus: list[GpuLoad] = []
    paused: Text = ""
    """Reason of a pause under way."""
    host: HostLoad = HostLoad()
    hung: Annotated[dict[str, Amount], Meta(max_length=8)] = {}
    """Readers ("gpu", "host") that do not answer -> for how many seconds. There are no readings of the GPUs then; those
    of the host are the last ones."""

    def __post_init__(self) -> None:
        untell(self, "cores")  # planners divide by them


# ---- work --------------------------------------------------------------------------------------------------------


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan asks of one device in one round."""

    ranks: dict[str, int]
    """Module path -> LoRA rank, or path of a block -> width of its bottleneck adapter; 0 or absent: not tuned."""
    batch: Annotated[int, Meta(ge=1)]
    """Samples per optimizer step."""
    bits: Bits
    steps: Annotated[int, Meta(ge=1)]
    agents: Annotated[int, Meta(ge=1, le=64)] = 1
    """Agents of the device that train; each does all of the above on its own share of the rows."""
    train_for_s: Amount = 0.0
    """Seconds by the device's monotonic clock from receipt; 0: no limit."""
    extra_steps: Annotated[int, Meta(ge=0)] = 0
    """Steps beyond `steps` that the device goes on for while `train_for_s` is not over."""
    score: bool = False
    """Whether the device tells `UpdateFacts.importance`."""
    prune: Pruning | None = None
    """None: the model stays whole."""
    split: SplitSpec | None = None
    """The device runs the lower blocks alone (`shared.steps`), as many as the plan chose; None: the whole model."""
    reasons: dict[str, str] = {}
    """Name of a number above, or "depth" (blocks tuned) -> the reading, the bound it met, the number it produced."""

    @property
    def most_steps(self) -> int:
        """Steps after which the device ends in any case."""
        return self.steps + self.extra_steps

    def told_steps(self, done: int) -> int:
        """Of how many steps progress is told: those asked for, or the extra ones as well once they are done."""
        return max(self.steps, done)

    def ended(self, done: int) -> Literal["complete", "time"]:
        """How it ends where its time is over after so many steps."""
        return "complete" if done >= self.steps else "time"


class BlobRef(msgspec.Struct, frozen=True, kw_only=True):
    """A content by its digest."""

    sha: Sha
    size: Annotated[int, Meta(ge=0, le=MAX_BLOB_BYTES)]


class BaseSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where a device can fetch the base it lacks, at the bits of its work: the manifest at `url`, files under it."""

    url: Text
    sha: Sha
    """Digest of the manifest (`shared.bases`), which holds those of the files."""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """Work with all a device needs to do it."""

    job: JobName
    round: Annotated[int, Meta(ge=1)]
    attempt: Annotated[int, Meta(ge=1)]
    work: Work
    base: BaseSpec
    base_digest: Text
    """Digest over the base's files; a device whose copy differs refuses."""
    source: BaseSource | None = None
    """For devices that don't have the base and whose owner allows the host."""
    task: TaskSpec
    training: TrainingSpec
    rounds: Annotated[int, Meta(ge=1)]
    """Rounds of the whole job, for the schedule."""
    seed: Natural
    adapter: BlobRef
    """The global adapter to start from; of split work what of it lies below the cut."""
    chunk: Natural = MAX_CHUNK_BYTES


class Assign(Message, frozen=True, kw_only=True):
    """Retained on `down/assign`: the desired state of one device. No assignment: stop what you do."""

    term: Natural = 0
    """The coordinator's term; a lower one than the highest seen is an old coordinator."""
    assignment: Assignment | None = None
    reason: Text = ""


class Ack(Message, frozen=True, kw_only=True):
    """On `up/ack`: a device's answer to its assignment."""

    epoch: Natural
    job: JobName
    round: Natural
    attempt: Natural
    verdict: Literal["accept", "reject", "failed"]
    reason: Text = ""
    out_of_memory: bool = False
    """Whether this answer was given because memory ran out."""
    batch_limit: Natural = 0
    """Largest batch that fits, where memory ran out; 0: none did."""


class Progress(Message, frozen=True, kw_only=True):
    """On `up/progress`, QoS 0."""

    epoch: Natural
    job: JobName
    round: Natural
    attempt: Natural
    step: Natural
    steps: Natural
    samples: Natural
    loss: Finite
    samples_per_s: Amount


class UpdateFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What training the update cost and gave, as the device measured it."""

    samples: Natural
    """Of all its agents together; the other figures are an agent's, of the slowest where they differ."""
    steps: Natural
    batch: Natural
    """The batch really used; below the assigned one after out of memory."""
    agents: Annotated[int, Meta(ge=1, le=64)] = 1
    """Agents whose work is in the update."""
    batch_limit: Natural = 0
    bits: Bits
    loss_first: Finite
    loss_last: Finite
    step_s: Amount
    """Median seconds per optimizer step, pauses excluded."""
    train_s: Amount
    """Seconds from the first to the last step, pauses excluded."""
    load_s: Amount = 0.0
    """Seconds to load the base and data; 0: they stayed loaded."""
    paused_s: Amount = 0.0
    fetch_s: Amount = 0.0
    peak_bytes: Natural = 0
    """Highest resident (CPU) or allocated (CUDA) memory of the agent in this round."""
    base_bytes: Natural = 0
    """Memory of the agent with the base loaded, before the first step."""
    cores_used: Amount = 0.0
    """Mean cores the agent used while training."""
    wait_s: Amount = 0.0
    """Split: mean seconds per step from features sent to gradient held; `step_s` then is its own compute alone."""
    ended: Literal["complete", "time", "drain"] = "complete"
    norm: Amount = 0.0
    """Euclidean norm of all tensors of the update."""
    importance: Annotated[dict[str, Share], Meta(max_length=4096)] = {}
    """Tuned module -> its share of what all matter to the loss, sum 1; by `Work.score`; {}: nothing was observed."""
    change: Amount = 0.0
    """Of work that prunes: Euclidean norm of what the update changes in the weights, whatever its rank."""
    kept: UnitBits = {}
    """Units that are left; {}: the model is whole. What they matter to the loss lies in the update."""
    requantized: Amount = 0.0
    """At 8 and 4 bits: relative error that quantizing the smaller layers anew adds to their weights."""

    def __post_init__(self) -> None:
        untell(self, "step_s", "train_s", "fetch_s", "cores_used", "wait_s")  # planners divide by them


# ---- blobs -------------------------------------------------------------------------------------------------------


class Manifest(Message, frozen=True, kw_only=True, tag="manifest"):
    """Sender -> receiver: this blob is here for you. Nothing is sent before a `Want`."""

    sha: Sha
    size: Annotated[int, Meta(ge=0, le=MAX_BLOB_BYTES)]
    chunk: Annotated[int, Meta(ge=1, le=1024 * 1024)]
    kind: Literal["update"]
    job: JobName
    round: Natural
    attempt: Natural
    facts: UpdateFacts


class Want(Message, frozen=True, kw_only=True, tag="want"):
    """Receiver -> sender: send these chunks, each `[first, count]` in units of `chunk` bytes."""

    sha: Sha
    chunk: Annotated[int, Meta(ge=1, le=1024 * 1024)]
    ranges: Annotated[list[tuple[Natural, Annotated[int, Meta(ge=1)]]], Meta(max_length=1024)]


class Done(Message, frozen=True, kw_only=True, tag="done"):
    """Receiver -> sender: forget this blob. `stored`: it is on my disk and counts; else the reason."""

    sha: Sha
    verdict: Literal["stored", "refused", "late"]
    reason: Text = ""


class Missing(Message, frozen=True, kw_only=True, tag="missing"):
    """Sender -> receiver: a wanted blob is not here (any more)."""

    sha: Sha
    reason: Text = ""


BlobMessage = Manifest | Want | Done | Missing

# ---- coordinator -------------------------------------------------------------------------------------------------


class Command(Message, frozen=True, kw_only=True):
    """On `down/cmd`: ask a device for something at once. `deliver`: what it has done of this work, a step at least."""

    kind: Literal["rebirth", "deliver"]
    reason: Text = ""
    job: Text = ""
    round: Natural = 0
    attempt: Natural = 0


class RoundInfo(Message, frozen=True, kw_only=True):
    """Retained on `fleet/round`: what the fleet works on, for anyone who watches."""

    job: Text
    round: Natural
    phase: Text
    base_digest: Text = ""
    adapter: Text = ""


class CoordState(Message, frozen=True, kw_only=True):
    """Retained on `coord/{coordinator}/state`, and its will. Devices hold their uploads while it is offline."""

    online: bool
    term: Natural
    ts: Amount = 0.0
