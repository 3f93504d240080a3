"""Making a release: the export of a job's adapter, a note of what it is, and both as one blob."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from coordinator import exporting
from coordinator.export import as_json
from shared import release_pack
from shared.release_messages import ReleaseKind

if TYPE_CHECKING:
    from coordinator.core.job import Job
    from coordinator.core.releases import Release


def pack_release(release: Release, job: Job, adapter: Path, base: str, work: Path) -> tuple[Path, ReleaseKind]:
    """The packed export of `adapter`, a file in the folder `work`, and what it holds. The same bytes each time.

    `base`: folder or hub id of the base model here. Raises `UserError` or `OSError` where it can't be written,
    `DecodeError` where the adapter can't be read, `ValueError` where it is too large.
    """
    folder, target = work / release.id, work / f"{release.id}.pack"
    if release.round != job.committed:
        # The metrics of the job are those of its last round.
        job = msgspec.structs.replace(job, metrics=None)
    assert job.facts is not None
    try:
        exporting.export_job(job, adapter, base, folder)
        kind = kind_of(folder)
        about = release_pack.About(
            release=release.id, job=release.job, round=release.round, kind=kind, base=job.spec.base,
            base_digest=job.facts.base_digest, task=job.spec.task,
        )  # fmt: skip
        (folder / release_pack.ABOUT).write_bytes(as_json(msgspec.to_builtins(about)))
        release_pack.write(folder, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target, kind


def kind_of(folder: Path) -> ReleaseKind:
    """What an export is, by its files."""
    if (folder / "bottleneck_config.json").is_file():
        return "bottleneck"
    return "lora" if (folder / "adapter_config.json").is_file() else "model"
