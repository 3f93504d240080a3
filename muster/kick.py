"""Ending a client's connection. mosquitto has no command for it, but a name has one connection: a new one ends the old.

The new one has a certificate of ten minutes, whose key lies in the authority's folder for as long as the connection
stands; the next revocation list withdraws it.
"""

from __future__ import annotations

import datetime
import queue
import random
import tempfile
import time
from pathlib import Path

from muster.pki.authority import Authority
from shared.errors import UserError
from shared.files import write_owned
from shared.settings import BrokerSettings
from shared.transport.base import Connected, Disconnected, TransportEvent, TransportFailed
from shared.transport.mqtt import MqttTransport


def kick(
    authority: Authority, name: str, host: str, port: int, *, now: datetime.datetime, timeout_s: float = 15.0
) -> None:
    """Take over the session of `name` at the broker, then let it go. Raises `UserError` where that fails."""
    certificate, key = authority.brief(name, now)
    with tempfile.TemporaryDirectory(prefix=".kick-", dir=authority.folder) as place:
        certfile, keyfile = Path(place) / "crt", Path(place) / "key"
        write_owned(certfile, certificate, mode=0o400)
        write_owned(keyfile, key, mode=0o400)
        settings = BrokerSettings(
            host=host, port=port, cafile=str(authority.cafile), certfile=str(certfile), keyfile=str(keyfile),
            session_expiry_s=0, reconnect_min_s=0.5, reconnect_max_s=2.0,
        )  # fmt: skip
        events: queue.SimpleQueue[TransportEvent] = queue.SimpleQueue()
        transport = MqttTransport(settings, name, lambda: 1, rng=random.Random(), clean_start=True)
        transport.start(events.put)
        try:
            _wait(events, timeout_s, f"{host}:{port}")
        finally:
            transport.stop(graceful=True)


def _wait(events: queue.SimpleQueue[TransportEvent], timeout_s: float, where: str) -> None:
    until = time.monotonic() + timeout_s
    reason = "no answer"
    while (left := until - time.monotonic()) > 0:
        try:
            event = events.get(timeout=left)
        except queue.Empty:
            break
        if isinstance(event, Connected):
            return
        if isinstance(event, Disconnected | TransportFailed):
            reason = event.reason
    raise UserError(f"{where}: can't connect: {reason}")
