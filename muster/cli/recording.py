"""`muster devices --record`: what a fleet tells of itself, written down for `muster simulate --replay`."""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

from coordinator.core.planning.reasons import plural
from coordinator.web.views import JobView
from muster.cli import jobs
from muster.cli.options import Place
from muster.client import ENDED, Client
from muster.testbed.replay import Recorder, lines
from shared.errors import UserError

LOOK_EVERY_S = 1.0


def record(place: Place, file: Path, device: str, for_s: float) -> None:
    """Append what the devices, or `device` alone, tell to the new `file`, until interrupted or for `for_s` seconds (0:
    without end). A coordinator that goes away is waited for."""
    with place.client() as client:
        if device:
            jobs.known(client.devices(), device)
        recording = _Recording(client, device)
    began = time.monotonic()
    until = began + for_s if for_s else math.inf
    with _opened(file) as stream:
        print(f"recording to {file}{f' for {for_s:g} s' if for_s else ''}; Ctrl-C ends it", file=sys.stderr)
        try:
            while (now := time.monotonic()) < until:
                recording.look(place, stream, now - began)
                time.sleep(max(0.0, min(LOOK_EVERY_S, until - time.monotonic())))
        except KeyboardInterrupt:
            pass  # its ordinary end
        except OSError as error:
            raise UserError(f"--record {file}: can't be written: {error.strerror or error}") from error
        finally:
            if not recording.devices:
                file.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    if not recording.devices:
        told = f"{device} told no" if device else "no device told its"
        raise UserError(f"--record {file}: {told} load within {seconds:.0f} s: nothing was recorded")
    print(f"{recording} in {seconds:.0f} s; replay it with: muster simulate --profile recorded --replay {file}")


class _Recording:
    """A recording under way, of `device` or, "", of all. `devices`: of which there are readings."""

    def __init__(self, client: Client, device: str) -> None:
        self.devices: set[str] = set()
        self._device = device
        self._loads = self._links = 0
        self._recorder = Recorder()
        self._silent = False
        self._jobs = {job.id: job for job in client.jobs()}
        for job in self._jobs.values():
            if job.state not in ENDED:
                self._recorder.links(client.job(job.id), 0.0)  # what was before is not of this recording

    def __str__(self) -> str:
        told = f"{plural(self._loads, 'load')} and {plural(self._links, 'download')}"
        return f"recorded {told} of {plural(len(self.devices), 'device')}"

    def look(self, place: Place, stream: BinaryIO, at: float) -> None:
        """Append what was told since the last look."""
        try:
            # Found anew each time: one that was restarted may have another port.
            with place.client() as client:
                devices, jobs = client.devices(), self._news(client)
        except UserError as error:  # whatever it is, a recording of hours is worth more than the reason
            if not self._silent:
                print(f"{error}; waiting for it", file=sys.stderr)
            self._silent = True
            return
        self._silent = False
        # Only now, with all of the answers there: what the recorder has seen it does not tell again.
        loads = self._recorder.note(devices, at)
        links = [one for _, job in jobs for one in self._recorder.links(job, at)]
        self._jobs |= {line.id: line for line, _ in jobs}
        loads, links = ([one for one in found if self._device in ("", one.device)] for found in (loads, links))
        _append(stream, lines(loads + links))
        self._loads, self._links = self._loads + len(loads), self._links + len(links)
        self.devices |= {one.device for one in loads}

    def _news(self, client: Client) -> list[tuple[JobView, JobView]]:
        """The jobs whose line in the list has changed, as it does with each round: the line, and the whole."""
        return [(line, client.job(line.id)) for line in client.jobs() if self._is_news(line)]

    def _is_news(self, job: JobView) -> bool:
        known = self._jobs.get(job.id)
        return known is None or (known != job and known.state not in ENDED)


def _append(stream: BinaryIO, data: bytes) -> None:
    """All of it or nothing: half a line would spoil the recording. Raises `OSError`."""
    before = stream.tell()
    if stream.write(data) < len(data):
        stream.truncate(before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("xb", buffering=0)
    except FileExistsError:
        raise UserError(f"--record {file}: exists already; name another file") from None
    except OSError as error:
        raise UserError(f"--record {file}: can't be made: {error.strerror or error}") from error
