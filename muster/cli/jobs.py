"""Commands that ask the coordinator."""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from rich.console import Console

from coordinator.web.views import DeviceView, JobView
from muster.cli import device_tables, following, tables
from muster.cli.options import Place
from muster.cli.options import as_json as _json
from muster.client import ENDED, beside
from shared.errors import UserError
from shared.settings import parse_toml


def submit(place: Place, file: Path, *, wait: bool, patience_s: float, as_json: bool) -> None:
    """Queue the job in `file`; `wait`: follow it to its end, over absences of the coordinator up to `patience_s`."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read: {error}") from error
    parse_toml(text, str(file))  # the coordinator does not know the file's name
    with place.client() as client:
        job = client.submit(text, str(file))
    if not wait:
        print(_json(job) if as_json else job.id)
        return
    print(job.id, file=sys.stderr)
    try:
        job = follow(place, job.id, patience_s)
    except KeyboardInterrupt:
        print(f"interrupted: {_goes_on(job.id)}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(_json(job) if as_json else tables.outcome(job))
    if job.state != "finished":
        raise typer.Exit(1)


def follow(place: Place, job_id: str, patience_s: float) -> JobView:
    """Say each change of the job on standard error until it ends or pauses.

    A coordinator that does not answer is waited for; raises `Unreachable` after `patience_s`.
    """
    return following.follow(
        place, lambda client: client.job(job_id), tables.status_line,
        lambda job: job.state in ENDED or job.state == "paused", _goes_on(job_id), patience_s,
    )  # fmt: skip


def _goes_on(job_id: str) -> str:
    return f"job {job_id} goes on; muster show {job_id} tells how it stands, muster cancel {job_id} ends it"


def list_jobs(place: Place, *, as_json: bool) -> None:
    """Print all jobs."""
    with place.client() as client:
        jobs = client.jobs()
    if as_json:
        print(_json(jobs))
    elif jobs:
        _console().print(tables.jobs(jobs))
    else:
        print("no jobs yet; queue one with: muster submit FILE")


def show(place: Place, job_id: str, round: int, *, as_json: bool) -> None:
    """Print one job, and round `round` of it in full (0: the last)."""
    with place.client() as client:
        job = client.job(job_id)
    chosen = next((view for view in job.rounds if view.round == round), None) if round else None
    if round and chosen is None:
        known = ", ".join(str(view.round) for view in job.rounds) or "none"
        raise UserError(f"job {job_id} has no round {round}; its rounds: {known}")
    if as_json:
        print(_json(chosen or job))
        return
    console = _console()
    console.print(tables.status_line(job), highlight=False)
    if job.rounds:
        console.print(tables.rounds(job))
        for part in tables.round_in_full(chosen or job.rounds[-1]):
            console.print(part, highlight=False)


def cancel(place: Place, job_id: str) -> None:
    """Cancel a job."""
    with place.client() as client:
        print(tables.status_line(client.cancel(job_id)))


def resume(place: Place, job_id: str) -> None:
    """Go on with a paused job."""
    with place.client() as client:
        print(tables.status_line(client.resume(job_id)))


def export(
    place: Place, job_id: str, folder: Path, *, merged: bool = False, base: str = "", ratio: float | None = None,
    device_class: str = "", data: str = "",
) -> None:  # fmt: skip
    """Fetch the adapter of a finished job; `merged`: as the whole model, on the base that it names or `base`.

    With `ratio` or `device_class` as a smaller model, measured on the rows in `data`.
    """
    smaller = ratio is not None or bool(device_class)
    if base and not merged and not smaller:
        raise UserError("--base says what to merge into: it goes with --merged, --ratio and --device-class")
    if data and not smaller:
        raise UserError("--data says what to measure a smaller model on: it goes with --ratio and --device-class")
    with place.client() as client:
        if not merged and not smaller:
            print(client.export(job_id, folder))
            return
        from muster.merged import merge
        from muster.smaller import make

        with beside(folder) as temporary:
            adapter = client.export(job_id, temporary / "adapter")
            if smaller:
                print(make(adapter, folder, base=base, ratio=ratio, device_class=device_class, data=data))
            else:
                print(merge(adapter, folder, base))


def devices(place: Place, device: str, *, as_json: bool) -> None:
    """Print the devices, or one in full."""
    with place.client() as client:
        found = known(client.devices(), device)
    if as_json:
        print(_json(found))
    elif device:
        _console().print(*device_tables.in_full(found[0]), sep="\n")
    elif found:
        _console().print(device_tables.devices(found))
    else:
        print("no device has reported yet")


def known(found: list[DeviceView], device: str) -> list[DeviceView]:
    """`device` alone of those found, or, "", all. Raises `UserError` where it is not among them."""
    if device and device not in {one.device for one in found}:
        raise UserError(f"no device {device!r} has reported yet; `muster devices` shows all that have")
    return [one for one in found if device in ("", one.device)]


def forget(place: Place, device: str) -> None:
    """Take a device out of the fleet."""
    with place.client() as client:
        client.forget(device)
    print(f"{device}: forgotten")


def _console() -> Console:
    # Piped into a file or a pager a table must not be cut to 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=200)
