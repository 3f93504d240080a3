"""What the command `muster release` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from coordinator.web.views import ReleasedDevice, ReleaseView
from muster.cli import tables
from shared.release_messages import Score


def score(found: Score | None) -> str:
    """A score on a device's own rows."""
    if found is None:
        return "-"
    accuracy = f", accuracy {found.accuracy:.3f}" if found.accuracy is not None else ""
    return f"loss {found.loss:.4f}{accuracy}"


def headline(view: ReleaseView) -> str:
    """A release in one line."""
    line = f"{view.id}: {view.state.replace('_', ' ')}"
    if view.stands:
        line += ", in force"
    return f"{line} ({view.reason})" if view.reason else line


def progress(view: ReleaseView) -> str:
    """Where a release is, for who watches it."""
    words = Counter(_word(device) for device in view.devices)
    told = ", ".join(f"{count} {word}" for word, count in sorted(words.items()))
    return f"{headline(view)}: {told}" if told else headline(view)


def releases(found: Sequence[ReleaseView]) -> Table:
    """All releases."""
    table = tables.table("release", "state", "in force", "kind", "size", "committed", "failed", "skipped", "reason")
    for view in found:
        table.add_row(
            view.id, view.state.replace("_", " "), "yes" if view.stands else "", view.kind,
            tables.size(view.bytes) if view.bytes else "-", str(view.committed), str(view.failed), str(view.skipped),
            view.reason,
        )  # fmt: skip
    return table


def devices(view: ReleaseView) -> Table:
    """The devices of one release."""
    table = tables.table("device", "canary", "state", "before", "after", "rows", "in use", "reason")
    for device in view.devices:
        table.add_row(
            device.device, "yes" if device.canary else "", _word(device), _before(device.before), score(device.after),
            _rows(device.after), device.active or "-", device.reason,
        )  # fmt: skip
    return table


def _before(found: Score | None) -> str:
    """What was in use, with its name: a loss alone does not say what the release was compared with."""
    return score(found) + (f" of {'the base' if found.of == 'base' else found.of}" if found and found.of else "")


def _rows(found: Score | None) -> str:
    """What a device measured on."""
    if found is None:
        return "-"
    return f"{found.rows} trained on" if found.trained_on else f"{found.rows} held out"


def _word(device: ReleasedDevice) -> str:
    """What came of it, else how far it is."""
    return device.stage or "told" if device.state == "told" else device.state
