"""`muster devices`: what an operator sees of one device or all."""

from __future__ import annotations

from typing import Any

import msgspec
from rich.console import Console

from coordinator.web.views import DeviceView, ParticipantView, RoundView
from muster.cli import device_tables, tables
from shared.messages import DatasetFacts, DeviceInfo, Gpu, GpuLoad, HostLoad, Load, UpdateFacts, Work

CARD = Gpu(
    uuid="GPU-1", name="NVIDIA L4", memory_bytes=24 * 10**9, compute="8.9", power_limit_w=72.0, clock_max_mhz=2040
)
BUSY = GpuLoad(
    uuid="GPU-1", utilization=0.97, memory_free=4 * 10**9, memory_total=24 * 10**9, temperature_c=84.0, power_w=71.6,
    energy_j=7.2e6, clock_mhz=1110, throttled=True, throttle=["power cap", "heat"], xids=[31, 94],
    fault="row remapping failed", foreign_utilization=0.25, foreign_memory=10**9,
)  # fmt: skip


def view(gpus: list[Gpu], loads: list[GpuLoad], problem: str = "", **reading: Any) -> DeviceView:
    info = DeviceInfo(
        epoch=1, hardware="a server", version="0.1.0", gpus=gpus, bits=[4, 16], driver="580.65.06, CUDA 13.0",
        jetpack="7.2 (L4T 39.2.0)", datasets={"notes": DatasetFacts(rows=7)}, problem=problem,
    )  # fmt: skip
    load = Load(epoch=1, seq=1, cores=8.0, memory_available=10**9, memory_limit=2 * 10**9, gpus=loads, **reading)
    return DeviceView(device="edge-01", state="ready", age_s=1.5, info=info, load=load, work="demo/2/1 training")


def listed(*devices: DeviceView) -> str:
    return printed(device_tables.devices(devices))


def shown(device: DeviceView) -> str:
    return printed(*device_tables.in_full(device))


def printed(*parts: Any) -> str:
    console = Console(width=250)
    with console.capture() as capture:
        console.print(*parts, sep="\n")
    return capture.get()


def test_the_list_has_a_line_for_each_gpu_with_what_is_wrong_with_it() -> None:
    calm = msgspec.structs.replace(BUSY, uuid="GPU-2", throttle=["power cap"], xids=[], fault="", utilization=0.5)
    told = listed(view([CARD], [BUSY, calm]))
    assert "97%, 84 °C, 72 W, heat, XID 31, 94: row remapping failed" in told
    assert "50%, 84 °C, 72 W " in told, "a power cap is nothing to see here"
    assert "demo/2/1 training" in told


def test_the_list_says_what_is_silent_and_what_is_the_matter() -> None:
    assert "demo/2/1 training; gpu silent for 12 s" in listed(view([CARD], [], hung={"gpu": 12.4}))
    assert "broken GPU: GPU-1; gpu silent for 12 s" in listed(
        view([CARD], [], problem="broken GPU: GPU-1", hung={"gpu": 12.4})
    )


def test_a_device_that_told_nothing_has_a_row_too() -> None:
    silent = DeviceView(device="edge-02", state="lost", age_s=90.0)
    assert "edge-02" in listed(silent)
    assert "it has not told what it is yet" in shown(silent)


def test_one_device_in_full() -> None:
    host = HostLoad(disk_free=5 * 10**9, received_per_s=1500.0, sent_per_s=200.0, cpu_stalled=0.25, memory_stalled=0.0)
    told = shown(view([CARD], [BUSY], host=host, temperature_c=61.0, paused="heat: 96 °C", hung={"host": 3.0}))
    for part in (
        "edge-01: ready, seen 2 s ago", "a server", "580.65.06, CUDA 13.0", "7.2 (L4T 39.2.0)", "4, 16",
        "notes (7 rows)", "host for 3 s", "5.00 GB", "1.5 kB/s in, 200 B/s out",
        "for CPU 25% of the time, for memory 0% of the time", "61 °C", "heat: 96 °C",
        "NVIDIA L4, GPU-1", "97%", "25%, 1.00 GB", "4.00 GB of 24.00 GB", "84 °C", "71.6 of 72 W", "2.00 kWh",
        "1110 of 2040 MHz", "power cap, heat", "XID 31, 94: row remapping failed",
    ):  # fmt: skip
        assert part in told, part
    assert "for disk" not in told, "what the kernel does not tell is not shown as 0"


def test_what_is_not_supported_is_a_dash() -> None:
    own = Gpu(uuid="integrated", name="Jetson Orin Nano", integrated=True)
    told = shown(view([own], [GpuLoad(uuid="integrated", utilization=0.5, power_w=9.0, power_mode="15W")]))
    row = next(line for line in told.splitlines() if line.startswith("Jetson Orin Nano"))
    assert "Jetson Orin Nano, integrated, mode 15W" in row
    cells = row[row.index("50%") :].split()
    assert cells == ["50%", "-", "shared", "-", "9.0", "W", "-", "-", "-", "-", "none"]


def test_a_gpu_that_gives_no_reading_is_still_there() -> None:
    told = shown(view([CARD], [], hung={"gpu": 40.0}))
    assert "NVIDIA L4, GPU-1" in told and "gpu for 40 s" in told


def test_a_data_set_that_can_not_be_read_is_shown_with_the_reason() -> None:
    device = view([], [])
    assert device.info is not None and "can't" not in listed(device) + shown(device)
    told = msgspec.structs.replace(device.info, faulty={"news": "news.jsonl: row 3 is not JSON"})
    device = msgspec.structs.replace(device, info=told)
    assert "can't read news: news.jsonl: row 3 is not JSON" in listed(device)
    assert "can't be read" in shown(device) and "news: news.jsonl: row 3 is not JSON" in shown(device)


def test_a_round_tells_what_quantizing_smaller_layers_anew_cost() -> None:
    work = Work(ranks={"m": 4}, batch=4, bits=8, steps=4)
    facts = UpdateFacts(
        samples=16, steps=4, batch=4, bits=8, loss_first=2.0, loss_last=1.0, step_s=0.1, train_s=0.4, requantized=0.0123
    )
    parts = [
        ParticipantView(device="a", work=work, status="done", facts=facts),
        ParticipantView(device="b", work=work, status="done", facts=msgspec.structs.replace(facts, requantized=0.0)),
        ParticipantView(device="c", work=work),
    ]
    told = printed(*tables.round_in_full(RoundView(round=1, phase="committed", participants=parts)))
    assert told.count("anew") == 1
    assert "a prune: quantizing its smaller layers anew leaves their weights 1.23% off the stored ones" in told
