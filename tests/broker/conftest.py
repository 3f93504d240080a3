"""A real mosquitto for each test, and owners of transports to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from muster.testbed.broker import Broker
from tests.broker.owner import Owner


@pytest.fixture
def own() -> Iterator[Callable[..., Owner]]:
    """Makes owners, and stops them at the end."""
    owners: list[Owner] = []

    def make(*args: Any, **options: Any) -> Owner:
        owners.append(Owner(*args, **options))
        return owners[-1]

    yield make
    for owner in owners:
        owner.transport.stop(graceful=False)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A mosquitto with the testbed's settings, open to all."""
    with Broker(tmp_path / "broker") as running:
        yield running
