"""Processes that compute gradients end with the one that started them."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

PROGRAM = """
import os, sys, time
from muster.testbed.gradients import Workers
if __name__ == "__main__":
    with Workers(1) as workers:
        print(workers._pool.submit(os.getpid).result(), flush=True)
        time.sleep(300)
"""


def test_a_killed_simulation_leaves_no_process_behind() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running() and worker.pid != parent.pid
    finally:
        parent.kill()
        parent.wait(30)
    until = time.monotonic() + 30
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "it goes on without anybody to work for"
        time.sleep(0.05)
