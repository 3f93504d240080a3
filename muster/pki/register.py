"""The register of issued certificates and the rules of issuing: pure functions over data, `now` is an argument."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterable
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, structs

from shared.errors import UserError
from shared.ids import LONGEST_COORDINATOR, check_name

Role = Literal["device", "coordinator", "top", "reader", "gate", "server"]
"""What a name is: `reader` may read the whole fleet (a dashboard), `gate` its presence alone (a health gate), and
`server` is a broker's own certificate. It decides what a certificate may be used for, and the access list."""
ROLES: tuple[Role, ...] = get_args(Role)
Reason = Literal["unspecified", "key_compromise", "cessation_of_operation", "superseded", "certificate_hold"]
HOLD: Reason = "certificate_hold"
"""The one reason that can be taken back: the name is suspended."""
REASONS: tuple[Reason, ...] = tuple(reason for reason in get_args(Reason) if reason != HOLD)
"""Of a revocation, which is for good."""
Days = Annotated[int, Meta(ge=1, le=36500)]

SKEW = datetime.timedelta(minutes=5)
"""Certificates and lists are valid from so long before now: the other machine's clock may be behind."""
_SECOND = datetime.timedelta(seconds=1)
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*\Z")


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """How long things are good for, in days."""

    certificate_days: Days = 90
    rotate_days: Days = 60
    """Age at which `rotate` renews a certificate."""
    crl_days: Days = 90
    """After it, a broker that got no newer revocation list refuses everyone."""
    authority_days: Days = 3650


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One certificate that was issued."""

    serial: str
    """In hex."""
    name: str
    role: Role
    hosts: tuple[str, ...] = ()
    """Names and addresses of a server."""
    key: str
    """sha256 of the public key."""
    not_before: datetime.datetime
    not_after: datetime.datetime
    kept: bool = False
    """Whether its key was made here, not on the node."""
    revoked_at: datetime.datetime | None = None
    reason: Reason = "unspecified"


class Register(msgspec.Struct, frozen=True, kw_only=True):
    """All that an authority remembers."""

    version: Literal[1] = 1
    fleet: str
    terms: Terms = Terms()
    entries: tuple[Entry, ...] = ()
    """In the order of issue."""
    crl_number: int = 0
    crl_from: datetime.datetime | None = None
    crl_until: datetime.datetime | None = None


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate that is asked for."""

    name: str
    role: Role
    hosts: tuple[str, ...] = ()
    key: str
    """sha256 of the public key."""
    kept: bool = False
    renew: bool = False
    """Whether it replaces one that is still good."""


def check_terms(terms: Terms) -> None:
    """Raises `UserError` for terms under which nothing would be renewed in time."""
    if not terms.rotate_days < terms.certificate_days <= terms.authority_days:
        raise UserError(
            f"days: rotation at {terms.rotate_days} must come before the end of a certificate at "
            f"{terms.certificate_days}, and that before the authority's own at {terms.authority_days}"
        )


def checked_hosts(hosts: Iterable[str]) -> tuple[str, ...]:
    """Host names in lower case and IP addresses in their short form. Raises `UserError` for what is neither."""
    found = []
    for host in hosts:
        try:
            found.append(str(ipaddress.ip_address(host)))
        except ValueError:
            if not _HOST.match(host.lower()):
                raise UserError(
                    f"host {host!r}: neither a host name nor an address (wildcards are not issued)"
                ) from None
            found.append(host.lower())
    return tuple(dict.fromkeys(found))


def admit(register: Register, wanted: Wanted, now: datetime.datetime) -> None:
    """Raises `UserError` with the reason why `wanted` must not be issued."""
    name = check_name(wanted.name, "name")
    if wanted.role == "coordinator" and len(name) > LONGEST_COORDINATOR:
        raise UserError(f"{name}: a coordinator's name has {LONGEST_COORDINATOR} characters at most, for its -top")
    if wanted.role == "server" and not wanted.hosts:
        raise UserError(f"{name}: a server needs the names that clients reach it by: --host NAME")
    if wanted.role != "server" and wanted.hosts:
        raise UserError(f"{name}: --host is for servers; this is a {wanted.role}")
    for entry in register.entries:
        if entry.name == name and entry.role != wanted.role:
            raise UserError(f"{name}: the name was given to a {entry.role}; a {wanted.role} needs another")
        if entry.key == wanted.key and entry.name != name:
            raise UserError(f"{name}: its key is {entry.name}'s too (a copied disk?): make a new one on the node")
        if entry.key == wanted.key and entry.revoked_at is not None and entry.reason not in ("superseded", HOLD):
            raise UserError(f"{name}: its key was revoked: make a new one on the node")
    if suspended(register, name):
        raise UserError(f"{name}: it is suspended: muster pki resume {name}, or revoke it")
    last = current(register, name)
    if wanted.renew and last is None:
        raise UserError(f"{name}: nothing to renew: it has no certificate that was not revoked")
    if not wanted.renew and last is not None and now < last.not_after:
        raise UserError(f"{name}: it has a certificate until {last.not_after:%Y-%m-%d}: revoke that, or renew it")


def answered(register: Register, wanted: Wanted, now: datetime.datetime) -> Entry | None:
    """The certificate that is good and just as `wanted`, where no other is asked for."""
    last = current(register, wanted.name)
    if last is None or wanted.renew or now >= last.not_after:
        return None
    same = (last.role, last.hosts, last.key, last.kept) == (wanted.role, wanted.hosts, wanted.key, wanted.kept)
    return last if same else None


def add(
    register: Register, wanted: Wanted, serial: str, now: datetime.datetime, authority_until: datetime.datetime
) -> tuple[Register, Entry]:
    """The register with a certificate as `wanted`; it never outlives its authority."""
    end = min(now + datetime.timedelta(days=register.terms.certificate_days), authority_until)
    if end - now < datetime.timedelta(days=1):
        raise UserError(f"the authority itself expires at {authority_until:%Y-%m-%d %H:%M} UTC: make a new one")
    entry = Entry(
        serial=serial, name=wanted.name, role=wanted.role, hosts=wanted.hosts, key=wanted.key, kept=wanted.kept,
        not_before=_whole(now) - SKEW, not_after=_whole(end),
    )  # fmt: skip
    return structs.replace(register, entries=(*register.entries, entry)), entry


def current(register: Register, name: str) -> Entry | None:
    """The newest certificate of `name` that was not revoked; it may have expired."""
    return next((one for one in reversed(register.entries) if one.name == name and one.revoked_at is None), None)


def due(register: Register, now: datetime.datetime) -> list[Entry]:
    """The newest certificate of each name where that is older than `rotate_days`, expired ones too, by name."""
    newest = {entry.name: entry for entry in register.entries if entry.revoked_at is None}
    age = datetime.timedelta(days=register.terms.rotate_days)
    return [entry for _, entry in sorted(newest.items()) if now >= entry.not_before + SKEW + age]


def revoke(
    register: Register, name: str, now: datetime.datetime, reason: Reason, *, only_old: bool = False
) -> tuple[Register, list[Entry]]:
    """The register with every certificate of `name` revoked, and which were not so before.

    Expired ones too, else they would be renewed. `only_old`: all but the newest. Who was suspended can be revoked.
    Raises `UserError` for a name that was never given.
    """
    if not any(entry.name == name for entry in register.entries):
        raise UserError(f"{name}: no certificate of this name was issued here")
    newest = current(register, name) if only_old else None
    found: list[Entry] = []
    entries = []
    for entry in register.entries:
        held = entry.reason == HOLD and reason != HOLD
        if entry.name == name and (entry.revoked_at is None or held) and entry != newest:
            entry = structs.replace(entry, revoked_at=_whole(now), reason=reason)
            found.append(entry)
        entries.append(entry)
    return structs.replace(register, entries=tuple(entries)), found


def suspended(register: Register, name: str) -> bool:
    """Whether the certificates of `name` are withheld for a while."""
    return any(entry.name == name and entry.reason == HOLD for entry in register.entries)


def resume(register: Register, name: str) -> tuple[Register, list[Entry]]:
    """The register with what `suspended` says taken back; the certificates that are good again, or were until they
    expired. Raises `UserError` for a name that is not suspended."""
    if not suspended(register, name):
        raise UserError(f"{name}: it is not suspended")
    found: list[Entry] = []
    entries = []
    for entry in register.entries:
        if entry.name == name and entry.reason == HOLD:
            entry = structs.replace(entry, revoked_at=None, reason="unspecified")
            found.append(entry)
        entries.append(entry)
    return structs.replace(register, entries=tuple(entries)), found


def listed(register: Register, now: datetime.datetime) -> list[Entry]:
    """What the revocation list holds: revoked certificates, until a day after they would have expired anyway."""
    day = datetime.timedelta(days=1)
    return [entry for entry in register.entries if entry.revoked_at is not None and now < entry.not_after + day]


def next_list(register: Register, now: datetime.datetime) -> Register:
    """The register with number and times of its next revocation list.

    Of two lists of one second a broker may take the older one, so each begins at least a second after the one before.
    Raises `UserError` where that lies ahead: a list from the future would lock the whole fleet out.
    """
    begin = _whole(now) - SKEW
    if register.crl_from is not None:
        begin = max(begin, register.crl_from + _SECOND)
    if begin > now:
        raise UserError(
            f"the last revocation list is of {register.crl_from:%Y-%m-%d %H:%M}, here it is {now:%Y-%m-%d %H:%M} UTC: "
            "set this machine's clock"
        )
    end = _whole(now) + datetime.timedelta(days=register.terms.crl_days)
    return structs.replace(register, crl_number=register.crl_number + 1, crl_from=begin, crl_until=end)


def state_of(register: Register, entry: Entry, now: datetime.datetime) -> str:
    """suspended, revoked, expired, replaced (by a newer one), due (for renewal) or good."""
    if entry.revoked_at is not None:
        return "suspended" if entry.reason == HOLD else "revoked"
    if now >= entry.not_after:
        return "expired"
    if entry != current(register, entry.name):
        return "replaced"
    return "due" if entry in due(register, now) else "good"


def names(register: Register, role: Role) -> list[str]:
    """The names of `role` that have a certificate, sorted."""
    return sorted({one.name for one in register.entries if one.role == role and one.revoked_at is None})


def _whole(moment: datetime.datetime) -> datetime.datetime:
    """Certificates know no parts of a second."""
    return moment.replace(microsecond=0)
