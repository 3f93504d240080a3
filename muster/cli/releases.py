"""`muster release`: a trained adapter to the devices, canaries first; and back."""

from __future__ import annotations

from typing import Annotated

import typer

from coordinator.core.release_records import Canaries
from coordinator.web.release_asks import WORSE_BY, ReleaseAsk
from muster.cli.options import Json, where
from shared.errors import UserError

EPILOG = (
    "Examples: [bold]muster release demo-3f2a1c --canary 10%[/bold] · [bold]muster release demo-3f2a1c@2 --device "
    "edge-01[/bold] · [bold]muster release --status[/bold] · [bold]muster release --rollback[/bold]"
)

Patience = Annotated[
    float, typer.Option(min=0.0, help="With --wait: seconds for which a coordinator that is away is waited for.")
]


def release(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="[JOB[@ROUND]]",
            help="Job to release, after its last accepted round or ROUND; with --status or --rollback a release's id "
            "or its job, and nothing for the latest.",
        ),
    ] = "",
    canary: Annotated[
        str, typer.Option(help="How many devices try it first: a share such as 10%, or a count such as 3.")
    ] = "10%",
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of canaries: another seed, other devices.")] = 0,
    device: Annotated[
        list[str] | None, typer.Option(help="A canary by name, in place of the draw; repeatable.")
    ] = None,
    worse_by: Annotated[
        float, typer.Option(min=0.0, help="Share by which a device's loss may rise above what it has now.")
    ] = WORSE_BY,
    deadline: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds for the canaries, and for the rest; 0: as the coordinator says."),
    ] = 0.0,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it to its end.")] = True,
    patience: Patience = 600.0,
    status: Annotated[bool, typer.Option("--status", help="Show a release, device by device.")] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Give the devices back what they had before a release.")
    ] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List all releases.")] = False,
    json: Json = False,
) -> None:
    """Put a job's adapter into use on the devices: some try it first, then the rest; back, where it is worse.

    Exit code 1: it was stopped or rolled back, or it does not work on some device.
    """
    from muster.cli import releasing

    place = where(context)
    match _asked(what, status=status, rollback=rollback, list_all=list_all):
        case "list":
            releasing.show_all(place, json)
        case "status":
            releasing.show(place, what or "last", json)
        case "rollback":
            releasing.roll_back(place, what or "last", wait=wait, patience_s=patience, json=json)
        case _:
            ask = _ask(what, canary, device or [], seed, worse_by, deadline)
            releasing.start(place, ask, wait=wait, patience_s=patience, json=json)


def _asked(what: str, **chosen: bool) -> str:
    """Which of the command's ways is meant."""
    ways = [name.removesuffix("_all") for name, on in chosen.items() if on]
    if len(ways) > 1:
        raise UserError("--status, --rollback and --list exclude each other")
    if not ways and not what:
        raise UserError("say which job: muster release JOB; or --status, --rollback, --list")
    return ways[0] if ways else "start"


def _ask(what: str, canary: str, devices: list[str], seed: int, worse_by: float, deadline: float) -> ReleaseAsk:
    job, at, number = what.partition("@")
    if at and not number.isdecimal():
        raise UserError(f"{what!r}: a round is a number, as in {job}@2")
    share, count = _canary(canary)
    canaries = Canaries(share=share, count=count, devices=devices, seed=seed)
    return ReleaseAsk(
        job=job, round=int(number or 0), canaries=canaries, worse_by=worse_by, deadline_s=deadline
    )  # fmt: skip


def _canary(text: str) -> tuple[float, int]:
    """(share, count) of "10%" or "3"."""
    number = text.strip().removesuffix("%")
    try:
        if text.strip().endswith("%") and 0.0 < float(number) <= 100.0:
            return float(number) / 100.0, 0
        if number.isdecimal() and int(number) > 0 and not text.strip().endswith("%"):
            return 0.0, int(number)
    except ValueError:
        pass
    raise UserError(f"--canary {text!r}: a share such as 10%, or a count such as 3")
