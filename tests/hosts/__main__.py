"""Whether hosts can be booted here: makes the Debian tree where it is not there yet, boots one host, ends it.

    .venv/bin/python -m tests.hosts

`make test-all` asks first, so that a machine that can't is told so at the start, not after half an hour of tests.
Exit code 1, if hosts are required (`MUSTER_HOST_TESTS=required`).
"""

from __future__ import annotations

import os
import sys
import time

from tests.hosts import site


def main() -> int:
    """Say which it is."""
    began = time.monotonic()
    try:
        site.probe()
    except site.NotPossible as error:
        sys.stdout.write(f"HOST TESTS WILL NOT RUN: {' '.join(str(error).split())}\n")
        return int(os.environ.get(site.REQUIRED) == "required")
    sys.stdout.write(f"hosts: one booted and ended in {time.monotonic() - began:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
