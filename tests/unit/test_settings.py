"""Settings and job files: all faults at once, each with its key and the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from shared.errors import SettingsError, UserError
from shared.jobs import JobSpec
from shared.settings import BrokerSettings, Section, check, load, parse_toml

PLAIN = """
name = "demo"
[base]
model = "minilm"
[task]
kind = "classification"
dataset = "notes"
labels = ["a", "b"]
"""


class Inner(Section, frozen=True, kw_only=True):
    """A table."""

    level: Annotated[int, Meta(ge=1)] = 1


class Outer(Section, frozen=True, kw_only=True):
    """A file with every kind of value."""

    path: str
    share: Annotated[float, Meta(gt=0)] = 0.5
    names: list[str] = []
    levels: dict[str, int] = {}
    inner: Inner = Inner()
    tables: dict[str, Inner] = {}


def faults(kind: type[Any], data: dict[str, Any]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        check(kind, data, "some.toml")
    assert str(caught.value).startswith("some.toml: ")
    assert "\n" not in str(caught.value)
    return caught.value.faults


def job_faults(more: str) -> list[str]:
    return faults(JobSpec, parse_toml(PLAIN + more, "job.toml"))


def test_a_plain_job_is_read(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(PLAIN + "[rounds]\ndeadline_s = 60\n")
    job = load(tmp_path / "job.toml", JobSpec)
    assert (job.name, job.rounds.deadline_s, job.rounds.count) == ("demo", 60.0, 3)


def test_all_faults_at_once() -> None:
    found = job_faults(
        """
        max_tokens = 2
        colour = "red"
        [rounds]
        count = 0
        quorum = 1.5
        dead_line_s = 5
        [training]
        lr = "fast"
        codec = "fp8"
        [strategy]
        bits = 5
        """
    )
    keys = {fault.split(":")[0] for fault in found}
    assert keys == {
        "task.max_tokens", "task.colour", "rounds.count", "rounds.quorum", "rounds.dead_line_s",
        "training.lr", "training.codec", "strategy.bits",
    }  # fmt: skip
    assert all(len(fault.split(": ", 1)[1]) > 10 for fault in found)


def test_missing_tables_and_keys() -> None:
    assert set(faults(JobSpec, {})) == {"name: missing", "base: missing", "task: missing"}
    assert "base.model: missing" in faults(JobSpec, {"base": {}})


def test_an_unknown_key_gets_a_suggestion_or_the_list() -> None:
    assert "did you mean 'deadline_s'?" in job_faults("[rounds]\ndeadlines = 5")[0]
    assert "known here: " in job_faults("[rounds]\nzzz = 5")[0]
    assert "rounds: unknown key" not in job_faults("[round]\ncount = 5")[0]
    assert job_faults("[round]\ncount = 5")[0] == "round: unknown key, did you mean 'rounds'?"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"inner": 5}, "inner: expected a table, got int"),
    ({"inner": [{"level": 1}]}, "inner: expected a table, got list"),
    ({"inner": {"level": 0}}, "inner.level: expected `int` >= 1, got 0"),
    ({"inner": {"level": True}}, "inner.level: expected `int`, got `bool`, got True"),
    ({"share": float("nan")}, "share: expected a finite number, got nan"),
    ({"share": float("inf")}, "share: expected a finite number, got inf"),
    ({"share": 0}, "share: expected `float` > 0.0, got 0"),
    ({"names": "a"}, "names: expected `array`, got `str`, got 'a'"),
    ({"levels": {"a": "x"}}, "levels.a: expected `int`, got `str`, got 'x'"),
    ({"levels": 3}, "levels: expected `object`, got `int`, got 3"),
    ({"tables": {"a": {"level": 0}}}, "tables.a.level: expected `int` >= 1, got 0"),
    ({"path": 3}, "path: expected `str`, got `int`, got 3"),
]


@pytest.mark.parametrize(("change", "fault"), WRONG)
def test_wrong_values(change: dict[str, Any], fault: str) -> None:
    assert faults(Outer, {"path": "p", **change}) == [fault]


def test_no_table_at_all() -> None:
    data: Any = [1]
    assert faults(Outer, data) == ["file: expected a table, got list"]


def test_every_kind_of_value_is_read() -> None:
    data = {"path": "p", "share": 1, "names": ["a"], "levels": {"a": 1}, "tables": {"t": {"level": 4}}}
    read = check(Outer, data, "x")
    assert read == Outer(path="p", share=1.0, names=["a"], levels={"a": 1}, tables={"t": Inner(level=4)})
    assert isinstance(read.share, float)


def test_a_port_out_of_range() -> None:
    assert faults(BrokerSettings, {"port": 70_000}) == ["port: expected `int` <= 65535, got 70000"]


@pytest.mark.parametrize("text", ["a = ", "[a\n", "a = 1\na = 2", "x" * 10, "a = " + "[" * 5000, "a = " + "9" * 5000])
def test_no_toml_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(UserError, match=r"f\.toml: ") as caught:
        load(tmp_path / "f.toml", Outer)
    assert "\n" not in str(caught.value)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("absent", "no such file"), ("binary", "can't be read"), (".", "can't be read")):
        with pytest.raises(UserError, match=reason):
            load(tmp_path / name, Outer)


tree = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["name", "base", "task", "rounds", "model", "kind", "count", "lr", "training", "levels"]


@settings(max_examples=150, deadline=None)
@given(data=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=9), tree, max_size=6))
def test_anything_else_is_a_fault_and_never_a_crash(data: dict[str, Any]) -> None:
    assert all(": " in fault for fault in faults(JobSpec, data))


def test_a_value_that_is_none_of_a_few_names_them() -> None:
    assert job_faults("[strategy]\nbits = 5") == ["strategy.bits: expected one of auto, 4, 8, 16, 32, got 5"]
