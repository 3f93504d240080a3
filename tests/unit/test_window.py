"""The queue and window of QoS 1 messages."""

from __future__ import annotations

import random

import pytest

from shared import topics
from shared.settings import BrokerSettings
from shared.transport.base import BackPressure, Outgoing
from shared.transport.retry import BRIEF, SPREAD, Retry
from shared.transport.window import Acked, Window


def message(token: int, size: int = 1) -> Outgoing:
    return Outgoing(topics.ACK, topics.ACK.name("f1", device="dev-1"), bytes(size), token)


def filled(count: int, size: int = 4) -> Window:
    window = Window(size, 100)
    for token in range(count):
        window.put(message(token))
    return window


def send(window: Window, session: int, first_mid: int = 1) -> list[object]:
    """Hand over all that the window lets go; the tokens."""
    tokens: list[object] = []
    while (taken := window.take(session)) is not None:
        assert window.sent(session, first_mid + len(tokens), taken) is None
        tokens.append(taken.token)
    return tokens


def test_nothing_leaves_before_a_session() -> None:
    assert filled(3).take(1) is None


def test_the_window_lets_no_more_out_than_its_size() -> None:
    window = filled(10)
    window.open(1)
    assert send(window, 1) == [0, 1, 2, 3]
    assert window.acked(1, 2, Acked()) == message(1)
    assert send(window, 1, first_mid=5) == [4]


def test_the_broker_may_lower_the_window_but_not_raise_it() -> None:
    window = filled(10)
    window.open(1, receive_maximum=2)
    assert len(send(window, 1)) == 2
    window.close()
    window.open(2, receive_maximum=1000)
    assert len(send(window, 2)) == 4


def test_a_lost_session_puts_the_unacknowledged_first_again_in_order() -> None:
    window = filled(6)
    window.open(1)
    send(window, 1)
    window.acked(1, 3, Acked())
    window.close()
    assert window.room() == 95
    window.open(2)
    assert send(window, 2) == [0, 1, 3, 4]


def test_an_answer_of_an_older_session_is_ignored() -> None:
    window = filled(1)
    window.open(1)
    send(window, 1)
    window.close()
    window.open(2)
    send(window, 2)
    assert window.acked(1, 1, Acked()) is None
    assert not window.idle
    assert window.acked(2, 1, Acked()) == message(0)
    assert window.idle


def test_an_answer_faster_than_the_hand_over_is_not_lost() -> None:
    window = filled(1)
    window.open(1)
    taken = window.take(1)
    assert taken is not None
    assert window.acked(1, 7, Acked(reason="Not authorized")) is None
    assert window.sent(1, 7, taken) == Acked(reason="Not authorized")
    assert window.idle


def test_a_message_handed_to_a_session_that_ended_meanwhile_stays_first() -> None:
    window = filled(2)
    window.open(1)
    taken = window.take(1)
    assert taken is not None
    window.close()
    window.open(2)
    assert window.sent(1, 1, taken) is None
    assert send(window, 2) == [0, 1]


def test_a_message_that_could_not_be_handed_over_stays_first() -> None:
    window = filled(2)
    window.open(1)
    taken = window.take(1)
    assert taken is not None
    window.unsent(taken)
    assert send(window, 1) == [0, 1]


def test_a_full_queue_refuses() -> None:
    window = Window(1, 2)
    window.put(message(0))
    window.put(message(1))
    assert window.room() == 0
    with pytest.raises(BackPressure):
        window.put(message(2))


def test_what_does_not_fit_any_more_is_taken_out() -> None:
    window = Window(4, 10)
    for token, size in enumerate((1, 500, 2, 600)):
        window.put(message(token, size))
    assert [dropped.token for dropped in window.drop(lambda waiting: len(waiting.payload) > 100)] == [1, 3]
    window.open(1)
    assert send(window, 1) == [0, 2]


def test_the_largest_unacknowledged_message_is_the_culprit() -> None:
    window = Window(4, 10)
    assert window.drop_largest() is None
    for token, size in enumerate((1, 500, 2)):
        window.put(message(token, size))
    window.open(1)
    send(window, 1)
    culprit = window.drop_largest()
    assert culprit is not None
    assert culprit.token == 1
    assert [left.token for left in window.take_all()] == [0, 2]


SETTINGS = BrokerSettings(reconnect_min_s=1.0, reconnect_max_s=10.0)


class Ones(random.Random):
    """Draws the longest wait."""

    def random(self) -> float:
        return 1.0


def waits(seed: int, lived_s: float | None, *, refused: bool) -> list[float]:
    """First waits of 200 transports."""
    rng = random.Random(seed)
    return [Retry(BrokerSettings(), rng).after(lived_s, refused=refused) for _ in range(200)]


def test_a_fleet_that_lost_its_broker_comes_back_spread() -> None:
    """Case 15."""
    drawn = waits(3, 100.0, refused=False)
    assert max(drawn) - min(drawn) >= 5
    assert max(drawn) <= SPREAD
    assert len(set(drawn)) == 200


def test_a_refused_login_waits_long_at_once() -> None:
    assert min(waits(4, None, refused=True)) >= 60


def test_waits_grow_to_the_longest_and_start_anew_after_a_steady_session() -> None:
    retry = Retry(SETTINGS, Ones())
    assert [retry.after(None, refused=False) for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    assert retry.after(BRIEF, refused=False) == SPREAD
    assert retry.after(None, refused=False) == 2


def test_brief_sessions_count_as_failures_and_raise_an_alarm() -> None:
    retry = Retry(SETTINGS, Ones())
    flapping = []
    drawn = []
    for _ in range(5):
        drawn.append(retry.after(BRIEF - 1, refused=False))
        flapping.append(retry.flapping)
    assert drawn == [6, 6, 6, 8, 10]
    assert flapping == [False, False, False, True, True]
    retry.after(BRIEF, refused=False)
    assert not retry.flapping
