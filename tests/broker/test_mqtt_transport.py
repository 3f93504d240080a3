"""The MQTT transport against a real mosquitto: the measured traps, one by one."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from muster.testbed.broker import Broker, free_port
from shared import topics
from shared.errors import UserError
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
from tests.broker.owner import Owner
from tests.broker.proxy import Proxy

Own = Callable[..., Owner]
FLEET = "f1"
COORDINATOR = topics.coordinator_filters(FLEET)
DEVICE = topics.device_filters(FLEET, "dev-1")


def quick(broker: Broker, **changes: object) -> BrokerSettings:
    return broker.settings(**{"reconnect_min_s": 0.05, "reconnect_max_s": 1.0, "will_delay_s": 0, **changes})


def state(text: str) -> Outgoing:
    return Outgoing(topics.STATE, topics.STATE.name(FLEET, device="dev-1"), text.encode(), text)


def ack(text: str, *, size: int = 0, device: str = "dev-1") -> Outgoing:
    return Outgoing(topics.ACK, topics.ACK.name(FLEET, device=device), text.encode().ljust(size), text)


def load(text: str) -> Outgoing:
    return Outgoing(topics.LOAD, topics.LOAD.name(FLEET, device="dev-1"), text.encode(), text)


def assign(text: str) -> Outgoing:
    return Outgoing(topics.ASSIGN, topics.ASSIGN.name(FLEET, device="dev-1"), text.encode(), text)


def is_a_transport(transport: Transport) -> Transport:
    return transport


def test_messages_of_both_qualities_arrive(broker: Broker, own: Own) -> None:
    coordinator = own(quick(broker), "coord-1", COORDINATOR)
    assert is_a_transport(coordinator.transport).alive
    [connected] = coordinator.wait(Connected)
    assert (connected.max_packet, connected.epoch, connected.session_present) == (1048576, 1, False)
    device = own(quick(broker), "dev-1", DEVICE)
    device.wait(Connected)
    device.transport.publish(load("warm"))
    device.transport.publish(ack("taken"))
    assert device.wait(Published) == [Published("taken")]
    coordinator.wait(Received, 2)
    assert coordinator.payloads() == [b"warm", b"taken"]
    assert coordinator.transport.stats.bytes_received == device.transport.stats.bytes_sent == 9


def test_a_retained_state_comes_with_every_session_and_says_so(broker: Broker, own: Own) -> None:
    coordinator = own(quick(broker), "coord-1", COORDINATOR)
    coordinator.transport.publish(assign("desired"))
    assert coordinator.wait(Published)[0].note == "No matching subscribers"
    for epoch in (1, 2):
        device = own(quick(broker), "dev-1", DEVICE)
        [received] = device.wait(Received)
        assert isinstance(device.events[0], Connected)
        assert device.events[0].session_present == (epoch == 2)
        assert (received.payload, received.retained) == (b"desired", True)
        device.transport.stop()


def test_a_broker_with_small_packets(tmp_path: Path, own: Own) -> None:
    """Case 2: the limit is announced, what is above is refused here, what is below goes."""
    with Broker(tmp_path / "small", overrides={"max_packet_size": "65536"}) as broker:
        coordinator, device = own(quick(broker), "coord-1", COORDINATOR), own(quick(broker), "dev-1", DEVICE)
        coordinator.wait(Connected)
        assert device.wait(Connected)[0].max_packet == 65536
        with pytest.raises(Oversize, match="65536"):
            device.transport.publish(ack("big", size=65536))
        device.transport.publish(ack("fits", size=65536 - 100))
        assert device.wait(Published) == [Published("fits")]
        assert len(coordinator.wait(Received)[0].payload) == 65536 - 100


def test_an_oversize_message_queued_before_the_limit_is_known_does_not_loop(tmp_path: Path, own: Own) -> None:
    """Case 3: it would cut the connection at every reconnect; it is dropped, and everything else goes on."""
    with Broker(tmp_path / "small", overrides={"max_packet_size": "65536"}) as broker, Proxy(broker.port) as proxy:
        device = own(quick(broker, port=proxy.port), "dev-1", DEVICE)
        device.transport.publish(ack("poison", size=100_000))
        device.transport.publish(ack("good"))
        poison, good = device.wait(Published, 2)
        assert (poison.token, good.token, good.reason) == ("poison", "good", "")
        assert "65536" in poison.reason
        device.rest(0.5)
        assert proxy.connections == 1
        assert proxy.largest < 65536


def test_a_broker_that_cuts_for_a_limit_it_did_not_announce_does_not_get_the_culprit_again(
    broker: Broker, own: Own
) -> None:
    with Proxy(broker.port, hide_limit=True) as proxy:
        device = own(quick(broker, port=proxy.port), "dev-1", DEVICE)
        device.wait(Connected)
        device.transport.publish(ack("small"))
        device.transport.publish(ack("poison", size=2_000_000))
        device.transport.publish(ack("good"))
        answers = {answer.token: answer.reason for answer in device.wait(Published, 3)}
        assert answers == {"small": "", "poison": "the broker cut the connection: packet too large", "good": ""}


@pytest.mark.parametrize("announced", [None, 3])
def test_the_window_holds_after_a_reconnect(tmp_path: Path, own: Own, announced: int | None) -> None:
    """Case 4: 300 messages queued offline; never more than the window on the wire, a lower one of the broker obeyed."""
    overrides = {"max_inflight_messages": str(announced)} if announced else {}
    with Broker(tmp_path / "b", overrides=overrides) as broker, Proxy(broker.port, delay_s=0.002) as proxy:
        coordinator = own(quick(broker), "coord-1", COORDINATOR)
        coordinator.wait(Connected)
        device = own(quick(broker, port=proxy.port, window=5, queue=400), "dev-1", DEVICE)
        for number in range(50):
            device.transport.publish(ack(f"before {number}"))
        device.wait(Published, 20)
        broker.kill()
        device.wait(Disconnected)
        for number in range(300):
            device.transport.publish(ack(f"offline {number}"))
        broker.restart()
        device.wait(Published, 350)
        assert proxy.most_unacked == (announced or 5)
        # What the broker acknowledged before it was killed may have died with it.
        coordinator.wait_for({f"offline {number}".encode() for number in range(300)})


def test_a_full_queue_is_back_pressure(broker: Broker, own: Own) -> None:
    device = own(quick(broker, port=free_port(), queue=3), "dev-1")
    for number in range(3):
        device.transport.publish(ack(str(number)))
    assert device.transport.room() == 0
    with pytest.raises(BackPressure):
        device.transport.publish(ack("3"))
    device.transport.publish(load("nobody hears this"))
    assert device.transport.stats.dropped == 1


def test_a_sink_that_raises_costs_the_connection_not_the_thread(broker: Broker, own: Own) -> None:
    """Case 5: counted, and what was not taken is delivered again."""
    raised: list[TransportEvent] = []

    def fragile(events: queue.Queue[TransportEvent]) -> Callable[[TransportEvent], None]:
        def sink(event: TransportEvent) -> None:
            if isinstance(event, Received) and not raised:
                raised.append(event)
                raise RuntimeError("full")
            events.put(event)

        return sink

    coordinator = own(quick(broker), "coord-1", COORDINATOR, sink=fragile)
    coordinator.wait(Connected)
    device = own(quick(broker), "dev-1", DEVICE)
    device.transport.publish(ack("precious"))
    device.wait(Published)
    [received] = coordinator.wait(Received)
    assert (received.payload, received.duplicate) == (b"precious", True)
    assert "full" in coordinator.of(Disconnected)[0].reason
    assert coordinator.transport.stats.faults == 1
    assert coordinator.transport.alive


def test_a_slow_owner_gets_each_message_once(broker: Broker, own: Own) -> None:
    """Case 6: the network thread keeps the connection alive while the owner is busy for twice the keepalive."""
    coordinator = own(quick(broker), "coord-1", COORDINATOR)
    device = own(quick(broker, keepalive_s=2), "dev-1", DEVICE)
    device.wait(Connected)
    coordinator.transport.publish(assign("work"))
    coordinator.wait(Published)
    time.sleep(4.0)
    device.wait(Received)
    device.rest(1.0)
    assert device.payloads() == [b"work"]
    assert device.of(Disconnected) == []


def test_a_killed_broker_loses_neither_queue_nor_session_nor_retained(broker: Broker, own: Own) -> None:
    """Case 7."""
    coordinator, device = own(quick(broker), "coord-1", COORDINATOR), own(quick(broker), "dev-1", DEVICE)
    coordinator.transport.publish(assign("desired"))
    coordinator.wait(Published)
    device.wait(Received)
    broker.kill()
    for number in range(40):
        device.transport.publish(ack(str(number)))
    device.wait(Disconnected)
    broker.restart()
    device.wait(Published, 40)
    coordinator.wait_for({str(number).encode() for number in range(40)})
    again = device.wait(Connected, 2)[-1]
    assert again.session_present
    assert again.epoch > 1
    assert device.transport.stats.reconnects == 1


def test_a_broker_that_lost_its_persistence_is_subscribed_again(broker: Broker, own: Own) -> None:
    """Case 8, the transport's part: no session is present, and messages flow again."""
    coordinator, device = own(quick(broker), "coord-1", COORDINATOR), own(quick(broker), "dev-1", DEVICE)
    coordinator.wait(Connected)
    device.wait(Connected)
    broker.kill()
    (broker.folder / "mosquitto.db").unlink(missing_ok=True)
    broker.restart()
    assert not coordinator.wait(Connected, 2)[-1].session_present
    device.wait(Connected, 2)
    device.transport.publish(ack("after"))
    coordinator.wait(Received)
    assert coordinator.payloads() == [b"after"]


def test_the_newest_desired_state_wins_over_a_full_queue(tmp_path: Path, own: Own) -> None:
    """Case 16: a full queue of the broker drops the newest; the retained one comes all the same."""
    with Broker(tmp_path / "b", overrides={"max_queued_messages": "5"}) as broker:
        device = own(quick(broker), "dev-1", DEVICE)
        device.wait(Connected)
        device.transport.stop()
        coordinator = own(quick(broker), "coord-1")
        for number in range(50):
            coordinator.transport.publish(assign(str(number)))
        coordinator.wait(Published, 50)
        returned = own(quick(broker), "dev-1", DEVICE)
        returned.wait_for({b"49"})
        assert len(returned.of(Received)) < 50


def test_the_will_of_the_last_connection_fires_when_a_client_vanishes(broker: Broker, own: Own) -> None:
    with Proxy(broker.port) as proxy:
        coordinator = own(quick(broker), "coord-1", COORDINATOR)
        coordinator.wait(Connected)
        device = own(quick(broker, port=proxy.port), "dev-1", DEVICE, will=lambda epoch: state(f"lost {epoch}"))
        device.wait(Connected)
        proxy.cut()
        device.wait(Connected, 2)
        device.transport.stop(graceful=False)
        coordinator.wait(Received, 2)
        assert coordinator.payloads() == [b"lost 1", b"lost 2"]
        assert [event.epoch for event in device.of(Connected)] == [1, 2]


def test_a_quick_return_suppresses_a_delayed_will(broker: Broker, own: Own) -> None:
    with Proxy(broker.port) as proxy:
        coordinator = own(quick(broker), "coord-1", COORDINATOR)
        coordinator.wait(Connected)
        settings = quick(broker, port=proxy.port, will_delay_s=2)
        device = own(settings, "dev-1", DEVICE, will=lambda epoch: state(f"lost {epoch}"))
        device.wait(Connected)
        proxy.cut()
        device.wait(Connected, 2)
        coordinator.rest(3.0)
        assert coordinator.payloads() == []


def test_a_graceful_stop_sends_the_queue_and_a_disconnect_and_no_will(broker: Broker, own: Own) -> None:
    """Case 17: `disconnected`, not `lost`."""
    with Proxy(broker.port, delay_s=0.002) as proxy:
        coordinator = own(quick(broker), "coord-1", COORDINATOR)
        coordinator.wait(Connected)
        settings = quick(broker, port=proxy.port, window=2)
        device = own(settings, "dev-1", DEVICE, will=lambda epoch: state("lost"))
        device.wait(Connected)
        for number in range(50):
            device.transport.publish(ack(str(number)))
        device.transport.publish(state("disconnected"))
        device.transport.stop()
        assert not device.transport.alive
        coordinator.wait(Received, 51)
        coordinator.rest(0.5)
        assert coordinator.payloads()[-1] == b"disconnected"
        assert len(coordinator.payloads()) == 51
        assert proxy.disconnects == 1


def test_a_stop_without_a_broker_returns(broker: Broker, own: Own) -> None:
    device = own(quick(broker, port=free_port()), "dev-1", DEVICE)
    device.transport.publish(ack("never"))
    device.wait(Disconnected)
    device.transport.stop()
    assert not device.transport.alive


def test_a_half_open_connection_is_noticed(broker: Broker, own: Own) -> None:
    """Case 14."""
    with Proxy(broker.port) as proxy:
        device = own(quick(broker, port=proxy.port, keepalive_s=2), "dev-1", DEVICE)
        device.wait(Connected)
        proxy.stall()
        assert device.wait(Disconnected)[0].reason == "Keep alive timeout"


def test_a_taken_over_session_raises_an_alarm(broker: Broker, own: Own) -> None:
    """Case 19: mosquitto 2.0 closes the older connection without a word, so the alarm comes after some rounds."""
    settings = quick(broker, reconnect_min_s=0.2)
    first = own(settings, "dev-1", DEVICE)
    first.wait(Connected)
    own(settings, "dev-1", DEVICE)
    assert "'dev-1'" in first.wait(TransportFailed)[0].reason


def test_a_refused_login_is_an_operators_matter(tmp_path: Path, own: Own) -> None:
    with Broker(tmp_path / "b", passwords={"dev-1": "right"}) as broker:
        word = tmp_path / "password"
        word.write_text("right\n", "utf-8")
        settings = quick(broker, username="dev-1", password_file=str(word), reconnect_max_s=60.0)
        own(settings, "dev-1", DEVICE).wait(Connected)
        word.write_text("wrong\n", "utf-8")
        refused = own(settings, "dev-2", DEVICE)
        assert "Not authorized" in refused.wait(TransportFailed)[0].reason
        refused.rest(0.5)
        assert refused.events == refused.of(TransportFailed)[:1]


def test_a_refused_subscription_is_surfaced(broker: Broker, own: Own) -> None:
    with Proxy(broker.port, refuse_subscriptions=True) as proxy:
        device = own(quick(broker, port=proxy.port), "dev-1", DEVICE)
        device.wait(Connected)
        [failed] = device.wait(TransportFailed)
        assert DEVICE[-1][0] in failed.reason
        assert "Not authorized" in failed.reason


def test_no_broker_is_one_line(broker: Broker, own: Own) -> None:
    port = free_port()
    device = own(quick(broker, port=port), "dev-1", DEVICE)
    first, *_ = device.wait(Disconnected, 3)
    assert first.reason == f"can't reach 127.0.0.1:{port}: Connection refused"


def test_a_missing_password_file_fails_at_once(broker: Broker) -> None:
    with pytest.raises(UserError, match="nowhere"):
        Owner(quick(broker, username="x", password_file="/nowhere"), "dev-1")


def test_an_acknowledgement_of_an_older_session_is_not_sent(broker: Broker, own: Own) -> None:
    with Proxy(broker.port) as proxy:
        coordinator = own(quick(broker), "coord-1", COORDINATOR)
        device = own(quick(broker, port=proxy.port), "dev-1", DEVICE)
        device.wait(Connected)
        coordinator.transport.publish(Outgoing(topics.COMMAND, topics.COMMAND.name(FLEET, device="dev-1"), b"do"))
        coordinator.wait(Published)
        old = device.queue.get(timeout=10)
        assert isinstance(old, Received)
        proxy.cut()
        device.wait(Connected, 2)
        device.transport.ack(old)
        [again] = device.wait(Received)
        assert (again.payload, again.duplicate) == (b"do", True)
        assert again.handle != old.handle
