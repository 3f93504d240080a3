"""Devices without a base model: the coordinator quantizes it once per bit width, they fetch it and train."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.core import records as rec
from muster.testbed.fleet import DeviceSpec, Fleet
from shared import bases
from tests.live.rig import LABELS, ended, records_of, wait_for, wait_until_heard, write_texts
from tests.training.tiny_models import make_bert

JOB = """
name = "texts"
[base]
model = "tiny"
[task]
kind = "classification"
dataset = "texts"
labels = [{labels}]
max_tokens = 16
[rounds]
count = 2
min_devices = 2
local_steps = 2
deadline_s = 60
[strategy]
rank = 2
bits = {bits}
[evaluation]
data = "{held_out}"
"""


CALM = {"policy": {"foreign_limit": 1000.0}}
"""The machine may be busy with other tests."""


def test_devices_fetch_the_base_that_they_lack(tmp_path: Path) -> None:
    base = make_bert(tmp_path / "base")
    data = {"texts": write_texts(tmp_path / "train.jsonl", 40, 1)}
    held_out = write_texts(tmp_path / "test.jsonl", 10, 2)
    devices = [DeviceSpec(f"edge-0{number}", data=data, settings=CALM) for number in (1, 2)]
    with Fleet(tmp_path / "fleet", devices, {"tiny": base}, serve=True) as fleet:
        wait_until_heard(fleet)
        text = JOB.format(labels=", ".join(f'"{label}"' for label in LABELS), held_out=held_out, bits='"auto"')
        job = fleet.client.submit(text).id
        view = wait_for(fleet, job, ended, seconds=120)
        assert view.state == "finished", view.reason
        records = records_of(fleet, job)
        admitted = [record for record in records if isinstance(record, rec.UpdateAdmitted)]
        assert sorted((one.round, one.device) for one in admitted) == [
            (1, "edge-01"), (1, "edge-02"), (2, "edge-01"), (2, "edge-02")
        ]  # fmt: skip
        packed = sorted((fleet.folder / "coordinator" / bases.FOLDER).iterdir())
        manifests = {found.bits: found for folder in packed if (found := bases.read(folder))}
        assert sorted(manifests) == [4, 8, 16, 32]
        for device in fleet.edges:
            (folder,) = (fleet.folder / device / bases.FOLDER).glob("[!.]*")
            assert bases.read(folder) == manifests[32]


@pytest.mark.slow
def test_a_device_whose_owner_lists_no_host_says_so(tmp_path: Path) -> None:
    base = make_bert(tmp_path / "base")
    data = {"texts": write_texts(tmp_path / "train.jsonl", 40, 1)}
    held_out = write_texts(tmp_path / "test.jsonl", 10, 2)
    closed = DeviceSpec("edge-02", data=data, settings={"policy": {**CALM["policy"], "base_hosts": []}})
    with Fleet(
        tmp_path / "fleet", [DeviceSpec("edge-01", data=data, settings=CALM), closed], {"tiny": base}, serve=True
    ) as fleet:  # fmt: skip
        wait_until_heard(fleet)
        text = JOB.format(labels=", ".join(f'"{label}"' for label in LABELS), held_out=held_out, bits=8)
        view = wait_for(fleet, fleet.client.submit(text).id, ended, seconds=120)
        assert view.state == "finished"
        told = [record for record in records_of(fleet, view.id) if isinstance(record, rec.DeviceAnswered)]
        refused = {record.device: record.reason for record in told if record.reason}
        assert set(refused) == {"edge-02"} and "policy.base_hosts" in refused["edge-02"]
