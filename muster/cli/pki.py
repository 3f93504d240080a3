"""`muster pki`: the fleet's authority."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from muster.pki import register as rules
from muster.pki.register import Entry, Reason, Register, Role, Terms
from shared.errors import UserError

if TYPE_CHECKING:
    from muster.pki.authority import Authority, Issued

app = typer.Typer(
    name="pki",
    help="Enrol, renew and revoke: the fleet's own certificate authority, in a folder that only you can read.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
Folder = Annotated[Path, typer.Option(envvar="MUSTER_PKI", help="Folder of the authority.")]
Passphrase = Annotated[
    str, typer.Option(help="File with the passphrase of the authority's key; else MUSTER_PKI_PASSPHRASE, if it is set.")
]
Name = Annotated[str, typer.Argument(help="Device id, coordinator's name, or another name.")]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="Of a server: name or address that clients use; repeatable.")
]
As = Annotated[
    str,
    typer.Option("--as", help="device, coordinator, top (<coordinator>-top), reader, gate (health gate) or server."),
]
Renew = Annotated[bool, typer.Option("--renew", help="Replace a certificate that is still good.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_HERE = Path("pki")


def open_authority(folder: Path, passphrase_file: str = "") -> Authority:
    """The authority in `folder`. Imported here: the help must not wait for the library."""
    from muster.pki.authority import Authority, read_passphrase

    return Authority(folder, read_passphrase(passphrase_file))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _one_of(value: str, allowed: Sequence[str], option: str) -> Any:
    if value not in allowed:
        raise UserError(f"{option} {value}: there are {', '.join(allowed)}")
    return value


@app.command(epilog="Example: [bold]muster pki init fleet1 --passphrase-file ~/.muster-ca[/bold]")
def init(
    fleet: Annotated[str, typer.Argument(help="Name of the fleet.")],
    folder: Folder = _HERE,
    passphrase_file: Passphrase = "",
    days: Annotated[int, typer.Option(help="How long a certificate is good for.")] = Terms().certificate_days,
    rotate_days: Annotated[int, typer.Option(help="Age at which rotate renews it.")] = Terms().rotate_days,
    crl_days: Annotated[int, typer.Option(help="How long a revocation list is good for.")] = Terms().crl_days,
    ca_days: Annotated[int, typer.Option(help="How long the authority is good for.")] = Terms().authority_days,
) -> None:
    """Make the authority: its key, its certificate, an empty revocation list."""
    asked = {
        "certificate_days": days, "rotate_days": rotate_days, "crl_days": crl_days, "authority_days": ca_days,
    }  # fmt: skip
    try:
        terms = msgspec.convert(asked, Terms)
    except msgspec.ValidationError as error:
        raise UserError(f"days: {str(error).lower()}") from error
    from muster.pki.authority import Authority, read_passphrase

    made = Authority.create(folder, fleet, _now(), terms=terms, passphrase=read_passphrase(passphrase_file))
    print(f"{made.cafile} goes to every machine, {made.crlfile} to the broker; back up {folder}, and keep it offline")


@app.command(epilog="Example: [bold]muster pki sign edge-07 --request edge-07.csr[/bold]")
def sign(
    name: Name,
    request: Annotated[Path, typer.Option(help="The node's request, made by muster-edge enroll NAME.")],
    role: As = "device",
    host: Hosts = None,
    renew: Renew = False,
    folder: Folder = _HERE,
    passphrase_file: Passphrase = "",
    json: Json = False,
) -> None:
    """Answer a node's request with a certificate. Its key stays on the node; of the request only the key is taken."""
    try:
        data = request.read_bytes()
    except OSError as error:
        raise UserError(f"--request {request}: {error.strerror}") from error
    authority = open_authority(folder, passphrase_file)
    part: Role = _one_of(role, rules.ROLES, "--as")
    _tell([authority.sign(name, data, part, _now(), hosts=host or (), renew=renew)], as_json=json)


@app.command(epilog="Example: [bold]muster pki issue coord-1 --as coordinator[/bold]")
def issue(
    name: Name,
    role: As = "device",
    host: Hosts = None,
    renew: Renew = False,
    folder: Folder = _HERE,
    passphrase_file: Passphrase = "",
    json: Json = False,
) -> None:
    """Make key and certificate here, for what runs on this machine. For other machines: sign their requests."""
    authority = open_authority(folder, passphrase_file)
    part: Role = _one_of(role, rules.ROLES, "--as")
    _tell([authority.issue(name, part, _now(), hosts=host or (), renew=renew)], as_json=json)


@app.command(epilog="Example: [bold]muster pki rotate --requests ./collected[/bold]")
def rotate(
    names: Annotated[list[str] | None, typer.Argument(help="Only these, due or not.")] = None,
    requests: Annotated[
        Path | None, typer.Option(help="Folder with NAME.csr of nodes that made new keys (muster-edge enroll --renew).")
    ] = None,
    folder: Folder = _HERE,
    passphrase_file: Passphrase = "",
    json: Json = False,
) -> None:
    """Renew every certificate that is due or has a request, and the revocation list. Without a request a node's key
    stays. Exit code 1: some could not be renewed."""
    authority = open_authority(folder, passphrase_file)
    try:
        given = {path.stem: path.read_bytes() for path in sorted(requests.glob("*.csr"))} if requests else {}
    except OSError as error:
        raise UserError(f"--requests {requests}: {error.strerror}") from error
    done = authority.rotate(_now(), only=names or (), requests=given)
    _tell(done.renewed, as_json=json)
    for reason in done.refused.values():
        print(f"not renewed: {reason}", file=sys.stderr)
    if done.refused:
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]muster pki revoke edge-07 --reason key_compromise[/bold]")
def revoke(
    name: Name,
    reason: Annotated[str, typer.Option(help=f"One of {', '.join(rules.REASONS)}.")] = "unspecified",
    old: Annotated[bool, typer.Option("--old", help="Only what a newer certificate has replaced.")] = False,
    folder: Folder = _HERE,
    passphrase_file: Passphrase = "",
) -> None:
    """Withdraw a name's certificates and write the list. The broker takes it at its next reload."""
    authority = open_authority(folder, passphrase_file)
    wanted: Reason = _one_of("superseded" if old and reason == "unspecified" else reason, rules.REASONS, "--reason")
    found = authority.revoke(name, _now(), reason=wanted, only_old=old)
    print(f"{name}: {len(found)} revoked; copy {authority.crlfile} to the broker, then reload it")


@app.command(epilog="Example: [bold]muster pki suspend edge-07[/bold]")
def suspend(name: Name, folder: Folder = _HERE, passphrase_file: Passphrase = "") -> None:
    """Keep a name out until you resume it: its certificates are on the list meanwhile, and nothing is renewed."""
    authority = open_authority(folder, passphrase_file)
    found = authority.revoke(name, _now(), reason=rules.HOLD)
    if not found and not rules.suspended(authority.register, name):
        raise UserError(f"{name}: its certificates were revoked, which is for good")
    print(f"{name}: suspended; copy {authority.crlfile} to the broker, reload it, then muster broker kick {name}")


@app.command(epilog="Example: [bold]muster pki resume edge-07[/bold]")
def resume(name: Name, folder: Folder = _HERE, passphrase_file: Passphrase = "") -> None:
    """Let a suspended name in again, with the certificate and key that it has."""
    authority = open_authority(folder, passphrase_file)
    authority.resume(name, _now())
    print(f"{name}: resumed; copy {authority.crlfile} to the broker, then reload it")


@app.command(epilog="Example: [bold]muster pki crl[/bold]")
def crl(folder: Folder = _HERE, passphrase_file: Passphrase = "") -> None:
    """Write the revocation list anew. A broker whose list has expired refuses everyone."""
    authority = open_authority(folder, passphrase_file)
    path = authority.refresh(_now())
    print(f"{path} is good until {authority.register.crl_until:%Y-%m-%d}; copy it to the broker, then reload it")


@app.command(name="list", epilog="Example: [bold]muster pki list[/bold]")
def list_names(folder: Folder = _HERE, json: Json = False) -> None:
    """List the newest certificate of each name, and until when the revocation list is good."""
    register = open_authority(folder).register
    newest = {entry.name: entry for entry in sorted(register.entries, key=_standing)}
    _table(register, [entry for _, entry in sorted(newest.items())], as_json=json)


@app.command(epilog="Example: [bold]muster pki show edge-07[/bold]")
def show(name: Name, folder: Folder = _HERE, json: Json = False) -> None:
    """Show every certificate that a name ever had."""
    register = open_authority(folder).register
    found = [entry for entry in register.entries if entry.name == name]
    if not found:
        raise UserError(f"{name}: no certificate of this name was issued here")
    _table(register, found, as_json=json, serials=True)


def _standing(entry: Entry) -> tuple[bool, bool]:
    """The higher, the more it says of its name: in force, suspended, revoked."""
    return entry.revoked_at is None, entry.reason == rules.HOLD


def _tell(issued: Sequence[Issued], *, as_json: bool) -> None:
    if as_json:
        views = [
            {
                **_view(one.entry),
                "certificate": str(one.certificate),
                "key_file": str(one.key or ""),
                "changed": one.changed,
            }
            for one in issued
        ]
        print(msgspec.json.encode(views).decode())
        return
    for one in issued:
        key = f" and {one.key}" if one.key else ""
        print(f"{one.entry.name}: {one.certificate}{key}, {one.entry.role}, until {one.entry.not_after:%Y-%m-%d}")
    if not issued:
        print("nothing was renewed")


def _view(entry: Entry) -> dict[str, Any]:
    view: dict[str, Any] = msgspec.to_builtins(entry)
    return view


def _table(register: Register, entries: Sequence[Entry], *, as_json: bool, serials: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    now = _now()
    states = [rules.state_of(register, entry, now) for entry in entries]
    if as_json:
        views = [{**_view(entry), "state": state} for entry, state in zip(entries, states, strict=True)]
        plain = {"fleet": register.fleet, "crl_until": register.crl_until, "certificates": views}
        print(msgspec.json.encode(plain).decode())
        return
    table = Table(box=None, header_style="bold")
    for title in ("name", "as", "state", "from", "until", "hosts", *(["serial"] if serials else [])):
        table.add_column(title, overflow="fold")
    for entry, state in zip(entries, states, strict=True):
        told = f"revoked: {entry.reason}" if state == "revoked" else state
        cells = [f"{entry.not_before:%Y-%m-%d}", f"{entry.not_after:%Y-%m-%d}", " ".join(entry.hosts)]
        table.add_row(entry.name, entry.role, told, *cells, *([entry.serial] if serials else []))
    Console().print(table)
    if register.crl_until is not None:
        left = (register.crl_until - now).days
        line = f"revocation list: good until {register.crl_until:%Y-%m-%d}"
        print(line + (": muster pki crl, then copy it to the broker" if left < 14 else ""), file=sys.stderr)
