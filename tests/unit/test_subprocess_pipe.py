"""A subprocess in frames, over real ones."""

from __future__ import annotations

import queue
import sys
from pathlib import Path

import pytest

from edge_daemon import protocol
from shared.subprocess_pipe import start_piped

WITHIN_S = 30.0
ECHO = """
import argparse, os
parser = argparse.ArgumentParser()
parser.add_argument("--read-fd", type=int)
parser.add_argument("--write-fd", type=int)
ends = parser.parse_args()
data = os.read(ends.read_fd, 4096)
print("this is no frame")
os.write(ends.write_fd, {reply})
"""


def run(reply: str) -> list[protocol.ToAgent | str]:
    """What is heard of a program that answers a `Stop` with the bytes `reply`."""
    heard: queue.SimpleQueue[protocol.ToAgent | str] = queue.SimpleQueue()
    command = [sys.executable, "-c", ECHO.format(reply=reply)]
    process, writer = start_piped(command, protocol.ToAgent, heard.put, heard.put, name="echo", quiet=True)
    writer.write(protocol.Stop(discard=True))
    found = [heard.get(timeout=WITHIN_S)]
    while not isinstance(found[-1], str):
        found.append(heard.get(timeout=WITHIN_S))
    process.wait(WITHIN_S)
    return found


def test_messages_are_told_in_order_then_the_end() -> None:
    assert run("data + data") == [protocol.Stop(discard=True), protocol.Stop(discard=True), ""]


def test_a_broken_frame_ends_the_reading_with_its_problem() -> None:
    first, end = run("data + b'\\xff' * 8")
    assert first == protocol.Stop(discard=True)
    assert isinstance(end, str) and "the limit is" in end


def test_a_command_that_can_not_start_leaves_no_descriptor_open() -> None:
    def ignore(_: object) -> None:
        raise AssertionError("nothing was started")

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        start_piped(["/nonexistent/program"], protocol.ToAgent, ignore, ignore, name="none")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
