"""The phases of a job as one table; `docs/state-machines.md` is generated from it and every step is checked against it.

Planning, closing and starting happen on `Tick` alone (the runtime ticks after every event), so that none of them can
wait for an event that never comes.
"""

from __future__ import annotations

from shared.machines import Transition

FIRST = "queued"
_RUNNING = ("preparing", "baseline", "waiting", "open", "folding", "evaluating", "exporting")

TABLE: tuple[Transition, ...] = (
    Transition("queued", "Tick", ("preparing",), "no other job holds the fleet"),
    Transition(
        "preparing", "BasePrepared", ("baseline", "waiting"), "the base was inspected, round 0's adapter exists"
    ),
    Transition("preparing", "WorkFailed", ("failed",), "the base can't be loaded"),
    Transition("baseline", "Evaluated", ("waiting",), "the untrained base was measured on the held-out data"),
    Transition("baseline", "WorkFailed", ("failed",), "the held-out data can't be used"),
    Transition("waiting", "Tick", ("open",), "enough devices are ready: the plan is recorded"),
    Transition(
        "open", "Tick", ("folding", "waiting", "paused"), "all delivered or quorum at the deadline; else it repeats"
    ),
    Transition("open", "TopFailed", ("paused",), "the top worker can't do its part; the operator is needed"),
    Transition("folding", "Folded", ("evaluating",), "the aggregate is on disk"),
    Transition("folding", "WorkFailed", ("paused",), "the aggregate can't be made; the operator is needed"),
    Transition("evaluating", "Tick", ("waiting", "exporting"), "no held-out data: committed without a judgement"),
    Transition(
        "evaluating", "Evaluated", ("waiting", "exporting", "paused"), "judged and committed; three refusals pause"
    ),
    Transition("evaluating", "WorkFailed", ("paused",), "the evaluation can't be done; the operator is needed"),
    Transition("exporting", "Exported", ("finished",), "the PEFT folder is complete"),
    Transition("exporting", "WorkFailed", ("paused",), "the export can't be written; the operator is needed"),
    Transition(
        "paused", "ResumeRequested", ("waiting", "folding", "evaluating", "exporting"), "resumed where it paused"
    ),
    *(
        Transition(p, "CancelRequested", ("cancelled",), "an operator cancelled it")
        for p in ("queued", *_RUNNING, "paused")
    ),
)
