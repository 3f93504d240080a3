"""Recorded telemetry as the load and the links of virtual devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from coordinator.web.views import DeviceView, JobView, ParticipantView, RoundView
from muster.testbed.device_model import Foreign
from muster.testbed.replay import Reading, Recorder, Replay, lines, read
from shared.errors import UserError
from shared.messages import DeviceInfo, Gpu, GpuLoad, Load, UpdateFacts, Work

READINGS = [
    Reading(device="b", at=0.0, cores=4.0, foreign_cores=0.0),
    Reading(device="a", at=0.0, cores=2.0, foreign_cores=0.5, memory_limit=100, foreign_memory=10),
    Reading(device="a", at=9.0, cores=2.0, foreign_cores=1.0, bandwidth=500.0),
]


def test_devices_take_the_recorded_ones_in_turn() -> None:
    replay = Replay(READINGS, ["x", "y", "z"])
    assert replay.foreign("x", 3.0) == replay.foreign("z", 3.0) == Foreign(0.25, 0.1)
    assert replay.foreign("y", 3.0) == Foreign(0.0, 0.0)
    assert replay.bandwidth("x", 3.0) == 500.0
    assert replay.bandwidth("y", 3.0) is None


def test_a_reading_holds_until_the_next_and_the_recording_begins_anew() -> None:
    replay = Replay(READINGS, ["x"])
    assert [replay.foreign("x", now).share for now in (0.0, 8.9, 9.0, 9.9, 10.0, 19.5)] == [
        0.25,
        0.25,
        0.5,
        0.5,
        0.25,
        0.5,
    ]


def _view(seq: int, foreign: float) -> DeviceView:
    load = Load(
        epoch=1, seq=seq, cores=2.0, foreign_cores=foreign, memory_limit=1000, memory_available=600, own_memory=300
    )
    return DeviceView(device="edge-01", state="ready", age_s=0.0, load=load)


def _fetched(*rounds: int) -> JobView:
    """A job in whose rounds `edge-01` fetched 200 kB in 2 s."""
    facts = UpdateFacts(
        samples=1, steps=1, batch=1, bits=16, loss_first=1.0, loss_last=1.0, step_s=1.0, train_s=1.0, fetch_s=2.0
    )
    work = Work(ranks={}, batch=1, bits=16, steps=1)
    part = ParticipantView(device="edge-01", work=work, facts=facts, adapter_bytes=200_000)
    told = [RoundView(round=number, phase="committed", participants=[part]) for number in rounds]
    return JobView(id="j", name="j", state="open", rounds=told)


def test_what_is_recorded_can_be_replayed(tmp_path: Path) -> None:
    recorder = Recorder()
    told = [_view(1, 0.5), DeviceView(device="edge-02", state="init", age_s=0.0)]
    readings = recorder.note(told, 0.0) + recorder.note(told, 0.5) + recorder.note([_view(2, 1.0)], 3.0)
    readings += recorder.links(_fetched(1), 4.0)
    (tmp_path / "telemetry.jsonl").write_bytes(lines(readings))
    assert len((tmp_path / "telemetry.jsonl").read_text().splitlines()) == 3
    replay = read(tmp_path / "telemetry.jsonl", ["sim-1"])
    assert replay.foreign("sim-1", 1.0) == Foreign(0.25, 0.1)
    assert replay.foreign("sim-1", 4.5).share == 0.5
    assert replay.bandwidth("sim-1", 1.0) == 100_000.0


def _info(**told: Any) -> DeviceInfo:
    return DeviceInfo(epoch=1, cores=2.0, bits=[4, 16], flops=8e9, **told)


def test_what_a_device_is_like_is_recorded_with_its_load() -> None:
    (told,) = Recorder().note([replace(_view(1, 0.5), info=_info())], 0.0)
    assert (told.flops, told.bits, told.card, told.cores, told.memory_limit) == (8e9, [4, 16], False, 2.0, 1000)
    later = Reading(device="edge-01", at=5.0, cores=1.0)
    assert Replay([told, later], ["sim-1"]).machine("sim-1") == told, "a reading before its probe is no machine"
    assert Replay([later], ["sim-1"]).machine("sim-1") == later


@pytest.mark.parametrize("integrated", [False, True])
def test_of_a_device_with_a_gpu_the_gpu_is_recorded(integrated: bool) -> None:
    gpu = Gpu(uuid="GPU-1", memory_bytes=0 if integrated else 24_000, integrated=integrated)
    view = replace(_view(1, 0.5), info=_info(gpus=[gpu]))
    assert view.load is not None
    on_gpu = GpuLoad(uuid="GPU-1", utilization=0.9, foreign_utilization=0.25, foreign_memory=6_000)
    (told,) = Recorder().note([replace(view, load=replace(view.load, gpus=[on_gpu]))], 0.0)
    memory = (1000, 100) if integrated else (24_000, 6_000)
    assert (told.cores, told.foreign_cores, told.memory_limit, told.foreign_memory) == (1.0, 0.25, *memory)
    assert told.card != integrated, "or whoever runs out of it runs out for the whole machine"


def test_a_device_that_is_gone_tells_nothing() -> None:
    recorder = Recorder()
    for state in ("lost", "disconnected", "draining"):
        assert recorder.note([replace(_view(1, 0.5), state=state)], 0.0) == []
    assert len(recorder.note([replace(_view(1, 0.5), state="training")], 1.0)) == 1


def test_a_link_is_noted_once_with_the_load_of_its_time() -> None:
    recorder = Recorder()
    assert recorder.links(_fetched(1), 0.0) == [], "there is no load to note it with"
    readings: list[Reading] = []
    for seq, (foreign, at) in enumerate(((0.0, 1.0), (0.5, 5.0), (1.0, 15.0))):
        readings += recorder.note([_view(seq, foreign)], at)
        found = recorder.links(_fetched(*range(1, seq + 3)), at + 2.0)
        assert [(one.at, one.foreign_cores, one.bandwidth) for one in found] == [(at + 2.0, foreign, 100_000.0)]
        readings += found
    replay = Replay(readings, ["sim-1"])
    assert [replay.foreign("sim-1", now).share for now in (3.0, 6.0, 11.0, 16.0)] == [0.0, 0.25, 0.25, 0.5]


@pytest.mark.parametrize("content", ["", "no json\n", '{"device": 3}\n'])
def test_a_recording_that_is_none_is_the_operators_fault(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recording"
    path.write_text(content)
    with pytest.raises(UserError, match="--replay"):
        read(path, ["a"])
    with pytest.raises(UserError, match="can't be read"):
        read(tmp_path / "nothing", ["a"])
