"""Writes `docs/state-machines.md`: diagrams and tables of both programs, from the tables that check their steps."""

from __future__ import annotations

import sys
from pathlib import Path

from coordinator.core import release_transitions as release
from coordinator.core import transitions as coordinator
from edge_daemon.core import release_transitions as rollout
from edge_daemon.core import transitions as edge
from shared.machines import Table, markdown, mermaid

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "state-machines.md"

INTRO = """\
# State machines

<!-- Written by scripts/machines_doc.py from the transition tables: change those, then run `make docs`. -->

A step that would leave its table raises, in production too. Events that change no phase are not drawn.
"""


def section(title: str, about: str, table: Table, first: str) -> str:
    """One machine."""
    return f"## {title}\n\n{about}\n\n```mermaid\n{mermaid(table, first)}\n```\n\n{markdown(table)}\n"


def page() -> str:
    """The whole page."""
    job = "A job on the coordinator (`coordinator/core/transitions.py`). Planning and closing happen on `Tick` alone."
    session = "A device's session (`edge_daemon/core/transitions.py`). Being connected is no phase."
    released = (
        "A release on the coordinator (`coordinator/core/release_transitions.py`). What is decided over several "
        "devices is decided on `Tick` alone."
    )
    placed = (
        "A release on a device (`edge_daemon/core/release_transitions.py`): Mender's states. Another desired release "
        "leads from any stage to `wanted`, none at all to `none`; a device that can't take it at all goes to "
        "`skipped`, and tries it once more when its daemon starts anew."
    )
    return "\n".join(
        (
            INTRO,
            section("Job", job, coordinator.TABLE, coordinator.FIRST),
            section("Session", session, edge.MOVES, edge.FIRST),
            section("Release", released, release.TABLE, release.FIRST),
            section("Release on a device", placed, rollout.MOVES, rollout.FIRST),
        )
    )


def main() -> int:
    """Write the page."""
    TARGET.write_text(page(), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
