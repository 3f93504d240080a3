"""What `muster-edge doctor` makes of what it read: a verdict for each check, and advice for what is not well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from shared.jobs import Bits
from shared.messages import Gpu

Verdict = Literal["ok", "warn", "fail", "skip"]
_DAY_S = 86400.0
_EXPIRY_WARN_S = 14 * _DAY_S
_SKEW_WARN_S = 5.0
_SKEW_FAIL_S = 300.0
"""What control messages may be apart; beyond it signed ones would be refused as expired."""
_MIB = 1024 * 1024
_ISSUE = "enrol this device (`muster-edge enroll --help`), see docs/operations.md, Enrol, rotate, revoke"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found. `advice`: what to do about it; empty where all is well."""

    check: str
    verdict: Verdict
    text: str
    advice: str = ""


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check=check, verdict="ok", text=text)


def fail(check: str, text: str, advice: str) -> Finding:
    """The device can't do its work like this."""
    return Finding(check=check, verdict="fail", text=text, advice=advice)


def warn(check: str, text: str, advice: str) -> Finding:
    """It works, but not as it should."""
    return Finding(check=check, verdict="warn", text=text, advice=advice)


def skip(check: str, text: str) -> Finding:
    """Not examined, and why."""
    return Finding(check=check, verdict="skip", text=text)


# ---- keys


@dataclass(frozen=True)
class Window:
    """When a certificate is good: Unix seconds. `of`: whose it is, in words."""

    of: str
    begin: float
    end: float


@dataclass(frozen=True)
class Keys:
    """The files of the connection as read. Empty: TLS is off."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Setting -> path, of those that are set."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Setting -> why its file can't be used."""
    exposed: str = ""
    """Mode of the key file, such as "0644", where others than its owner may read it."""
    name: str = ""
    """CN of the certificate."""
    matches: bool = True
    """The key is that of the certificate."""
    issued: bool = True
    """The certificate comes from the authority of `cafile`."""
    windows: tuple[Window, ...] = ()


def keys(found: Keys, device: str, now: float) -> list[Finding]:
    """Presence, mode, match, validity, name."""
    if "cafile" not in found.files:
        advice = "set broker.cafile, certfile and keyfile; without them anyone may listen, and speak for this device"
        return [warn("keys", "broker.cafile is not set: the connection has no TLS", advice)]
    wrong = [fail("keys", f"broker.{name}: {why}", _ISSUE) for name, why in found.faults.items()]
    if found.exposed:
        path = found.files.get("keyfile", "")
        wrong.append(fail("keys", f"{path} has mode {found.exposed}: others can read it", f"chmod 0400 {path}"))
    if found.name and found.name != device:
        text = f"the certificate is {found.name}'s, and the settings say device = {device!r}"
        wrong.append(fail("keys", text, f'correct "device" in the settings, or {_ISSUE}'))
    if not found.matches:
        wrong.append(fail("keys", "the key is not that of the certificate", f"install both from one issue; {_ISSUE}"))
    if not found.issued:
        text = "the certificate was not issued by the authority in broker.cafile"
        wrong.append(fail("keys", text, f"install the fleet's ca.crt, or {_ISSUE}"))
    wrong += [finding for window in found.windows if (finding := _validity(window, now)) is not None]
    if wrong:
        return wrong
    if "certfile" not in found.files:
        return [warn("keys", "no certificate of this device: broker.certfile is not set", _ISSUE)]
    days = min((window.end - now) / _DAY_S for window in found.windows)
    return [ok("keys", f"{found.name}, key and certificate match, good for {days:.0f} days")]


def _validity(window: Window, now: float) -> Finding | None:
    if now < window.begin:
        text = f"{window.of} is not valid yet, for another {(window.begin - now) / _DAY_S:.1f} days"
        return fail("keys", text, "the clock of this device is probably wrong: see the check of the clock")
    if now >= window.end:
        return fail("keys", f"{window.of} expired {(now - window.end) / _DAY_S:.1f} days ago", f"renew it: {_ISSUE}")
    if window.end - now < _EXPIRY_WARN_S:
        return warn("keys", f"{window.of} expires in {(window.end - now) / _DAY_S:.1f} days", f"renew it: {_ISSUE}")
    return None


# ---- clock


@dataclass(frozen=True)
class Clock:
    """`synchronized`: by the system's word, None: it can't be asked. `coordinator_ts`: of the coordinator's latest
    presence, Unix seconds; None: none heard. `period_s`: it is said again so often."""

    now: float
    synchronized: bool | None = None
    windows: tuple[Window, ...] = ()
    coordinator_ts: float | None = None
    period_s: float = 30.0


def clock(found: Clock) -> Finding:
    """Against the certificates, the coordinator, and what keeps it right."""
    advice = "set it right: `timedatectl set-ntp true`, or your chrony or GPS"
    outside = next((one for one in found.windows if not one.begin <= found.now < one.end), None)
    if outside is not None:
        text = f"{outside.of} is not valid by this clock"
        return fail("clock", text, f"{advice}; if the clock is right, renew the certificate")
    skew = _skew(found)
    if skew is not None and abs(skew) > _SKEW_FAIL_S:
        return fail("clock", f"{skew:+.0f} s from the coordinator's", advice)
    if skew is not None and abs(skew) > _SKEW_WARN_S:
        return warn("clock", f"{skew:+.0f} s from the coordinator's", advice)
    if found.synchronized is False:
        return warn("clock", "nothing keeps it right: it is not synchronized", advice)
    told = "synchronized" if found.synchronized else "whether it is synchronized can't be asked here"
    agrees = "" if skew is None else ", agrees with the coordinator's"
    return ok("clock", told + agrees)


def _skew(found: Clock) -> float | None:
    """Seconds that this clock is ahead, beyond what the age of the coordinator's word explains."""
    if found.coordinator_ts is None:
        return None
    ahead = found.now - found.coordinator_ts
    return ahead if ahead < 0 else max(0.0, ahead - found.period_s)


# ---- disk, GPUs, kernels, sandbox


def disk(path: str, free: int | None, reserve: int, fault: str) -> Finding:
    """`free`: bytes where the state lies; `reserve`: below it work is refused; `fault`: why nothing can be written."""
    if fault:
        advice = f"let the service's user write there (StateDirectory= of the unit does): chown muster {path}"
        return fail("disk", f"{path}: {fault}", advice)
    if free is None:
        return skip("disk", f"{path} is not there yet: the first start makes it")
    text = f"{free // _MIB} MiB free at {path}, the owner's reserve is {reserve // _MIB} MiB"
    advice = "free some space, move state_dir, or lower policy.disk_reserve_bytes"
    if free < reserve:
        return fail("disk", text, f"work is refused: {advice}")
    return warn("disk", text, advice) if free < 2 * reserve else ok("disk", text)


def gpus(found: Sequence[Gpu] | None, wanted: Sequence[str], driver: bool) -> Finding:
    """`found` by the driver, None: it hangs; `wanted`: by the settings; `driver`: its files are on this machine."""
    if found is None:
        advice = "see `dmesg | grep -i xid` and nvidia-smi; usually only a reboot helps"
        return fail("gpu", "the NVIDIA driver does not answer", advice)
    missing = [name for name in wanted if name != "cpu" and name not in {gpu.uuid for gpu in found}]
    if missing:
        return fail("gpu", f"agent.gpus: not found: {', '.join(missing)}", "compare with `nvidia-smi -L`")
    if not found and driver and "cpu" not in wanted:
        advice = (
            "device nodes may be missing or closed to this user (ls -l /dev/nvidia*; groups video and render; "
            "`nvidia-modprobe -u -c=0`, or enable nvidia-persistenced), or nvidia-ml-py is not installed"
        )
        return fail("gpu", "an NVIDIA driver is installed, and no GPU can be seen", advice)
    names = [f"{gpu.name or gpu.uuid} {gpu.memory_bytes // _MIB} MiB, compute {gpu.compute or '?'}" for gpu in found]
    return ok("gpu", "; ".join(names) or "none: agents train on the CPU")


@dataclass(frozen=True)
class Kernel:
    """What an agent proved on one GPU ("" or "cpu": the CPU). `problem`: why there is no answer."""

    gpu: str
    bits: Sequence[Bits] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def kernel(found: Kernel) -> Finding:
    """Whether 4 bits are proven: quantized, dequantized, multiplied, within the bound. A GPU without them is a fault of
    the installation; a CPU may well do without."""
    where = found.gpu or "cpu"
    check = f"kernel {where}"
    if found.problem:
        advice = "see the lines above; is the extra [train] installed: pip install 'muster[train]'?"
        return fail(check, f"the agent gives no answer: {found.problem}", advice)
    proven = ", ".join(str(bits) for bits in found.bits) or "no"
    lacking = "; ".join(
        f"{name}: {note}" for name, note in sorted(found.notes.items()) if name.isdigit() or name == "gpu"
    )
    if not found.bits:
        return fail(check, f"nothing is proven: {lacking}", _kernel_advice(lacking))
    if 4 not in found.bits:
        verdict = warn if where == "cpu" else fail
        return verdict(
            check, f"{proven} bits proven, not 4: {lacking or 'the agent does not offer them'}", _kernel_advice(lacking)
        )
    if lacking:
        return warn(check, f"{proven} bits proven; {lacking}", _kernel_advice(lacking))
    return ok(check, f"{proven} bits proven by a product within its bound")


def _kernel_advice(note: str) -> str:
    if "named symbol not found" in note or "no kernel image" in note:
        return (
            "this build of bitsandbytes has no kernel for the GPU: on JetPack 6 build it with "
            "-DCOMPUTE_CAPABILITY=87, see docs/operations.md, Jetson notes"
        )
    if "does not see this GPU" in note:
        return "torch is a CPU build, or CUDA does not come up: `muster-edge doctor --cuda` says where it ends"
    if "bitsandbytes" in note or "ModuleNotFoundError" in note:
        return "install the extra [train], with bitsandbytes >= 0.45"
    return "the device gets work at proven bits only; on a GPU `muster-edge doctor --cuda` says where it ends"


_CUDA_ADVICE = {
    "100": "no device: are /dev/nvidia* there and open to this user (groups video and render, DeviceAllow=)?",
    "304": "the sandbox denies /proc/self/task/*/comm: ProcSubset=all and ProtectProc=default are needed",
    "802": "the system is not ready: nvidia-fabricmanager must run",
    "803": "driver and library do not fit: reboot after an upgrade of the driver",
    "804": "the driver is too old for this CUDA: upgrade it, or install a torch for an older CUDA",
    "999": "nvidia-uvm is not loaded or its node missing: `nvidia-modprobe -u -c=0` at boot",
}
"""CUDA error code of cuInit -> what it means here."""


def cuda(step: str, good: bool, text: str, code: str = "") -> Finding:
    """One step of CUDA from the driver to a 4-bit product. `code`: CUDA's error code."""
    if good:
        return ok(f"cuda {step}", text)
    advice = {
        "driver": "install the NVIDIA driver; in the unit's sandbox its library must be readable",
        "torch": "install a torch built for CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu126",
        "memory": "other programs hold the memory: nvidia-smi",
        "end": "the last lines of the text are its own; `dmesg | grep -i -e xid -e nvrm` says what the driver saw",
    }
    return fail(f"cuda {step}", text, _CUDA_ADVICE.get(code) or advice.get(step) or _kernel_advice(text))


def confined(status: Mapping[str, str], degraded: bool) -> Literal["", "full", "degraded"]:
    """What confines this process. `status`: of /proc/self/status; `degraded`: its unit says so."""
    filtered, privileged = status.get("Seccomp", "0") == "2", status.get("NoNewPrivs", "0") != "1"
    if not filtered or privileged or int(status.get("CapEff", "0"), 16) != 0:
        return ""
    return "degraded" if degraded else "full"


def sandbox(found: Literal["", "full", "degraded"]) -> Finding:
    """Whether this ran as the service does."""
    if found == "degraded":
        text = "as the service, without its device filter (jetson/degraded.conf)"
        return warn("sandbox", text, "try without that drop-in after an upgrade of JetPack")
    if found:
        return ok("sandbox", "as the service: system calls filtered, no privileges, no capabilities")
    return skip("sandbox", "none here: `muster-edge doctor --sandbox` (as root) examines as the service would run")


def failed(findings: Sequence[Finding]) -> bool:
    """Whether the device is not fit."""
    return any(finding.verdict == "fail" for finding in findings)
