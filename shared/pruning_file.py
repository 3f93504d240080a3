"""`pruning.json` beside an exported adapter of a job that prunes: what a smaller model of any size is made from."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shared import units
from shared.errors import DecodeError
from shared.jobs import TaskSpec
from shared.units import Group

PRUNING_FILE = "pruning.json"


class PruningFile(msgspec.Struct, kw_only=True):
    """Bits and bytes are base64 in the file."""

    job: str
    round: int
    task: TaskSpec
    groups: list[Group]
    kept: dict[str, bytes]
    """Group -> bits of the units of the job's own model."""
    scores: dict[str, bytes]
    """Group -> a byte for what each unit matters to the fleet."""
    classes: dict[str, float] = {}
    """Class of devices -> the share of the units that is gone there."""

    def units_left(self, ratio: float | None = None) -> dict[str, list[int]]:
        """The units of the job's own model, or those of a model of which `ratio` is gone."""
        if ratio is None:
            return units.unpack(self.groups, self.kept)
        return units.best(self.groups, units.scores_of(self.groups, self.scores), ratio)


def write(told: PruningFile) -> bytes:
    """As a file."""
    told = msgspec.structs.replace(told, kept=dict(sorted(told.kept.items())), scores=dict(sorted(told.scores.items())))
    return msgspec.json.encode(told)


def read(folder: Path) -> PruningFile | None:
    """That of the export in `folder`; None: its job pruned nothing. Raises `DecodeError`, `OSError`."""
    path = folder / PRUNING_FILE
    if not path.is_file():
        return None
    try:
        told = msgspec.json.decode(path.read_bytes(), type=PruningFile)
        units.unpack(told.groups, told.kept)
        units.scores_of(told.groups, told.scores)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DecodeError(f"{path}: {error}") from error
    return told
