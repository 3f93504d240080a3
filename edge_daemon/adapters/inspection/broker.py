"""The way to the broker, step by step: address, TCP, TLS, login, access list.

A device has one session: whoever else logs in with its name pushes the daemon out. So while the daemon runs (its lock
on `state_dir` tells) the login is left alone.
"""

from __future__ import annotations

import fcntl
import os
import queue
import random
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from edge_daemon.core.diagnosis import Finding, Window, fail, ok, skip, warn
from edge_daemon.settings import EdgeSettings
from shared import topics
from shared.codec import pack, unpack
from shared.errors import DecodeError, UserError
from shared.messages import CoordState, DeviceState
from shared.settings import BrokerSettings
from shared.transport import base
from shared.transport.credentials import read_credentials
from shared.transport.mqtt import MqttTransport
from shared.version import VERSION

_ALERT_S = 1.0
"""A broker that refuses our certificate says so by an alert after the handshake of TLS 1.3."""


@dataclass(frozen=True)
class Met:
    """What the way to the broker showed. `windows`: of its certificate; `coordinator_ts`: of a coordinator online."""

    findings: list[Finding]
    windows: tuple[Window, ...] = ()
    coordinator_ts: float | None = None


def visit(settings: EdgeSettings, wait_s: float) -> Met:
    """Go as far as it goes; each step waits `wait_s` at most."""
    findings, windows = _reach(settings.broker, wait_s)
    if any(finding.verdict == "fail" for finding in findings) or (
        settings.broker.cafile and findings[-1].verdict != "ok"
    ):
        rest = [skip("broker login", "not reached"), skip("broker access", "not reached")]
        return Met([*findings, *rest], windows)
    if why := occupied(Path(settings.state_dir)):
        return Met([*findings, skip("broker login", why), skip("broker access", why)], windows)
    more, seen = _login(settings, wait_s)
    return Met([*findings, *more], windows, seen)


def occupied(state_dir: Path) -> str:
    """Why the device's session must be left alone, or ""."""
    try:
        descriptor = os.open(state_dir / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"whether the daemon runs can't be told ({error.strerror}): run this as root or as the service's user"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return "the daemon runs and holds this device's only session: see `systemctl status muster-edge`"
    finally:
        os.close(descriptor)
    return ""


def _reach(settings: BrokerSettings, wait_s: float) -> tuple[list[Finding], tuple[Window, ...]]:
    where = f"{settings.host}:{settings.port}"
    try:
        raw = socket.create_connection((settings.host, settings.port), wait_s)
    except socket.gaierror as error:
        return [fail("broker address", f"{settings.host}: {error.strerror}", "correct broker.host, or the DNS")], ()
    except OSError as error:
        advice = (
            "is mosquitto up, the port right, the way open? In the unit's sandbox a drop-in must allow the address: "
            "IPAddressAllow="
        )
        return [fail("broker address", f"{where}: {error.strerror or error}", advice)], ()
    with raw:
        reached = ok("broker address", f"{where} answers")
        if not settings.cafile:
            return [reached, skip("broker TLS", "off: broker.cafile is not set")], ()
        finding, windows = _handshake(settings, raw)
        return [reached, finding], windows


def _handshake(settings: BrokerSettings, raw: socket.socket) -> tuple[Finding, tuple[Window, ...]]:
    try:
        context, _ = read_credentials(settings)
    except UserError as error:
        return skip("broker TLS", str(error)), ()
    assert context is not None
    try:
        with context.wrap_socket(raw, server_hostname=settings.host) as secured:
            windows = _windows(secured.getpeercert())
            secured.settimeout(_ALERT_S)
            try:
                if not secured.recv(1):
                    raise ConnectionResetError("it closed the connection")
            except TimeoutError:
                pass  # it waits for us to speak: it took our certificate
            return ok("broker TLS", f"{secured.version()}, its certificate names {settings.host}"), windows
    except ssl.SSLCertVerificationError as error:
        advice = "broker.cafile must be the fleet's authority, broker.host a name in the broker's certificate"
        return fail("broker TLS", f"the broker's certificate: {error.verify_message}", advice), ()
    except (OSError, ssl.SSLError) as error:
        advice = (
            "the broker refuses this device's certificate: is it revoked, expired or of another authority? Its log "
            "says more; it must speak TLS 1.3"
        )
        return fail("broker TLS", getattr(error, "reason", None) or str(error), advice), ()


def _windows(certificate: object) -> tuple[Window, ...]:
    if not isinstance(certificate, dict) or "notBefore" not in certificate:
        return ()
    begin, end = (float(ssl.cert_time_to_seconds(str(certificate[name]))) for name in ("notBefore", "notAfter"))
    return (Window("the broker's certificate", begin, end),)


def _login(settings: EdgeSettings, wait_s: float) -> tuple[list[Finding], float | None]:
    """Log in as the device and say what is true: that its daemon is not connected."""
    events: queue.SimpleQueue[base.TransportEvent] = queue.SimpleQueue()
    epoch = _epoch(Path(settings.state_dir))
    transport = MqttTransport(settings.broker, settings.device, next_epoch=lambda: epoch, rng=random.Random())
    transport.subscribe(topics.device_filters(settings.fleet, settings.device))
    transport.start(events.put)
    try:
        visitor = _Visitor(settings, transport, events, wait_s, epoch)
        return visitor.findings(), visitor.coordinator_ts
    finally:
        transport.stop(graceful=True)


class _Visitor:
    def __init__(
        self,
        settings: EdgeSettings,
        transport: MqttTransport,
        events: queue.SimpleQueue[base.TransportEvent],
        wait_s: float,
        epoch: int,
    ) -> None:
        self.coordinator_ts: float | None = None
        self._settings = settings
        self._transport = transport
        self._events = events
        self._wait_s = wait_s
        self._epoch = epoch
        self._heard: list[str] = []

    def findings(self) -> list[Finding]:
        met = self._until(base.Connected, base.TransportFailed)
        if not isinstance(met, base.Connected):
            why = met.reason if isinstance(met, base.TransportFailed) else f"no answer within {self._wait_s:.0f} s"
            advice = "the broker's log says why; the certificate's CN must be the device's name"
            return [fail("broker login", why, advice), skip("broker access", "not logged in")]
        return [ok("broker login", f"as {self._settings.device}, packets up to {met.max_packet} bytes"), self._access()]

    def _access(self) -> Finding:
        fleet, device = self._settings.fleet, self._settings.device
        name = topics.STATE.name(fleet, device=device)
        state = DeviceState(s="disconnected", epoch=self._epoch, version=VERSION, ts=time.time())
        self._transport.publish(base.Outgoing(topics.STATE, name, pack(state), token=name))
        self._transport.pump()
        met = self._until(base.Published)
        advice = "make the access list anew (shared.topics.acl) for this fleet; is `fleet` right in the settings?"
        if not isinstance(met, base.Published):
            return fail("broker access", f"no answer to a message on {name}", advice)
        if met.reason:
            return fail("broker access", f"{name}: {met.reason}", advice)
        if not self._heard:
            self._until(base.Received)
        if not self._heard:
            advice = f"has a coordinator of fleet {fleet!r} ever run? If so: {advice}"
            return warn("broker access", "may write its state; hears of no coordinator", advice)
        return ok("broker access", f"may write its state, hears of {', '.join(sorted(set(self._heard)))}")

    def _until(self, *wanted: type) -> base.TransportEvent | None:
        """The next event of a wanted kind, within the wait; presence of coordinators is noted on the way."""
        end = time.monotonic() + self._wait_s
        while (left := end - time.monotonic()) > 0:
            try:
                event = self._events.get(timeout=left)
            except queue.Empty:
                return None
            if isinstance(event, base.Received) and not self._note(event):
                continue  # left unacknowledged: the daemon gets it
            if isinstance(event, wanted):
                return event
        return None

    def _note(self, received: base.Received) -> bool:
        parsed = topics.parse(received.name)
        if parsed is None or parsed.topic is not topics.COORD_STATE or not received.payload:
            return False
        try:
            state = unpack(received.payload, CoordState)
        except DecodeError:
            return False
        self._heard.append(f"{parsed.coordinator} ({'online' if state.online else 'offline'})")
        if state.online and state.ts:
            self.coordinator_ts = max(state.ts, self.coordinator_ts or 0.0)
        return True


def _epoch(state_dir: Path) -> int:
    """Of the daemon's latest connection; what we say under it can't hide what the daemon says under the next."""
    try:
        return int((state_dir / "epoch").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
