"""`muster simulate` on tiny models: real rounds on virtual devices, repeatable to the byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muster.cli.main import main
from muster.testbed import device_model as dm
from muster.testbed.simulate import Session, Simulation, carry_out, load_steps, result_of
from muster.testbed.simulated import Result
from shared.errors import UserError
from shared.modeling import base_model
from tests.training.simulate_rig import tiny_simulation
from tests.training.tiny_models import COLOURS


@pytest.fixture
def asked(tmp_path: Path, bert: Path) -> Simulation:
    return tiny_simulation(tmp_path, bert)


def _silent(_line: str) -> None:
    pass


@pytest.mark.timeout(300)
def test_equal_seeds_give_equal_bytes_whatever_the_number_of_processes(asked: Simulation, tmp_path: Path) -> None:
    one = carry_out(asked, tell=_silent)
    two = carry_out(replace(asked, workers=2, out=tmp_path / "two"), tell=_silent)
    first = (one.out / "result.json").read_bytes()
    assert first == (two.out / "result.json").read_bytes()
    other = carry_out(replace(asked, seed=5, out=tmp_path / "three"), tell=_silent)
    assert first != (other.out / "result.json").read_bytes()
    _check(json.loads(first))
    report = (one.out / "report.md").read_text()
    assert "## Simulation" in report and "3 of 8 ready devices were drawn" in report
    assert (one.out / "quality.png").is_file() and (one.out / "devices.png").is_file()


def _check(result: dict[str, Any]) -> None:
    assert result["state"] == "finished" and [one["round"] for one in result["rounds"]] == [1, 2]
    for one in result["rounds"]:
        assert len(one["devices"]) == 3 and one["bytes_up"] > 0 and one["bytes_down"] > 0
        done = [part for part in one["devices"] if part["status"] == "done"]
        assert done
        for part in done:
            assert 0 < part["trained_s"] < part["own_s"] <= one["seconds"]
            assert part["steps"] == 3 and part["peak"] > 0 and part["params"] > 0 and part["predicted_peak"] > 0
        own = [part["own_s"] for part in done]
        share = sum(max(own) - each for each in own) / (len(own) * max(own))
        assert one["waiting"] == pytest.approx(share, abs=1e-5)
    carried = sum(up + down for up, down in result["bytes_by_device"].values())
    assert carried >= sum(one["bytes_up"] + one["bytes_down"] for one in result["rounds"])


def test_a_device_whose_time_is_up_delivers_what_it_has(asked: Simulation) -> None:
    # On the slowest class 3 steps take longer than this.
    limit = 2.2 * dm.StepTable(load_steps()).seconds(dm.StepWork(16, 8, 0, 1000), dm.Shape(2, 16, 16_000, 1000), 0.1)
    done = carry_out(
        replace(asked, over={"rounds": {"train_for_s": limit}, "strategy": {"batch_min": 8}}), tell=_silent
    )
    steps = [part.steps for one in done.result.rounds for part in one.devices if part.status == "done"]
    assert any(0 < count < 3 for count in steps), steps


def test_the_head_alone_is_trained(asked: Simulation) -> None:
    done = carry_out(replace(asked, strategy="head"), tell=_silent)
    parts = [part for one in done.result.rounds for part in one.devices if part.status == "done"]
    assert done.result.state == "finished" and parts
    assert {(part.rank, part.modules) for part in parts} == {(0, 0)}
    head = base_model.load(Path(asked.models[0].partition("=")[2]), COLOURS).head
    assert {part.params for part in parts} == {sum(tensor.numel() for tensor in head.values())}
    losses = [one.loss for one in done.result.rounds]
    assert done.result.baseline is not None and losses[-1] != done.result.baseline.loss
    assert "rank 0: 0 modules tuned" in (done.out / "report.md").read_text()


def test_devices_of_an_emulated_profile_train_at_their_quotas(asked: Simulation) -> None:
    # One batch for all: a planner that may choose gives faster devices more work, which is no test of quotas.
    strategy = {"bits": 32, "batch_min": 8, "batch_max": 8}
    over = {"rounds": {"sample": 0, "count": 1, "min_devices": 4}, "strategy": strategy}
    done = carry_out(replace(asked, profile="emulated-light", devices=4, over=over), tell=_silent)
    parts = {part.device: part for part in done.result.rounds[0].devices}
    assert {name: (part.kind, part.bits) for name, part in parts.items()} == {
        "edge-01": ("0.36 cores", 32), "edge-02": ("0.26 cores", 32), "edge-03": ("0.22 cores", 32),
        "edge-04": ("0.12 cores", 32),
    }  # fmt: skip
    trained = [parts[name].trained_s for name in sorted(parts)]
    assert trained == sorted(trained) and trained[3] > 1.5 * trained[0]
    assert [what for _, _, what in done.result.happened] == ["join"] * 4


def test_recorded_load_is_replayed(asked: Simulation, tmp_path: Path) -> None:
    line = {"device": "edge-01", "at": 0.0, "cores": 4.0, "foreign_cores": 2.0, "bandwidth": 1e5}
    path = tmp_path / "telemetry.jsonl"
    path.write_text(json.dumps(line) + "\n")
    done = carry_out(replace(asked, replay=path, rounds=1, out=tmp_path / "replayed"), tell=_silent)
    assert done.result.state == "finished"
    assert "foreign 3.00 of 6.00" in (done.out / "report.md").read_text()


def test_the_recorded_fleet_is_simulated(asked: Simulation, tmp_path: Path) -> None:
    """Three machines, one of them ten times as fast and with a GPU, another half taken by others."""
    usual = {"cores": 4.0, "memory_limit": 2**31, "flops": 7e9, "bits": [4, 8, 16], "bandwidth": 1e6}
    told = [
        {**usual, "device": "bench-pc"},
        {**usual, "device": "old-pc", "foreign_cores": 2.0},
        {**usual, "device": "server", "cores": 1.0, "flops": 2.8e11, "card": True},
    ]
    path = tmp_path / "day.jsonl"
    path.write_text("".join(json.dumps({**line, "at": 0.0}) + "\n" for line in told))
    fleet = replace(asked, profile="recorded", devices=0, replay=path, rounds=2, out=tmp_path / "fleet", alpha=0.0)
    done = carry_out(replace(fleet, strategy="fedlora", over={"rounds": {"sample": 0, "min_devices": 3}}), tell=_silent)
    assert done.result.state == "finished"
    last = {part.device: part for part in done.result.rounds[-1].devices}
    assert set(last) == {"bench-pc", "old-pc", "server"}
    seconds = {name: part.trained_s for name, part in last.items()}
    assert seconds["server"] < seconds["bench-pc"] / 4 and seconds["bench-pc"] < seconds["old-pc"] / 1.3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--profile", "nothing"], "unknown profile"),
        (["--strategy", "nothing"], "strategy.name"),
        (["--data", "/nothing"], "--data /nothing"),
        (["--replay", "/nothing"], "--replay /nothing"),
        (["--profile", "recorded"], "--replay"),
        (["--job", "/nothing.toml"], "/nothing.toml"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    asked: Simulation, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--data": asked.data, "--job": str(asked.job), "--model": asked.models[0], "--out": str(tmp_path / "no")}
    given.update(zip(options[::2], options[1::2], strict=True))
    code = main(["simulate", *(word for pair in given.items() for word in pair)])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "no").exists()


def test_the_library_says_so_too(asked: Simulation) -> None:
    with pytest.raises(UserError, match="unknown profile"):
        carry_out(replace(asked, profile="nothing"), tell=_silent)


def test_runs_of_one_session_do_not_touch_each_other_and_every_start_is_charged(asked: Simulation) -> None:
    def run(name: str, session: Session) -> Result:
        roomy = replace(asked, strategy=name, profile="jetson-roomy", rounds=1, over={"strategy": {"bits": 32}})
        return result_of(roomy, session, _silent)

    with Session(0) as session:
        found = {name: run(name, session) for name in ("head", "fedadapter", "full")}
        assert run("head", session) == found["head"]
    parts = [result.rounds[0].devices for result in found.values()]
    assert all(part.status == "done" for devices in parts for part in devices)
    assert [devices[0].params for devices in parts] == sorted({devices[0].params for devices in parts})
    # Of one device at one batch: what trains more takes longer, and more memory.
    work = [{(part.device, part.batch): part for part in devices} for devices in parts]
    both = work[0].keys() & work[1].keys() & work[2].keys()
    assert both
    for key in both:
        took = [one[key].trained_s / one[key].steps for one in work]
        assert took == sorted(took) and [one[key].peak for one in work] == sorted(one[key].peak for one in work)


def test_an_interrupted_run_reports_the_rounds_so_far(asked: Simulation) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("round 1 committed"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(replace(asked, rounds=50), tell=interrupt)
    assert asked.out is not None
    result = json.loads((asked.out / "result.json").read_bytes())
    assert result["state"] == "interrupted" and [one["round"] for one in result["rounds"]] == [1]
    assert "tiny: interrupted" in (asked.out / "report.md").read_text()
    with Session(0) as session, pytest.raises(KeyboardInterrupt):
        result_of(replace(asked, rounds=50), session, interrupt)
