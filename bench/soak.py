"""Many short rounds on four devices with the test agent over a real mosquitto: does anything grow?

RSS and file descriptors of coordinator, daemons and broker are read every few rounds. After the warm-up a straight line
through the RSS may not rise by more than 5 kB a round (and 1.5 MB in all), and descriptors may not become more.
Exit code 1, and one line that says what grew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
from bench_fleet import POLICY
from growth import RSS_PER_ROUND, SLACK, Held, grown

from muster.client import ENDED
from muster.testbed import least_squares
from muster.testbed.fleet import DeviceSpec, Fleet

SHAPE = "64x32"
DEVICES = 4
SAMPLES = 60
"""About so many are taken after the warm-up."""
JOB = """
name = "soak"
[base]
model = "{shape}"
[task]
kind = "least_squares"
dataset = "points"
[rounds]
count = {rounds}
min_devices = {devices}
quorum = 1.0
local_steps = 3
[strategy]
rank = 4
batch = 4
batch_min = 4
batch_max = 4
[training]
lr = 0.02
checkpoint_every = 2
[evaluation]
data = "{held_out}"
worse_by = 100.0
"""


def main() -> int:
    """0: nothing grew; 1: something did, or the job did not finish."""
    parser = argparse.ArgumentParser(description="many rounds on a small fleet: does anything grow?")
    parser.add_argument("--rounds", type=int, default=500)
    rounds = parser.parse_args().rounds
    if rounds < 30:
        parser.error("--rounds: a line needs 30 rounds at least")
    os.environ["MUSTER_TEST_STEP_S"] = "0.001"
    warm_up = max(10, rounds // 5)
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="muster-soak-") as folder:
        programs, state = run(Path(folder), rounds, warm_up)
    if state != "finished":
        print(f"soak: the job is {state}", file=sys.stderr)
        return 1
    for held in programs:
        print(
            f"{held.name}: {held.rss[0] / 1e6:.1f} -> {held.rss[-1] / 1e6:.1f} MB, "
            f"{held.descriptors[0]} -> {held.descriptors[-1]} descriptors, {len(held.rounds)} samples"
        )
    shape = f"{DEVICES} devices, rounds {warm_up} to {rounds}"
    for kind in ("coordinator", "edge", "broker"):
        of_kind = [held for held in programs if held.name.startswith(kind)]
        slope = max(held.slope for held in of_kind) / 1e3
        met = not any(held.swollen for held in of_kind)
        note = f"the highest line of {len(of_kind)}; a rise of less than {SLACK / 1e6:g} MB in all is no growth"
        figure(f"soak.{kind}_rss", f"{kind}: growth of RSS, {shape}", slope, "kB/round", RSS_PER_ROUND / 1e3, met, note)
    more = max(0, *(held.more_descriptors for held in programs))
    what = f"file descriptors that stay open, any program, {shape}"
    figure("soak.descriptors", what, more, "", 0, more == 0, "fewest of the last third less the most of the first")
    if line := grown(programs):
        print(f"soak: grew: {line}", file=sys.stderr)
        return 1
    return 0


def run(place: Path, rounds: int, warm_up: int) -> tuple[list[Held], str]:
    """What each program held after the warm-up, and how the job ended."""
    held_out = place / "held-out.jsonl"
    least_squares.write_rows(held_out, least_squares.make_rows(SHAPE, 16, seed=99))
    devices = []
    for number in range(1, DEVICES + 1):
        rows = place / f"{number}.jsonl"
        least_squares.write_rows(rows, least_squares.make_rows(SHAPE, 32, seed=number))
        devices.append(DeviceSpec(f"edge-{number}", data={"points": rows}, settings=POLICY))
    fleet = Fleet(
        place / "fleet", devices, {SHAPE: SHAPE}, agent="numpy", limits=False,
        coordinator={"waits": {"gather_s": 0.1}},
        broker={"autosave_on_changes": "false", "autosave_interval": "30"},
    )  # fmt: skip
    with fleet:
        pids = {"coordinator": fleet.coordinator.pid, "broker": fleet.broker.pid}
        pids |= {name: program.pid for name, program in fleet.edges.items()}
        held = {name: Held(name) for name in pids}
        text = JOB.format(shape=SHAPE, rounds=rounds, devices=DEVICES, held_out=held_out)
        state = follow(fleet, fleet.client.submit(text).id, pids, held, warm_up, max(1, (rounds - warm_up) // SAMPLES))
    return list(held.values()), state


def follow(
    fleet: Fleet, job: str, pids: Mapping[str, int], held: Mapping[str, Held], warm_up: int, every: int
) -> str:  # fmt: skip
    """Sample `every` so many rounds until the job has ended; its state then."""
    due = warm_up
    while True:
        view = next(one for one in fleet.client.jobs() if one.id == job)
        if view.round >= due:
            due = view.round + every
            for name, pid in pids.items():
                process = psutil.Process(pid)
                held[name].add(view.round, process.memory_info().rss, process.num_fds())
        if view.state in ENDED or view.state == "paused":
            return view.state
        if fleet.ended:
            return f"stuck: {fleet.ended}"
        time.sleep(0.1)


def figure(name: str, what: str, value: float, unit: str, most: float, met: bool, note: str) -> None:
    """One result, as `bench/README.md` describes it."""
    result = {"name": name, "what": what, "value": round(value, 2), "unit": unit, "target": f"<= {most:g}", "met": met}
    print(json.dumps({**result, "note": note}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
