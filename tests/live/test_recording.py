"""Recordings of fleets over mosquitto, by `muster devices --record` with a load on one device and by `muster emulate`;
`muster simulate` replays them."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from muster.cli.main import main
from muster.testbed import emulate, least_squares
from muster.testbed.fleet import DeviceSpec, Fleet, start_in
from muster.testbed.replay import FILE, Reading
from muster.testbed.simulate import carry_out

pytest.importorskip("torch")
from tests.live.rig import wait_until_heard  # noqa: E402 - those below need torch
from tests.training.simulate_rig import tiny_simulation  # noqa: E402
from tests.training.tiny_models import make_bert  # noqa: E402

pytestmark = [pytest.mark.cgroup, pytest.mark.slow, pytest.mark.timeout(240)]
SQUARES = """
name = "squares"
[base]
model = "16x8"
[task]
kind = "least_squares"
[rounds]
count = 2
"""
BURNER = "while True: sum(i * i for i in range(10_000))"
MUCH, LITTLE = 0.3, 0.1
"""Shares of a device's cores: what the burner takes for certain, and what is left without one."""


def foreign_share(fleet: Fleet, device: str) -> float:
    (load,) = [view.load for view in fleet.client.devices() if view.device == device]
    assert load is not None
    return load.foreign_cores / load.cores


def replayed(
    recording: Path, folder: Path, profile: str = "equal", names: tuple[str, str] = ("sim-01", "sim-02")
) -> list[set[float]]:
    """Of two virtual devices the shares of their cores that a plan of a simulation took for foreign."""
    folder = folder / profile
    folder.mkdir()
    asked = replace(tiny_simulation(folder, make_bert(folder / "tiny")), devices=2, profile=profile, rounds=1)
    over = {"rounds": {"sample": 0, "min_devices": 2}}
    done = carry_out(replace(asked, replay=recording, over=over), tell=lambda _: None)
    assert done.result.state == "finished"
    report = (done.out / "report.md").read_text(encoding="utf-8")
    told = [re.findall(rf"- {name} .*foreign ([\d.]+) of ([\d.]+)", report) for name in names]
    assert all(told), report
    return [{float(used) / float(cores) for used, cores in one} for one in told]


def test_the_load_of_a_fleet_is_that_of_a_virtual_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, file = tmp_path / "rows.jsonl", tmp_path / "fleet.jsonl"
    least_squares.write_rows(rows, least_squares.make_rows("16x8", 40, 1))
    telemetry = {"telemetry": {"idle_s": 1.0, "busy_s": 1.0}}
    specs = [DeviceSpec(name, 0.4, None, {"points": rows}, telemetry) for name in ("edge-01", "edge-02")]
    with Fleet(tmp_path / "fleet", specs, {"16x8": "16x8"}, agent="numpy") as fleet:
        wait_until_heard(fleet)
        burner = start_in(fleet.edges["edge-01"].group, [sys.executable, "-c", BURNER], tmp_path / "burner.log")
        try:
            until = time.monotonic() + 60.0
            while foreign_share(fleet, "edge-01") < MUCH or foreign_share(fleet, "edge-02") > LITTLE:
                assert time.monotonic() < until, "the load does not come"
                time.sleep(0.1)
            here = ["--config", str(fleet.folder / "coordinator.toml")]
            assert main([*here, "devices", "--record", str(file), "--for", "6"]) == 0
        finally:
            burner.kill()
            burner.wait(10)
    assert re.search(r"^recorded \d+ loads and 0 downloads of 2 devices in ", capsys.readouterr().out, re.MULTILINE)
    for profile, names in (("equal", ("sim-01", "sim-02")), ("recorded", ("edge-01", "edge-02"))):
        loaded, idle = replayed(file, tmp_path, profile, names)
        assert min(loaded) > MUCH and max(idle) < LITTLE, profile


def test_an_emulation_leaves_a_recording_that_can_be_replayed(tmp_path: Path) -> None:
    data, out = tmp_path / "points", tmp_path / "emulated"
    data.mkdir()
    for number, name in enumerate(("train", "test")):
        least_squares.write_rows(data / f"{name}.jsonl", least_squares.make_rows("16x8", 100, number))
    (tmp_path / "job.toml").write_text(SQUARES, encoding="utf-8")
    done = emulate.carry_out(
        emulate.Emulation(
            devices=2, profile="equal", data=str(data), job=tmp_path / "job.toml", agent="numpy", out=out
        )
    )  # fmt: skip
    assert done.job.state == "finished", done.job.reason
    found = [msgspec.json.decode(line, type=Reading) for line in (out / FILE).read_bytes().splitlines()]
    limits = {shape.name: (shape.cores, shape.memory_bytes) for shape in done.shapes}
    assert {(one.device, (round(one.cores, 3), one.memory_limit)) for one in found} == set(limits.items())
    recorded = [{one.foreign_cores / one.cores for one in found if one.device == name} for name in sorted(limits)]
    for told, seen in zip(replayed(out / FILE, tmp_path), recorded, strict=True):
        assert all(any(abs(share - one) < 0.01 for one in seen) for share in told), (told, seen)
