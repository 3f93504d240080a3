"""The in-memory network: a broker's semantics, faults, and the same run for the same seed."""

from __future__ import annotations

import itertools
from typing import TypeVar

import pytest

from shared import topics
from shared.settings import BrokerSettings
from shared.transport.base import (
    BackPressure,
    Connected,
    Disconnected,
    Outgoing,
    Oversize,
    Published,
    Received,
    Transport,
    TransportEvent,
    TransportFailed,
)
from shared.transport.memory import MemoryTransport
from shared.transport.memory_broker import matches
from shared.transport.memory_network import Faults, MemoryNetwork

E = TypeVar("E")
FLEET = "f1"
QUICK = BrokerSettings(reconnect_min_s=0.1, reconnect_max_s=2.0)


class Client:
    """An owner that keeps what it gets, with the time, and acknowledges it (unless `slow`)."""

    def __init__(self, network: MemoryNetwork, name: str, *, slow: bool = False, **options: object) -> None:
        self.network, self.name, self.slow = network, name, slow
        self.events: list[tuple[float, TransportEvent]] = []
        self.epochs = itertools.count(1)
        options.setdefault("settings", QUICK)
        self.transport = MemoryTransport(network, name, lambda: next(self.epochs), **options)  # type: ignore[arg-type]  # the caller names them
        as_coordinator = name.startswith("coord")
        filters = topics.coordinator_filters(FLEET) if as_coordinator else topics.device_filters(FLEET, name)
        self.transport.subscribe(filters)
        self.transport.start(self.handle)

    def handle(self, event: TransportEvent) -> None:
        self.events.append((self.network.now, event))
        if isinstance(event, Received) and not self.slow:
            self.transport.ack(event)
        self.transport.pump()

    def of(self, kind: type[E]) -> list[E]:
        return [event for _, event in self.events if isinstance(event, kind)]

    def payloads(self) -> list[bytes]:
        return [event.payload for _, event in self.events if isinstance(event, Received)]


def state(device: str, text: str) -> Outgoing:
    return Outgoing(topics.STATE, topics.STATE.name(FLEET, device=device), text.encode(), text)


def ack(device: str, text: str, size: int = 0) -> Outgoing:
    return Outgoing(topics.ACK, topics.ACK.name(FLEET, device=device), text.encode().ljust(size), text)


def load(device: str, text: str) -> Outgoing:
    return Outgoing(topics.LOAD, topics.LOAD.name(FLEET, device=device), text.encode(), text)


def assign(device: str, text: str) -> Outgoing:
    return Outgoing(topics.ASSIGN, topics.ASSIGN.name(FLEET, device=device), text.encode(), text)


def command(device: str, text: str) -> Outgoing:
    return Outgoing(topics.COMMAND, topics.COMMAND.name(FLEET, device=device), text.encode(), text)


def pair(seed: int = 0, faults: Faults | None = None, **options: object) -> tuple[MemoryNetwork, Client, Client]:
    network = MemoryNetwork(seed, faults, **options)  # type: ignore[arg-type]
    coordinator, device = Client(network, "coord-1"), Client(network, "dev-1")
    network.run_until(1.0)
    return network, coordinator, device


def is_a_transport(transport: Transport) -> Transport:
    return transport


def test_it_is_a_transport() -> None:
    network = MemoryNetwork(0)
    assert is_a_transport(MemoryTransport(network, "dev-1", lambda: 1)).alive


@pytest.mark.parametrize(
    ("wanted", "name", "taken"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("+/b", "a/b", True),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("a/+/c", "a/b/c", True),
        ("#", "a", True),
        ("a/b/c", "a/b", False),
    ],
)
def test_filters(wanted: str, name: str, taken: bool) -> None:
    assert matches(wanted, name) == taken
    network = MemoryNetwork(0)
    session, _ = network.broker.attach("x", 0.0, clean=False)
    network.broker.subscribe(session, [(wanted, 1)], 0.0)
    assert bool(network.broker.route(Outgoing(topics.ACK, name, b""), 0.0)) == taken


def test_a_message_is_delivered_and_acknowledged() -> None:
    network, coordinator, device = pair()
    device.transport.publish(ack("dev-1", "hello"))
    network.run_until(2.0)
    assert coordinator.payloads() == [b"hello"]
    assert device.of(Published) == [Published("hello")]
    assert coordinator.transport.stats.bytes_received == device.transport.stats.bytes_sent == 5


def test_a_connection_keeps_its_order() -> None:
    network, coordinator, device = pair(faults=Faults(delay_s=(0.0, 0.5)))
    for number in range(50):
        device.transport.publish(ack("dev-1", str(number)))
    network.run_until(60.0)
    assert coordinator.payloads() == [str(number).encode() for number in range(50)]


def test_retained_messages_come_to_every_new_session_until_they_are_emptied() -> None:
    network, coordinator, device = pair()
    coordinator.transport.publish(assign("dev-2", "old"))
    coordinator.transport.publish(assign("dev-2", "new"))
    network.run_until(2.0)
    late = Client(network, "dev-2")
    network.run_until(3.0)
    [received] = late.of(Received)
    assert (received.payload, received.retained) == (b"new", True)
    coordinator.transport.publish(assign("dev-2", ""))
    network.kill("dev-2")
    network.run_until(4.0)
    again = Client(network, "dev-2", clean_start=True)
    network.run_until(5.0)
    assert again.payloads() == []


def test_a_reconnect_brings_the_retained_state_even_if_the_queue_lost_it() -> None:
    network, coordinator, device = pair(max_queued=3)
    network.partition(["dev-1"], 1.0, 300.0)
    network.run_until(100.0)
    for number in range(10):
        coordinator.transport.publish(assign("dev-1", str(number)))
    network.run_until(400.0)
    assert network.broker.dropped > 0
    assert b"9" in device.payloads()


def test_an_offline_client_gets_its_queue_when_it_returns() -> None:
    network, coordinator, device = pair()
    network.kill("dev-1")
    device.events.clear()
    coordinator.transport.publish(command("dev-1", "one"))
    network.run_until(2.0)
    coordinator.transport.publish(Outgoing(topics.DOWN_BLOB, topics.DOWN_BLOB.name(FLEET, device="dev-1"), b"two"))
    network.run_until(70.0)
    assert device.events == []
    reborn = Client(network, "dev-1")
    network.run_until(71.0)
    [connected] = reborn.of(Connected)
    assert connected.session_present
    assert reborn.payloads() == [b"two"]  # a command lives 60 s


def test_what_was_not_acknowledged_comes_again_as_a_duplicate() -> None:
    network = MemoryNetwork(0)
    coordinator, device = Client(network, "coord-1"), Client(network, "dev-1", slow=True)
    network.run_until(1.0)
    coordinator.transport.publish(command("dev-1", "do"))
    network.run_until(2.0)
    network.kill("dev-1")
    reborn = Client(network, "dev-1")
    network.run_until(3.0)
    assert [(event.payload, event.duplicate) for event in device.of(Received)] == [(b"do", False)]
    assert [(event.payload, event.duplicate) for event in reborn.of(Received)] == [(b"do", True)]
    network.kill("dev-1")
    last = Client(network, "dev-1")
    network.run_until(4.0)
    assert last.of(Received) == []


def test_the_broker_holds_back_what_a_slow_owner_has_not_acknowledged() -> None:
    network = MemoryNetwork(0, max_inflight=3)
    coordinator, device = Client(network, "coord-1"), Client(network, "dev-1", slow=True)
    network.run_until(1.0)
    for number in range(5):
        coordinator.transport.publish(command("dev-1", str(number)))
    network.run_until(2.0)
    assert len(device.of(Received)) == 3
    device.transport.ack(device.of(Received)[0])
    network.run_until(3.0)
    assert len(device.of(Received)) == 4


def with_will(network: MemoryNetwork, name: str) -> Client:
    return Client(network, name, will=lambda epoch: state(name, f"lost {epoch}"))


def test_the_will_fires_after_its_delay_when_a_client_dies() -> None:
    network, coordinator, _ = pair()
    with_will(network, "dev-2")
    network.run_until(2.0)
    network.kill("dev-2")
    network.run_until(2.0 + QUICK.will_delay_s - 0.1)
    assert coordinator.payloads() == []
    network.run_until(2.0 + QUICK.will_delay_s + 0.1)
    assert coordinator.payloads() == [b"lost 1"]
    assert network.broker.retained(topics.STATE.name(FLEET, device="dev-2")) == b"lost 1"


def test_the_will_does_not_fire_after_a_graceful_stop_or_a_quick_return() -> None:
    network, coordinator, _ = pair()
    leaving, crashing = with_will(network, "dev-2"), with_will(network, "dev-3")
    network.run_until(2.0)
    leaving.transport.publish(state("dev-2", "disconnected"))
    leaving.transport.stop()
    crashing.transport.stop(graceful=False)
    reborn = with_will(network, "dev-3")
    network.run_until(60.0)
    assert coordinator.payloads() == [b"disconnected"]
    reborn.transport.stop(graceful=False)
    network.run_until(120.0)
    assert coordinator.payloads() == [b"disconnected", b"lost 1"]


def test_every_connection_has_a_fresh_epoch() -> None:
    network, _, device = pair()
    for until in (100.0, 200.0, 300.0):
        network.crash_broker(3.0)
        network.run_until(until)
    assert [event.epoch for event in device.of(Connected)] == [1, 2, 3, 4]
    assert device.transport.stats.reconnects == 3


def test_a_short_cut_delays_and_a_long_one_ends_the_session() -> None:
    network, coordinator, device = pair()
    network.partition(["dev-1"], 1.0, 10.0)
    network.run_until(2.0)
    device.transport.publish(ack("dev-1", "during"))
    network.run_until(10.9)
    assert coordinator.payloads() == []
    network.run_until(12.0)
    assert coordinator.payloads() == [b"during"]
    assert device.of(Disconnected) == []

    network.partition(["dev-1"], 20.0, 100.0)
    network.run_until(30.0)
    device.transport.publish(ack("dev-1", "held"))
    network.run_until(20.0 + 1.5 * QUICK.keepalive_s + 1.0)
    assert device.of(Disconnected)[0] == Disconnected("Keep alive timeout")
    network.run_until(130.0)
    assert coordinator.payloads() == [b"during", b"held"]
    assert network.connected("dev-1")


def test_a_broker_that_lost_its_memory_starts_anew() -> None:
    network, coordinator, device = pair()
    device.transport.publish(state("dev-1", "ready"))
    network.run_until(2.0)
    network.crash_broker(1.0, keep=False)
    network.run_until(30.0)
    assert network.broker.retained(topics.STATE.name(FLEET, device="dev-1")) == b""
    assert not device.of(Connected)[-1].session_present
    device.transport.publish(state("dev-1", "ready again"))
    network.run_until(31.0)
    assert coordinator.payloads()[-1] == b"ready again"


def test_messages_queued_while_the_broker_is_down_are_delivered_in_order() -> None:
    network, coordinator, device = pair()
    network.crash_broker(5.0)
    for number in range(100):
        device.transport.publish(ack("dev-1", str(number)))
    network.run_until(60.0)
    assert coordinator.payloads() == [str(number).encode() for number in range(100)]
    assert len(device.of(Published)) == 100


def test_a_second_process_with_the_same_id_takes_over_and_the_first_says_so() -> None:
    network, _, device = pair()
    Client(network, "dev-1")
    network.run_until(1.5)
    [failed] = device.of(TransportFailed)
    assert "dev-1" in failed.reason


def test_limits() -> None:
    network = MemoryNetwork(0, max_packet=1000)
    settings = BrokerSettings(window=2, queue=3)
    device = Client(network, "dev-1", settings=settings)
    for number in range(3):
        assert device.transport.room() == 3 - number
        device.transport.publish(ack("dev-1", str(number)))
    with pytest.raises(BackPressure):
        device.transport.publish(ack("dev-1", "3"))
    with pytest.raises(Oversize):
        device.transport.publish(ack("dev-1", "big", size=1000))
    device.transport.publish(load("dev-1", "nobody hears this"))
    assert device.transport.stats.dropped == 1
    network.run_until(1.0)
    assert [event.token for event in device.of(Published)] == ["0", "1", "2"]
    assert device.transport.room() == 3


def test_a_broker_with_smaller_packets_after_a_restart_drops_what_waits_too_large() -> None:
    network, _, device = pair()
    network.crash_broker(1.0)
    device.transport.publish(ack("dev-1", "big", size=5000))
    device.transport.publish(ack("dev-1", "small"))
    network.max_packet = 1000
    network.run_until(20.0)
    big, small = device.of(Published)
    assert (big.token, small.token) == ("big", "small")
    assert "1000" in big.reason
    assert small.reason == ""


def test_a_denied_publish_is_surfaced_and_not_repeated() -> None:
    network, coordinator, device = pair()
    network.deny = lambda client, name: f"/{client}/" not in name
    device.transport.publish(ack("dev-2", "forged"))
    network.run_until(100.0)
    assert device.of(Published) == [Published("forged", "Not authorized")]
    assert device.transport.stats.denials == 1
    assert coordinator.payloads() == []


def test_a_message_without_subscribers_is_noted() -> None:
    network = MemoryNetwork(0)
    device = Client(network, "dev-1")
    network.run_until(1.0)
    device.transport.publish(ack("dev-1", "anyone?"))
    network.run_until(2.0)
    assert device.of(Published) == [Published("anyone?", "", "No matching subscribers")]


def test_loss_takes_loads_and_only_delays_what_is_acknowledged() -> None:
    network, coordinator, device = pair(3, Faults(loss=0.3))
    for number in range(200):
        device.transport.publish(load("dev-1", f"load {number}"))
        device.transport.publish(ack("dev-1", f"ack {number}"))
        network.run_until(network.now + 1.0)
    network.run_until(network.now + 30.0)
    received = coordinator.payloads()
    assert {f"ack {number}".encode() for number in range(200)} <= set(received)
    assert 50 < sum(payload.startswith(b"load") for payload in received) < 150
    assert any(event.duplicate for event in coordinator.of(Received))


def test_drop_loses_acknowledged_messages_without_a_word() -> None:
    network, coordinator, device = pair(4, Faults(drop=0.2))
    for number in range(100):
        device.transport.publish(ack("dev-1", str(number)))
    network.run_until(60.0)
    assert [event.reason for event in device.of(Published)] == [""] * 100
    assert len(coordinator.payloads()) == 100 - network.broker.dropped < 100


def test_duplicates_and_reordering() -> None:
    network, coordinator, device = pair(5, Faults(duplicate=0.2, reorder=0.2))
    for number in range(100):
        device.transport.publish(ack("dev-1", f"{number:03}"))
    network.run_until(60.0)
    received = coordinator.payloads()
    assert len(set(received)) == 100 < len(received)
    first = list(dict.fromkeys(received))
    assert first != sorted(first)


def stormy(seed: int) -> list[tuple[float, TransportEvent]]:
    faults = Faults(loss=0.05, drop=0.02, duplicate=0.05, reorder=0.1, delay_s=(0.001, 0.05))
    network, coordinator, device = pair(seed, faults)
    network.partition(["dev-1"], 20.0, 60.0)
    network.schedule(100.0, lambda: network.crash_broker(3.0))
    for second in range(200):
        network.schedule(float(second), lambda second=second: device.transport.publish(ack("dev-1", str(second))))  # type: ignore[misc]  # a default binds the loop's value
    network.run_until(300.0)
    return coordinator.events + device.events


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    assert stormy(1) == stormy(1)
    assert stormy(1) != stormy(2)


def test_run_until_stops_early_when_told() -> None:
    network, coordinator, device = pair()
    device.transport.publish(ack("dev-1", "x"))
    assert network.run_until(100.0, when=lambda: bool(coordinator.payloads()))
    assert network.now < 2.0
    assert not network.run_until(100.0, when=lambda: len(coordinator.payloads()) > 1)
    assert network.now == 100.0


def test_a_fleet_of_fifty_through_a_thousand_seconds() -> None:
    network = MemoryNetwork(9, Faults(loss=0.02, duplicate=0.01, reorder=0.02))
    coordinator = Client(network, "coord-1")
    names = [f"dev-{number:02}" for number in range(50)]
    fleet = [Client(network, name) for name in names]

    def beat(client: Client) -> None:
        client.transport.publish(load(client.name, f"{network.now}"))
        network.schedule(network.now + 3.0, lambda: beat(client))

    for number, client in enumerate(fleet):
        network.schedule(1.0 + number / 50, lambda client=client: beat(client))  # type: ignore[misc]  # as above
    chunk = bytes(1000)
    for number in range(5000):
        device = fleet[number % 50]
        name = topics.UP_CHUNK.name(FLEET, device=device.name, sha="a" * 64, index=number)
        message = Outgoing(topics.UP_CHUNK, name, chunk, number)
        network.schedule(10.0 + number / 10, lambda device=device, message=message: device.transport.publish(message))  # type: ignore[misc]  # as above
    network.run_until(1000.0)
    chunks = {event.name for event in coordinator.of(Received) if "/chunk/" in event.name}
    assert len(chunks) == 5000
    assert len(coordinator.of(Received)) > 20_000


def test_a_slow_link_carries_one_packet_after_the_other() -> None:
    network, coordinator, device = pair(faults=Faults(delay_s=(0.01, 0.01)))
    network.run_until(1.0)
    network.rate = lambda client, way: 1000.0 if (client, way) == (device.name, "up") else float("inf")
    before = dict(network.carried)
    for text in ("one", "two"):
        device.transport.publish(ack(device.name, text, size=2000))
    size = 2000 + len(topics.ACK.name(FLEET, device=device.name))
    network.run_until(20.0)
    at = [when for when, event in coordinator.events if isinstance(event, Received) and len(event.payload) == 2000]
    assert at == pytest.approx([1.0 + size / 1000 + 0.02, 1.0 + 2 * size / 1000 + 0.02], abs=1e-6)
    up, down = (device.name, "up"), (coordinator.name, "down")
    assert network.carried[up] - before.get(up, 0) == network.carried[down] - before.get(down, 0) == 2 * size
