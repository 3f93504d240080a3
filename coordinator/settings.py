"""`coordinator.toml`."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.ids import LONGEST_COORDINATOR
from shared.settings import BrokerSettings, FilePath, HealthSettings, Section

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{1,62}\Z")]
Seconds = Annotated[float, Meta(gt=0)]


class ApiSettings(Section, frozen=True, kw_only=True):
    """The HTTP API: always behind a bearer token."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8470
    """0: a free port, written to `<state_dir>/api.json`."""
    token_file: FilePath = ""
    """Empty: `<state_dir>/token`, made at the first start with mode 0600."""
    public_url: str = ""
    """Where devices reach this API, such as "https://muster.example:8470". With it base models are quantized once per
    bit width and served to devices that lack them; empty: every device has its own copy. `host` must be reachable from
    there, or a proxy stand before it."""


class WaitSettings(Section, frozen=True, kw_only=True):
    """Every wait of the coordinator, in seconds."""

    silent_s: Seconds = 12.0
    """A participant that says nothing for so long is no longer waited for. A round is not repeated for one that left
    before that, and after a reconnect no will is believed earlier."""
    absent_s: Seconds = 60.0
    """A device that said nothing for so long gets no work."""
    cautious_periods: Annotated[float, Meta(gt=0)] = 3.0
    """Telemetry older than so many periods leads to a cautious assignment."""
    period_s: Seconds = 10.0
    """The devices' telemetry period while idle."""
    gather_s: Seconds = 2.0
    """After enough devices are ready, how long to wait for more before planning."""
    repeat_s: Seconds = 2.0
    """Pause before a round that failed is planned again; doubles with every failure, up to a minute."""
    patience: Annotated[float, Meta(ge=1)] = 5.0
    """Where devices keep coming and going: planned all the same after so many times `gather_s`."""
    grace_s: Seconds = 30.0
    """After a restart or an outage nothing ends by its deadline before the devices had so long to be heard again."""
    remind_s: Seconds = 10.0
    """An assignment that shows no effect is published again: a broker may drop what it acknowledged."""
    retry_s: Seconds = 5.0
    """A wanted chunk that did not come is wanted again."""
    release_s: Seconds = 1800.0
    """How long the canaries of a release, then the rest, then a rollback may take; `muster release --deadline` says
    otherwise. A device tries a release between two rounds."""
    release_look_s: Seconds = 1.0
    """Between two looks at the devices of a release, where nothing came from them."""
    release_remind_s: Seconds = 30.0
    """A desired release that shows no effect is published again."""
    worker_silence_s: Seconds = 600.0
    """A model worker that says nothing for so long is killed and started again."""


class TopSettings(Section, frozen=True, kw_only=True):
    """The top worker of split learning: its own client of the broker, named `<name>-top`."""

    certfile: FilePath = ""
    """PEM file of its certificate, where the broker asks for one."""
    keyfile: FilePath = ""
    """PEM file of the key of `certfile`."""
    command: list[str] = msgspec.field(default_factory=lambda: [sys.executable, "-m", "coordinator.workers.top_worker"])
    """The program; the coordinator adds the numbers of the pipe's ends."""


class CoordinatorSettings(Section, frozen=True, kw_only=True):
    """All of `coordinator.toml`."""

    fleet: Name
    """The fleet this coordinator works for."""
    name: Annotated[Name, Meta(max_length=LONGEST_COORDINATOR)] = "coord-1"
    """Id of this coordinator on the broker, of 59 characters at most: its top worker is `<name>-top`."""
    state_dir: FilePath = "/var/lib/muster-coordinator"
    """Folder of the event log, the blobs, the token and the exports."""
    broker: BrokerSettings = BrokerSettings(window=32, queue=4096)
    api: ApiSettings = ApiSettings()
    waits: WaitSettings = WaitSettings()
    health: HealthSettings = HealthSettings()
    models: dict[str, FilePath] = {}
    """Name of a base model -> folder or hub id: the same model, under the same name, as on the devices."""
    worker: list[str] = msgspec.field(
        default_factory=lambda: [sys.executable, "-m", "coordinator.workers.model_worker"]
    )
    """The program that loads models; the coordinator adds the numbers of the pipe's ends."""
    top: TopSettings = TopSettings()
    credit_bytes: Annotated[int, Meta(ge=1024)] = 16 * 1024 * 1024
    """Bytes of chunks that may be under way to the coordinator at once, over all devices."""
    fsync: bool = True
    """Whether every record is forced to disk before it counts; off only in tests."""
    keep_rounds: Annotated[int, Meta(ge=1)] = 3
    """Committed rounds whose updates stay in the blob store."""
    keep_releases: Annotated[int, Meta(ge=2)] = 3
    """Releases whose files stay in the blob store, for devices that come late and for rollbacks."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least that is logged."""
