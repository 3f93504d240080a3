"""Memory that runs out under a real limit: the kernel kills the agent, the daemon goes on with less, plans remember."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coordinator.core import records as rec
from coordinator.web.views import ParticipantView
from muster.testbed import least_squares, profiles
from muster.testbed.fleet import AGENTS, DeviceSpec, Fleet
from muster.testbed.models import minilm_folder
from tests.live.rig import LABELS, ended, parts_of, plans_of, records_of, wait_for, wait_until_heard, write_texts

MIB = 2**20
SMALL, LARGE = "edge-01", "edge-02"
DAEMON_BYTES = 64 * MIB
SETTINGS = {"policy": {"foreign_limit": 100.0}, "telemetry": {"idle_s": 1.0, "busy_s": 1.0}}
SQUARES = """
name = "squares"
[base]
model = "12x6"
[task]
kind = "least_squares"
dataset = "points"
[rounds]
count = {rounds}
min_devices = 1
quorum = 0.5
local_steps = 4
deadline_s = 60
[strategy]
rank = 3
batch = 8
batch_min = 1
batch_max = 8
[training]
lr = 0.05
"""
TEXTS = """
name = "texts"
[base]
model = "minilm"
[task]
kind = "classification"
dataset = "texts"
labels = [{labels}]
max_tokens = 64
[rounds]
count = 2
local_steps = 1
deadline_s = 150
[strategy]
rank = 2
batch = 32
batch_min = 2
batch_max = 32
bits = 32
"""


def _small_and_large(folder: Path, sample_bytes: int, spare: int) -> Fleet:
    """Two devices; the first has `spare` bytes beyond daemon and agent, and needs `sample_bytes` per sample."""
    specs = []
    for seed, name in enumerate((SMALL, LARGE)):
        path = folder / f"{name}.jsonl"
        least_squares.write_rows(path, least_squares.make_rows("12x6", 64, seed=seed))
        # A quota: what else this machine does must not move the plans.
        specs.append(DeviceSpec(name, 0.5, data={"points": path}, settings=SETTINGS))
    limit = profiles.measure_agent(AGENTS["numpy"], {"points": str(specs[0].data["points"])}) + DAEMON_BYTES + spare
    hungry = ["/usr/bin/env", f"MUSTER_TEST_SAMPLE_BYTES={sample_bytes}", *AGENTS["numpy"]]
    settings = {**SETTINGS, "agent": {"command": hungry}}
    specs[0] = DeviceSpec(SMALL, 0.5, memory_bytes=limit, data=specs[0].data, settings=settings)
    return Fleet(folder / "fleet", specs, {"12x6": "12x6"}, agent="numpy", coordinator={"waits": {"gather_s": 0.3}})


@pytest.mark.cgroup
@pytest.mark.timeout(120)
def test_the_batch_is_halved_until_it_fits_and_the_next_plan_knows(tmp_path: Path) -> None:
    sample = 48 * MIB
    # Room for a batch of four, and half of what eight need beyond that.
    with _small_and_large(tmp_path, sample, spare=6 * sample) as fleet:
        wait_until_heard(fleet)
        daemon = fleet.edges[SMALL].pid
        job = fleet.client.submit(SQUARES.format(rounds=3)).id
        view = wait_for(fleet, job, ended, seconds=90)
        assert fleet.edges[SMALL].pid == daemon, "the daemon died too"
        log = fleet.edges[SMALL].log.read_text(encoding="utf-8")
    assert view.state == "finished", view.reason
    first, *later = parts_of(view, SMALL)
    assert first.work.batch == 8, "the planner can't know yet"
    _check_halved(first)
    assert first.facts is not None
    assert first.facts.batch_limit == 4
    assert "out of memory with a batch of 8: again with 4" in log
    assert len(later) == 2
    assert all(part.work.batch <= 4 and part.status == "done" for part in later)
    assert any("5 ran out of memory before (limit 4)" in part.work.reasons["batch"] for part in later), [
        part.work.reasons["batch"] for part in later
    ]
    assert log.count("out of memory with a batch") == 1, "it ran out again"


@pytest.mark.cgroup
@pytest.mark.timeout(120)
def test_not_even_one_sample_fits(tmp_path: Path) -> None:
    """The round goes on without the device; then it gets fewer bits, then no work, each time with the reason."""
    with _small_and_large(tmp_path, 256 * MIB, spare=96 * MIB) as fleet:
        wait_until_heard(fleet)
        daemon = fleet.edges[SMALL].pid
        job = fleet.client.submit(SQUARES.format(rounds=3)).id
        view = wait_for(fleet, job, ended, seconds=100)
        assert fleet.edges[SMALL].pid == daemon, "the daemon died too"
    assert view.state == "finished", view.reason
    answers = [r for r in records_of(fleet, job) if isinstance(r, rec.DeviceAnswered)]
    assert [(r.round, r.device, r.verdict) for r in answers] == [(1, SMALL, "failed"), (2, SMALL, "failed")]
    assert all(r.out_of_memory and "not even a batch of one fits" in r.reason for r in answers)
    closed = [r.devices for r in records_of(fleet, job) if isinstance(r, rec.RoundClosed)]
    assert closed == [[LARGE]] * 3, "the others went on"
    plans = plans_of(fleet, job)
    assert [plan.participants[SMALL].bits for plan in plans if SMALL in plan.participants] == [32, 16]
    assert "32 bits ran out of memory above batch 0" in plans[1].participants[SMALL].reasons["bits"]
    assert "16 bits ran out of memory above batch 0" in plans[2].left_out[SMALL]


@pytest.mark.cgroup
@pytest.mark.timeout(240)
def test_the_real_agent_is_killed_and_goes_on_with_less(tmp_path: Path) -> None:
    """The memory shrinks after the plan was made: a batch of 32 that was promised room no longer has it."""
    path = write_texts(tmp_path / "texts.jsonl", 64, 1, words=120)
    size = profiles.measure_agent(AGENTS["torch"], {"texts": str(path)})
    spec = DeviceSpec(SMALL, 1.0, data={"texts": path}, settings=SETTINGS)
    text = TEXTS.format(labels=", ".join(f'"{label}"' for label in LABELS))
    with Fleet(tmp_path / "fleet", [spec], {"minilm": minilm_folder()}) as fleet:
        wait_until_heard(fleet)
        daemon = fleet.edges[SMALL].pid
        job = fleet.client.submit(text).id
        wait_for(fleet, job, lambda view: view.state == "open", seconds=60)
        fleet.edges[SMALL].group.set_memory(size + DAEMON_BYTES + 500 * MIB)
        view = wait_for(fleet, job, ended, seconds=180)
        assert fleet.edges[SMALL].pid == daemon, "the daemon died too"
    assert view.state == "finished", view.reason
    first, second = parts_of(view, SMALL)
    assert first.work.batch == 32
    _check_halved(first)
    assert first.facts is not None
    assert second.work.batch <= first.facts.batch_limit
    # Either the limit that was met stops the next larger batch, or the peak that was measured beneath it does.
    assert re.search(
        r"ran out of memory before \(limit \d+\)|would take \d+ MiB of \d+ MiB memory", second.work.reasons["batch"]
    ), second.work.reasons["batch"]
    assert second.facts is not None
    assert second.facts.batch == second.work.batch, "and that fits"


def _check_halved(part: ParticipantView) -> None:
    """The update tells the limit that was met, and was trained at it."""
    assert part.status == "done", part.reason
    assert part.facts is not None
    assert 1 <= part.facts.batch_limit < part.work.batch
    assert part.facts.batch == part.facts.batch_limit
