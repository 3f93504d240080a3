"""What the runs of `bench/planning.py` say of each claim, and the tables of the studies. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from bench.planning_grid import TASKS, Method
from bench.planning_studies import STUDIES, Study, label
from bench.planning_tables import Results, interval, prediction_error, seconds_a_round, told
from bench.planning_words import PARTS_OF_FEDPIPE
from muster.testbed import simulated

Reading = Callable[[simulated.Result, float], tuple[float, bool]]
LAST = 3
"""Rounds whose mean is the quality at the end of a run: single rounds under skew are noise."""


class Ratio(NamedTuple):
    """How many times more a rival takes than the method: geometric mean over pairs of runs with its 95 % interval.

    Of `pairs` in all, `open`: the rival did not arrive, whose part of the ratio is a lower bound; `lost`: the method
    did not, where it is an upper bound; `neither` did, which counts for nothing.
    """

    mean: float
    low: float
    high: float
    pairs: int
    open: int
    lost: int
    neither: int

    def __str__(self) -> str:
        spread = "" if math.isnan(self.low) else f" ({self.low:.2f} to {self.high:.2f})"
        notes = [f"; in {self.open} the rival did not arrive: at least"] * (self.open > 0)
        notes += [f"; in {self.lost} the method did not arrive: at most"] * (self.lost > 0)
        notes += [f"; in {self.neither} neither arrived"] * (self.neither > 0)
        return f"{self.mean:.2f}{spread}, {self.pairs} pairs{''.join(notes)}"

    def meets(self, wanted: float) -> bool | None:
        """Whether the mean reaches `wanted`; None where the runs can't tell."""
        if self.lost or self.neither:
            return False
        return None if self.open and self.mean < wanted else self.mean >= wanted


def seconds(result: simulated.Result, target: float) -> tuple[float, bool]:
    """(virtual seconds to the target, or of the whole run where it did not arrive; whether it did)."""
    found = simulated.time_to(result.rounds, target)
    return (simulated.whole_run(result.rounds), False) if found is None else (found, True)


def traffic(result: simulated.Result, target: float) -> tuple[float, bool]:
    """(bytes over all links to the target, or in the whole run; whether it arrived)."""
    found = simulated.bytes_to(result.rounds, target)
    if found is None:
        return float(sum(one.bytes_up + one.bytes_down for one in result.rounds)), False
    return float(found), True


def ratio(results: Results, method: str, rival: str, reading: Reading) -> Ratio | None:
    """`rival` over `method`, in pairs of runs with the same task, alpha and seed; None where there is no pair."""
    mine, theirs = (_by_place(results, name) for name in (method, rival))
    logs, missed, lost, neither = [], 0, 0, 0
    places = sorted(mine.keys() & theirs.keys())
    for place in places:
        target = TASKS[place[0]].target
        if not mine[place].rounds or not theirs[place].rounds:
            # A run that failed: the method's own is a loss, the rival's tells nothing.
            lost += not mine[place].rounds
            neither += bool(mine[place].rounds)
            continue
        (own, arrived), (other, came) = reading(mine[place], target), reading(theirs[place], target)
        if not arrived and not came:
            neither += 1
            continue
        logs.append(math.log(other / own))
        missed += not came
        lost += not arrived
    if not logs:
        return None
    mean, half = interval(logs)
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(places), missed, lost, neither)


MINUTES = 60.0
"""That the standard profile may take on two cores."""
BY_OTHERS = (
    ("replanning.", "re-planning 10,000 devices, the slowest planner (`bench/run.py replanning`)", "<= 1 s"),
    ("order.tau", "Kendall's tau of time to target, 6 emulated devices over mosquitto against the virtual clock "
     "(`bench/run.py order`)", ">= 0.6"),
    ("predicted_memory.cpu_", "predicted memory of a training step off what the CPU's allocator hands out, the worst "
     "of 16, 8 and 4 bits (`bench/run.py predicted_memory`)", "<= 10 %"),
    ("predicted_memory.as_gpu_", "the same where the CPU keeps what a GPU keeps, predicted for a GPU", "<= 10 %"),
    ("cuda.memory_", "the same off `torch.cuda.max_memory_allocated` on CUDA (`bench/run.py on_cuda`)", "<= 10 %"),
)  # fmt: skip
"""Claims that other benchmarks measure: the beginning of their names, and what is asked of them."""


def claims(
    results: Results, studies: Mapping[str, Results], *, others: Sequence[Mapping[str, Any]] = (), minutes: float = 0.0
) -> Iterator[str]:
    """The table of claims, line by line. `others`: figures of other benchmarks (`bench/results.json`); `minutes`: of
    the standard profile on two cores; 0: not known."""
    yield "| claim | measured | must reach | met |"
    yield "|---|---|---|---|"
    main = [(run, result) for run, result in results if run.task == "dbpedia14"]
    for rival in ("fedlora", "fedadapter", "full"):
        roomy = ", on a fleet with memory enough for it" if rival == "full" else ""
        what = f"`fedpipe` against `{rival}`{roomy}: times faster to the target"
        yield from _by_alpha(main, what, ("fedpipe", rival), seconds, 2.0)
    for rival in ("fedlora, equal", "fedadapter, equal", "full, equal-roomy"):
        equal = ratio(studies.get("equal", []), "fedpipe, equal", rival, seconds)
        yield _row(f"the same on a fleet of equal devices, against `{rival.partition(',')[0]}`", equal, 1.0)
    yield from _params(main, studies)
    for rival in ("fedlora", "hetlora", "fedadapter"):
        what = f"`legend` against `{rival}`: times faster to the target"
        yield from _by_alpha(main, what, ("legend", rival), seconds, 1.5)
        what = f"`legend` against `{rival}`: the rival's traffic to the target over its own (1.72: 42 % less)"
        yield from _by_alpha(main, what, ("legend", rival), traffic, 1 / (1 - 0.42))
    for name in ("legend", "fedpipe"):
        shares = [100 * simulated.mean_waiting(result.rounds) for run, result in main if run.method.name == name]
        if shares:
            mean, half = interval(shares)
            yield _line(f"share of the round that devices wait, `{name}`", f"{mean:.1f} ± {half:.1f} %", "<= 10 %",
                        mean <= 10)  # fmt: skip
    yield from _padding(studies.get("padding", []), "unequal ranks, 2 to 8")
    yield from _padding(studies.get("padding-wide", []), "unequal ranks, 2 to 64, each at its own best rate")
    for name, what, wanted in BY_OTHERS:
        figures = [one for one in others if str(one["name"]).startswith(name)]
        figures = [one for one in figures if not isinstance(one["value"], str)] or figures
        if figures and isinstance(figures[0]["value"], str):
            yield _line(what, "not run", wanted, None)
        elif figures:
            worst, (_, _, unit) = max(float(one["value"]) for one in figures), wanted.split(" ", 1)[1].partition(" ")
            yield _line(what, f"{worst:.2f} {unit}".rstrip(), wanted, all(one["met"] for one in figures))
    if minutes:
        yield _line("the runs of this profile, on 2 cores", f"{minutes:.0f} minutes", f"<= {MINUTES:.0f}",
                    minutes <= MINUTES)  # fmt: skip


def _by_alpha(
    results: Results, claim: str, names: tuple[str, str], reading: Reading, wanted: float
) -> Iterator[str]:  # fmt: skip
    """A row for each skew: runs of one seed share devices and are no independent draws."""
    for alpha in sorted({run.alpha for run, _ in results}, reverse=True):
        here = [(run, result) for run, result in results if run.alpha == alpha]
        yield _row(f"{claim}, Dirichlet {alpha:g}", ratio(here, *names, reading), wanted)


def _row(claim: str, found: Ratio | None, wanted: float) -> str:
    if found is None:
        return _line(claim, "not run", f">= {wanted:.3g}", None)
    return _line(claim, str(found), f">= {wanted:.3g}", found.meets(wanted))


def _line(claim: str, measured: str, wanted: str, met: bool | None) -> str:
    return f"| {claim} | {measured} | {wanted} | {'' if met is None else 'yes' if met else '**no**'} |"


PARAMS = (
    ("params", ""), ("params-falling", ", both at falling rates"),
    ("params-whole", ", both at falling rates, `fedpipe` with all directions of its updates"),
)  # fmt: skip
"""Studies of quality against full fine-tuning, and how they are told apart."""


def _params(main: Results, studies: Mapping[str, Results]) -> Iterator[str]:
    """Parameters trained, and what they reach against all of them."""
    shares = [fmean(part.params for one in result.rounds for part in one.devices) for run, result in main
              if run.method.name == "fedpipe"]  # fmt: skip
    whole = [part.params for run, result in main if run.method.name == "full" for one in result.rounds
             for part in one.devices]  # fmt: skip
    if shares and whole:
        share = 100 * fmean(shares) / fmean(whole)
        yield _line("`fedpipe`: parameters that a device trains, of full fine-tuning's", f"{share:.2f} %", "<= 20 %",
                    share <= 20)  # fmt: skip
        for name, words in PARAMS:
            study = studies.get(name, [])
            gaps = _ahead(study, Method("full"), Method("fedpipe"))
            if len(gaps) > 1:
                own, rival = (
                    [(run, result) for run, result in study if run.method.name == method]
                    for method in ("fedpipe", "full")
                )
                mean, half = interval(gaps)
                yield _line(
                    f"`fedpipe` after {_length(own)} behind full fine-tuning after {_length(rival)}, {len(gaps)} "
                    f"seeds{words}",
                    f"{mean:.1f} ± {half:.1f} points with {share:.2f} % of the parameters",
                    "<= 1 point with <= 5 % of the parameters", mean <= 1 and share <= 5,
                )  # fmt: skip


def _length(results: Results) -> str:
    spent = fmean(simulated.whole_run(result.rounds) for _, result in results)
    return f"{results[0][0].rounds} rounds ({spent:.0f} s)"


def _padding(study: Results, ranks: str) -> Iterator[str]:
    pairs = _ahead(study, Method("hetlora", "fsr"), Method("hetlora"))
    if len(pairs) < 2:
        return
    mean, half = interval(pairs)
    yield _line(f"exact aggregation over zero-padding at {ranks}, mean difference",
                f"{mean:.1f} ± {half:.1f} points, lowest {min(pairs):.1f}",
                "interval above 0, no seed below -0.5", mean - half > 0 and min(pairs) >= -0.5)  # fmt: skip


def _ahead(study: Results, method: Method, rival: Method) -> list[float]:
    """As `differences`, where all runs of a method are of one variant."""
    variants = {run.method: run.variant for run, _ in study}
    mine, theirs = (label(one, variants.get(one, "")) for one in (method, rival))
    return differences(study, mine, theirs)


def differences(results: Results, method: str, rival: str) -> list[float]:
    """Points of quality at the end by which `method` is ahead of `rival`, seed by seed."""
    mine, theirs = (_by_place(results, name) for name in (method, rival))
    both = [at for at in sorted(mine.keys() & theirs.keys()) if mine[at].rounds and theirs[at].rounds]
    return [100 * (at_the_end(mine[at]) - at_the_end(theirs[at])) for at in both]


def at_the_end(result: simulated.Result) -> float:
    """Mean quality of the last rounds."""
    found = [q for one in result.rounds[-LAST:] if (q := simulated.quality(one)) is not None]
    return fmean(found) if found else math.nan


def study_table(study: Study, results: Results) -> Iterator[str]:
    """What a study's runs gave, variant by variant."""
    target = TASKS["dbpedia14"].target
    yield "| method | seeds | quality at the end | s to target | s per round | waiting | MB per round | prediction |"
    yield "|---|---|---|---|---|---|---|---|"
    for method, variant in study.pairs:
        mine = [
            result for run, result in results if (run.method, run.variant) == (method, variant) and result.rounds
        ]  # fmt: skip
        if not mine:
            continue
        cells = [
            label(method, variant), f"{len(mine)} of {len(study.seeds)}",
            told(mine, at_the_end, "{:.4f}"), told(mine, lambda one: simulated.time_to(one.rounds, target), "{:.0f}"),
            told(mine, seconds_a_round, "{:.1f}"),
            told(mine, lambda one: 100 * simulated.mean_waiting(one.rounds), "{:.1f} %"),
            told(mine, lambda one: fmean(r.bytes_up + r.bytes_down for r in one.rounds) / 1e6, "{:.2f}"),
            told(mine, prediction_error, "{:.0f} %"),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    for faster, slower in study.ratios:
        found = ratio(results, faster, slower, seconds)
        if found is not None:
            yield from ("", f"`{faster}` against `{slower}`: times faster to the target {found}.")


def pair_table(results: Results) -> Iterator[str]:
    """Two devices round by round: what each was asked, when each was done, and how much of the round they waited."""
    yield "| round | device | bits | batch | highest rank | modules | parameters | done after s | waiting |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for _, result in results:
        for one in result.rounds:
            for part in one.devices:
                yield (
                    f"| {one.round} | {part.kind} | {part.bits} | {part.batch} | {part.rank} | {part.modules} "
                    f"| {part.params} | {part.own_s:.1f} | {one.waiting:.0%} |"
                )


STAGES = ((1, 1), (2, 2), (3, 3), (4, 6), (7, 10), (11, 40))
"""First and last rounds that a prediction error is averaged over."""


def drift_table(results: Results) -> Iterator[str]:
    """Predicted against measured training time, as planners come to know the fleet and it changes under them."""
    yield from _by_stage(results, lambda one: one.prediction_error)


def fedpipe_table(results: Results) -> Iterator[str]:
    """What of `fedpipe` acted in its runs: rounds over chosen modules, and in these ranks and bits."""
    yield "| task | Dirichlet | rounds over chosen modules, by seed | devices there with fewer parameters | bits |"
    yield "|---|---|---|---|---|"
    mine = [(run, result) for run, result in results if run.method.name == "fedpipe" and result.rounds]
    for place in sorted({(run.task, run.alpha) for run, _ in mine}, key=lambda one: (one[0], -one[1])):
        here = [result for run, result in mine if (run.task, run.alpha) == place]
        chosen = [_over_chosen(result) for result in here]
        parts = [part for rounds in chosen for one in rounds for part in one.devices]
        fewer = sum(
            part.params < max(one.params for one in round.devices)
            for rounds in chosen for round in rounds for part in round.devices
        )  # fmt: skip
        bits = ", ".join(f"{bits}" for bits in sorted({part.bits for result in here for one in result.rounds
                                                       for part in one.devices}))  # fmt: skip
        counts = ", ".join(
            f"{len(rounds)} of {len(result.rounds)}" for rounds, result in zip(chosen, here, strict=True)
        )  # fmt: skip
        yield f"| {place[0]} | {place[1]:g} | {counts} | {fewer} of {len(parts)} | {bits} |"


def _over_chosen(result: simulated.Result) -> list[simulated.RoundResult]:
    every = max(part.modules for one in result.rounds for part in one.devices)
    return [one for one in result.rounds if max((part.modules for part in one.devices), default=every) < every]


def waiting_table(results: Results) -> Iterator[str]:
    """The share of rounds that devices wait, likewise."""
    yield from _by_stage(results, lambda one: one.waiting)


def _by_stage(results: Results, share: Callable[[simulated.RoundResult], float | None]) -> Iterator[str]:
    yield "| method | " + " | ".join(f"round {a}" if a == b else f"{a}-{b}" for a, b in STAGES) + " |"
    yield "|---" * (len(STAGES) + 1) + "|"
    for name in sorted({label(run.method, run.variant) for run, _ in results}):
        rounds = [one for run, result in results if label(run.method, run.variant) == name for one in result.rounds]
        cells = []
        for first, last in STAGES:
            shares = [share(one) for one in rounds if first <= one.round <= last]
            found = [one for one in shares if one is not None]
            cells.append(f"{100 * fmean(found):.0f} %" if found else "-")
        yield f"| {name} | {' | '.join(cells)} |"


def sections(results: Results, studies: Mapping[str, Results]) -> Iterator[str]:
    """All that follows the tables of the grid."""
    drifting = [(run, result) for run, result in results if run.task == "dbpedia14"]
    if any(run.method.name == "fedpipe" for run, _ in results):
        yield from ("", "## What of `fedpipe` acts in these runs", "", PARTS_OF_FEDPIPE)
        yield from fedpipe_table(results)
    if drifting:
        yield from ("", "## Predicted against measured step time under drifting load", "")
        yield "Mean of |predicted - trained| / trained seconds over the devices of a round. Heat, foreign load and 6 %"
        yield "noise of a step move under the planners, and after 20 rounds, which few runs reach, power modes; seconds"
        yield "of a device not met before are a guess."
        yield ""
        yield from drift_table(drifting)
        yield from ("", "## Waiting, round by round", "")
        yield "Mean share of a round that its devices wait for the slowest."
        yield ""
        yield from waiting_table(drifting)
    for study in STUDIES:
        found = studies.get(study.name, [])
        yield from (
            "",
            f"## {study.title}",
            "",
            f"`python -m bench.planning --studies {study.name}`. {study.remark}".rstrip(),
        )
        yield ""
        if not found:
            yield "Not run."
            continue
        yield from pair_table(found) if study.name == "pair" else study_table(study, found)


def _by_place(results: Results, name: str) -> dict[tuple[str, float, int], simulated.Result]:
    return {
        (run.task, run.alpha, run.seed): result for run, result in results if label(run.method, run.variant) == name
    }


def cost(seconds: Sequence[Mapping[str, Any]], names: Container[str]) -> tuple[float, float, int]:
    """(minutes, CPU minutes, runs counted) of the runs of these files, from the lines of `seconds.jsonl`. Of two runs
    side by side each took half of its time."""
    mine = [one for one in seconds if one["run"] in names]
    wall = sum(float(one["wall_s"]) / int(one.get("abreast", 1)) for one in mine) / 60
    return wall, sum(float(one["cpu_s"]) for one in mine) / 60, len(mine)
