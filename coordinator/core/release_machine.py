"""The decisions about releases: canaries first, the rest once they took it, back where they did not.

The rules of `coordinator.core.round_machine` hold here, too. What a device is to have follows from the releases alone
(`releases.wanted`); `sync` says it to devices that have not heard it from this process.
"""

from __future__ import annotations

from typing_extensions import assert_never

from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import fleet, releases
from coordinator.core import release_records as rec
from coordinator.core.fleet import Presence
from coordinator.core.release_transitions import TABLE
from coordinator.core.releases import SETTLED, Release
from coordinator.core.turn import State, Turn
from shared import machines
from shared.release_messages import Release as Desired
from shared.release_messages import ReleaseState


def on_event(turn: Turn, event: ev.ReleaseEvent) -> None:
    """Take what an operator or the packing has to say."""
    if isinstance(event, ev.ReleaseRequested):
        if event.release in turn.state.releases or releases.under_way(turn.state.releases) is not None:
            turn.count("releases while another is under way")
            return
        turn.record_release(
            rec.ReleaseStarted(
                release=event.release, number=event.number, job=event.job, round=event.round, adapter=event.adapter,
                canaries=event.canaries, worse_by=event.worse_by, deadline_s=event.deadline_s, bits=event.bits,
                ts=event.ts,
            )
        )  # fmt: skip
        turn.do(*entry(turn.state))
        return
    release = turn.state.releases.get(event.release)
    if release is None or not machines.allows(TABLE, release.phase, type(event).__name__):
        turn.count("answers out of phase")
        return
    match event:
        case ev.Packed():
            if release.blob is None:
                turn.record_release(rec.ReleasePacked(release=release.id, blob=event.blob, kind=event.kind))
                turn.update(release_since=event.now)
        case ev.PackingFailed():
            _end(turn, release, "failed", f"it can't be packed: {event.reason}", event)
        case ev.RollbackRequested():
            if release.phase == "packing":
                _end(turn, release, "failed", "withdrawn by an operator", event)
            elif releases.last(turn.state.releases) is not release:
                turn.count("rollbacks below another release")
            else:
                _withdraw(turn, release, "withdrawn by an operator", event)
        case _:
            assert_never(event)


def entry(state: State) -> list[cmd.Command]:
    """What the release under way needs done, after a restart, too; what devices need to hear is `sync`'s."""
    release = releases.under_way(state.releases)
    if release is None or release.phase != "packing" or release.blob is not None:
        return []
    return [cmd.PackRelease(release, state.jobs[release.job])]


def on_started(turn: Turn, event: ev.Started) -> None:
    """Take up the release under way."""
    release = releases.under_way(turn.state.releases)
    if release is None:
        return
    # A clock that jumped must neither end the phase at once nor prolong it.
    spent = min(max(event.ts - release.phase_ts, 0.0), release.deadline_s)
    turn.update(release_since=event.now - spent)
    turn.do(*entry(turn.state))


def on_report(turn: Turn, device: str, report: ReleaseState, event: ev.FromDevice) -> None:
    """Take what a device says; old words and those about what it is not to have change nothing durable."""
    known = turn.state.release_reports.get(device)
    if known is not None and (report.epoch, report.seq) <= (known.epoch, known.seq):
        return
    turn.update(release_reports={**turn.state.release_reports, device: report}, release_looked_at=-1e9)
    back = releases.under_way(turn.state.releases)
    awaited = back is not None and back.phase == "rolling_back" and device in back.awaited
    if back is not None and awaited and back.id not in (report.release, report.active):
        _returned(turn, back, device, report, event)
    found = releases.wanted(turn.state.releases, device)
    _repeat(turn, device, event.now)
    if found is None or found[0].id != report.release:
        return
    release, part = found[0], found[0].parts.get(device)
    final = report.stage in ("committed", "failed", "skipped") or (report.stage == "active" and not found[1])
    if final and (part is None or part.state != report.stage):
        turn.record_release(
            rec.DeviceReleased(
                release=release.id, device=device, state=report.stage, reason=report.reason,  # type: ignore[arg-type]  # one of four words
                before=report.before, after=report.after, ts=event.ts,
            )
        )  # fmt: skip


def forget(turn: Turn, device: str) -> None:
    """A device left the fleet: the broker keeps nothing for it, and should it come back it is told anew."""
    state = turn.state
    if device in state.release_told:
        turn.do(cmd.PublishRelease(device, None))
    turn.update(
        release_told={name: told for name, told in state.release_told.items() if name != device},
        release_reports={name: report for name, report in state.release_reports.items() if name != device},
    )


def _returned(turn: Turn, release: Release, device: str, report: ReleaseState, event: ev.FromDevice) -> None:
    part = release.parts[device]
    if part.state == "returned":
        return
    turn.record_release(
        rec.DeviceReleased(
            release=release.id, device=device, state="returned", reason=f"has {report.active or 'no release'}",
            before=part.before, after=part.after, ts=event.ts,
        )
    )  # fmt: skip


def on_tick(turn: Turn, event: ev.Tick) -> None:
    """Decide about the phase of the release under way, at most once a `release_look_s` where nothing came."""
    state = turn.state
    release = releases.under_way(state.releases)
    if release is None or event.now - state.release_looked_at < state.waits.release_look_s:
        return
    turn.update(release_looked_at=event.now)
    over = _is_over(state, release, event.now)
    match release.phase:
        case "packing":
            _begin_if_heard(turn, release, event)
        case "canary":
            _judge(turn, release, over, event)
        case "rest":
            _settle(turn, release, over, event)
        case "rolling_back":
            _return(turn, release, over, event)
        case _:
            pass
    _remind(turn, event.now)


def sync(turn: Turn, device: str, now: float) -> None:
    """Tell `device` what it is to have, where this process has not told it so."""
    state = turn.state
    if not state.releases:
        return
    known = state.fleet.get(device)
    if known is None or known.info is None or not known.info.releases:
        return
    found = releases.wanted(state.releases, device)
    if found is None and not any(one.widened or device in one.parts for one in state.releases.values()):
        return  # it never was to have any
    key = (found[0].id, found[1]) if found else ("", False)
    told = state.release_told.get(device)
    if told is not None and told[0] == key:
        return
    _tell(turn, device, now)


def sync_all(turn: Turn, now: float) -> None:
    """The same for every device that is known."""
    for device in sorted(turn.state.fleet):
        sync(turn, device, now)


def _tell(turn: Turn, device: str, now: float) -> None:
    state = turn.state
    found = releases.wanted(state.releases, device)
    seq = state.release_seq + 1
    spec, commit, reason = None, False, "no release stands"
    if found is not None:
        release, commit = found
        spec = releases.spec_of(release, state.jobs[release.job], device, state.chunk)
        reason = release.reason
    key = (spec.id, commit) if spec else ("", False)
    told = {**state.release_told, device: (key, now)}
    turn.update(release_seq=seq, release_told=told)
    message = Desired(term=state.term, seq=seq, release=spec, commit=commit, reason=reason[:1000])
    turn.do(cmd.PublishRelease(device, message))


def _begin_if_heard(turn: Turn, release: Release, event: ev.Tick) -> None:
    """Choose the canaries, once the fleet is heard: after a restart the devices tell us anew that they are there."""
    state, now = turn.state, event.now
    if release.blob is None or not _hears(state, now):
        return
    able, left_out = takers(state, now)
    dataset = state.jobs[release.job].spec.task.dataset
    with_data = [device for device in able if dataset in _datasets(state.fleet[device])]
    chosen = releases.choose(able, with_data, release.canaries)
    complete = bool(chosen) and set(chosen) >= set(release.canaries.devices)
    if not complete and now - max(state.restarted_at, state.release_since) < state.waits.grace_s:
        return
    if not chosen:
        why = "; ".join(f"{device}: {reason}" for device, reason in sorted(left_out.items())[:5])
        _end(turn, release, "failed", f"no device can take it now ({why or 'none is known'})", event)
        return
    reason = f"{len(chosen)} of {len(able)} devices try it first"
    turn.record_release(
        rec.CanariesChosen(release=release.id, devices=chosen, left_out=left_out, reason=reason, ts=event.ts)
    )
    _entered(turn, event)


def takers(state: State, now: float) -> tuple[list[str], dict[str, str]]:
    """Devices that can take a release now, by id; the others with the reason."""
    able, left_out = [], {}
    for device, known in sorted(state.fleet.items()):
        reason = _unable(known, state, now)
        if reason:
            left_out[device] = reason
        else:
            able.append(device)
    return able, left_out


def _unable(known: Presence, state: State, now: float) -> str:
    if not known.present:
        return f"it is {known.state.s if known.state else 'unknown'}"
    if known.info is None or not known.info.releases:
        return "its daemon is too old to take releases"
    if now - known.heard_at > state.waits.absent_s:
        return f"it has said nothing for {now - known.heard_at:.0f} s"
    return ""


def _datasets(known: Presence) -> set[str]:
    return set(known.info.datasets) if known.info else set()


def _judge(turn: Turn, release: Release, over: bool, event: ev.Tick) -> None:
    """Whether the canaries took it. One that did not is enough to stop."""
    waiting = [device for device in release.awaited if release.parts[device].state == "told"]
    if over:
        for device in waiting:
            release = _give_up(turn, release, device, event)
        waiting = []
    parts = {device: release.parts[device] for device in release.chosen}
    bad = [f"{device}: {part.reason}" for device, part in parts.items() if part.state in ("failed", "silent")]
    if bad:
        _withdraw(turn, release, f"stopped by a canary: {'; '.join(bad[:5])}", event)
        return
    if waiting:
        return
    took = [device for device, part in parts.items() if part.state in ("active", "committed")]
    if not took:
        why = "; ".join(f"{device}: {part.reason}" for device, part in parts.items())
        _withdraw(turn, release, f"no canary could try it: {why[:500]}", event)
        return
    if not _hears(turn.state, event.now):
        return
    able, _ = takers(turn.state, event.now)
    rest = sorted({*able, *took} - {d for d, part in parts.items() if part.state == "skipped"})
    turn.record_release(
        rec.ReleaseWidened(
            release=release.id, devices=rest, reason=f"{len(took)} of {len(parts)} canaries took it", ts=event.ts
        )
    )
    _entered(turn, event)


def _give_up(turn: Turn, release: Release, device: str, event: ev.Tick) -> Release:
    """The deadline has passed for a device. One whose owner or whose work kept it from trying is no sign of a fault."""
    report = turn.state.release_reports.get(device)
    about = report if report is not None and report.release == release.id else None
    within = f"within {release.deadline_s:.0f} s"
    if about is not None and about.waits:
        state, reason = "skipped", f"did not come to it {within}: {about.waits}"
    elif about is not None:
        state, reason = "silent", f"only {about.stage} {within}"
    else:
        state, reason = "silent", f"said nothing about it {within}"
    return turn.record_release(
        rec.DeviceReleased(release=release.id, device=device, state=state, reason=reason, ts=event.ts)  # type: ignore[arg-type]  # one of two words
    )


def _settle(turn: Turn, release: Release, over: bool, event: ev.Tick) -> None:
    """Whether all have answered. A device where it failed keeps what it had; it takes nothing from the others."""
    waiting = [device for device in release.awaited if release.parts[device].state not in SETTLED]
    if waiting and not over:
        return
    for device in waiting:
        release = _give_up(turn, release, device, event)
    states = [part.state for part in release.parts.values()]
    counted = ", ".join(f"{states.count(state)} {state}" for state in sorted(SETTLED) if state in states)
    _end(turn, release, "finished", counted, event)


def _return(turn: Turn, release: Release, over: bool, event: ev.Tick) -> None:
    """Whether every device that had it has what it had before."""
    waiting = [device for device in release.awaited if release.parts[device].state != "returned"]
    if any(not _is_gone(turn.state, device, event.now) for device in waiting) and not over:
        return
    reason = release.reason
    if waiting:
        reason += f"; not yet confirmed by {', '.join(waiting[:5])}{' ...' if len(waiting) > 5 else ''}"
    _end(turn, release, "rolled_back", reason, event)


def _withdraw(turn: Turn, release: Release, reason: str, event: ev.AnyEvent) -> None:
    """Back to what was before. Devices that never put it in place need not confirm that it is gone."""
    parts = turn.state.releases[release.id].parts
    had = [device for device, part in sorted(parts.items()) if part.state not in ("failed", "skipped")]
    turn.record_release(rec.ReleaseWithdrawn(release=release.id, devices=had, reason=reason, ts=event.ts))
    _entered(turn, event)


def _end(turn: Turn, release: Release, state: rec.Ending, reason: str, event: ev.AnyEvent) -> None:
    turn.record_release(rec.ReleaseEnded(release=release.id, state=state, reason=reason, ts=event.ts))


def _entered(turn: Turn, event: ev.AnyEvent) -> None:
    """A phase begins in which devices have to hear something."""
    turn.update(release_since=event.now, release_looked_at=-1e9)
    sync_all(turn, event.now)


def _hears(state: State, now: float) -> bool:
    """Whether the fleet is known as it is: after a start or an outage the devices tell us anew that they are there,
    some after a will that is not to be believed."""
    if state.cut_off:
        return False
    since, gather = state.restarted_at, state.waits.gather_s
    if now - since >= state.waits.patience * gather:
        return True
    lost = (known for known in state.fleet.values() if known.state is not None and known.state.s == "lost")
    quiet = now - max(state.settled_at, since) >= gather
    return quiet and all(fleet.gone(known, now, since, state.waits.silent_s) for known in lost)


def _is_gone(state: State, device: str, now: float) -> bool:
    """Whether nothing is to be expected of a device; it will hear what it is to have once it is back."""
    known, since = state.fleet.get(device), state.hearing_since(now)
    if known is None or known.state is None:
        return now - since >= state.waits.grace_s
    left = fleet.gone(known, now, since, state.waits.silent_s)
    return left or now - max(known.heard_at, since) > state.waits.absent_s


def _is_over(state: State, release: Release, now: float) -> bool:
    """Whether the phase's time is up. Who was cut off, or began anew, hears the devices first."""
    deadline_at = state.release_since + release.deadline_s
    if state.restarted_at > state.release_since:
        deadline_at = max(deadline_at, state.restarted_at + state.waits.grace_s)
    return now >= deadline_at and not state.cut_off


def _remind(turn: Turn, now: float) -> None:
    """Say it again to those that are waited for and show no sign of having heard it."""
    state = turn.state
    release = releases.under_way(state.releases)
    if release is None or state.cut_off:
        return
    for device in release.awaited:
        _repeat(turn, device, now)


def _repeat(turn: Turn, device: str, now: float) -> None:
    """Say it again where the last word shows no effect; a device tells now and then what it goes by."""
    state = turn.state
    told, report = state.release_told.get(device), state.release_reports.get(device)
    if told is None or now - told[1] < state.waits.release_remind_s:
        return
    heard = report is not None and report.release == told[0][0]
    pending = told[0][1] and report is not None and report.stage == "active"  # the word to keep it got lost
    if not heard or pending:
        _tell(turn, device, now)
