"""What `muster release` does, once its options are understood."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from coordinator.web.release_asks import ReleaseAsk
from coordinator.web.views import ReleaseView
from muster.cli import following
from muster.cli import release_tables as tables
from muster.cli.options import Place, as_json

ENDED = frozenset({"finished", "rolled_back", "failed"})


def start(place: Place, ask: ReleaseAsk, *, wait: bool, patience_s: float, json: bool) -> None:
    """Begin a release; `wait`: follow it to its end, over absences of the coordinator up to `patience_s`."""
    with place.client() as client:
        view = client.release(ask)
    if wait:
        print(view.id, file=sys.stderr)
        view = _watched(place, view.id, patience_s)
    _print(view, json, short=not wait)
    if wait and not well(view):
        raise typer.Exit(1)


def roll_back(place: Place, name: str, *, wait: bool, patience_s: float, json: bool) -> None:
    """Withdraw a release; `wait`: until the devices have what they had."""
    with place.client() as client:
        view = client.roll_back(name)
    if wait:
        view = _watched(place, view.id, patience_s)
    _print(view, json, short=not wait)
    if wait and view.state not in ("rolled_back", "failed"):
        raise typer.Exit(1)


def show(place: Place, name: str, json: bool) -> None:
    """One release with its devices."""
    with place.client() as client:
        view = client.release_status(name)
    _print(view, json)
    if view.state in ENDED and not well(view):
        raise typer.Exit(1)


def show_all(place: Place, json: bool) -> None:
    """All releases."""
    with place.client() as client:
        found = client.releases()
    if json:
        print(as_json(found))
    elif found:
        _console().print(tables.releases(found))
    else:
        print("no releases yet; make one with: muster release JOB")


def _watched(place: Place, name: str, patience_s: float) -> ReleaseView:
    try:
        return follow(place, name, patience_s)
    except KeyboardInterrupt:
        print(f"interrupted: {_goes_on(name)}", file=sys.stderr)
        raise typer.Exit(130) from None


def follow(place: Place, name: str, patience_s: float) -> ReleaseView:
    """Say each change of the release on standard error until it ends.

    A coordinator that does not answer is waited for; raises `Unreachable` after `patience_s`.
    """
    return following.follow(
        place, lambda client: client.release_status(name), tables.progress, lambda view: view.state in ENDED,
        _goes_on(name), patience_s,
    )  # fmt: skip


def _goes_on(name: str) -> str:
    return f"release {name} goes on; muster release --status {name} tells how it stands, --rollback takes it back"


def well(view: ReleaseView) -> bool:
    """Whether the release is in use wherever it was tried."""
    return view.state == "finished" and not view.failed


def _print(view: ReleaseView, json: bool, *, short: bool = False) -> None:
    if json:
        print(as_json(view))
    elif short:
        print(view.id)
    else:
        console = _console()
        console.print(tables.headline(view), highlight=False)
        console.print(tables.devices(view))
        for device, reason in sorted(view.left_out.items()):
            console.print(f"left out: {device}: {reason}", highlight=False)


def _console() -> Console:
    # Piped into a file or a pager a table must not be cut to 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=200)
