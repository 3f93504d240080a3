"""Freed memory goes back to the system: in processes of their own, for an allocator's settings stay."""

from __future__ import annotations

import subprocess
import sys

import pytest

PEAK_AND_REST = """
import threading
from pathlib import Path
from shared.allocator import give_back, keep_small

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

{before}
begun = resident()
def work():
    # Blocks of 300 kB to 1 MB; what lies between them stays, so that the heap's top can't shrink.
    blocks = [bytearray(300_000 + 40_000 * (n % 20)) for n in range(200)]
    return [bytearray(100) for _ in range(1000)]
kept = []
threads = [threading.Thread(target=lambda: kept.append(work())) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
{after}
print(resident() - begun)
"""


def rest(*, before: str = "", after: str = "") -> int:
    """Bytes that a process still holds after work, beyond what it held before."""
    code = PEAK_AND_REST.format(before=before, after=after)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("way", [{"after": "give_back()"}, {"before": "keep_small()"}])
def test_what_is_freed_goes_back(way: dict[str, str]) -> None:
    kept = rest()
    if kept < 16_000_000:
        pytest.fail(f"this allocator keeps {kept} bytes only (MALLOC_ARENA_MAX set?): the test shows nothing")
    assert rest(**way) < 8_000_000


def test_cycles_are_collected() -> None:
    code = (
        "import gc, weakref\nfrom shared.allocator import give_back\ngc.disable()\n"
        "class Node: pass\nnode = Node(); node.self = node; ref = weakref.ref(node); del node\n"
        "assert ref() is not None\ngive_back()\nassert ref() is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rare_collections_come_all_the_same() -> None:
    code = (
        "import weakref\nfrom shared.allocator import collect_rarely\ncollect_rarely(5000)\n"
        "class Node: pass\nnode = Node(); node.self = node; ref = weakref.ref(node); del node\n"
        "kept = [[] for _ in range(4000)]\nassert ref() is not None, 'not after 700'\n"
        "kept += [[] for _ in range(2000)]\nassert ref() is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_was_imported_is_left_out_of_later_collections_and_what_comes_later_is_not() -> None:
    code = (
        "import gc, weakref\nfrom shared.allocator import give_back, spare_imported\ngc.disable()\n"
        "class Node: pass\n"
        "def cycle():\n    node = Node(); node.self = node\n    return weakref.ref(node)\n"
        "refs = []\n"
        "def first(): refs.append(cycle()); return [0] * 10\n"
        "spare_imported(first); spare_imported(first)\n"
        "assert len(refs) == 1 and refs[0]() is None, 'once, and nothing of it is kept'\n"
        "frozen = gc.get_freeze_count()\nassert frozen > 1000\n"
        "ref = cycle()\nassert ref() is not None\ngive_back()\nassert ref() is None\n"
        "assert gc.get_freeze_count() <= frozen\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
