"""Taking over new settings while the service runs: what may change at once, and what waits for a restart. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True)
class TakenOver(Generic[T]):
    """`settings`: the old ones with all that may change; `changed`: those keys; `waiting`: keys for a restart."""

    settings: T
    changed: list[str]
    waiting: list[str]


def take_over(old: T, new: T, fixed: Collection[str]) -> TakenOver[T]:
    """`old` with what `new` changes, but for the keys in `fixed` (as `key`, `table` or `table.key`)."""
    changed: list[str] = []
    waiting: list[str] = []
    return TakenOver(_merged(old, new, fixed, "", changed, waiting), changed, waiting)


def told(taken: TakenOver[T]) -> str:
    """What a reload did, in one line."""
    words = f"new: {', '.join(taken.changed)}" if taken.changed else "nothing new"
    return words + (f"; only after a restart: {', '.join(taken.waiting)}" if taken.waiting else "")


def _merged(old: Any, new: Any, fixed: Collection[str], prefix: str, changed: list[str], waiting: list[str]) -> Any:
    values = {}
    for name in old.__struct_fields__:
        key, before, after = f"{prefix}{name}", getattr(old, name), getattr(new, name)
        if before == after:
            continue
        if key in fixed:
            waiting.append(key)
        elif isinstance(before, msgspec.Struct):
            values[name] = _merged(before, after, fixed, f"{key}.", changed, waiting)
        else:
            values[name] = after
            changed.append(key)
    return msgspec.structs.replace(old, **values) if values else old
