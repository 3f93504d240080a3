"""What `muster devices` prints: all devices in a table, or one in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from coordinator.web.views import DeviceView
from muster.cli.tables import size, table
from shared.messages import DeviceInfo, Gpu, GpuLoad, HostLoad, Load

UNTOLD = "-"


def devices(found: Sequence[DeviceView]) -> Table:
    """The devices and their load."""
    told = table(
        "device", "state", "seen", "cores", "own", "foreign", "throttled", "memory free", "heat", "GPUs", "work"
    )
    for device in found:
        load = device.load
        cells = [UNTOLD] * 6
        if load is not None:
            cells = [
                f"{load.cores:.2f}", f"{load.own_cores:.2f}", f"{load.foreign_cores:.2f}", f"{load.throttled:.0%}",
                f"{size(load.memory_available)} of {size(load.memory_limit)}", _heat(load.temperature_c),
            ]  # fmt: skip
        told.add_row(device.device, device.state, f"{device.age_s:.0f} s", *cells, _gpus(device), _words(device))
    return told


def in_full(device: DeviceView) -> Iterator[Table | Text]:
    """One device: what it is, what it has free, its GPUs one by one."""
    yield Text(f"{device.device}: {device.state}, seen {device.age_s:.0f} s ago", style="bold")
    pairs = table("", "")
    pairs.show_header = False
    for name, value in [*_capability(device), *(_load(device.load) if device.load else [])]:
        if value and value != UNTOLD:
            pairs.add_row(name, value)
    yield pairs
    facts = {gpu.uuid: gpu for gpu in device.info.gpus} if device.info else {}
    loads = {gpu.uuid: gpu for gpu in device.load.gpus} if device.load else {}
    if not facts and not loads:
        return
    gpus = table(
        "GPU",
        "busy",
        "foreign",
        "memory free",
        "heat",
        "power",
        "energy",
        "clock",
        "memory clock",
        "throttled",
        "errors",
    )
    for uuid in {**facts, **loads}:
        gpus.add_row(*_gpu(uuid, facts.get(uuid), loads.get(uuid)))
    yield gpus


def _capability(device: DeviceView) -> list[tuple[str, str]]:
    info = device.info
    if info is None:
        return [("problem", "it has not told what it is yet")]
    return [
        ("problem", info.problem),
        ("work", device.work),
        ("hardware", info.hardware),
        ("version", info.version),
        ("JetPack", info.jetpack),
        ("GPU driver", info.driver),
        ("proven bits", ", ".join(map(str, info.bits))),
        ("data sets", ", ".join(f"{name} ({facts.rows} rows)" for name, facts in sorted(info.datasets.items()))),
        ("can't be read", _faulty(info)),
    ]


def _load(load: Load) -> list[tuple[str, str]]:
    host = load.host
    return [
        ("does not answer", ", ".join(f"{name} for {seconds:.0f} s" for name, seconds in sorted(load.hung.items()))),
        ("cores", f"{load.cores:.2f}, own {load.own_cores:.2f}, foreign {load.foreign_cores:.2f}, "
                  f"stopped by the quota {load.throttled:.0%}"),
        ("memory free", f"{size(load.memory_available)} of {size(load.memory_limit)}, own {size(load.own_memory)}"),
        ("disk free", size(host.disk_free)),
        ("network", _network(host)),
        ("waiting", _stalls(host)),
        ("heat", _heat(load.temperature_c)),
        ("battery", {None: "", True: "in use", False: "not in use"}[load.on_battery]),
        ("rests", load.paused),
    ]  # fmt: skip


def _network(host: HostLoad) -> str:
    if host.received_per_s is None or host.sent_per_s is None:
        return ""
    return f"{size(int(host.received_per_s))}/s in, {size(int(host.sent_per_s))}/s out"


def _stalls(host: HostLoad) -> str:
    shares = {"CPU": host.cpu_stalled, "memory": host.memory_stalled, "disk": host.disk_stalled}
    return ", ".join(f"for {name} {share:.0%} of the time" for name, share in shares.items() if share is not None)


def _gpu(uuid: str, facts: Gpu | None, load: GpuLoad | None) -> list[str]:
    facts, load = facts or Gpu(uuid=uuid), load or GpuLoad(uuid=uuid)
    name = ", ".join(filter(None, [facts.name, uuid, load.power_mode and f"mode {load.power_mode}"]))
    memory = "shared" if facts.integrated else UNTOLD
    if load.memory_free is not None:
        memory = f"{size(load.memory_free)} of {size(load.memory_total or facts.memory_bytes)}"
    limit = f" of {facts.power_limit_w:.0f}" if facts.power_limit_w else ""
    foreign = [_share(load.foreign_utilization)] if load.foreign_utilization is not None else []
    foreign += [size(load.foreign_memory)] if load.foreign_memory is not None else []
    return [
        name, _share(load.utilization), ", ".join(foreign) or UNTOLD, memory, _heat(load.temperature_c),
        UNTOLD if load.power_w is None else f"{load.power_w:.1f}{limit} W",
        UNTOLD if load.energy_j is None else f"{load.energy_j / 3.6e6:.2f} kWh",
        _clock(load.clock_mhz, facts.clock_max_mhz), _clock(load.memory_clock_mhz, facts.memory_clock_max_mhz),
        _throttle(load), _errors(load) or "none",
    ]  # fmt: skip


def _gpus(device: DeviceView) -> str:
    """Of the table of all: a line for each GPU, or how many there are."""
    loads = device.load.gpus if device.load else []
    if not loads:
        return str(len(device.info.gpus) if device.info else 0)
    lines = []
    for gpu in loads:
        parts = [_share(gpu.utilization), _heat(gpu.temperature_c)]
        parts += [f"{gpu.power_w:.0f} W"] if gpu.power_w is not None else []
        # A power cap is what a busy GPU always meets.
        parts += [reason for reason in gpu.throttle if reason != "power cap"]
        parts += [_errors(gpu)]
        lines.append(", ".join(part for part in parts if part and part != UNTOLD) or UNTOLD)
    return "\n".join(lines)


def _words(device: DeviceView) -> str:
    """What an operator should see first."""
    silent = [f"{name} silent for {s:.0f} s" for name, s in sorted(device.load.hung.items())] if device.load else []
    problem = device.info.problem if device.info else ""
    faulty = f"can't read {_faulty(device.info)}" if device.info and device.info.faulty else ""
    return "; ".join(filter(None, [problem or device.work, *silent, faulty]))


def _faulty(info: DeviceInfo) -> str:
    return "; ".join(f"{name}: {why}" for name, why in sorted(info.faulty.items()))


def _throttle(load: GpuLoad) -> str:
    if load.throttled is None:
        return UNTOLD
    return (", ".join(load.throttle) or "yes") if load.throttled else "no"


def _errors(load: GpuLoad) -> str:
    xids = f"XID {', '.join(map(str, load.xids))}" if load.xids else ""
    return ": ".join(filter(None, [xids, load.fault]))


def _clock(mhz: int | None, top: int | None) -> str:
    return UNTOLD if mhz is None else f"{mhz} of {top} MHz" if top else f"{mhz} MHz"


def _share(value: float | None) -> str:
    return UNTOLD if value is None else f"{value:.0%}"


def _heat(degrees: float | None) -> str:
    return UNTOLD if degrees is None else f"{degrees:.0f} °C"
