"""What a round costs without training: 3 MB down and up on each of 2 devices, over real processes and mosquitto.

The test agent returns a full-size update at once and evaluation is off. A round counts from its plan to the next one's,
which is made right after the commit is on disk; fsync is on. Bytes are counted by a TCP relay on each device's link.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench_fleet import JOB, POLICY, RANK, SIDE

from coordinator.adapters.event_log import SqliteEventLog
from coordinator.core import records as rec
from muster.client import ENDED
from muster.testbed import least_squares
from muster.testbed.fleet import DeviceSpec, Fleet


def main() -> None:
    """Measure; one JSON object a figure."""
    parser = argparse.ArgumentParser(description="cost of a round without training")
    parser.add_argument("--rounds", type=int, default=36)
    parser.add_argument("--warm-up", type=int, default=5)
    options = parser.parse_args()
    os.environ["MUSTER_TEST_ECHO"] = "1"
    for secure in (False, True):
        seconds, share = measure(options.rounds, options.warm_up, secure=secure)
        name = "round.overhead_tls" if secure else "round.overhead"
        what = "assignments published to commit on disk, 3 MB x 2 devices, `fsr`, fsync on" + (
            ", TLS" if secure else ""
        )
        note = (
            f"median of {options.rounds - options.warm_up - 1} rounds, highest {max(seconds):.3f} s; "
            "same payload: Flower 10.4 s, NVFlare 2.6 s, bare MQTT 0.055 s"
        )
        print(json.dumps(_figure(name, what, statistics.median(seconds), "s", "< 0.5", note)))
        if not secure:
            what = "bytes on a device's link against download + upload, 3 MB adapters"
            note = "the worse of two links; all TCP payload in both directions, telemetry and acknowledgements included"
            print(json.dumps(_figure("round.link_bytes", what, share, "x", "<= 1.05", note)))


def measure(rounds: int, warm_up: int, *, secure: bool) -> tuple[list[float], float]:
    """(seconds of each round, bytes on the worse link over payload bytes)."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        place = Path(folder)
        least_squares.write_rows(place / "rows.jsonl", least_squares.make_rows(f"{SIDE}x{SIDE}", 2, seed=1))
        devices = [DeviceSpec(f"edge-{n}", data={"points": place / "rows.jsonl"}, settings=POLICY) for n in (1, 2)]
        # As shipped in deploy/mosquitto: the broker saves at intervals; our own disks are the truth.
        fleet = Fleet(
            place / "fleet", devices, {f"{SIDE}x{SIDE}": f"{SIDE}x{SIDE}"}, agent="numpy", secure=secure, limits=False,
            broker={"autosave_on_changes": "false", "autosave_interval": "30"}, relay=not secure,
        )  # fmt: skip
        with fleet:
            text = JOB.format(side=SIDE, rounds=rounds, devices=2, rank=RANK, aggregator="fsr")
            job = fleet.client.submit(text).id
            view = _finished(fleet, job)
            carried = {name: relay.bytes_up + relay.bytes_down for name, relay in fleet.relays.items()}
        if view != "finished":
            raise SystemExit(f"the job is {view}")
        records = SqliteEventLog(place / "fleet" / "coordinator" / "events.sqlite").of_job(job)
    plans = [record.ts for record in records if isinstance(record, rec.RoundPlanned)]
    payload = _payload(records)
    between = [after - before for before, after in zip(plans, plans[1:], strict=False)]
    return between[warm_up:], max((carried[name] / payload[name] for name in carried), default=0.0)


def _finished(fleet: Fleet, job: str) -> str:
    while True:
        view = next(one for one in fleet.client.jobs() if one.id == job)
        if view.state in ENDED or view.state == "paused":
            return view.state
        time.sleep(0.5)


def _payload(records: list[rec.AnyRecord]) -> Counter[str]:
    """Device -> bytes that had to travel: each round's global adapter to it, and its update back."""
    total, adapter = Counter[str](), 0
    for record in records:
        match record:
            case rec.JobPrepared():
                adapter = record.adapter.size
            case rec.RoundPlanned():
                total.update(dict.fromkeys(record.plan.participants, adapter))
            case rec.UpdateAdmitted():
                total[record.device] += record.blob.size
            case rec.RoundFolded():
                adapter = record.adapter.size
            case _:
                pass
    return total


def _figure(name: str, what: str, value: float, unit: str, target: str, note: str) -> dict[str, object]:
    return {"name": name, "what": what, "value": round(value, 4), "unit": unit, "target": target, "note": note}


if __name__ == "__main__":
    main()
