"""A job as its event log on disk tells it: what was asked, what came of it, and what the planner saw each time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from coordinator.adapters.event_log import SqliteEventLog
from coordinator.core import records as rec
from coordinator.core.draw import NOT_DRAWN
from coordinator.core.facts import ModelFacts
from shared.jobs import JobSpec
from shared.messages import DeviceInfo, Load, UpdateFacts, Work


@dataclass(frozen=True)
class Done:
    """A round that is over. `limits`: batch that fits, of those that ran out of memory."""

    round: int
    works: dict[str, Work]
    infos: dict[str, DeviceInfo]
    loads: dict[str, Load]
    results: dict[str, UpdateFacts]
    limits: dict[str, int]
    fetched: int
    """Bytes of the adapter that its devices fetched."""


@dataclass(frozen=True)
class Planned:
    """A plan, and all that the log holds before it. `adapter`: bytes of the global one at that moment.

    The record's `infos` are those of all candidates: what it left out, as records before it told it.
    """

    record: rec.RoundPlanned
    past: tuple[Done, ...]
    adapter: int


@dataclass
class Story:
    """One job; filled by `read`."""

    spec: JobSpec
    facts: ModelFacts
    plans: list[Planned] = field(default_factory=list)


def read(path: Path) -> Story:
    """The only job of the log at `path`."""
    log = SqliteEventLog(path)
    records = list(log.replay())
    log.close()
    (submitted,) = (record for record in records if isinstance(record, rec.JobSubmitted))
    (prepared,) = (record for record in records if isinstance(record, rec.JobPrepared))
    story, past, adapter = Story(submitted.spec, prepared.facts), list[Done](), prepared.adapter.size
    results: dict[str, UpdateFacts] = {}
    limits: dict[str, int] = {}
    counted: list[str] = []
    folded = adapter
    told: dict[str, DeviceInfo] = {}
    for record in records:
        match record:
            case rec.RoundPlanned():
                told |= record.infos
                left = [device for device, why in record.plan.left_out.items() if why != NOT_DRAWN]
                over = sorted([*record.plan.participants, *left])
                whole = replace(record, infos={device: told[device] for device in over})
                story.plans.append(Planned(whole, tuple(past), adapter))
                results, limits, counted = {}, {}, []
            case rec.UpdateAdmitted():
                results[record.device] = record.facts
                limits.pop(record.device, None)
                if record.facts.batch_limit:
                    limits[record.device] = record.facts.batch_limit
            case rec.DeviceAnswered() if record.out_of_memory:
                limits[record.device] = record.batch_limit
            case rec.RoundClosed():
                counted = record.devices
            case rec.RoundFolded():
                folded = record.adapter.size
            case rec.RoundCommitted() | rec.RoundRepeated():
                plan = story.plans[-1].record
                kept = {device: facts for device, facts in results.items() if device in counted}
                past.append(
                    Done(record.round, plan.plan.participants, plan.infos, plan.loads, kept, dict(limits), adapter)
                )
                if isinstance(record, rec.RoundCommitted) and record.accepted:
                    adapter = folded
            case _:
                pass
    return story
