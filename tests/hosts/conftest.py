"""Real hosts, where they can be booted; where not, the last line of the run says so."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.hosts.site import REQUIRED, NotPossible, Site, hosts

_why: list[str] = []
_timings: list[tuple[str, float]] = []


@pytest.fixture(scope="package")
def machines() -> Iterator[Site]:
    """Three hosts as rented: nothing of Muster on them."""
    try:
        with hosts() as site:
            yield site
            _timings.extend(site.controller.timings)
    except NotPossible as error:
        _why.append(str(error))
        pytest.skip(f"hosts: {error}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """After everything that is printed: whether the hosts were there."""
    if _why and os.environ.get(REQUIRED) == "required":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    yield
    if _why:
        sys.stdout.write(f"HOST TESTS NOT RUN: {' '.join(_why[0].split())}\n")
        sys.stdout.flush()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long everything on the hosts took."""
    for label, seconds in _timings:
        terminalreporter.write_line(f"hosts: {seconds:6.1f} s  {label}")
