"""Transition tables: what both programs' machines are declared in, checked against, and drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shared.errors import MusterError


class InvalidTransition(MusterError):
    """A machine moved where its table has no row: our fault, never the other side's."""


@dataclass(frozen=True)
class Transition:
    """In phase `source`, event `on` may lead to one of `targets`; `meaning` is the line for the docs."""

    source: str
    on: str
    targets: tuple[str, ...]
    meaning: str


Table = Sequence[Transition]


def allows(table: Table, source: str, on: str) -> bool:
    """Whether the table has a row for event `on` in phase `source`."""
    return any(row.source == source and row.on == on for row in table)


def check(table: Table, source: str, on: str, target: str) -> None:
    """Raises `InvalidTransition` unless the table lets `on` lead from `source` to `target`."""
    if not any(row.source == source and row.on == on and target in row.targets for row in table):
        raise InvalidTransition(f"{source} --{on}--> {target} is not in the table")


def phases(table: Table) -> list[str]:
    """Every phase the table names, in order of appearance."""
    return list(dict.fromkeys(name for row in table for name in (row.source, *row.targets)))


def mermaid(table: Table, first: str) -> str:
    """The table as a Mermaid state diagram that begins in `first`."""
    lines = ["stateDiagram-v2", f"    [*] --> {first}"]
    for row in table:
        lines += [f"    {row.source} --> {target}: {row.on}" for target in row.targets]
    return "\n".join(lines)


def markdown(table: Iterable[Transition]) -> str:
    """The table as a Markdown table."""
    lines = ["| in | on | to | meaning |", "|---|---|---|---|"]
    lines += [f"| {row.source} | {row.on} | {', '.join(row.targets)} | {row.meaning} |" for row in table]
    return "\n".join(lines)
