"""What every test of readers needs."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest


@pytest.fixture(autouse=True)
def real_procfs() -> Iterator[None]:
    """A reader of a recorded tree points psutil at it; the next test must read the machine again."""
    before = psutil.PROCFS_PATH
    yield
    psutil.PROCFS_PATH = before
