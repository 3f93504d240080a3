"""The grid of `bench/planning.py`: what is run, that nothing is run twice, and what the tables tell."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench import planning, planning_plots, planning_runs
from bench.planning_claims import at_the_end, claims, differences, ratio, seconds, study_table, traffic
from bench.planning_grid import GRIDS, RATES, SAME_RUNS, Grid, Method, Run, final_runs, methods, tuning_runs
from bench.planning_studies import Study
from bench.planning_tables import interval, page
from coordinator.core.aggregation import registry as aggregators
from coordinator.core.planning import registry
from muster.testbed.models import SmallGpt2
from muster.testbed.simulated import Outcome, Result, RoundResult

GRID = Grid(cells=(("dbpedia14", 1.0, (0, 1)), ("e2e", 1.0, (0,))), few=frozenset({"e2e"}), rounds=4, tuning=2)
UNIFORM, HEAD, FEDLORA, HETLORA = Method("uniform"), Method("head"), Method("fedlora"), Method("hetlora")


def _result(run: Run, accuracy: float, at: float = 10.0) -> Result:
    part = Outcome(
        device="sim-01", kind="nx", status="done", predicted_s=1.0, trained_s=2.0, own_s=3.0, predicted_peak=0, peak=1,
        batch=4, bits=16, rank=8, modules=2, params=500_000, steps=8,
    )  # fmt: skip
    rounds = [
        RoundResult(
            round=number, seconds=at, at=at * number, loss=1.0, accuracy=accuracy * number / 2, perplexity=None,
            accepted=True, bytes_up=1_000_000, bytes_down=500_000, waiting=0.2, prediction_error=0.5, devices=[part],
        )
        for number in (1, 2)
    ]  # fmt: skip
    return Result(
        job="planning", state="finished", strategy=run.method.strategy, aggregator="fsr", profile="jetson", devices=80,
        data=run.task, alpha=run.alpha, seed=run.seed, lr=run.lr, baseline=None, rounds=rounds, bytes_by_device={},
    )  # fmt: skip


def test_all_planners_are_methods_and_inexact_ones_get_the_exact_aggregator_once() -> None:
    found = methods()
    assert {method.strategy for method in found} == set(registry.PLANNERS) - {*aggregators.PRUNING, *aggregators.SPLIT}
    assert UNIFORM in found and Method("uniform", "fsr") not in found
    assert methods(["uniform"]) == [UNIFORM]
    # What would be the same run twice is left out.
    assert Method("hetlora", "fsr") in found and not SAME_RUNS.keys() & {method.name for method in found}
    # The standard profile has every strategy once; the floor and other aggregators are asked for beside it.
    once = [method.name for method in found if not method.beside]
    assert sorted([*once, "head"]) == sorted({method.strategy for method in found})


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_under_strong_skew_the_share_of_a_device_is_bounded_where_batches_differ(alpha: float) -> None:
    for method in methods():
        one_batch = getattr(registry.PLANNERS[method.strategy](), "one_batch", method.strategy == "fedadapter")
        run = Run(method, "dbpedia14", alpha, 0, 0.01, "test", 4)
        strategy = planning_runs.simulation(run, Path()).over["strategy"]
        assert isinstance(strategy, dict)
        assert strategy["batch_max"] == (32 if one_batch else 64), method.name
        assert strategy.get("max_share") == (0.12 if alpha == 0.1 and not one_batch else None), method.name


def test_every_method_is_tuned_with_the_same_budget_and_never_on_test_rows() -> None:
    runs = list(tuning_runs(GRID, [HETLORA, HEAD, UNIFORM]))
    assert [(r.method.name, r.task, r.lr) for r in runs] == [
        *[("hetlora", "dbpedia14", lr) for lr in RATES],
        *[("head", "dbpedia14", lr) for lr in HEAD.rates],
        *[("uniform", "dbpedia14", lr) for lr in RATES],
        *[("hetlora", "e2e", lr) for lr in RATES],
    ]
    assert {len(method.rates) for method in methods()} == {len(RATES)}
    assert {(r.split, r.rounds, r.stop) for r in runs} == {("validation", 2, False)}
    assert {r.seed for r in runs}.isdisjoint({0, 1})


def test_final_runs_take_the_tuned_rate_seed_by_seed() -> None:
    rates = {("uniform", "dbpedia14"): 3e-3, ("head", "dbpedia14"): 1e-2}
    runs = list(final_runs(GRID, [UNIFORM, HEAD], rates))
    assert [(r.method.name, r.task, r.seed, r.lr) for r in runs] == [
        ("uniform", "dbpedia14", 0, 3e-3), ("head", "dbpedia14", 0, 1e-2),
        ("uniform", "dbpedia14", 1, 3e-3), ("head", "dbpedia14", 1, 1e-2),
    ]  # fmt: skip
    assert all(r.split == "test" and r.stop for r in runs)
    for grid in GRIDS.values():
        names = [r.name for r in tuning_runs(grid, methods())]
        assert len(set(names)) == len(names)


def test_the_best_rate_on_the_validation_split_is_taken_once_all_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "RUNS", tmp_path)
    runs = [run for run in tuning_runs(GRID, [UNIFORM]) if run.task == "dbpedia14"]
    for place, run in enumerate(runs):
        assert planning.rates(GRID, [UNIFORM]) == {}
        planning.keep(run, _result(run, [0.5, 0.8, 0.8, 0.7][place]))
    # Of equals the smaller rate.
    rates = planning.rates(GRID, [UNIFORM])
    assert rates == {("uniform", "dbpedia14"): RATES[1], ("uniform", "20news"): RATES[1]}, "one base and kind, one rate"


def test_a_finished_run_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "RUNS", tmp_path)
    run = Run(UNIFORM, "dbpedia14", 1.0, 0, 1e-3, "test", 2)
    planning.keep(run, _result(run, 0.9))
    with planning_runs.Runners(0) as runners:
        assert planning._run_stage([run], math.inf, runners)
        assert not planning._run_stage([run, Run(UNIFORM, "dbpedia14", 1.0, 1, 1e-3, "test", 2)], -math.inf, runners)
    assert "run " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "tasks"),
    [("20news", {"validation/dbpedia14", "test/20news"}), ("e2e", {"validation/e2e", "test/e2e"})],
)
def test_tasks_alone_get_the_rates_that_they_need(
    asked: str, tasks: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert planning.main(["--list", "--tasks", asked]) == 0
    listed = [line.split()[1].split("/") for line in capsys.readouterr().out.splitlines()[:-1]]
    assert {f"{split}/{task}" for split, task, *_ in listed} == tasks
    assert {name for split, _, name, _ in listed if split == "test"} == {"fedpipe", "legend", "hetlora", "flora"}


def test_a_method_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no fedpip; there are .*fedpipe"):
        planning.main(["--list", "--only", "fedpip"])
    with pytest.raises(SystemExit):
        planning.main(["--list", "--tasks", "20new"])
    assert "invalid choice" in capsys.readouterr().err


def test_a_plot_has_all_methods_and_the_same_runs_draw_the_same_bytes(tmp_path: Path) -> None:
    rates = {("uniform", "dbpedia14"): 3e-3, ("head", "dbpedia14"): 1e-2}
    results = [(run, _result(run, 0.8)) for run in final_runs(GRID, [HEAD, UNIFORM], rates)]
    planning_plots.write(GRID, results, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "dbpedia14-1.svg"
    assert f"](plots/{path.name})" in page("standard", GRID, results, rates, plots="plots")
    assert all(f">{name}</text>" in path.read_text() for name in ("head", "uniform"))
    assert planning_plots.draw(results, 0.75) == path.read_bytes()
    failed = [(run, msgspec.structs.replace(result, rounds=[])) for run, result in results]
    assert "svg" not in page("standard", GRID, failed, rates, plots="plots")


def test_the_split_depends_on_a_rows_content_alone() -> None:
    rows = [{"text": f"row {number}", "label": number % 3} for number in range(4000)]
    share = sum(map(planning_runs.held_out, rows)) / len(rows)
    assert share == pytest.approx(planning_runs.VALIDATION, abs=0.02)
    assert planning_runs.held_out({"label": 0, "text": "row 0"}) == planning_runs.held_out(rows[0])
    second = [planning_runs.held_out(row, planning_runs.VALIDATION) for row in rows]
    assert sum(second) / len(rows) == pytest.approx(planning_runs.VALIDATION, abs=0.02)
    assert not any(one and planning_runs.held_out(row) for one, row in zip(second, rows, strict=True))


def test_intervals_are_those_of_student() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-5))
    assert math.isnan(interval([1.0])[1])


def test_the_page_has_a_row_for_each_method_the_fastest_first() -> None:
    rates = {("uniform", "dbpedia14"): 3e-3, ("head", "dbpedia14"): 1e-2}
    runs = list(final_runs(GRID, [HEAD, UNIFORM], rates))
    accuracy = {"uniform": 0.9, "head": 0.6}
    results = [(run, _result(run, accuracy[run.method.name], at=10.0 + run.seed)) for run in runs]
    text = page("standard", GRID, results, rates)
    lines = [line for line in text.splitlines() if line.startswith(("| uniform", "| head"))]
    assert lines[0].startswith("| uniform | 0.003 | 2 of 2 | 0.9000 ± 0.0000 | 21 ± 13 | 3.0 ± 0.0 | 10.5 ± 6.4")
    assert lines[1].startswith("| head | 0.01 | 2 of 2 | 0.6000 ± 0.0000 | - | - |")
    assert "20.0 % ± 0.0 % | 50 % ± 0 % | 0.500" in lines[0]
    assert text.count("Not run.") == 1


def test_where_the_target_is_not_reached_the_page_tells_seconds_to_what_all_reached() -> None:
    """0.45 is there after the second round of 10 s where the best is 0.45 or 0.6, after the first where it is 0.9."""
    runs = [(Run(method, "dbpedia14", 1.0, seed, 0.01, "test", 4), quality) for method, seed, quality in (
        (UNIFORM, 0, 0.6), (UNIFORM, 1, 0.9), (FEDLORA, 0, 0.45), (FEDLORA, 1, 0.9))]  # fmt: skip
    rates = {(name, "dbpedia14"): 0.01 for name in ("uniform", "fedlora")}
    text = page("standard", GRID, [(run, _result(run, quality)) for run, quality in runs], rates)
    said = re.search(r"every run reached, accuracy 0\.4500 \(.*\): (.*)", text)
    assert said is not None and said[1] == "`fedlora` 15, `uniform` 15."
    well = [(run, _result(run, 0.9)) for run, _ in runs]
    assert "every run reached" not in page("standard", GRID, well, rates)


def _pairs(own: list[float], other: list[float], accuracy: float = 1.8) -> list[tuple[Run, Result]]:
    runs = [
        (Run(Method(name), "dbpedia14", 1.0, seed, 1e-3, "test", 2, stop=True), at, reached)
        for name, times, reached in (("fedpipe", own, 1.8), ("fedlora", other, accuracy))
        for seed, at in enumerate(times)
    ]
    return [(run, _result(run, reached, at)) for run, at, reached in runs]


def test_a_ratio_is_the_geometric_mean_over_pairs_of_runs() -> None:
    # The target is reached in the first round, of which `at` is the end.
    found = ratio(_pairs([10.0, 10.0], [20.0, 80.0]), "fedpipe", "fedlora", seconds)
    assert found is not None and found.mean == pytest.approx(40.0 / 10.0)
    assert (found.pairs, found.open, found.lost) == (2, 0, 0) and found.low < found.mean < found.high
    bytes_too = ratio(_pairs([10.0, 10.0], [20.0, 80.0]), "fedpipe", "fedlora", traffic)
    assert bytes_too is not None and bytes_too.mean == pytest.approx(1.0)
    assert ratio(_pairs([10.0], []), "fedpipe", "fedlora", seconds) is None


def test_a_rival_that_does_not_arrive_makes_a_lower_bound_and_an_own_failure_is_no_success() -> None:
    found = ratio(_pairs([10.0, 10.0], [20.0, 20.0], accuracy=0.1), "fedpipe", "fedlora", seconds)
    # Its whole run: two rounds.
    assert found is not None and found.mean == pytest.approx(4.0) and found.open == 2
    assert found.meets(3.0) is True and found.meets(5.0) is None
    back = ratio(_pairs([10.0, 10.0], [20.0, 20.0], accuracy=0.1), "fedlora", "fedpipe", seconds)
    assert back is not None and back.lost == 2 and "the method did not arrive" in str(back)
    assert back.meets(0.1) is False
    failed = [(run, msgspec.structs.replace(result, rounds=[])) for run, result in _pairs([10.0], [])]
    only = ratio(failed + _pairs([], [10.0]) + _pairs([1.0, 1.0], [2.0, 2.0])[1::2], "fedpipe", "fedlora", seconds)
    assert only is not None and (only.pairs, only.lost) == (2, 1) and only.meets(1.0) is False
    rows = list(claims(_pairs([10.0, 10.0], [30.0, 30.0]), {}))
    assert any(row.startswith("| `fedpipe` against `fedlora`") and row.endswith("| yes |") for row in rows)
    assert any("against `full`" in row and "not run" in row for row in rows)


def test_data_is_looked_for_where_the_tests_have_it_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning_runs, "ROOT", tmp_path / "checkout")
    monkeypatch.setenv("MUSTER_DATA", "")
    assert not planning_runs.data_there()
    usual = tmp_path / "shared" / "data"
    assert f"not run: MUSTER_DATA ({usual} is no folder)" in capsys.readouterr().err
    usual.mkdir(parents=True)
    assert planning_runs.data_there() and os.environ["MUSTER_DATA"] == str(usual)
    monkeypatch.setenv("MUSTER_DATA", str(tmp_path / "elsewhere"))
    assert not planning_runs.data_there() and planning.main(["--profile", "smoke"]) == 1


def test_claims_of_other_benchmarks_and_of_the_time_stand_beside() -> None:
    figures = [
        ("replanning.a", 0.5, True), ("replanning.b", 1.25, False), ("order.tau", 0.8, True),
        ("predicted_memory.cpu_8", 2.5, True), ("predicted_memory.cpu_4", 4.75, True),
        ("cuda.memory_8", "not run", None), ("predicted_memory.as_gpu_8", "not run", None),
        ("predicted_memory.as_gpu_4", 12.5, False),
    ]  # fmt: skip
    others = [{"name": name, "value": value, "met": met} for name, value, met in figures]
    rows = [row.split(" | ")[1:] for row in claims([], {}, others=others, minutes=59.6)]
    assert ["1.25 s", "<= 1 s", "**no** |"] in rows and ["0.80", ">= 0.6", "yes |"] in rows
    assert ["4.75 %", "<= 10 %", "yes |"] in rows and ["not run", "<= 10 %", " |"] in rows
    assert ["12.50 %", "<= 10 %", "**no** |"] in rows, "what was not run hides nothing"
    assert ["60 minutes", "<= 60", "yes |"] in rows
    assert any("61 minutes" in row and "**no**" in row for row in claims([], {}, minutes=60.6))


def _ended(method: Method, quality: float, seed: int, rounds: int = 2, variant: str = "") -> tuple[Run, Result]:
    run = Run(method, "dbpedia14", 1.0, seed, 1e-2, "test", rounds, variant=variant)
    return run, _result(run, quality / 0.75)  # whose last rounds have half of it, and all


def test_exact_aggregation_is_compared_at_each_width_of_ranks() -> None:
    exact = Method("hetlora", "fsr")
    narrow = [_ended(one, q, seed) for seed in (0, 1) for one, q in ((HETLORA, 0.5), (exact, 0.49))]
    wide = [_ended(one, q, seed, variant="wide") for seed in (0, 1) for one, q in ((HETLORA, 0.5), (exact, 0.55))]
    rows = [row for row in claims([], {"padding": narrow, "padding-wide": wide}) if "zero-padding" in row]
    assert [re.findall(r"-?[\d.]+ ± [\d.]+ points", row) for row in rows] == [
        ["-1.0 ± 0.0 points"],
        ["5.0 ± 0.0 points"],
    ]
    assert rows[0].endswith("| **no** |") and rows[1].endswith("| yes |")


def test_full_fine_tuning_is_compared_at_constant_rates_and_where_both_fall() -> None:
    fedpipe, full = Method("fedpipe"), Method("full")
    equal = [_ended(one, q, seed) for seed in (0, 1) for one, q in ((fedpipe, 0.8), (full, 0.84))]
    falling = [
        (replace(run, variant="falling"), result)
        for seed in (0, 1)
        for run, result in (_ended(fedpipe, 0.835, seed, rounds=8), _ended(full, 0.84, seed, rounds=8))
    ]
    main = [_ended(one, 0.8, 0) for one in (fedpipe, full)]
    whole = [
        (replace(run, variant="falling-whole") if run.method == fedpipe else run, result) for run, result in falling
    ]
    studies = {"params": equal, "params-falling": falling, "params-whole": whole}
    rows = [row for row in claims(main, studies) if "behind full" in row]
    assert [re.findall(r"[\d.]+ ± [\d.]+ points", row) for row in rows] == [
        ["4.0 ± 0.0 points"],
        ["0.5 ± 0.0 points"],
        ["0.5 ± 0.0 points"],
    ]
    assert "all directions" in rows[2]
    assert "after 2 rounds" in rows[0] and "falling" not in rows[0]
    assert "after 8 rounds" in rows[1] and "both at falling rates" in rows[1]


def test_a_run_on_the_small_gpt2_is_another_where_that_was_made_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    of_e2e, of_other = (Run(UNIFORM, task, 1.0, 0, 0.01, "test", 2) for task in ("e2e", "dbpedia14"))
    before = [planning.path_of(run) for run in (of_e2e, of_other)]
    monkeypatch.setattr(planning, "SmallGpt2", lambda: SmallGpt2(steps=7))
    after = [planning.path_of(run) for run in (of_e2e, of_other)]
    assert after[0] != before[0] and after[1] == before[1]


def test_a_study_compares_its_variants() -> None:
    study = Study("s", "?", ((UNIFORM, ""), (UNIFORM, "short")), 2, (0, 1), ratios=(("uniform, short", "uniform"),))
    found = [
        (run, _result(run, 1.8, at=10.0 if run.variant else 30.0)) for run in study.runs({("uniform", "dbpedia14"): 1})
    ]
    assert list(study_table(study, found))[-1] == (
        "`uniform, short` against `uniform`: times faster to the target 3.00 (3.00 to 3.00), 2 pairs."
    )


def test_differences_are_in_points_seed_by_seed() -> None:
    found = differences(_pairs([1.0, 1.0], [1.0, 1.0], accuracy=1.0), "fedpipe", "fedlora")
    # Quality rises to 1.8 and 1.0 in two rounds, of which the mean is taken.
    assert found == pytest.approx([60.0, 60.0])
    assert at_the_end(_pairs([1.0], [])[0][1]) == pytest.approx(1.35)
