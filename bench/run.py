"""Runs the benchmarks one after the other and writes `bench/results.json` and `docs/benchmarks.md`.

    .venv/bin/python bench/run.py [NAME ...]    all benchmarks, or these; results of the others stay
    .venv/bin/python bench/run.py quality --part e2e    a part of one that has several; its other figures stay
    .venv/bin/python bench/run.py --soak        the soak runs (`bench/soak*.py`), which the default leaves out
    .venv/bin/python bench/run.py --render      only write the page anew from the recorded results

What a benchmark is, and what it prints: `bench/README.md`.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
LIMIT_S = 3600
NO_BENCHMARK = (
    "run",
    "fedspine",
    "mergesfl",
    "mergesfl_clock",
    "mergesfl_fleet",
    "split_control",
    "planning",
    "planning_claims",
    "planning_grid",
    "planning_plots",
    "planning_runs",
    "planning_studies",
    "planning_tables",
    "planning_words",
    "record_steps",
)
"""Programs of their own with their parts: `make bench-planning` and its like; the recording of the device model's
constants."""
REQUIRED = ("name", "value", "unit")
SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}

Result = dict[str, Any]


def benchmarks(*, soak: bool) -> dict[str, Path]:
    """Name -> file."""
    found = {path.stem: path for path in sorted((ROOT / "bench").glob("[a-z]*.py")) if path.stem not in NO_BENCHMARK}
    return {name: path for name, path in found.items() if name.startswith("soak") == soak}


def machine() -> str:
    """Processor, cores, memory, system and the versions that matter, in one line."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "numpy"))
    python = platform.python_version()
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, Python {python}, {versions}"


def meets(value: float, target: str) -> bool | None:
    """Whether `value` meets a target such as "<= 1.5"; None: there is no target of that form."""
    sign, _, bound = target.partition(" ")
    try:
        return SIGNS[sign](value, float(bound.split()[0].replace(",", "")))
    except (KeyError, ValueError, IndexError):
        return None


def parse(output: str, benchmark: str) -> list[Result]:
    """The results among the lines a benchmark printed. Raises `ValueError` for one that lacks a key."""
    results: list[Result] = []
    for line in output.splitlines():
        if not line.startswith(("{", "[")):
            continue
        try:
            printed = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line for people that begins with a bracket
        for result in printed if isinstance(printed, list) else [printed]:
            missing = [key for key in REQUIRED if key not in result]
            if missing:
                raise ValueError(f"{benchmark}: a result lacks {', '.join(missing)}: {line[:200]}")
            results.append(result)
    if not results:
        raise ValueError(f"{benchmark}: printed no result")
    return results


def complete(result: Result, benchmark: str, command: str, where: str, date: str) -> Result:
    """A printed result with what the runner knows."""
    target = str(result.get("target", ""))
    met = result["met"] if "met" in result else meets(float(result["value"]), target)
    known = {
        "benchmark": benchmark,
        "name": result["name"],
        "what": result.get("what", ""),
        "value": result["value"],
        "unit": result["unit"],
        "target": target,
        "met": met,
        "note": result.get("note", ""),
        "command": command,
        "machine": where,
        "date": date,
    }
    return {**known, **{key: value for key, value in result.items() if key not in known}}


def run(name: str, path: Path, part: str = "") -> list[Result]:
    """Run one benchmark, or a part of it. Raises `ValueError` with the reason where it gave no result."""
    command = f".venv/bin/python bench/run.py {name}" + (f" --part {part}" if part else "")
    print(f"bench: {command}", flush=True)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'bench' / 'lib'}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        done = subprocess.run(
            [sys.executable, str(path), *([part] if part else [])],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name}: not done after {LIMIT_S} s") from None
    if done.returncode != 0:
        raise ValueError(f"{name}: exit code {done.returncode}: {done.stdout[-400:]}")
    date = datetime.now(tz=timezone.utc).strftime("%Y-%m-%d")
    results = [complete(one, name, command, machine(), date) for one in parse(done.stdout, name)]
    for one in results:
        print(f"bench:   {one['name']}: {number(one['value'])} {one['unit']} (target {one['target'] or 'none'})")
    return results


def number(value: object) -> str:
    """A figure with four digits, without a needless exponent."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def render(results: list[Result]) -> str:
    """The page of these results."""
    lines = [
        "# Benchmarks",
        "",
        "<!-- Written by bench/run.py from bench/results.json: run `make bench`. -->",
        "",
        "Each figure is what its command printed on the machine named below; nothing is written by hand.",
        "`make bench` runs all of them, `.venv/bin/python bench/run.py NAME` one. A missed target is shown as missed.",
        "",
    ]
    if not results:
        return "\n".join([*lines, "Nothing was measured yet.", ""])
    formats = [one for one in results if "format" in one]
    lines += ["| figure | measured | target | met | date |", "|---|---|---|---|---|"]
    words = {True: "yes", False: "**no**", None: ""}
    for one in results:
        if one in formats:
            continue
        figure = f"{one['what'] or one['name']}".replace("|", "\\|")
        measured = f"{number(one['value'])} {one['unit']}"
        lines.append(f"| {figure} | {measured} | {one['target']} | {words[one['met']]} | {one['date']} |")
    lines += by_format(formats) if formats else []
    commands = dict.fromkeys((one["command"], one["machine"]) for one in results)
    lines += ["", "## Commands", ""]
    lines += [f"- `{command}` on {where}" for command, where in commands]
    notes = [one for one in results if one["note"]]
    if notes:
        lines += ["", "## Notes", "", *(f"- {one['what'] or one['name']}: {one['note']}" for one in notes)]
    return "\n".join([*lines, ""])


def by_format(results: list[Result]) -> list[str]:
    """The section with the table of `bits`: most bytes first, of as many bytes the lowest perplexity."""
    dates = ", ".join(dict.fromkeys(str(one["date"]) for one in results))
    lines = [
        "",
        "## Perplexity and bytes of a causal model by the format of its base",
        "",
        "| format | perplexity | loss above fp32 | bits per weight | MiB of the linear layers |",
        "|---|---|---|---|---|",
    ]
    for one in sorted(results, key=lambda one: (-one["linear_bytes"], one["value"])):
        rise, error = one["loss_rise"], one["loss_rise_error"]
        above = f"{rise:+.5f} ± {error:.5f}" if rise or error else "0"
        size = f"{one['linear_bytes'] / 2**20:.2f}"
        lines.append(f"| {one['format']} | {one['value']:.2f} | {above} | {one['bits_per_weight']:.3f} | {size} |")
    caveats = dict.fromkeys(str(one["caveat"]) for one in results)
    return [*lines, "", f"Measured {dates}.", *caveats]


def recorded() -> list[Result]:
    """The results on disk."""
    loaded: list[Result] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    return loaded


def write(results: list[Result]) -> None:
    """Both files; the order is that of the names, so that a new run changes only what it measured."""
    ordered = sorted(results, key=lambda one: (one["benchmark"], one["name"]))
    RESULTS.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(render(ordered), encoding="utf-8")


def main() -> int:
    """0: all ran and met their targets; 1: one failed or missed its target; 2: unknown name."""
    parser = argparse.ArgumentParser(description="Run benchmarks and record what they measured.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; none: all")
    parser.add_argument("--soak", action="store_true", help="run the soak runs instead")
    parser.add_argument("--part", default="", help="of the one named benchmark, only this part")
    parser.add_argument("--render", action="store_true", help="write the page from the recorded results")
    arguments = parser.parse_args()
    if arguments.render:
        write(recorded())
        return 0
    offered = {**benchmarks(soak=False), **benchmarks(soak=True)}
    unknown = [name for name in arguments.names if name not in offered]
    if unknown:
        print(f"bench: no benchmark {', '.join(unknown)}; there are {', '.join(offered)}", file=sys.stderr)
        return 2
    wanted = arguments.names or list(benchmarks(soak=arguments.soak))
    failed: list[str] = []
    for name in wanted:
        try:
            measured = run(name, offered[name], arguments.part)
        except ValueError as error:
            failed.append(str(error))
            continue
        again = {one["name"] for one in measured}
        write(
            [one for one in recorded() if one["benchmark"] != name or (arguments.part and one["name"] not in again)]
            + measured
        )
        failed += [f"{one['name']}: target {one['target']} missed" for one in measured if one["met"] is False]
    for line in failed:
        print(f"bench: {line}", file=sys.stderr)
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
