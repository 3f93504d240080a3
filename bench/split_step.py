"""What a step of split learning costs on the wire: 4 devices, features of 1.5 MB up and their gradient down, over
mosquitto on loopback, against bare paho with the same bytes in the same pieces.

Each client is a process of its own. Nothing is computed: the top answers with the gradient once the features of all
four are there. Ours writes and reads the messages of `shared.steps`; the bare one sends zeros and counts bytes. The
two take turns, so that both meet the same machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import queue
import random
import statistics
import time
from typing import Any

import numpy as np
from paho.mqtt import client as paho

from coordinator.workers.top_link import LOOSE, Link
from muster.testbed.broker import Broker
from shared import steps, tensors, topics
from shared.blob_sender import chunk_limit
from shared.settings import BrokerSettings
from shared.transport.base import Connected, Outgoing, Received
from shared.transport.mqtt import MqttTransport

FLEET, WORK, TOP = "bench", "job/1/1", "coord-1-top"
DEVICES = [f"edge-{n}" for n in range(1, 5)]
SHAPE = (16, 128, 384)
"""Samples, tokens and width: 1.5 MB in bf16."""
WARM_UP = 3


def main() -> None:
    """Measure; one JSON object a figure."""
    parser = argparse.ArgumentParser(description="cost of a step of split learning on the wire")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    ours: list[float] = []
    bare: list[float] = []
    with Broker() as broker:
        for _ in range(options.turns):
            bare += _turn(_bare_top, _bare_device, broker.settings(), options.steps)
            ours += _turn(_our_top, _our_device, broker.settings(), options.steps)
    ratio = statistics.median(ours) / statistics.median(bare)
    note = (
        f"median of {len(ours)} steps {1e3 * statistics.median(ours):.0f} ms, bare {1e3 * statistics.median(bare):.0f} "
        f"ms; {len(DEVICES)} devices, 1.5 MB each way, pieces of 120 KiB, QoS 0, no TLS"
    )
    print(json.dumps({
        "name": "split.step", "what": "a step on the wire against bare paho", "value": ratio, "unit": "x",
        "target": "<= 1.5", "note": note,
    }))  # fmt: skip


def _turn(top: Any, device: Any, broker: BrokerSettings, count: int) -> list[float]:
    """Seconds of each step but the first ones, of the slowest device."""
    context = mp.get_context("spawn")
    told: Any = context.Queue()
    go = context.Barrier(len(DEVICES) + 1)
    processes = [context.Process(target=top, args=(broker, go, count))]
    processes += [context.Process(target=device, args=(name, broker, go, count, told)) for name in DEVICES]
    for process in processes:
        process.start()
    found = [told.get(timeout=300) for _ in DEVICES]
    for process in processes:
        process.join(30)
        process.kill()
    return [max(one) for one in zip(*found, strict=True)][WARM_UP:]


def _features(number: int) -> steps.Features:
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    mask = memoryview(np.ones(SHAPE[:2], "u1").tobytes())
    return steps.Features(
        work=WORK, run=1, step=number, hidden=tensors.encode(values, "bf16"), mask=mask,
        targets=memoryview(np.zeros(SHAPE[0], "<i4").tobytes()),
    )  # fmt: skip


def _our_device(name: str, broker: BrokerSettings, go: Any, count: int, told: Any) -> None:
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    transport = MqttTransport(broker, name, lambda: 1, rng=random.Random(), clean_start=True, loose=LOOSE)
    transport.subscribe([(topics.DOWN_STEP.name(FLEET, device=name), 0)])
    transport.start(inbox.put)
    connected = inbox.get(timeout=30)
    assert isinstance(connected, Connected)
    size, topic = chunk_limit(connected.max_packet), topics.UP_STEP.name(FLEET, device=name)
    message, assembler, seconds = _features(1), steps.Assembler(down=True), []
    go.wait()
    for step in range(count):
        began = time.monotonic()
        for packet in steps.packets(message, step, size):
            transport.publish(Outgoing(topics.UP_STEP, topic, packet))
        while True:
            event = inbox.get(timeout=60)
            if isinstance(event, Received) and assembler.add(event.payload) is not None:
                break
        seconds.append(time.monotonic() - began)
    told.put(seconds)
    transport.stop(graceful=False)


def _our_top(broker: BrokerSettings, go: Any, count: int) -> None:
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    link = Link(inbox)
    link.open(broker, FLEET, TOP)
    connected = inbox.get(timeout=30)
    assert isinstance(connected, Connected)
    link.connected(connected)
    link.expect(dict.fromkeys(DEVICES, sum(map(len, _pieces()))))
    answer = steps.Gradient(work=WORK, run=1, step=1, loss=0.0, hidden=_features(1).hidden)
    go.wait()
    for _ in range(count):
        here: set[str] = set()
        while len(here) < len(DEVICES):
            event = inbox.get(timeout=60)
            if isinstance(event, Received) and (heard := link.read(event)) is not None:
                here.add(heard[0])
        for device in sorted(here):
            link.send(device, answer)
    time.sleep(0.5)  # what was published last is still on its way
    link.close()


def _bare(name: str, broker: BrokerSettings, filters: list[str], inbox: Any) -> Any:
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5)
    there: queue.SimpleQueue[int] = queue.SimpleQueue()
    client.on_subscribe = lambda *_: there.put(1)
    client.on_message = lambda _c, _u, message: inbox.put(message)
    client.connect(broker.host, broker.port)
    client.loop_start()
    client.subscribe([(one, 0) for one in filters])
    there.get(timeout=30)
    return client


def _pieces() -> list[bytes]:
    """The bytes of a message in pieces as ours."""
    return [bytes(len(packet)) for packet in steps.packets(_features(1), 1, 122_880)]


def _bare_device(name: str, broker: BrokerSettings, go: Any, count: int, told: Any) -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client = _bare(name, broker, [f"bare/{name}/down"], inbox)
    pieces, seconds = _pieces(), []
    go.wait()
    for _ in range(count):
        began = time.monotonic()
        for piece in pieces:
            client.publish(f"bare/{name}/up", piece, 0)
        for _piece in pieces:
            inbox.get(timeout=60)
        seconds.append(time.monotonic() - began)
    told.put(seconds)
    client.loop_stop()


def _bare_top(broker: BrokerSettings, go: Any, count: int) -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client = _bare("bare-top", broker, ["bare/+/up"], inbox)
    pieces = _pieces()
    go.wait()
    for _ in range(count):
        for _piece in range(len(pieces) * len(DEVICES)):
            inbox.get(timeout=60)
        for name in DEVICES:
            for piece in pieces:
                client.publish(f"bare/{name}/down", piece, 0)
    time.sleep(0.5)  # what was published last is still on its way
    client.loop_stop()


if __name__ == "__main__":
    main()
