"""The coordinator's worker for tests: the same pipe protocol as the real one, least squares in numpy, no torch.

python -m muster.testbed.numpy_worker --read-fd R --write-fd W
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from coordinator.core.aggregation.registry import create
from coordinator.core.facts import Metrics
from coordinator.workers import protocol
from muster.testbed import least_squares
from muster.testbed.least_squares import Rows
from shared import adapter as adapters
from shared.errors import DecodeError, MusterError, UserError
from shared.files import write_whole
from shared.frames import FrameReader, FrameWriter
from shared.jobs import JobSpec


class Worker:
    """Answers requests; keeps held-out data loaded."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, int], Rows] = {}

    def answer(self, request: protocol.ToWorker) -> protocol.FromWorker:
        """What to send back for `Prepare` or `Evaluate`."""
        try:
            match request:
                case protocol.Prepare():
                    return self._prepare(request)
                case protocol.Evaluate():
                    return self._evaluate(request)
                case _:
                    return protocol.WorkerFailed(reason=f"no answer to {type(request).__name__}")
        except UserError as error:
            return protocol.WorkerFailed(reason=str(error), operator=True)
        except (MusterError, OSError) as error:
            return protocol.WorkerFailed(reason=str(error))

    def _prepare(self, request: protocol.Prepare) -> protocol.Prepared:
        if request.job.evaluation.data:
            self._held_out(request.job, request.job.evaluation.rows)
        start = create(request.job.strategy).start
        facts = least_squares.model_facts(request.job.base.model, start)
        initial = least_squares.initial_adapter(request.job.name, request.job.base.model, start)
        write_whole(Path(request.adapter_path), initial)
        return protocol.Prepared(facts=facts)

    def _evaluate(self, request: protocol.Evaluate) -> protocol.Evaluated:
        begun = time.monotonic()
        rows = self._held_out(request.job, request.rows)
        loss = least_squares.loss_of(adapters.read_file(Path(request.adapter_path)), rows)
        metrics = Metrics(loss=loss, rows=len(rows), seconds=time.monotonic() - begun)
        return protocol.Evaluated(metrics=metrics)

    def _held_out(self, job: JobSpec, limit: int) -> Rows:
        key = (job.evaluation.data, job.base.model, limit)
        if key not in self._rows:
            self._rows[key] = least_squares.read_rows(Path(job.evaluation.data), job.base.model, limit)
        return self._rows[key]


def main(argv: list[str] | None = None) -> int:
    """Entry point of the subprocess: one answer per request, until `Exit` or the end of the pipe."""
    parser = argparse.ArgumentParser(prog="numpy_worker")
    parser.add_argument("--read-fd", type=int, required=True)
    parser.add_argument("--write-fd", type=int, required=True)
    options = parser.parse_args(argv)
    wanted: type[protocol.ToWorker] = protocol.ToWorker  # type: ignore[assignment]  # a union is a type to msgspec
    worker = Worker()
    with os.fdopen(options.read_fd, "rb") as incoming, os.fdopen(options.write_fd, "wb") as outgoing:
        reader, writer = FrameReader(incoming, wanted), FrameWriter(outgoing)
        try:
            while (request := reader.read()) is not None and not isinstance(request, protocol.Exit):
                writer.write(worker.answer(request))
        except (BrokenPipeError, DecodeError) as error:
            sys.stderr.write(f"numpy_worker: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
