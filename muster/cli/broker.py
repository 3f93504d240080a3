"""`muster broker`: what a fleet's mosquitto needs."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from muster import mosquitto
from muster.cli.pki import Passphrase, open_authority
from muster.pki import register as rules
from muster.pki.register import Role
from shared import topics
from shared.errors import UserError
from shared.ids import check_name

app = typer.Typer(
    name="broker",
    help="What a fleet's mosquitto needs: its configuration, its access list; and to end a connection.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
_SHIPPED = mosquitto.Places()


@app.command(epilog="Example: [bold]muster broker config > /etc/mosquitto/mosquitto.conf[/bold]")
def config(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = _SHIPPED.port,
    pki: Annotated[str, typer.Option(help="Folder on the broker with ca.crt, crl.pem, its key.")] = _SHIPPED.pki,
    name: Annotated[str, typer.Option(help="Name of its certificate and key there.")] = _SHIPPED.name,
    acl: Annotated[str, typer.Option(help="File of the access list.")] = _SHIPPED.acl,
    persistence: Annotated[str, typer.Option(help="Folder of its state.")] = _SHIPPED.persistence,
) -> None:
    """Print the configuration: mutual TLS 1.3, the certificate's name as user, limits that are measured."""
    places = mosquitto.Places(port, pki, check_name(name, "--name"), acl, persistence)
    for value in (pki, acl, persistence):
        if not value.startswith("/") or any(letter.isspace() for letter in value):
            raise UserError(f"{value!r}: give an absolute path without spaces")
    print(mosquitto.configuration(places), end="")


@app.command(epilog="Example: [bold]muster broker acl --folder pki > muster.acl[/bold]")
def acl(
    fleet: Annotated[str, typer.Argument(help="Name of the fleet; without it, the authority's.")] = "",
    coordinator: Annotated[list[str] | None, typer.Option(help="May plan and collect; repeatable.")] = None,
    reader: Annotated[list[str] | None, typer.Option(help="May read the whole fleet; repeatable.")] = None,
    gate: Annotated[list[str] | None, typer.Option(help="May read presence alone; repeatable.")] = None,
    folder: Annotated[Path, typer.Option(envvar="MUSTER_PKI", help="Folder of the authority.")] = Path("pki"),
) -> None:
    """Print the access list. Without names, those that the authority has enrolled as such."""
    named = {"coordinator": coordinator or [], "reader": reader or [], "gate": gate or []}
    if not fleet:
        if any(named.values()):
            raise UserError("name the fleet, too: muster broker acl FLEET --coordinator NAME")
        register = open_authority(folder).register
        fleet = register.fleet
        parts: tuple[Role, ...] = ("coordinator", "reader", "gate")
        named = {part: rules.names(register, part) for part in parts}
    if not named["coordinator"]:
        raise UserError("a fleet without a coordinator does nothing: enrol one, or name it with --coordinator")
    for what, names in (("fleet", [fleet]), *named.items()):
        for name in names:
            check_name(name, what)
    twice = [name for name in sum(named.values(), []) if sum(name in names for names in named.values()) > 1]
    if twice:
        raise UserError(f"{twice[0]}: give each name one part alone")
    text = topics.acl(fleet, named["coordinator"], readers=named["reader"], gates=named["gate"])
    print(text, end="")


@app.command(epilog="Example: [bold]muster broker kick edge-07 --host broker.example[/bold]")
def kick(
    name: Annotated[str, typer.Argument(help="The client whose connection shall end.")],
    host: Annotated[str, typer.Option(help="Name or address of the broker.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = _SHIPPED.port,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until this is given up.")] = 15.0,
    folder: Annotated[Path, typer.Option(envvar="MUSTER_PKI", help="Folder of the authority.")] = Path("pki"),
    passphrase_file: Passphrase = "",
) -> None:
    """End a client's connection, and the session that the broker keeps for it.

    A broker looks at certificates only when a connection begins. After a revocation: reload the broker, then this.
    """
    from muster.kick import kick as end

    now = datetime.datetime.now(datetime.timezone.utc)
    end(open_authority(folder, passphrase_file), name, host, port, now=now, timeout_s=timeout)
    print(f"{name}: its connection to {host}:{port} has ended, if there was one")
