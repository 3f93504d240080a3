"""Lines that say what they are about: as JSON on standard error; the journal's side is tested on a booted system."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from coordinator import performing
from coordinator.core import records as rec
from shared import logs

PROGRAM = """
import logging
from shared import logs
logs.set_up("muster-edge", "INFO", device="edge-01", fleet="lab")
log = logging.getLogger("x")
log.info("before")
logs.about(job="toy", round=12, attempt=1, trace=logs.trace("toy", 12, 1))
log.info("during %s", "it", extra=logs.event("phase"))
log.warning("of another", extra=logs.event("device-answered", device="edge-07", round=13))
logs.about()
try:
    1 / 0
except ZeroDivisionError:
    log.exception("after")
log.debug("never")
"""


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    logs.about()
    root.handlers[:], root.level = before


def test_lines_carry_what_they_are_about() -> None:
    # Inherited from whoever runs this; its standard error is another one.
    environment = {**os.environ, "JOURNAL_STREAM": "8:1234"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    before, during, other, after = map(json.loads, done.stderr.splitlines())
    assert (before["device"], before["fleet"], before.get("round")) == ("edge-01", "lab", None)
    assert (during["text"], during["event"], during["round"], during["attempt"]) == ("during it", "phase", "12", "1")
    assert during["trace"] == "toy.12.1"
    assert (other["device"], other["round"], other["job"]) == ("edge-07", "13", "toy"), "a line's own fields come first"
    assert "round" not in after
    assert "ZeroDivisionError" in after["traceback"]


def test_a_class_of_lines_has_one_message_id_for_ever() -> None:
    fields = logs.event("round-committed")
    assert fields["MUSTER_EVENT"] == "round-committed"
    # Someone's filter may hold it.
    assert fields["MESSAGE_ID"] == "97c8c5b4e1d95d3b99dc2b50905970a7"
    assert logs.event("round-committed") == fields
    assert logs.event("round-closed")["MESSAGE_ID"] != fields["MESSAGE_ID"]


def test_what_is_not_known_is_no_field() -> None:
    assert set(logs.event("x", job="", round=None, attempt=0)) == {"MESSAGE_ID", "MUSTER_EVENT", "MUSTER_ATTEMPT"}


def test_records_of_the_coordinator_become_fields() -> None:
    record = rec.DeviceAnswered(job="toy", round=3, attempt=2, device="edge-01", verdict="failed", reason="why")
    fields = performing.fields(record)
    assert {name: value for name, value in fields.items() if name != "MESSAGE_ID"} == {
        "MUSTER_EVENT": "device-answered", "MUSTER_JOB": "toy", "MUSTER_ROUND": "3", "MUSTER_ATTEMPT": "2",
        "MUSTER_DEVICE": "edge-01",
    }  # fmt: skip
