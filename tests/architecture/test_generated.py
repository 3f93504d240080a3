"""Generated files are current; pins cover what is declared; the commands that the papers name exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from bench import run as bench
from scripts import machines_doc, settings_doc
from tests.architecture.source import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_settings_page_is_current() -> None:
    assert (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8") == settings_doc.page(), "run make docs"


def test_the_state_machines_page_is_current() -> None:
    assert (ROOT / "docs" / "state-machines.md").read_text(encoding="utf-8") == machines_doc.page(), "run make docs"


def test_every_key_is_described() -> None:
    lines = settings_doc.page().splitlines()
    assert not [line for line in lines if line.startswith("| `") and line.endswith(f"| {settings_doc.MISSING} |")]


def test_the_benchmark_page_is_current() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == bench.render(bench.recorded()), "run make docs"


def test_pins_satisfy_the_declared_ranges() -> None:
    lines = (ROOT / "constraints" / "py311.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    declared = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    environment = {"python_version": "3.11", "python_full_version": "3.11.7"}
    wrong = []
    for text in declared:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate(environment):
            continue
        pin = pins.get(wanted.name.lower().replace("_", "-"))
        if pin is None or not wanted.specifier.contains(pin):
            wrong.append(f"{text}: pinned {pin}")
    assert not wrong, "run scripts/pins.py in an environment whose tests passed"


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    assert set(re.findall(r"^  make (\S+)", shown, re.MULTILINE)) == set(phony.group(1).split())


@pytest.mark.parametrize(
    "paper", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/operations.md", "bench/README.md"]
)
def test_links_and_make_targets_of_papers_exist(paper: str) -> None:
    page = ROOT / paper
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    assert not [link for link in links if not (page.parent / link).exists()]
    assert not [name for name in re.findall(r"`make ([a-z-]+)`", text) if f"\n{name}:" not in makefile]


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [
        (1.4, "<= 1.5", True),
        (1.6, "<= 1.5", False),
        (1000, ">= 1,000 MB/s", True),
        (3, "", None),
        (3, "as low as can be", None),
    ],
)
def test_a_target_is_compared(value: float, target: str, met: bool | None) -> None:
    assert bench.meets(value, target) is met


def test_results_are_found_among_other_lines() -> None:
    result = {"name": "a.b", "value": 1.5, "unit": "s", "target": "<= 2", "extra": [1]}
    (found,) = bench.parse(f"warming up\n[not json\n{json.dumps(result)}\n", "a")
    done = bench.complete(found, "a", "python a.py", "a machine", "2026-01-01")
    assert done["met"] is True
    assert done["extra"] == [1]
    assert "| a.b | 1.5 s | <= 2 | yes | 2026-01-01 |" in bench.render([done])


@pytest.mark.parametrize("soak", [False, True])
def test_what_is_run_as_a_benchmark_is_a_program(soak: bool) -> None:
    """A part of another program prints no result, and `make bench` would fail of it."""
    found = bench.benchmarks(soak=soak)
    assert found
    assert not [name for name, path in found.items() if "__main__" not in path.read_text(encoding="utf-8")]


def test_formats_are_one_table() -> None:
    """From the most bytes to the fewest, with what holds for all of them said once."""
    rows = [("nf4", 912896, 4.1273, 184.2382, 0.00041), ("fp32", 7077888, 32.0, 184.1635, 0.0)]
    results = [
        bench.complete(
            {
                "name": f"bits.{name}", "what": f"perplexity at {name}", "value": value, "unit": "", "format": name,
                "linear_bytes": size, "bits_per_weight": bits, "loss_rise": rise, "loss_rise_error": rise / 5,
                "caveat": "a small base",
            },
            "bits", "python bits.py", "a machine", "2026-01-01",
        )
        for name, size, bits, value, rise in rows
    ]  # fmt: skip
    lines = bench.render(results).splitlines()
    assert lines.index("| fp32 | 184.16 | 0 | 32.000 | 6.75 |") + 1 == lines.index(
        "| nf4 | 184.24 | +0.00041 ± 0.00008 | 4.127 | 0.87 |"
    )
    assert lines.count("a small base") == 1
    assert not [line for line in lines if "perplexity at" in line]


@pytest.mark.parametrize("output", ["", "nothing\n", '{"name": "a"}\n'])
def test_a_benchmark_without_results_is_refused(output: str) -> None:
    with pytest.raises(ValueError, match="^a: "):
        bench.parse(output, "a")
