"""The owner's policy: every refusal names the reading and the limit it met."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge_daemon.core import policy
from edge_daemon.core.state import Capability
from edge_daemon.settings import AgentSettings, PolicySettings
from shared.jobs import BaseSpec, TaskSpec
from shared.messages import BaseSource, DatasetFacts, GpuLoad, Load
from tests.unit.session_rig import GIB, SETTINGS, assignment, load

NOON = 12 * 60
ABLE = Capability(bits=(16, 32), datasets={"points": DatasetFacts(rows=10)})
CAUSAL = TaskSpec(kind="causal", dataset="points")


def _refusal(
    owner: PolicySettings | None = None, *, capability: Capability = ABLE, reading: Load | None = None,
    minute: int = NOON, disk_free: int = 10 * GIB, **changes: Any,
) -> str:  # fmt: skip
    settings = msgspec.structs.replace(SETTINGS, policy=owner or PolicySettings())
    return policy.refusal(settings, capability, assignment(**changes), reading, minute=minute, disk_free=disk_free)


def _pause(owner: PolicySettings | None = None, *, paused: bool = False, minute: int = NOON, **reading: Any) -> str:
    settings = msgspec.structs.replace(SETTINGS, policy=owner or PolicySettings())
    return policy.pause(settings, load(**reading), minute=minute, paused=paused)


def test_a_calm_device_takes_work() -> None:
    assert _refusal(reading=load()) == ""
    assert _refusal() == ""
    assert _pause() == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capability": Capability(problem="the agent does not start: x")}, ["does not start"]),
        ({"capability": Capability(bits=(32,), notes={"points": "no such file"})}, ["points", "no such file"]),
        ({"task": TaskSpec(kind="least_squares", dataset="secrets")}, ["secrets", "[data]"]),
        ({"base": BaseSpec(model="big"), "task": CAUSAL}, ["big", "[models]", "policy.hub"]),
        ({"capability": Capability(bits=(16,), datasets=ABLE.datasets)}, ["bits: 32", "16"]),
        ({"owner": PolicySettings(hours=["22:00-06:00"])}, ["12:00", "22:00-06:00"]),
        ({"disk_free": 100 * 1024 * 1024}, ["disk", "100 MiB", "512 MiB"]),
        ({"owner": PolicySettings(memory_reserve_bytes=2 * GIB), "reading": load()}, ["memory", "1024", "2048"]),
        ({"reading": load(temperature_c=99.0)}, ["heat", "99", "95"]),
        ({"reading": load(gpus=[GpuLoad(uuid="g", temperature_c=98.0)])}, ["heat", "98"]),
        ({"reading": load(on_battery=True)}, ["battery"]),
    ],
)
def test_a_refusal_names_the_reading_and_its_limit(changes: dict[str, Any], words: list[str]) -> None:
    reason = _refusal(**changes)
    assert all(word in reason for word in words), reason


def test_foreign_load_is_no_reason_to_refuse_a_round() -> None:
    busy = load(foreign_cores=4.0)
    assert _refusal(reading=busy) == ""
    assert _pause(foreign_cores=4.0).startswith("foreign load")


def test_an_owner_may_allow_battery_and_the_hub() -> None:
    assert _refusal(PolicySettings(on_battery=True), reading=load(on_battery=True)) == ""
    assert _refusal(PolicySettings(hub=True), base=BaseSpec(model="maker/big"), task=CAUSAL) == ""
    assert "hub id" in _refusal(PolicySettings(hub=True), base=BaseSpec(model="/srv/secret"), task=CAUSAL)


@pytest.mark.parametrize(
    ("reading", "paused", "rests"),
    [
        ({"foreign_cores": 3.5}, False, False),
        ({"foreign_cores": 3.7}, False, True),
        ({"foreign_cores": 3.5}, True, True),
        ({"foreign_cores": 2.8}, True, False),
        ({"temperature_c": 94.0}, False, False),
        ({"temperature_c": 94.0}, True, True),
        ({"temperature_c": 89.0}, True, False),
        ({"cores": 0.0, "foreign_cores": 1.0}, False, False),
    ],
)
def test_a_pause_ends_well_below_the_limit_that_began_it(reading: dict[str, float], paused: bool, rests: bool) -> None:
    assert bool(_pause(paused=paused, **reading)) == rests


def test_training_rests_outside_the_owners_hours() -> None:
    owner = PolicySettings(hours=["22:00-06:00", "12:30-13:00"])
    assert "hours" in _pause(owner, minute=NOON)
    assert _pause(owner, minute=23 * 60) == ""
    assert _pause(owner, minute=5 * 60 + 59) == ""
    assert "hours" in _pause(owner, minute=6 * 60)
    assert _pause(owner, minute=NOON + 45) == ""


@pytest.mark.parametrize(
    ("span", "good"),
    [("22:00-06:00", True), ("00:00-24:00", True), ("08:60-09:00", False), ("25:00-26:00", False)],
)
def test_spans_are_checked_when_the_settings_are_read(span: str, good: bool) -> None:
    settings = msgspec.structs.replace(SETTINGS, policy=PolicySettings(hours=[span]))
    assert (policy.faults(settings) == []) == good


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ([], ""),
        (["cpu", "cpu"], ""),
        (["GPU-1", "GPU-2"], ""),
        (["cpu", "GPU-1"], "does not go together"),
        (["GPU-1", "GPU-1"], "'GPU-1' is listed twice"),
    ],
)
def test_listed_gpus_are_checked_when_the_settings_are_read(gpus: list[str], words: str) -> None:
    found = policy.faults(msgspec.structs.replace(SETTINGS, agent=AgentSettings(gpus=gpus)))
    assert [words in fault for fault in found] == ([True] if words else [])


def test_the_foreign_load_of_one_gpu_pauses() -> None:
    gpus = [GpuLoad(uuid="GPU-1"), GpuLoad(uuid="GPU-2", foreign_utilization=0.95)]
    assert _pause(gpus=gpus) == "foreign load: other programs use 95% of GPU-2, the limit is 90%"
    calm = [GpuLoad(uuid="GPU-1", utilization=1.0, foreign_utilization=0.75)]
    assert _pause(gpus=calm) == "", "our own load is no reason"
    assert "75% of GPU-1" in _pause(gpus=calm, paused=True)


def test_entries_that_could_never_match_are_faults() -> None:
    owner = PolicySettings(base_hosts=["coord", "coord.example:8470", "https://coord", "coord/x", "[::1]", ""])
    wrong = policy.faults(msgspec.structs.replace(SETTINGS, policy=owner))
    assert [fault.split("'")[1] for fault in wrong] == ["https://coord", "coord/x", "[::1]", ""]


SOURCE = BaseSource(url="https://Coord.example:8470/v1/bases/" + "0" * 64, sha="0" * 64)


@pytest.mark.parametrize("host", ["coord.example", "coord.example:8470", "COORD.EXAMPLE"])
def test_a_base_may_be_fetched_from_a_host_that_the_owner_lists(host: str) -> None:
    owner = PolicySettings(base_hosts=[host])
    assert _refusal(owner, base=BaseSpec(model="big"), task=CAUSAL, source=SOURCE) == ""
    settings = msgspec.structs.replace(SETTINGS, policy=owner)
    assert policy.base_path(settings, "big", SOURCE) == ""
    held = msgspec.structs.replace(settings, models={"big": "/srv/big"})
    assert policy.base_path(held, "big", SOURCE) == "/srv/big"


@pytest.mark.parametrize(
    "url",
    [
        "https://coord.example:8471/x", "https://other.example:8470/x", "ftp://coord.example:8470/x",
        "https://coord.example:8470@evil.example/x", "https://me@coord.example:8470/x", "https://coord.example:x/y", "",
        "file:///etc/passwd", "https://coord.example.evil:8470/",
    ],
)  # fmt: skip
def test_no_other_address_is_fetched_from(url: str) -> None:
    owner = PolicySettings(base_hosts=["coord.example:8470"])
    source = BaseSource(url=url, sha="0" * 64)
    reason = _refusal(owner, base=BaseSpec(model="big"), task=CAUSAL, source=source)
    assert "policy.base_hosts" in reason and "'big'" in reason
