"""`docs/wire-format.md`: its tables are current, and its reader reads what Muster writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgpack
import pytest

from scripts import wire_doc

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "wire-format.md").read_text(encoding="utf-8")
GOLDENS = sorted((ROOT / "tests" / "goldens").glob("*.hex"))


def reader() -> Any:
    found = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    space: dict[str, Any] = {}
    exec(compile(found[1], "docs/wire-format.md", "exec"), space)
    return space["read"]


def test_the_tables_are_current() -> None:
    assert wire_doc.renewed(TEXT) == TEXT, "run scripts/wire_doc.py"
    assert "`device/{device}/up/load`" in TEXT


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_the_reader_reads_every_golden(path: Path) -> None:
    data = bytes.fromhex(path.read_text())
    assert reader()(data) == (msgpack.unpackb(data), len(data))


@pytest.mark.parametrize(
    "value", [0, 127, 128, -1, -33, -(2**40), 2**16, 2**33, 1.5, None, True, False, "x" * 40, b"y" * 300, [1] * 20,
              {"k" * 300: {"a": [b"", ""]}}, {str(n): n for n in range(20)}],
)  # fmt: skip
def test_the_reader_reads_every_form(value: object) -> None:
    data = msgpack.packb(value)
    assert reader()(data) == (value, len(data))
