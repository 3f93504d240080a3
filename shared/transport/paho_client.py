"""paho, set up our way: clients that leave the window, the waiting and the acknowledging to their owner."""

from __future__ import annotations

import logging
import socket
import ssl
from contextlib import suppress
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from shared.settings import BrokerSettings
from shared.transport.base import Outgoing
from shared.transport.credentials import read_credentials

CONNECT_TIMEOUT_S = 5.0


class _LastError(logging.Handler):
    """Keeps paho's last error text: its disconnect callback says only "Unspecified error"."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage().removeprefix("failed to receive on socket: ")


class ClientFactory:
    """Makes a fresh client for each connection of one client id.

    `receive_maximum` (messages) and `max_packet` (bytes) bound what the broker may send us at once.
    """

    def __init__(self, settings: BrokerSettings, client_id: str, *, receive_maximum: int, max_packet: int) -> None:
        self._settings = settings
        self._client_id = client_id
        self._receive_maximum = receive_maximum
        self._max_packet = max_packet
        self._errors = _LastError()
        self._logger = logging.Logger(f"{__name__}.{client_id}", logging.ERROR)
        self._logger.addHandler(self._errors)

    @property
    def last_error(self) -> str:
        """What paho last logged as an error since `make`; "": nothing."""
        return self._errors.text

    def make(self, will: Outgoing | None) -> Any:
        """A client that knows its credentials and will. Raises `UserError` where a credential can't be read."""
        self._errors.text = ""
        context, password = read_credentials(self._settings)
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            self._client_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_inflight_messages_set(0)  # unlimited there: the window is ours
        client.enable_logger(self._logger)
        client.on_socket_open = _no_delay
        # Without it paho writes to the socket from the thread that calls `publish`, beside the one that loops.
        client.on_socket_register_write = lambda *_: None
        if context is not None:
            client.tls_set_context(context)
        if self._settings.username:
            client.username_pw_set(self._settings.username, password)
        if will is not None:
            properties = _properties(PacketTypes.WILLMESSAGE)
            properties.WillDelayInterval = self._settings.will_delay_s
            client.will_set(will.name, will.payload, will.topic.qos, will.topic.retain, properties)
        return client

    def connect(self, client: Any, *, clean_start: bool) -> None:
        """Open the connection. Raises `OSError`, of which `ssl.SSLCertVerificationError` can't be helped by a retry."""
        settings = self._settings
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = settings.session_expiry_s
        properties.ReceiveMaximum = self._receive_maximum
        properties.MaximumPacketSize = self._max_packet
        # paho notices silence after two of its periods; three quarters make that 1.5 of ours.
        keepalive = max(1, settings.keepalive_s * 3 // 4)
        try:
            client.connect(settings.host, settings.port, keepalive, clean_start=clean_start, properties=properties)
        except ssl.SSLCertVerificationError:
            raise
        except OSError as error:
            raise ConnectionError(f"can't reach {settings.host}:{settings.port}: {error.strerror or error}") from error


def expiry(seconds: int) -> Properties:
    """Properties of a message that the broker forgets after `seconds`."""
    properties = _properties(PacketTypes.PUBLISH)
    properties.MessageExpiryInterval = seconds
    return properties


def close_socket(client: Any) -> None:
    """Close what is left of a connection, without a DISCONNECT."""
    sock = client.socket()
    if sock is not None:
        with suppress(OSError):
            sock.close()


def _no_delay(_client: Any, _userdata: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _properties(kind: int) -> Properties:
    return Properties(kind)  # type: ignore[no-untyped-call]  # paho types all but this class
