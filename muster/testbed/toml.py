"""TOML text from plain values: what settings and job files need, no more."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Table = dict[str, Any]


def dumps(tables: Mapping[str, Any]) -> str:
    """`tables` as TOML; None is left out. Raises `TypeError` for a value that TOML does not know."""
    return "\n".join(_lines(tables, ())) + "\n"


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """`base` with the values of `over`, table by table."""
    found: Table = dict(base)
    for key, value in over.items():
        before = found.get(key)
        both = isinstance(value, Mapping) and isinstance(before, Mapping)
        found[key] = merged(before, value) if both and before is not None else value
    return found


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [
        f"{_quoted(key)} = {_value(value)}" for key, value in table.items() if not isinstance(value, Mapping | None)
    ]
    for key, value in table.items():
        if isinstance(value, Mapping):
            inner = (*path, key)
            lines += ["", f"[{'.'.join(map(_quoted, inner))}]", *_lines(value, inner)]
    return lines


def _value(value: object) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"{value!r:.60} has no form in TOML")


def _quoted(text: str) -> str:
    # A JSON string is a basic string of TOML, but for DEL, and surrogate pairs, which are not escaped here.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
