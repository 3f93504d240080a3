"""`muster presence`: what devices and coordinators say of themselves on the broker."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from muster.cli.options import Json
from muster.presence import Expected, Presence, Verdict, Watch
from shared.errors import UserError
from shared.settings import BrokerSettings

EPILOG = "Example: [bold]muster presence --broker broker.example:8883 --fleet fleet1 --name gate-1 --pki pki[/bold]"
_LISTEN_S = 2.0
"""Retained words come at once; so long for the slowest of them."""


def presence(
    broker: Annotated[str, typer.Option(help="Name or address of the broker, with its port: HOST:PORT.")],
    fleet: Annotated[str, typer.Option(help="The fleet to look at.")],
    name: Annotated[str, typer.Option(help="The name in the certificate: one connection of it at a time.")] = "gate-1",
    cafile: Annotated[str, typer.Option(help="PEM file of the fleet's authority; turns TLS on.")] = "",
    certfile: Annotated[str, typer.Option(help="PEM file of the certificate.")] = "",
    keyfile: Annotated[str, typer.Option(help="PEM file of its key.")] = "",
    expect: Annotated[
        str, typer.Option(help='JSON, or - for standard input: {"NAME": {"version", "above", "states", "load"}}.')
    ] = "",
    within: Annotated[float, typer.Option(help="With --expect: seconds to wait for it.", min=0.1)] = 60.0,
    json: Json = False,
) -> None:
    """Show what the fleet says of itself on the broker, or wait until it says what it should; exit code 1: not in time.

    Works while no coordinator runs. A roll-out takes it as its gate.
    """
    expected = _expected(expect)
    host, _, port = broker.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--broker {broker!r}: expected HOST:PORT")
    settings = BrokerSettings(host=host, port=int(port), cafile=cafile, certfile=certfile, keyfile=keyfile)
    with Watch(settings, fleet, name) as watch:
        verdicts = watch.until(expected, within if expect else _LISTEN_S)
        if not expect:
            verdicts = {one: Verdict(fault="", presence=found) for one, found in sorted(watch.board.known.items())}
    if json:
        print(msgspec.json.format(msgspec.json.encode(verdicts), indent=2).decode())
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(_table(verdicts))
    if any(verdict.fault for verdict in verdicts.values()):
        raise typer.Exit(1)


def _expected(text: str) -> dict[str, Expected]:
    if not text:
        return {}
    source = "standard input" if text == "-" else "--expect"
    try:
        return msgspec.json.decode(sys.stdin.read() if text == "-" else text, type=dict[str, Expected])
    except msgspec.MsgspecError as error:
        raise UserError(f"{source}: {error}") from error


def _table(verdicts: dict[str, Verdict]) -> Table:
    table = Table("name", "state", "epoch", "version", "fault", box=None)
    for name, verdict in verdicts.items():
        found = verdict.presence or Presence(state="-", epoch=0)
        table.add_row(name, found.state, str(found.epoch), found.version or "-", verdict.fault or "-")
    return table
