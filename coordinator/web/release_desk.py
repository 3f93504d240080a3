"""What the HTTP API asks of the coordinator about releases, each call carried out on the coordinator's own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core import release_machine, releases
from coordinator.core.job import Job
from coordinator.core.release_records import Canaries
from coordinator.core.releases import Part, Release
from coordinator.core.turn import State
from coordinator.runtime import Runtime
from coordinator.web.refusals import Conflict, NotFound
from coordinator.web.release_asks import ReleaseAsk
from coordinator.web.views import ReleasedDevice, ReleaseView
from shared.jobs import Bits
from shared.messages import BlobRef


class ReleaseDesk:
    """The API's view of releases. `on_loop` runs a call on the runtime's thread."""

    def __init__(self, runtime: Runtime, on_loop: Callable[[Callable[[], Any]], Any]) -> None:
        self._runtime = runtime
        self._on_loop = on_loop

    def start(self, ask: ReleaseAsk) -> ReleaseView:
        """Begin a release. Raises `NotFound` and `Conflict` with what to do instead."""
        adapter, number, bits = self._adapter(ask.job, ask.round)

        def begin() -> ReleaseView:
            runtime, state = self._runtime, self._runtime.state
            self._refuse(state, ask.canaries)
            count = releases.next_number(state.releases, state.release_reports.values())
            release = f"{ask.job}.r{number}-{count}"
            runtime.step(
                ev.ReleaseRequested(
                    release=release, number=count, job=ask.job, round=number, adapter=adapter, canaries=ask.canaries,
                    worse_by=ask.worse_by, deadline_s=ask.deadline_s or runtime.settings.waits.release_s, bits=bits,
                    **runtime.now(),
                )
            )  # fmt: skip
            if release not in runtime.state.releases:
                raise Conflict(f"the release can't be written down, nothing was begun: {runtime.problem}")
            return _view(runtime.state, runtime.state.releases[release], whole=True)

        view: ReleaseView = self._on_loop(begin)
        return view

    def all(self) -> list[ReleaseView]:
        """Every release, the oldest first."""

        def look() -> list[ReleaseView]:
            state = self._runtime.state
            return [_view(state, release) for release in state.releases.values()]

        views: list[ReleaseView] = self._on_loop(look)
        return views

    def one(self, name: str) -> ReleaseView:
        """One release with all its devices. `name`: its id, or that of a job for the job's last; "last": the last."""

        def look() -> ReleaseView:
            state = self._runtime.state
            return _view(state, _find(state, name), whole=True)

        view: ReleaseView = self._on_loop(look)
        return view

    def roll_back(self, name: str) -> ReleaseView:
        """Give every device back what it had before a release; "last": before the newest.

        Where the newest was withdrawn already, "last" is refused: whoever asks after a canary has stopped a release
        means that one, and must not lose the good one below it.
        """

        def act() -> ReleaseView:
            runtime = self._runtime
            newest = releases.last(runtime.state.releases)
            if newest is None:
                raise Conflict("no release stands: there is nothing to roll back")
            release = _find(runtime.state, name)
            if name == "last" and release.id != newest.id:
                raise Conflict(
                    f"the last release {release.id} is {release.phase.replace('_', ' ')} already ({release.reason}); "
                    f"in force is {newest.id}: name it to roll that one back, too"
                )
            if release.phase not in (*releases.STANDS, "packing"):
                raise Conflict(f"release {release.id} does not stand any more: it is {release.phase}")
            if newest.id != release.id:
                word = "stands" if newest.phase == "finished" else f"is {newest.phase}"
                raise Conflict(f"release {newest.id} {word} above {release.id}: roll that one back first")
            if not runtime.step(ev.RollbackRequested(release=release.id, **runtime.now())):
                raise Conflict(f"the rollback can't be written down, nothing was begun: {runtime.problem}")
            return _view(runtime.state, runtime.state.releases[release.id], whole=True)

        view: ReleaseView = self._on_loop(act)
        return view

    def _refuse(self, state: State, canaries: Canaries) -> None:
        busy = releases.under_way(state.releases)
        if busy is not None:
            raise Conflict(f"release {busy.id} is under way ({busy.phase}): wait for it, or roll it back")
        able, left_out = release_machine.takers(state, self._runtime.ports.clock())
        for device in canaries.devices:
            if device not in able:
                raise Conflict(f"canary {device} can't take a release: {left_out.get(device, 'no such device')}")
        if not able:
            why = "; ".join(f"{device}: {reason}" for device, reason in sorted(left_out.items())[:5])
            raise Conflict(f"no device can take a release now ({why or 'none has reported yet'})")

    def _adapter(self, job_id: str, number: int) -> tuple[BlobRef, int, dict[str, Bits]]:
        """The global adapter of a job after round `number` (0: the last), that round, and who trained at which bits."""

        def find() -> Job:
            job = self._runtime.state.jobs.get(job_id)
            if job is None:
                raise NotFound(f"no job {job_id!r}; `muster list` shows all")
            if job.adapter is None or not job.committed:
                raise Conflict(f"job {job_id} is {job.phase}: no round of it is committed yet")
            return job

        self._on_loop(find)
        story = _story(self._runtime.ports.log.of_job(job_id))
        if number and number not in story.adapters:
            known = ", ".join(map(str, sorted(story.adapters))) or "none"
            raise NotFound(f"job {job_id} has no accepted round {number}; accepted rounds: {known}")
        if not story.adapters:
            raise Conflict(f"no round of job {job_id} was accepted")
        chosen = number or max(story.adapters)
        adapter = story.adapters[chosen]
        if self._runtime.ports.blobs.path(adapter.sha) is None:
            keep = self._runtime.settings.keep_rounds
            raise Conflict(
                f"the adapter of round {chosen} is not kept any more (keep_rounds: {keep}); take a later one"
            )
        return adapter, chosen, story.bits


class _Story:
    """What a job's records tell of its accepted rounds."""

    def __init__(self) -> None:
        self.adapters: dict[int, BlobRef] = {}
        self.bits: dict[str, Bits] = {}


def _story(records: list[rec.AnyRecord]) -> _Story:
    story, folded = _Story(), dict[int, BlobRef]()
    for record in records:
        match record:
            case rec.RoundPlanned():
                story.bits.update({device: work.bits for device, work in record.plan.participants.items()})
            case rec.RoundFolded():
                folded[record.round] = record.adapter
            case rec.RoundCommitted() if record.accepted and record.round in folded:
                story.adapters[record.round] = folded[record.round]
            case _:
                pass
    return story


def _find(state: State, name: str) -> Release:
    if name in state.releases:
        return state.releases[name]
    found = [release for release in state.releases.values() if name in ("last", release.job)]
    if not found:
        raise NotFound(f"no release {name!r}; `muster release --list` shows all")
    return found[-1]


def _view(state: State, release: Release, *, whole: bool = False) -> ReleaseView:
    counts = [part.state for part in release.parts.values()]
    stands = next((one for one in reversed(state.releases.values()) if one.phase in ("rest", "finished")), None)
    return ReleaseView(
        id=release.id, job=release.job, round=release.round, state=release.phase, reason=release.reason,
        stands=stands is not None and stands.id == release.id, kind=release.kind if release.blob else "",
        bytes=release.blob.size if release.blob else 0, worse_by=release.worse_by, deadline_s=release.deadline_s,
        started=release.started_ts, left_out=release.left_out,
        devices=[_device(state, release, name, part) for name, part in sorted(release.parts.items())] if whole else [],
        committed=counts.count("committed"), failed=counts.count("failed") + counts.count("silent"),
        skipped=counts.count("skipped"),
    )  # fmt: skip


def _device(state: State, release: Release, device: str, part: Part) -> ReleasedDevice:
    report = state.release_reports.get(device)
    about = report if report is not None and report.release == release.id else None
    reason = part.reason
    if part.state == "told" and about is not None:
        reason = about.waits
    return ReleasedDevice(
        device=device, canary=device in release.chosen, state=part.state, stage=about.stage if about else "",
        reason=reason, active=report.active if report else "",
        before=part.before or (about.before if about else None), after=part.after or (about.after if about else None),
    )  # fmt: skip
