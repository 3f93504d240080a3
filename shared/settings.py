"""Settings and job files: TOML, checked whole. Every fault is reported at once, with its key and the reason.

In a path `${NAME}` stands for an environment variable, such as `"${CREDENTIALS_DIRECTORY}/mqtt.key"` for a file that
systemd handed over by `LoadCredential=`.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta, structs

from shared.errors import SettingsError, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T", bound=msgspec.Struct)
FilePath = Annotated[str, Meta(extra={"path": True})]
"""A file or folder; `${NAME}` in it is replaced by that environment variable when the settings are read."""
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a settings file."""


class BrokerSettings(Section, frozen=True, kw_only=True):
    """How to reach the broker. TLS is on when `cafile` is set."""

    host: str = "127.0.0.1"
    """Name or address of the broker."""
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    """TCP port of the broker; 8883 by custom with TLS."""
    cafile: FilePath = ""
    """PEM file of the authority that signed the broker's certificate; turns TLS on."""
    certfile: FilePath = ""
    """PEM file of this side's certificate, for brokers that ask for one."""
    keyfile: FilePath = ""
    """PEM file of the key of `certfile`."""
    crlfile: FilePath = ""
    """PEM file of the authority's revocation list; with it a broker whose certificate was revoked is refused, and every
    broker once the list has expired."""
    username: str = ""
    """Empty: log in without a name."""
    password_file: FilePath = ""
    """File that holds the password of `username`, alone."""
    keepalive_s: Annotated[int, Meta(ge=2, le=120)] = 30
    """The broker takes a connection for lost after one and a half times this silence."""
    session_expiry_s: Annotated[int, Meta(ge=0)] = 3600
    """How long the broker keeps the session of a client that is away."""
    will_delay_s: Annotated[int, Meta(ge=0)] = 5
    """How long the broker waits before it tells the fleet that a client was lost."""
    reconnect_min_s: float = 1.0
    """Bound of the first wait before a new connection; it doubles with every failure, the wait is random below it."""
    reconnect_max_s: float = 120.0
    """Highest bound of that wait; a refused login waits so long at once."""
    window: Annotated[int, Meta(ge=1, le=1000)] = 16
    """QoS 1 messages that may be unacknowledged at once."""
    queue: Annotated[int, Meta(ge=1)] = 256
    """QoS 1 messages that may wait for the window."""


class HealthSettings(Section, frozen=True, kw_only=True):
    """When the service tells systemd that it is well. Past a bound it says nothing, and is killed and started again."""

    ready_s: Annotated[float, Meta(ge=0)] = 30.0
    """Without a broker the service counts as started after so many seconds, and goes on trying."""
    network_s: Annotated[float, Meta(gt=0)] = 30.0
    """Seconds that the network thread may be late."""
    tick_s: Annotated[float, Meta(gt=0)] = 30.0
    """Seconds that one turn of the main loop may take."""
    start_s: Annotated[float, Meta(gt=0)] = 1800.0
    """Seconds for which a service that starts asks systemd for more time than its unit gives."""
    extend_s: Annotated[float, Meta(gt=0)] = 30.0
    """While it starts or stops it asks so often for more time, each time for twice as much."""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises `UserError` where it is missing, unreadable or not TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    return parse_toml(text, str(path))


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """The tables of TOML text; `source` names it in errors."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of numbers with thousands of digits a plain one
        raise UserError(f"{source}: not TOML: {error}") from error


def load(path: Path, wanted: type[T]) -> T:
    """Read and check a settings file."""
    return check(wanted, read_toml(path), str(path))


def check(wanted: type[T], data: dict[str, Any], source: str) -> T:
    """`data` as a `wanted`. Raises `SettingsError` with every fault: `table.key: reason`."""
    faults: list[str] = []
    value = _struct(wanted, data, "", faults)
    if faults or value is None:
        raise SettingsError(source, faults)
    return value


def _struct(wanted: type[T], data: object, prefix: str, faults: list[str]) -> T | None:
    if not isinstance(data, dict):
        faults.append(f"{prefix.rstrip('.') or 'file'}: expected a table, got {type(data).__name__}")
        return None
    fields = {field.encode_name: field for field in structs.fields(wanted)}
    before = len(faults)
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known here: {', '.join(sorted(fields))}"
            faults.append(f"{prefix}{_shown(key)}: unknown key{hint}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in data:
            if field.required:
                faults.append(f"{prefix}{name}: missing")
            continue
        values[field.name] = _value(field.type, data[name], f"{prefix}{name}", faults)
    return wanted(**values) if len(faults) == before else None


def _shown(key: object) -> str:
    """A key as TOML would have it: quoted unless it is a bare one, so that a report stays one line."""
    return str(key) if re.fullmatch(r"[A-Za-z0-9_-]+", str(key)) else repr(key)


def _value(wanted: Any, data: object, key: str, faults: list[str]) -> Any:
    inner = get_args(wanted)[0] if get_origin(wanted) is Annotated else wanted
    if wanted == FilePath and isinstance(data, str):
        return _expanded(data, key, faults)
    if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
        return _struct(inner, data, f"{key}.", faults)
    if get_origin(inner) is dict and isinstance(data, dict):
        return {name: _value(get_args(inner)[1], item, f"{key}.{_shown(name)}", faults) for name, item in data.items()}
    if isinstance(data, float) and not math.isfinite(data):
        faults.append(f"{key}: expected a finite number, got {data}")
        return None
    try:
        return msgspec.convert(data, wanted)
    except msgspec.ValidationError as error:
        if get_origin(inner) is Literal:
            faults.append(f"{key}: expected one of {', '.join(map(str, get_args(inner)))}, got {data!r:.60}")
            return None
        faults.append(f"{key}: {str(error)[0].lower()}{str(error)[1:]}, got {data!r:.60}")
        return None


def _expanded(path: str, key: str, faults: list[str]) -> str:
    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], "")
        if not found:
            hint = ": systemd sets it for the service alone" if match[1] == "CREDENTIALS_DIRECTORY" else ""
            faults.append(f"{key}: ${{{match[1]}}} is not set in the environment{hint}")
        return found

    return _VARIABLE.sub(value, path)
