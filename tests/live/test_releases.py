"""A release on a fleet of real processes over TLS and the access list: MiniLM trained, tried on the canary, in use
everywhere, asked there; and a bad one, which the canary stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

pytest.importorskip("torch")
from coordinator.core.release_records import Canaries  # noqa: E402 - after the package that may be missing
from coordinator.web.release_asks import ReleaseAsk  # noqa: E402 - the same
from coordinator.web.views import ReleaseView  # noqa: E402 - the same
from muster.testbed.fleet import DeviceSpec, Fleet  # noqa: E402 - the same
from muster.testbed.models import minilm_folder  # noqa: E402 - the same
from tests.live.rig import LABELS, ended, wait_for, wait_until_heard, write_texts  # noqa: E402 - the same

JOB = """
name = "{name}"
[base]
model = "minilm"
targets = ["query", "value"]
[task]
kind = "classification"
dataset = "texts"
labels = [{labels}]
max_tokens = 24
[rounds]
count = {rounds}
min_devices = 3
local_steps = {steps}
deadline_s = 300
[strategy]
rank = 4
batch = 16
batch_min = 16
batch_max = 16
bits = 32
[training]
lr = {lr}
max_grad_norm = 0.0
"""
NAMES = ("edge-01", "edge-02", "edge-03")
PATIENCE_S = 300.0
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]  # on fleets in memory the same is part of `make test`


class Place(NamedTuple):
    """A fleet with a good job and one whose learning rate tore the model apart."""

    fleet: Fleet
    good: str
    bad: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("releases")
    held_out = write_texts(folder / "held-out.jsonl", 60, 99)
    devices = [
        DeviceSpec(
            name,
            data={"texts": write_texts(folder / f"{name}.jsonl", 160, number)},
            settings={
                "policy": {"foreign_limit": 1000.0}, "agent": {"threads": 1},
                # One has a file of rows that nobody learns from, one leaves some out, one has only what it learns from.
                "release": {
                    "edge-01": {"data": {"texts": str(held_out)}},
                    "edge-02": {"hold_out": 0.25},
                    "edge-03": {"share": 0.25},
                }[name],
            },
        )
        for number, name in enumerate(NAMES)
    ]  # fmt: skip
    with Fleet(folder / "fleet", devices, {"minilm": minilm_folder()}, secure=True) as fleet:
        wait_until_heard(fleet)
        yield Place(fleet, trained(fleet, "good", 2, 12, 0.01), trained(fleet, "bad", 1, 3, 2.0))


def trained(fleet: Fleet, name: str, rounds: int, steps: int, lr: float) -> str:
    text = JOB.format(name=name, labels=", ".join(f'"{label}"' for label in LABELS), rounds=rounds, steps=steps, lr=lr)
    job = wait_for(fleet, fleet.client.submit(text).id, ended, seconds=PATIENCE_S)
    assert job.state == "finished", job.reason
    return job.id


def seen(place: Place, name: str, met: Callable[[ReleaseView], bool]) -> ReleaseView:
    """The release once `met` says so."""
    until = time.monotonic() + PATIENCE_S
    while True:
        view = place.fleet.client.release_status(name)
        if met(view):
            return view
        assert not place.fleet.ended, place.fleet.ended
        assert time.monotonic() < until, view
        time.sleep(0.1)


def over(view: ReleaseView) -> bool:
    return view.state in ("finished", "rolled_back", "failed")


def in_use(place: Place) -> dict[str, str]:
    """Device -> what is in use on its disk."""
    links = {name: place.fleet.folder / name / "releases" / "current" for name in NAMES}
    return {name: link.resolve().name if link.is_symlink() else "" for name, link in links.items()}


def command(place: Place, *words: str) -> subprocess.CompletedProcess[str]:
    """`muster` as an operator runs it."""
    where = json.loads((place.fleet.folder / "coordinator" / "api.json").read_text())
    return subprocess.run(
        [sys.executable, "-m", "muster.cli.main", "--url", where["url"], "--token-file", where["token_file"], *words],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def classify(place: Place, device: str, *texts: str) -> subprocess.CompletedProcess[str]:
    """`muster-edge classify` as the owner of a device runs it."""
    config = place.fleet.folder / f"{device}.toml"
    return subprocess.run(
        [sys.executable, "-m", "edge_daemon.service", "classify", "--config", str(config), *texts],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_a_release_reaches_every_device_and_answers_there(place: Place) -> None:
    """The canary is killed in the middle of its trial and goes on after a restart."""
    assert "no release is in use" in classify(place, "edge-01", "the sea").stderr
    ask = ReleaseAsk(job=place.good, canaries=Canaries(devices=["edge-02"]), deadline_s=PATIENCE_S)
    name = place.fleet.client.release(ask).id
    seen(place, name, lambda view: any(one.stage == "staged" for one in view.devices) or over(view))
    canary = place.fleet.edges["edge-02"]
    canary.kill()
    assert in_use(place) == dict.fromkeys(NAMES, "")
    canary.start()
    view = seen(place, name, over)
    assert (view.state, view.reason, view.committed) == ("finished", "3 committed", 3)
    assert in_use(place) == dict.fromkeys(NAMES, name)
    rows = {one.device: (one.after.rows, one.after.trained_on) for one in view.devices if one.after is not None}
    assert rows == {"edge-01": (60, False), "edge-02": (40, False), "edge-03": (40, True)}
    for one in view.devices:
        assert one.before is not None and one.after is not None and one.after.accuracy is not None
        assert one.after.loss < one.before.loss, f"{one.device}: trained for nothing"
    for device in NAMES:
        done = classify(place, device, "the old sun over the sea and the rain", "near the old road this cold rain")
        assert done.returncode == 0, done.stderr
        assert [line.split("\t")[0] in LABELS for line in done.stdout.splitlines()] == [True, True]
        # Any program reads it: the folder names the base where it is here.
        current = place.fleet.folder / device / "releases" / "current"
        assert json.loads((current / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            minilm_folder()
        )


def test_a_bad_release_is_rolled_back_on_the_canary(place: Place) -> None:
    """Acceptance case 43: the rest is untouched, and the operator's command ends with 1."""
    before = in_use(place)
    assert set(before.values()) != {""}, "there is nothing to be worse than"
    untouched = {name: listing(place, name) for name in ("edge-01", "edge-02")}
    done = command(place, "release", place.bad, "--device", "edge-03", "--deadline", str(PATIENCE_S))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rolled back (stopped by a canary: edge-03: worse here: loss" in done.stdout
    assert in_use(place) == before
    assert {name: listing(place, name) for name in ("edge-01", "edge-02")} == untouched
    view = place.fleet.client.release_status(place.bad)
    assert [one.device for one in view.devices] == ["edge-03"]
    assert classify(place, "edge-03", "the old sea").returncode == 0


def test_an_operator_goes_back(place: Place) -> None:
    first = place.fleet.client.release_status(place.good).id
    done = command(place, "release", f"{place.good}@2", "--canary", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    second = place.fleet.client.release_status(place.good).id
    assert second != first and in_use(place) == dict.fromkeys(NAMES, second)
    done = command(place, "release", "--rollback")
    assert done.returncode == 0, done.stdout + done.stderr
    assert in_use(place) == dict.fromkeys(NAMES, first)
    listed = command(place, "release", "--list").stdout
    assert first in listed and second in listed and "rolled back" in listed


def listing(place: Place, device: str) -> list[tuple[str, int]]:
    """Every file of a device's releases, and when it was written."""
    folder = place.fleet.folder / device / "releases"
    return sorted((str(path.relative_to(folder)), path.lstat().st_mtime_ns) for path in folder.rglob("*"))
