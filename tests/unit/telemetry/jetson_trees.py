"""The hand-written trees of Jetsons, unfolded into a folder."""

from __future__ import annotations

from pathlib import Path

TREES = Path(__file__).parent / "trees"


def names() -> list[str]:
    """All there are."""
    return sorted(path.parent.name for path in TREES.glob("jetson-*/tree.txt"))


def unfold(name: str, into: Path) -> Path:
    """The files of tree `name` under `into`."""
    for row in (TREES / name / "tree.txt").read_text(encoding="utf-8").splitlines():
        path, _, content = row.partition(" = ")
        put(into, path, content.replace("\\n", "\n").replace("\\0", "\0") + "\n" * (not content.endswith("\\0")))
    return into


def put(root: Path, path: str, content: str) -> None:
    """One file."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
