"""When a round closes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.close import Status, closing, updates_needed

STATUS = st.sampled_from(["assigned", "accepted", "done", "refused", "failed", "gone", "silent"])


def _round(text: str) -> dict[str, Status]:
    """Statuses by first letter: a(ssigned), w(orking = accepted), d(one), r(efused), f(ailed), g(one), s(ilent)."""
    words: dict[str, Status] = {
        "a": "assigned", "w": "accepted", "d": "done", "r": "refused", "f": "failed", "g": "gone", "s": "silent"
    }  # fmt: skip
    return {f"edge-{index}": words[letter] for index, letter in enumerate(text)}


@pytest.mark.parametrize(
    ("statuses", "quorum", "now", "verdict"),
    [
        ("", 0.5, 0.0, "repeat"),
        ("dddd", 1.0, 0.0, "close"),
        ("ddda", 0.5, 99.9, "wait"),
        ("dddw", 0.5, 99.9, "wait"),
        ("dddw", 0.5, 100.0, "close"),
        ("daww", 0.5, 100.0, "repeat"),
        ("daaa", 0.25, 100.0, "close"),
        ("aaaa", 0.0, 100.0, "repeat"),
        ("ddrf", 0.5, 0.0, "close"),
        ("ddss", 0.5, 0.0, "close"),
        ("ddss", 0.75, 0.0, "repeat"),
        ("dsss", 0.5, 0.0, "repeat"),
        ("rrrr", 0.0, 0.0, "repeat"),
        ("dsrw", 0.25, 0.0, "wait"),
        ("ddgg", 0.5, 0.0, "close"),
        ("ddgg", 0.75, 99.9, "wait"),
        ("ddgg", 0.75, 100.0, "repeat"),
        ("dgrr", 0.75, 0.0, "repeat"),
        ("ggss", 0.0, 0.0, "wait"),
    ],
)
def test_the_verdict_follows_from_who_is_waited_for(statuses: str, quorum: float, now: float, verdict: str) -> None:
    found, reason = closing(_round(statuses), quorum, now, deadline_at=100.0)
    assert found == verdict
    assert reason


def test_the_reason_counts_what_is_there_and_what_was_lost() -> None:
    _, reason = closing(_round("dssrf"), 0.5, 0.0, 100.0)
    assert reason == "nobody is waited for any more: 1 of 5 updates, 3 needed (50% of 5); 1 refused, 1 failed, 2 silent"


@pytest.mark.parametrize(("participants", "quorum", "needed"), [(10, 0.7, 7), (10, 0.3, 3), (3, 0.5, 2), (5, 0.0, 1)])
def test_rounding_of_shares_never_asks_one_more(participants: int, quorum: float, needed: int) -> None:
    assert updates_needed(participants, quorum) == needed


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), STATUS, max_size=9), st.floats(0, 1), st.floats(0, 200))
def test_nothing_closes_without_its_quorum_and_nothing_waits_past_the_deadline(
    statuses: dict[str, Status], quorum: float, now: float
) -> None:
    verdict, _ = closing(statuses, quorum, now, 100.0)
    done = sum(status == "done" for status in statuses.values())
    if verdict == "close":
        assert done >= max(1, quorum * len(statuses) - 1e-9)
    if verdict == "wait":
        assert now < 100.0
        away = sum(status == "gone" for status in statuses.values())
        at_work = {"assigned", "accepted"} & set(statuses.values())
        assert at_work or done < updates_needed(len(statuses), quorum) <= done + away
    if now >= 100.0:
        assert verdict != "wait"
