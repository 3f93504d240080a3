"""`muster simulate` with split learning: the real agents and the real top worker on the virtual clock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muster.testbed import device_model as dm
from muster.testbed.simulate import Simulation, carry_out
from tests.training.simulate_rig import tiny_simulation, tiny_stories

OVER: dict[str, Any] = {"strategy": {"bits": 32, "split": {"block": 1}}}


def _silent(_line: str) -> None:
    pass


@pytest.fixture
def asked(tmp_path: Path, bert: Path) -> Simulation:
    return replace(tiny_simulation(tmp_path, bert), strategy="mergesfl", profile="jetson-roomy", over=OVER)


def test_devices_and_the_top_worker_teach_a_model_and_equal_seeds_give_equal_bytes(
    asked: Simulation, tmp_path: Path
) -> None:
    one = carry_out(asked, tell=_silent)
    assert one.result.state == "finished" and len(one.result.rounds) == 2
    for round in one.result.rounds:
        done = [part for part in round.devices if part.status == "done"]
        assert len(done) == 3 and all(part.steps == 3 for part in done)
        for part in done:
            assert 0 < part.trained_s < part.own_s <= round.seconds
            assert part.peak > 0 and part.predicted_peak > 0 and part.params > 0
    losses = [round.loss for round in one.result.rounds]
    assert one.result.baseline is not None and losses[-1] is not None and losses[-1] < one.result.baseline.loss
    two = carry_out(replace(asked, workers=2, out=tmp_path / "two"), tell=_silent)
    assert (one.out / "result.json").read_bytes() == (two.out / "result.json").read_bytes()


@pytest.mark.parametrize("strategy", ["splitfed", "adasfl", "mergesfl-uniform", "mergesfl-random"])
def test_so_do_its_rivals(asked: Simulation, strategy: str) -> None:
    done = carry_out(replace(asked, strategy=strategy, rounds=1), tell=_silent)
    assert done.result.state == "finished"
    assert [part.status for part in done.result.rounds[0].devices] == ["done"] * 3


@pytest.mark.parametrize(("below", "above"), [("lora", "full"), ("full", "lora"), ("full", "full")])
@pytest.mark.parametrize("task", ["colours", "stories"])
def test_each_side_may_be_tuned_in_its_own_way(
    asked: Simulation, below: str, above: str, task: str, tmp_path: Path, gpt2: Path
) -> None:
    """GPT-2's token table is its output matrix, too: no side trains it."""
    over = {"strategy": {"bits": 32, "split": {"block": 1, "tuning": below, "top_tuning": above}}}
    if task == "stories":
        asked = replace(tiny_stories(tmp_path, gpt2), strategy="mergesfl", profile="jetson-roomy")
    done = carry_out(replace(asked, over=over), tell=_silent)
    assert done.result.state == "finished" and done.result.baseline is not None
    assert [part.status for part in done.result.rounds[-1].devices] == ["done"] * 3
    losses = [round.loss for round in done.result.rounds]
    assert losses[-1] is not None and losses[-1] < done.result.baseline.loss
    params = {part.params for round in done.result.rounds for part in round.devices}
    assert len(params) == 1 and (params.pop() > 4000) == (below == "full")


def test_devices_that_crash_in_the_middle_of_a_round_are_gone_on_without(
    asked: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dm, "UP_S", 25.0)
    monkeypatch.setattr(dm, "DOWN_S", 5.0)
    over = {"rounds": {"local_steps": 60}, "strategy": {"split": {"block": 1, "step_s": 2.0}}}
    restless = replace(asked, profile="jetson", rounds=3, over=over)
    one = carry_out(restless, tell=_silent)
    assert one.result.state == "finished"
    first = [at for at, _, what in one.result.happened if what == "crash"]
    begun = one.result.rounds[0].at - one.result.rounds[0].seconds
    assert any(begun < at < one.result.rounds[-1].at for at in first)
    statuses = [part.status for round in one.result.rounds for part in round.devices]
    assert "done" in statuses and set(statuses) > {"done"}
    two = carry_out(replace(restless, out=tmp_path / "two"), tell=_silent)
    assert (one.out / "result.json").read_bytes() == (two.out / "result.json").read_bytes()
