"""Every device of a fleet finishes in the same second: the broker must drop nothing while the coordinator is slow."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import os
import queue
import random
import threading
import time
from collections import deque
from pathlib import Path

import pytest

from muster.testbed.broker import Broker
from shared import topics
from shared.blob_folder import BlobFolder
from shared.blobs import BlobReceiver, BlobSender
from shared.codec import pack, unpack
from shared.fields import MAX_CHUNK_BYTES
from shared.messages import BlobRef, Manifest, UpdateFacts, Want
from shared.settings import BrokerSettings
from shared.transport.base import BackPressure, Connected, Outgoing, Received, TransportEvent
from shared.transport.mqtt import MqttTransport

FLEET = "burst"
DEVICES = 200
CREDIT = 16 * 1024 * 1024
RETRY_S = 5.0
PER_CHUNK_S = 0.003
CONTROL_ROOM = 16
DROPPED, UPTIME = "$SYS/broker/publish/messages/dropped", "$SYS/broker/uptime"
FACTS = UpdateFacts(
    samples=1, steps=1, batch=1, bits=32, loss_first=1.0, loss_last=1.0, step_s=0.1, train_s=0.1
)  # fmt: skip


def _transport(settings: BrokerSettings, name: str) -> MqttTransport:
    epochs = itertools.count(1)
    return MqttTransport(settings, name, lambda: next(epochs), rng=random.Random(name))


class Device:
    """One device with a finished update: offers it once, answers what is wanted."""

    def __init__(self, settings: BrokerSettings, name: str, folder: BlobFolder, ref: BlobRef) -> None:
        self.name = name
        self.ref = ref
        self.transport = _transport(settings, name)
        self.transport.subscribe(topics.device_filters(FLEET, name))
        self.sender = BlobSender(folder)
        self._waiting: deque[Outgoing] = deque()

    def offer(self) -> None:
        """Announce the update."""
        manifest = Manifest(
            sha=self.ref.sha, size=self.ref.size, chunk=MAX_CHUNK_BYTES, kind="update", job="job", round=1, attempt=1,
            facts=FACTS,
        )  # fmt: skip
        name = topics.UP_BLOB.name(FLEET, device=self.name)
        self.transport.publish(Outgoing(topics.UP_BLOB, name, pack(manifest)))

    def handle(self, event: TransportEvent) -> None:
        """One event of its transport; then send what there is room for."""
        if isinstance(event, Received):
            parsed = topics.parse(event.name)
            if parsed is not None and parsed.topic is topics.DOWN_BLOB:
                assert self.sender.on_want("coordinator", unpack(event.payload, Want)) is None
            self.transport.ack(event)
        for chunk in self.sender.take(max(0, self.transport.room() - CONTROL_ROOM)):
            name = topics.UP_CHUNK.name(FLEET, device=self.name, sha=chunk.sha, index=chunk.index)
            self._waiting.append(Outgoing(topics.UP_CHUNK, name, chunk.data))
        with contextlib.suppress(BackPressure):
            while self._waiting:
                self.transport.publish(self._waiting[0])
                self._waiting.popleft()
        self.transport.pump()


class Devices:
    """All devices, served by one thread as their daemons would serve them."""

    def __init__(self, settings: BrokerSettings, folder: BlobFolder, refs: list[BlobRef]) -> None:
        self._queue: queue.SimpleQueue[tuple[Device, TransportEvent] | None] = queue.SimpleQueue()
        self.all = [Device(settings, f"edge-{i:03d}", folder, ref) for i, ref in enumerate(refs)]
        self.connected: set[str] = set()
        self.faults: list[BaseException] = []
        self._thread = threading.Thread(target=self._serve, name="devices", daemon=True)

    def start(self) -> None:
        """Connect them all and wait until every one is."""
        self._thread.start()
        for device in self.all:
            device.transport.start(lambda event, device=device: self._queue.put((device, event)))  # type: ignore[misc]  # bound now
        until = time.monotonic() + 60.0
        while len(self.connected) < len(self.all):
            assert time.monotonic() < until, f"{len(self.connected)} of {len(self.all)} devices connected"
            time.sleep(0.05)

    def stop(self) -> None:
        """Disconnect them all."""
        for device in self.all:
            device.transport.stop(graceful=False)
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            device, event = item
            try:
                if isinstance(event, Connected):
                    self.connected.add(device.name)
                device.handle(event)
            except (AssertionError, ValueError, OSError) as error:
                self.faults.append(error)


class Coordinator:
    """The receiving side: one transport, one receiver under a credit, and a little work for every chunk."""

    def __init__(self, settings: BrokerSettings, folder: BlobFolder) -> None:
        self.receiver = BlobReceiver(folder, credit_bytes=CREDIT, retry_s=RETRY_S)
        self.complete: dict[str, Path] = {}
        self.most_outstanding = 0
        self.dropped: int | None = None
        self.uptimes = 0
        self._queue: queue.SimpleQueue[TransportEvent] = queue.SimpleQueue()
        self.transport = _transport(settings, "coord-1")
        self.transport.subscribe([*topics.coordinator_filters(FLEET), (DROPPED, 0), (UPTIME, 0)])
        self.transport.start(self._queue.put)

    def turn(self) -> None:
        """Handle one event and send what is due."""
        with contextlib.suppress(queue.Empty):
            event = self._queue.get(timeout=0.25)
            if isinstance(event, Received):
                self._received(event)
                self.transport.ack(event)
        for device, want in self.receiver.due(time.monotonic()):
            name = topics.DOWN_BLOB.name(FLEET, device=device)
            self.transport.publish(Outgoing(topics.DOWN_BLOB, name, pack(want)))
        self.most_outstanding = max(self.most_outstanding, self.receiver.outstanding)
        self.transport.pump()

    def _received(self, event: Received) -> None:
        if event.name == DROPPED:
            self.dropped = int(event.payload)
            return
        self.uptimes += event.name == UPTIME
        parsed, now = topics.parse(event.name), time.monotonic()
        if parsed is None:
            return
        if parsed.topic is topics.UP_BLOB:
            manifest = unpack(event.payload, Manifest)
            self.receiver.want(parsed.device, BlobRef(sha=manifest.sha, size=manifest.size), manifest.chunk, now)
        elif parsed.topic is topics.UP_CHUNK:
            time.sleep(PER_CHUNK_S)
            arrival = self.receiver.on_chunk(parsed.device, parsed.sha, parsed.index, event.payload, now)
            if arrival.kind == "complete" and arrival.path is not None:
                self.complete[parsed.device] = arrival.path


@pytest.mark.timeout(420)
@pytest.mark.parametrize("size", [600_000, pytest.param(3_000_000, marks=pytest.mark.slow)])
def test_all_devices_finish_in_the_same_second(tmp_path: Path, size: int) -> None:
    gc.collect()  # 200 paho clients of a test before this one hold their socket pairs until then
    sent = BlobFolder(tmp_path / "sent", fsync=False)
    common = os.urandom(size - 8)
    refs = [sent.put(i.to_bytes(8, "big") + common) for i in range(DEVICES)]
    # Saved as seldom as the deployed broker does it; the limits of its queues are the same.
    saved = {"autosave_interval": "30", "autosave_on_changes": "false"}
    with Broker(tmp_path / "broker", overrides=saved) as broker:
        # As the services have it: the coordinator's window and queue are larger than a device's.
        coordinator = Coordinator(broker.settings(window=32, queue=4096), BlobFolder(tmp_path / "taken", fsync=False))
        devices = Devices(broker.settings(), sent, refs)
        try:
            devices.start()
            for device in devices.all:
                device.offer()
            _pull(coordinator, devices)
        finally:
            devices.stop()
            coordinator.transport.stop(graceful=False)
    assert coordinator.dropped == 0, "the broker dropped messages"
    for device in devices.all:
        data = coordinator.complete[device.name].read_bytes()
        assert hashlib.sha256(data).hexdigest() == device.ref.sha
    total = DEVICES * size
    again = sum(device.sender.sent_bytes for device in devices.all) - total
    assert again < 0.01 * total, f"{again} bytes were sent again, {coordinator.receiver.stats}"
    assert coordinator.most_outstanding <= CREDIT
    assert coordinator.transport.stats.reconnects == 0
    assert not any(device.transport.stats.reconnects for device in devices.all)


def _pull(coordinator: Coordinator, devices: Devices) -> None:
    """Until every update is there, and the broker has told its counters afterwards."""
    until = time.monotonic() + 360.0
    while len(coordinator.complete) < DEVICES:
        assert not devices.faults, devices.faults[0]
        assert time.monotonic() < until, f"{len(coordinator.complete)} of {DEVICES}, {coordinator.receiver.stats}"
        coordinator.turn()
    # The broker tells a counter only when it has changed, and its uptime always.
    until_uptime = coordinator.uptimes + 2
    while coordinator.uptimes < until_uptime:
        assert time.monotonic() < until, "the broker tells no counters"
        coordinator.turn()
