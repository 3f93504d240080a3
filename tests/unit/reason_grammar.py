"""The grammar of reasons: every sentence that a planner may say, its reading, its bound and each of its notes.

Kept apart from the planners' own words: a sentence of another form, or a note that stands nowhere here, is an error.
"""

from __future__ import annotations

import re
from typing import NamedTuple

HEAD = re.compile(r"(?P<name>[a-z]+) (?P<value>\d+): (?P<rest>.+)", re.DOTALL)


def s(name: str) -> str:
    """Seconds."""
    return rf"(?P<{name}_s>[\d.]+(?:e[-+]\d+)?) s"


def m(name: str) -> str:
    """MiB."""
    return rf"(?P<{name}_mib>\d+) MiB"


def n(name: str) -> str:
    """A whole number."""
    return rf"(?P<{name}>\d+)"


def f(name: str) -> str:
    """A number with a point."""
    return rf"(?P<{name}>\d+\.\d+)"


SOURCE = (
    r"(?:fitted on (?P<fitted>\d+) rounds?|from (?P<other>\d+) rounds? at (?P<other_bits>\d+) bits"
    r"|(?P<median>median of the fleet|its probe against the fleet's)|(?P<assumed>assumed speed))"
)
CAPACITY = (
    r"(?:(?P<free>[\d.]+) free cores \(foreign (?P<foreign>[\d.]+) of (?P<cores>[\d.]+)\)"
    r"|(?P<gpu_free>[\d.]+) of the GPU free \(foreign (?P<gpu_foreign>[\d.]+) of 1\.00\))"
)
BUDGET = (
    rf"(?:(?P<unlimited>no memory limit \(0 MiB reported\))"
    rf"|{m('budget')} memory budget \(limit {m('limit')}, reserve {m('reserve')}, foreign {m('taken')}\))"
)
RAN = rf"{m('limit')} memory limit by having run under it"
MEMORY = (
    rf"{m('size')}(?: at batch {n('at_batch')})? \("
    rf"(?:agent {m('agent')} at work, base {m('base')}(?: frozen, {m('tuned')} tuned itself)?"
    rf", activations {m('activations')} or loading {m('loading')}"
    rf"|measured {m('peak')}(?: at {n('peak_bits')} bits)? with {n('samples')} samples at once)\)"
)
OWN = rf"(?:averaged over {n('averaged')} rounds?|{SOURCE}(?:, 0 rounds of its own)?)"
"""Of `legend`, which measures by itself."""
STEP = rf"step {s('step')} \({OWN}\) at {CAPACITY}, {n('steps')} steps? {s('took')}"
TARGET = rf"{s('target')} round target"
RANKS = rf"ranks {n('lowest')}(?: to {n('highest')})? on {n('modules')} modules?, {n('params')} parameters?"

FORMS: dict[str, tuple[str, str, str]] = {
    "rank/equal": (
        rf"{n('asked')} asked on {n('modules')} modules?", "meets|exceeds", rf"the smallest side {n('side')}"
    ),
    "rank/itself": (rf"{n('params')} parameters trained themselves", "meets", rf"{n('factors')} factors asked"),
    "rank/head": (rf"{n('modules')} modules tuned, only the head", "meets", rf"{n('params')} parameters of the head"),
    "rank/capability": (
        rf"step {s('step')} \({SOURCE}\) undisturbed at batch {n('batch')}",
        "meets|exceeds",
        rf"{s('allowed')} for {n('rank')} of {n('largest')} \((?P<fastest>[\w-]+), the fastest, takes {s('fastest')}\)",
    ),
    "rank/width": (
        rf"width {n('width')} in the top {n('depth')} blocks?, "
        rf"(?:(?P<alike>all devices alike)|trial group {n('group')} of {n('groups')})",
        "meets",
        rf"width {n('widest')} and {n('deepest')} blocks? at most",
    ),
    "rank/rising": (
        rf"blocks {n('lowest')} to {n('highest')} of {n('blocks')} get (?P<ranks>\d+(?: \d+)*)",
        "meets",
        rf"{n('total')} in all, {n('mean')} on average",
    ),
    "rank/by memory": (RANKS, "meets", rf"{n('room')} that {BUDGET} leaves at batch {n('batch')}"),
    "rank/by having run": (
        RANKS, "meets", rf"{n('room')} that have run under the {m('limit')} memory limit at batch {n('batch')}"
    ),
    "rank/by time": (
        RANKS, "meets|exceeds", rf"{n('room')} that {s('left')} leave at batch {n('batch')} and {CAPACITY}"
    ),
    "batch/time": (STEP, "meets|exceeds", TARGET),
    "batch/memory": (MEMORY, "meets", BUDGET),
    "batch/ran": (MEMORY, "meets", RAN),
    "bits/memory": (MEMORY, "meets", BUDGET),
    "bits/ran": (MEMORY, "meets", RAN),
    "depth": (
        rf"{s('round')} = forward {s('forward')} \+ {s('back')} back through (?P<passed>[\d.]+) of (?P<all>[\d.]+) "
        rf"blocks \+ transfer {s('transfer')} "
        rf"\((?:averaged over {n('averaged')} rounds?|{SOURCE}, 0 rounds of its own)\) at {CAPACITY}",
        "meets",
        TARGET,
    ),
    "steps/deadline": (rf"{n('asked')} asked x {s('step')} = {s('took')}", "meets|exceeds", rf"{s('bound')} deadline"),
    "steps/time": (
        rf"{n('asked')} asked x {s('step')} = {s('took')}(?: from {s('first')} on)?, the last from {s('last')}",
        "meets|exceeds",
        rf"{s('bound')} training time",
    ),
    "agents/cores": (
        rf"{n('ready')} ready, {f('cores')} cores and {n('rows')} rows on the device", "meets",
        rf"{n('core')} core or part of one and {n('row')} row for each",
    ),
    "agents/gpus": (
        rf"{n('ready')} ready, {n('gpus')} GPUs? and {n('rows')} rows on the device", "meets",
        rf"{n('gpu')} GPU and {n('row')} row for each",
    ),
    "weights/first": (
        rf"{n('steps')} steps? and no scores before round {n('round')}", "meets", rf"the warm-up of {n('whole')} steps?"
    ),
    "weights/old": (
        rf"scores of round {n('scored')} are {n('age')} rounds? old", "meets", rf"a new score every {n('every')}"
    ),
    "weights/chosen": (
        rf"{f('share')} of the score of round {n('scored')} on {n('chosen')} of {n('modules')} modules?", "meets",
        rf"{f('wanted')} wanted",
    ),
}  # fmt: skip
"""Kind -> (reading, verb, bound)."""

NOTES: dict[str, str] = {
    "clipped": rf"{n('clipped')} modules? smaller than that get their size",
    "least rank": r"the least rank all the same",
    "rank by bits": rf"{n('larger')} would leave memory for {n('fewer')} bits only, "
    rf"{n('rank')} leaves it for {n('bits')}",
    "rank by memory": rf"{n('larger')} would not fit \((?P<refused>memory: .+)\)",
    "nothing measured": r"nothing was measured yet: devices are taken to be as fast as their probes, or alike",
    "not measured itself": r"not measured itself yet",
    "trial too large": rf"its memory does not hold the trial of depth {n('depth')}, width {n('width')}",
    "trial by bits": rf"the trial of depth {n('depth')}, width {n('width')} would leave memory for "
    rf"{n('fewer')} bits only, this leaves it for {n('bits')}",
    "rising": rf"rising from {n('first')} over {n('blocks')} blocks?, sum {n('sum')}",
    "worth": rf"worth {f('worth')} of {f('most')} at under-training {n('under')}%",
    "least ranks": r"the least ranks all the same",
    "largest batch": rf"{n('size')} is the largest batch of the job",
    "the job's batch": rf"{n('size')} is the batch of the job, not to be passed by old readings",
    "alike": rf"{n('size')} is the batch of the job, as every device has it",
    "rows": rf"the data set has {n('rows')} rows?",
    "ran out": rf"{n('size')} ran out of memory before \(limit {n('limit')}\)",
    "batch by memory": rf"{n('size')} would take {m('size')} of {m('budget')} memory",
    "batch by time": rf"{n('size')} would take {s('took')}",
    "no room": rf"{n('size')} leaves no room for ranks in {m('budget')} memory",
    "no room in time": rf"{n('size')} has no room for ranks even with {n('under')}% of the steps undone",
    "bounded J": rf"{n('size')} would give J {f('rival')} at most",
    "greedy J": rf"{n('size')} would give J {f('rival')} by the greedy",
    "J": rf"J {f('objective')}",
    "least batch": r"the least batch all the same",
    "old: batch": rf"{{old}}: cautious batch {n('halved')} instead of {n('batch')}",
    "old: least batch": rf"{{old}}: batch {n('batch')} is the least already",
    "old: bits": rf"{{old}}: cautious {n('fewer')} bits instead of {n('bits')}, which takes {m('size')}",
    "old: depth": rf"{{old}}: cautious depth {n('halved')} instead of {n('depth')}",
    "old: least depth": rf"{{old}}: depth {n('depth')} is the least already",
    "bits ran out": rf"{n('bits')} bits ran out of memory above batch {n('limit')}",
    "bits by memory": rf"{n('bits')} bits would take {m('size')}",
    "bits proven": rf"{n('bits')} bits are the most proven here",
    "bits asked": rf"{n('bits')} bits asked",
    "all blocks": rf"there are {n('blocks')} blocks?",
    "depth by memory": rf"{n('depth')} would take {m('size')} of {m('budget')} memory",
    "depth by deadline": rf"{n('depth')} would take {s('took')} of {s('late')}, {n('share')}% of the deadline",
    "depth by time": rf"{n('depth')} would take {s('took')}",
    "partial work": r"partial work counts",
    "more": rf"up to {n('extra')} more while there is time",
    "lost": r"an update after the deadline is lost",
    "undone": rf"{n('undone')} of the job's {n('asked')} left undone",
    "transfer": rf"transfer {s('transfer')} "
    rf"\((?:(?P<unmeasured>link not yet measured)(?:: the median's {f('usual')} MB/s)?"
    rf"|{m('moved')} at {f('rate')} MB/s)\)",
    "only the head": r"only the head is trained",
    "all tuned": rf"all modules tuned at rank {n('rank')}",
    "all scored": rf"all modules tuned at rank {n('rank')} to score them",
    "most": r"most: (?P<most>.+)",
}
"""Kind of a note -> its form. `{old}`: why telemetry is not to be trusted."""

OLD = rf"(?:(?P<unheard>no telemetry yet)|telemetry is {n('age')} s old \(limit {n('fresh')} s\))"

NOTES_OF: dict[str, set[str]] = {
    "rank/equal": {"clipped"},
    "rank/itself": set(),
    "rank/head": set(),
    "rank/capability": {
        "clipped", "least rank", "rank by bits", "rank by memory", "nothing measured", "not measured itself"
    },
    "rank/width": {"trial too large", "trial by bits"},
    "rank/rising": {"rising", "clipped"},
    "rank/by memory": {"worth"},
    "rank/by having run": {"worth"},
    "rank/by time": {"worth", "least ranks"},
    "batch/time": {
        "largest batch", "the job's batch", "rows", "ran out", "batch by memory", "batch by time", "least batch",
        "no room", "no room in time", "bounded J", "greedy J", "J", "old: batch", "old: least batch",
    },
    "batch/memory": {"alike", "rows", "ran out", "batch by memory"},
    "batch/ran": {"alike", "ran out", "batch by memory"},
    "bits/memory": {"bits ran out", "bits by memory", "old: bits", "bits proven", "bits asked"},
    "bits/ran": {"bits by memory", "bits ran out", "old: bits", "bits proven", "bits asked"},
    "depth": {"all blocks", "depth by memory", "depth by deadline", "depth by time", "old: depth", "old: least depth"},
    "steps/deadline": {"lost", "transfer", "only the head"},
    "steps/time": {"partial work", "more", "undone", "transfer", "only the head"},
    "agents/cores": set(),
    "agents/gpus": set(),
    "weights/first": {"all tuned", "all scored"},
    "weights/old": {"all scored"},
    "weights/chosen": {"most"},
}  # fmt: skip
"""Kind -> the notes that may follow; each pair must be met by some plan."""


class Note(NamedTuple):
    """One note, parsed."""

    kind: str
    said: dict[str, str]


class Reason(NamedTuple):
    """A sentence, parsed: `said` holds the numbers of reading and bound by their names in the grammar."""

    kind: str
    value: int
    verb: str
    said: dict[str, str]
    notes: tuple[Note, ...]

    def note(self, kind: str) -> dict[str, str] | None:
        return next((note.said for note in self.notes if note.kind == kind), None)


_FORMS = {
    kind: re.compile(rf"{reading} (?P<verb>{verb}) {bound}") for kind, (reading, verb, bound) in FORMS.items()
}  # fmt: skip
_NOTES = {kind: re.compile(form.replace("{old}", OLD)) for kind, form in NOTES.items()}


def parse(name: str, text: str) -> Reason:
    """The reason of the number `name`. Raises `AssertionError` where the sentence is in no form of the grammar."""
    head = HEAD.fullmatch(text)
    assert head and head["name"] == name, text
    first, *rest = parts(head["rest"])
    found = [
        (kind, match)
        for kind, form in _FORMS.items()
        if kind.split("/")[0] == name and (match := form.fullmatch(first))
    ]
    assert len(found) == 1, (text, [kind for kind, _ in found])
    kind, match = found[0]
    notes = tuple(_note(kind, one, text) for one in rest)
    return Reason(kind, int(head["value"]), match["verb"], _said(match), notes)


def parts(text: str) -> list[str]:
    """Split at each `; ` that stands in no brackets."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0 and text.startswith("; ", place):
            found.append(text[start:place])
            start = place + 2
    return [*found, text[start:]]


def _note(kind: str, text: str, whole: str) -> Note:
    found = [(one, match) for one in sorted(NOTES_OF[kind]) if (match := _NOTES[one].fullmatch(text))]
    assert len(found) == 1, (whole, text, [one for one, _ in found])
    return Note(found[0][0], _said(found[0][1]))


def _said(match: re.Match[str]) -> dict[str, str]:
    return {name: told for name, told in match.groupdict().items() if told is not None and name != "verb"}
