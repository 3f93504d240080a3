"""The owner's policy: may this device train now, and why not. Every refusal names the reading and the limit it met."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from edge_daemon.core.state import Capability
from edge_daemon.core.team import CPU
from edge_daemon.settings import EdgeSettings, PolicySettings
from shared.messages import Assignment, BaseSource, Load
from shared.unified_memory import reserve

_RESUME_SHARE = 0.8
"""A pause for foreign load ends below this share of its limit, so that it does not flap."""
_RESUME_COOLER_C = 5.0
_MIB = 1024 * 1024

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::\d{1,5})?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A name on the hub; a path on this device never looks like one, or is in `[models]`."""


def refusal(
    settings: EdgeSettings,
    capability: Capability,
    assignment: Assignment,
    load: Load | None,
    *,
    minute: int,
    disk_free: int,
    unified: bool = False,
) -> str:
    """Why this device does not take `assignment`, or "".

    `minute`: local minute of the day; `disk_free`: bytes. Without a reading (None) no reading can meet its limit.
    `unified`: the GPU shares the machine's memory.
    """
    reason = _unable(settings, capability, assignment) or _outside_hours(settings.policy, minute)
    needed = settings.policy.disk_reserve_bytes + assignment.adapter.size
    if not reason and disk_free < needed:
        reason = f"disk: {_mib(disk_free)} free, {_mib(needed)} needed (reserve and global adapter)"
    if reason or load is None:
        return reason
    # Foreign load passes in seconds: work is taken and rests until then.
    return (
        ailing(settings.policy, load)
        or _short_of_memory(settings.policy, load, unified)
        or _strained(settings.policy, load, resuming=False)
    )


def ailing(policy: PolicySettings, load: Load | None) -> str:
    """What is broken, so that this device takes no work at all, or "". The words don't change while it lasts."""
    if load is None:
        return ""
    for gpu in load.gpus:
        if found := [str(xid) for xid in gpu.xids if xid in policy.xids]:
            fault = f" ({gpu.fault})" if gpu.fault else ""
            which = f"{gpu.uuid} reported XID {', '.join(found)}{fault}"
            return f"broken GPU: {which}; no work before a reset of it and a restart of the daemon (policy.xids)"
    if load.hung.get("gpu", 0.0) > policy.gpu_silence_s:
        return f"GPU driver: no answer for more than {policy.gpu_silence_s:g} s (policy.gpu_silence_s)"
    return ""


def pause(settings: EdgeSettings, load: Load | None, *, minute: int, paused: bool) -> str:
    """Why training must rest now, or "". `paused`: whether it rests already; then the limits are lower (hysteresis)."""
    reason = _outside_hours(settings.policy, minute)
    return reason or ("" if load is None else _too_busy(settings.policy, load, resuming=paused))


def in_hours(spans: list[str], minute: int) -> bool:
    """Whether local minute `minute` of the day lies in one of the "HH:MM-HH:MM" spans; no span: always."""
    return not spans or any(_within(span, minute) for span in spans)


def faults(settings: EdgeSettings) -> list[str]:
    """What is wrong with the owner's settings beyond their types: a list of "key: reason"."""
    wrong = []
    gpus = settings.agent.gpus
    if CPU in gpus and set(gpus) != {CPU}:
        wrong.append(f'agent.gpus: "{CPU}" does not go together with GPUs')
    twice = sorted({gpu for gpu in gpus if gpu != CPU and gpus.count(gpu) > 1})
    wrong += [f"agent.gpus: {gpu!r} is listed twice" for gpu in twice]
    for host in settings.policy.base_hosts:
        if not _HOST.fullmatch(host):
            wrong.append(f'policy.base_hosts: {host!r} is neither "name" nor "name:port" (no scheme, no path)')
    for span in settings.policy.hours:
        begin, end = _minutes(span)
        if max(begin, end) > 24 * 60 or any(int(part[3:]) > 59 for part in span.split("-")):
            wrong.append(f"policy.hours: {span!r} is no span of a day")
    return wrong


def hold(settings: EdgeSettings, load: Load | None, *, minute: int, unified: bool) -> str:
    """Why a release is not tried now, or "": it waits for the owner's hours, for memory, for other programs."""
    if load is None:
        return _outside_hours(settings.policy, minute)
    return (
        ailing(settings.policy, load)
        or _short_of_memory(settings.policy, load, unified)
        or pause(settings, load, minute=minute, paused=False)
    )


def base_path(settings: EdgeSettings, model: str, source: BaseSource | None) -> str:
    """Folder or hub id of the base `model`, by the owner's `[models]`; "": to be fetched from `source`."""
    if model not in settings.models and source is not None and _may_fetch(settings.policy, source.url):
        return ""
    return settings.models.get(model, model)


def _may_fetch(policy: PolicySettings, url: str) -> bool:
    """Whether the owner lists the host of `url`, with its port or for any port."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return False
    allowed = {name.lower() for name in policy.base_hosts}
    return parts.scheme in ("http", "https") and not parts.username and bool({host, f"{host}:{port}"} & allowed)


def base_fault(settings: EdgeSettings, model: str, source: BaseSource | None) -> str:
    """Why the base `model` can't be had by the owner's leave, or ""."""
    if model in settings.models or not base_path(settings, model, source):
        return ""
    if not settings.policy.hub:
        return f"base model {model!r} is not in this device's [models] table, and {_not_fetched(source)}"
    if not _HUB_ID.fullmatch(model):
        return f"base model {model!r} is neither in this device's [models] table nor a hub id (owner/name)"
    return ""


def _not_fetched(source: BaseSource | None) -> str:
    if source is None:
        return "policy.hub is off"
    host = urlsplit(source.url).netloc.rpartition("@")[2].lower()
    return f"neither is {host!r:.100} in policy.base_hosts nor policy.hub on"


def _unable(settings: EdgeSettings, capability: Capability, assignment: Assignment) -> str:
    if capability.problem:
        return capability.problem
    task, base, work = assignment.task, assignment.base, assignment.work
    if task.dataset not in settings.data:
        return f"data set {task.dataset!r} is not in this device's [data] table"
    if task.dataset not in capability.datasets:
        note = capability.notes.get(task.dataset, "it could not be read")
        return f"data set {task.dataset!r}: {note}"
    # A least-squares base is its name: nothing is loaded.
    if task.kind != "least_squares" and (fault := base_fault(settings, base.model, assignment.source)):
        return fault
    if work.bits not in capability.bits:
        proven = ", ".join(str(bits) for bits in capability.bits) or "none"
        return f"bits: {work.bits} asked, proven here: {proven}"
    return ""


def _outside_hours(policy: PolicySettings, minute: int) -> str:
    if in_hours(policy.hours, minute):
        return ""
    return f"hours: it is {minute // 60:02d}:{minute % 60:02d}, the owner allows {', '.join(policy.hours)}"


def _too_busy(policy: PolicySettings, load: Load, *, resuming: bool) -> str:
    limit = policy.foreign_limit * (_RESUME_SHARE if resuming else 1.0)
    share = load.foreign_cores / load.cores if load.cores > 0 else 0.0
    if share > limit:
        return f"foreign load: other programs use {share:.0%} of the cores, the limit is {limit:.0%}"
    for gpu in load.gpus:
        share = gpu.foreign_utilization or 0.0
        if share > limit:
            return f"foreign load: other programs use {share:.0%} of {gpu.uuid}, the limit is {limit:.0%}"
    return _strained(policy, load, resuming=resuming)


def _short_of_memory(policy: PolicySettings, load: Load, unified: bool) -> str:
    """Where the GPU shares the memory, running out of it kills whatever the system chooses: a reserve stays."""
    if not load.memory_limit:
        return ""  # not told
    available = f"memory: {_mib(load.memory_available)} available"
    if unified and load.memory_available < reserve(load.memory_limit):
        return f"{available}, {_mib(reserve(load.memory_limit))} stay free where the GPU shares it"
    if load.memory_available < policy.memory_reserve_bytes:
        return f"{available}, the owner's reserve is {_mib(policy.memory_reserve_bytes)}"
    return ""


def _strained(policy: PolicySettings, load: Load, *, resuming: bool) -> str:
    heat_limit = policy.temperature_limit_c - (_RESUME_COOLER_C if resuming else 0.0)
    heat = hottest(load)
    if heat is not None and heat > heat_limit:
        return f"heat: {heat:.0f} °C, the limit is {heat_limit:.0f} °C"
    if not policy.throttled:
        for gpu in load.gpus:
            if reasons := [reason for reason in gpu.throttle if reason != "power cap"]:
                return f"throttled: {gpu.uuid} by {', '.join(reasons)}, and policy.throttled is off"
    if load.on_battery and not policy.on_battery:
        return "battery: running on battery, and policy.on_battery is off"
    return ""


def hottest(load: Load) -> float | None:
    """The highest temperature of the reading, degrees Celsius."""
    known = [t for t in (load.temperature_c, *(gpu.temperature_c for gpu in load.gpus)) if t is not None]
    return max(known, default=None)


def _within(span: str, minute: int) -> bool:
    begin, end = _minutes(span)
    if begin <= end:
        return begin <= minute < end
    return minute >= begin or minute < end


def _minutes(span: str) -> tuple[int, int]:
    begin, end = (int(part[:2]) * 60 + int(part[3:]) for part in span.split("-"))
    return begin, end


def _mib(count: int) -> str:
    return f"{count / _MIB:.0f} MiB"
