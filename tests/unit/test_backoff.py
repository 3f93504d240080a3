"""Full jitter: uniform below a bound that doubles up to a cap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.backoff import delay

draws = st.floats(0, 1, exclude_max=True)


@given(attempt=st.integers(0, 10**9), draw=draws, base=st.floats(0.01, 10), cap=st.floats(0.01, 1000))
def test_within_the_bounds(attempt: int, draw: float, base: float, cap: float) -> None:
    wait = delay(attempt, draw, base_s=base, cap_s=cap)
    assert 0 <= wait <= cap
    assert wait <= base * 2.0 ** min(attempt, 1000)


@given(draw=draws, attempt=st.integers(0, 100))
def test_grows_with_the_attempts(draw: float, attempt: int) -> None:
    assert delay(attempt, draw) <= delay(attempt + 1, draw)


def test_the_bound_doubles_and_stops() -> None:
    assert [delay(attempt, 0.5, base_s=1.0, cap_s=6.0) for attempt in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_fleet_spreads() -> None:
    """200 devices after a broker's restart: no tenth of the wait holds more than a fifth of them."""
    waits = [delay(5, (n * 0.618033988749895) % 1) for n in range(200)]
    tenths = [sum(1 for wait in waits if n * 3.2 <= wait < (n + 1) * 3.2) for n in range(10)]
    assert sum(tenths) == 200
    assert max(tenths) <= 40
