"""Whether the files and folders that the owner named are there: what the agent will read, looked at without torch."""

from __future__ import annotations

import re
from pathlib import Path

from edge_daemon.settings import EdgeSettings
from shared.files import model_fault, rows_fault

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:\w+)?")
_FILES = (".jsonl", ".gz", ".json")
_SHAPE = re.compile(r"\d+x\d+")
"""A base of the test agent is its shape: nothing is loaded."""


def faults(settings: EdgeSettings, *, whole: bool = False) -> list[str]:
    """What can't be read of `[data]` and `[models]`, as "key: reason". What may come from the hub is not tried.

    `whole`: every row is looked at, which takes a second per some 100 MB.
    """
    hub = settings.policy.hub
    wrong = []
    for name, source in settings.data.items():
        if hub and _on_hub(source) and not source.endswith(_FILES):
            continue
        if fault := rows_fault(Path(source).expanduser(), whole=whole):
            wrong.append(f"data.{name}: {fault}")
    for name, source in settings.models.items():
        if _SHAPE.fullmatch(source) or (hub and _on_hub(source)):
            continue
        if fault := model_fault(Path(source).expanduser()):
            wrong.append(f"models.{name}: {fault}")
    return wrong


def _on_hub(source: str) -> bool:
    """Whether `source` can only be meant as a hub id."""
    return not Path(source).expanduser().exists() and _HUB_ID.fullmatch(source) is not None
