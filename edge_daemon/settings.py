"""`edge.toml`: what the device's owner decides."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.settings import BrokerSettings, FilePath, HealthSettings, Section

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{1,62}\Z")]


class PolicySettings(Section, frozen=True, kw_only=True):
    """When this device may train; a refusal or pause names the reading that met its limit."""

    hours: list[Annotated[str, Meta(pattern=r"^\d\d:\d\d-\d\d:\d\d\Z")]] = []
    """Local times of day, such as "22:00-06:00"; empty: always."""
    foreign_limit: Annotated[float, Meta(gt=0)] = 0.9
    """Share of the device's cores, or of one of its GPUs, that other programs may use before training pauses."""
    temperature_limit_c: float = 95.0
    """Training pauses while the hottest sensor is above this."""
    memory_reserve_bytes: Annotated[int, Meta(ge=0)] = 0
    """Refuse work while less memory than this is available; with an integrated GPU while it is less than 1 GiB or 10 %
    of the memory, too."""
    disk_reserve_bytes: Annotated[int, Meta(ge=0)] = 512 * 1024 * 1024
    """Refuse work while less than this is free where `state_dir` lies."""
    on_battery: bool = False
    """Whether this device may train while it runs on battery."""
    throttled: bool = True
    """Whether this device may train while a GPU is slowed down by heat or to protect itself; a power cap, which a busy
    GPU always meets, never counts."""
    gpu_silence_s: Annotated[float, Meta(gt=0)] = 30.0
    """Take no work while the GPU driver has not answered for this long."""
    xids: list[Annotated[int, Meta(ge=1)]] = msgspec.field(default_factory=lambda: [48, 63, 64, 79, 94, 95])
    """Take no work after a GPU reported one of these errors (NVIDIA's XID numbers), until the daemon is started anew;
    work under way goes on. Empty: none."""
    share_labels: bool = False
    """Whether the label counts of the data sets may leave the device."""
    base_hosts: list[str] = []
    """Hosts ("name" or "name:port") from which base models that are not in `[models]` may be fetched."""
    hub: bool = False
    """Whether base models and the data sets of `[data]` may be loaded from the Hugging Face hub."""


class AgentSettings(Section, frozen=True, kw_only=True):
    """The training subprocess."""

    command: list[str] = msgspec.field(default_factory=lambda: [sys.executable, "-m", "edge_daemon.training.agent"])
    """The program; the daemon adds the numbers of the pipe's ends."""
    gpus: list[str] = []
    """UUIDs of the GPUs that train, one agent each, "integrated" for a Jetson's own; "cpu" (alone or repeated) is an
    agent on the CPU. Empty: all GPUs found, or one agent on the CPU where there is none."""
    threads: Annotated[int, Meta(ge=0)] = 0
    """CPU threads of all agents together; 0: the cores of the quota. Each agent gets its share, at least one."""
    silence_s: Annotated[float, Meta(gt=0)] = 180.0
    """An agent that says nothing for so long is killed and started again."""
    tries: Annotated[int, Meta(ge=1)] = 3
    """Starts of an agent for the same work before the work is reported as failed."""
    drain_s: Annotated[float, Meta(gt=0)] = 30.0
    """How long a daemon that was told to end waits for the agent to write the work that is done."""


class TelemetrySettings(Section, frozen=True, kw_only=True):
    """How often the load is read and sent."""

    idle_s: Annotated[float, Meta(gt=0)] = 10.0
    """Seconds between two readings while there is no work."""
    busy_s: Annotated[float, Meta(gt=0)] = 3.0
    """Seconds between two readings while there is work; the coordinator gives up a device after 12 s of silence."""
    change: Annotated[float, Meta(gt=0)] = 0.2
    """A change of a reading by this share is sent at once (read every second while training)."""
    budget_s: Annotated[float, Meta(gt=0)] = 2.0
    """Seconds that a reading may take, of the host and of the GPUs each; then the load is sent without it."""
    retry_s: Annotated[float, Meta(gt=0)] = 30.0
    """Seconds for which a GPU driver that is not there, or a GPU that was lost, is left alone."""
    power_mode_s: Annotated[float, Meta(gt=0)] = 60.0
    """Seconds between two questions for a Jetson's power mode (`nvpmodel -q`)."""


class EdgeHealthSettings(HealthSettings, frozen=True, kw_only=True):
    """When the daemon tells systemd that it is well. Past a bound it says nothing, and is killed and started again."""

    agent_s: Annotated[float, Meta(gt=0)] = 120.0
    """Seconds beyond `agent.silence_s` after which an agent that was killed for its silence should be gone."""


class ReleaseSettings(Section, frozen=True, kw_only=True):
    """Releases: trained models that this device is to have in use, beneath `<state_dir>/releases`."""

    accept: bool = True
    """Whether this device takes releases."""
    data: dict[str, str] = {}
    """Name of a data set -> JSONL(.gz) file of rows that are never trained on: a release must not be worse on them."""
    hold_out: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    """Where there is no such file: this share of the rows in `[data]` is left out of training from now on, always the
    same rows, and a release is judged on them. Set it before the job begins. 0: nothing is left out."""
    share: Annotated[float, Meta(gt=0, le=1)] = 0.1
    """Where there is neither: a release is judged on this share of the rows in `[data]`. They are trained on here, so
    it looks better than it is; `muster release --status` says so."""
    rows: Annotated[int, Meta(ge=1)] = 512
    """Rows that a release is judged on at most: the device trains nothing meanwhile."""
    keep: Annotated[int, Meta(ge=1)] = 2
    """Releases before the one in use whose files stay, to go back to without a transfer."""


class EdgeSettings(Section, frozen=True, kw_only=True):
    """All of `edge.toml`."""

    fleet: Name
    """The fleet this device belongs to."""
    device: Name
    """Id of this device, unique in its fleet."""
    state_dir: FilePath = "/var/lib/muster"
    """Folder for models, adapters, checkpoints and updates not yet taken."""
    broker: BrokerSettings = BrokerSettings()
    data: dict[str, FilePath] = {}
    """Name of a data set -> JSONL(.gz) file, or with `policy.hub` a hub id ("id" or "id:split")."""
    models: dict[str, FilePath] = {}
    """Name of a base model -> folder, or with `policy.hub` a hub id. Only these are ever loaded, with
    `policy.base_hosts` those that the coordinator serves, and with `policy.hub` any hub id that a job names."""
    policy: PolicySettings = PolicySettings()
    agent: AgentSettings = AgentSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    release: ReleaseSettings = ReleaseSettings()
    health: EdgeHealthSettings = EdgeHealthSettings()
    credit_bytes: Annotated[int, Meta(ge=1024)] = 1024 * 1024
    """Bytes of chunks that may be under way to this device at once."""
    reannounce_s: Annotated[float, Meta(gt=0)] = 5.0
    """Seconds after which a finished update is announced again while no one took it."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least that is logged."""
