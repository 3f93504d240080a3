"""Recorded telemetry as the load and the links of virtual devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.web.views import DeviceView, JobView, ParticipantView, RoundView
from muster.testbed.device_model import Foreign
from muster.testbed.replay import Reading, Recorder, Replay, read
from shared.errors import UserError
from shared.messages import Load, UpdateFacts, Work

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


def test_what_is_recorded_can_be_replayed(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.note([_view(1, 0.5), DeviceView(device="edge-02", state="init", age_s=0.0)], 0.0)
    recorder.note([_view(1, 0.5)], 0.5)
    recorder.note([_view(2, 1.0)], 3.0)
    facts = UpdateFacts(
        samples=1, steps=1, batch=1, bits=16, loss_first=1.0, loss_last=1.0, step_s=1.0, train_s=1.0, fetch_s=2.0
    )
    part = ParticipantView(
        device="edge-01", work=Work(ranks={}, batch=1, bits=16, steps=1), facts=facts, adapter_bytes=200_000
    )
    recorder.links(
        JobView(
            id="j", name="j", state="finished", rounds=[RoundView(round=1, phase="committed", participants=[part])]
        ),
        {1: 4.0},
    )
    recorder.write(tmp_path / "telemetry.jsonl")
    assert len((tmp_path / "telemetry.jsonl").read_text().splitlines()) == 3
    replay = read(tmp_path / "telemetry.jsonl", ["sim-1"])
    assert replay.foreign("sim-1", 1.0) == Foreign(0.25, 0.1)
    assert replay.foreign("sim-1", 4.5).share == 0.5
    assert replay.bandwidth("sim-1", 1.0) == 100_000.0


def test_a_link_is_noted_with_the_load_of_its_time(tmp_path: Path) -> None:
    recorder = Recorder()
    for seq, (foreign, at) in enumerate(((0.0, 0.0), (0.5, 5.0), (1.0, 15.0))):
        recorder.note([_view(seq, foreign)], at)
    facts = UpdateFacts(
        samples=1, steps=1, batch=1, bits=16, loss_first=1.0, loss_last=1.0, step_s=1.0, train_s=1.0, fetch_s=2.0
    )
    work = Work(ranks={}, batch=1, bits=16, steps=1)
    part = ParticipantView(device="edge-01", work=work, facts=facts, adapter_bytes=200_000)
    rounds = [RoundView(round=number, phase="committed", participants=[part]) for number in (1, 2, 3)]
    recorder.links(JobView(id="j", name="j", state="finished", rounds=rounds), {1: 2.0, 2: 10.0, 3: 20.0})
    recorder.write(tmp_path / "telemetry.jsonl")
    replay = read(tmp_path / "telemetry.jsonl", ["sim-1"])
    assert [replay.foreign("sim-1", now).share for now in (3.0, 6.0, 11.0, 16.0)] == [0.0, 0.25, 0.25, 0.5]


@pytest.mark.parametrize("content", ["", "no json\n", '{"device": 3}\n'])
def test_a_recording_that_is_none_is_the_operators_fault(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recording"
    path.write_text(content)
    with pytest.raises(UserError, match="--replay"):
        read(path, ["a"])
    with pytest.raises(UserError, match="can't be read"):
        read(tmp_path / "nothing", ["a"])
