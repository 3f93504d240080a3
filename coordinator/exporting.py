"""The export of a job, in the form that fits what its strategy trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.core.planning.base import Shrinking
from coordinator.export import export_peft
from coordinator.export_bottleneck import export_bottleneck
from coordinator.export_whole import export_whole, transposed
from shared import adapter as adapter_files
from shared.starts import start_of

if TYPE_CHECKING:
    from coordinator.core.job import Job


def export_job(job: Job, adapter: Path, base: str, folder: Path) -> None:
    """Write the global adapter file `adapter` of `job` to `folder`; `base` is the folder or hub id of the base model.

    Raises `UserError` where `folder` can't be written, `DecodeError` where the adapter can't be read.
    """
    metrics = job.metrics
    given = adapter_files.read_file(adapter)
    start = start_of(given.notes)
    if start == "bottleneck":
        export_bottleneck(given, folder, spec=job.spec, base=base, metrics=metrics)
    elif start == "dense":
        assert job.facts is not None
        export_whole(given, folder, spec=job.spec, facts=job.facts, base=base, metrics=metrics)
    else:
        groups = job.facts.groups if job.facts is not None else []
        classes = job.planner.ratios if isinstance(job.planner, Shrinking) else {}
        turned = transposed(job.facts) if start == "sides" and job.facts is not None else ()
        export_peft(
            given, folder, spec=job.spec, base=base, metrics=metrics, groups=groups, classes=classes, transposed=turned
        )
