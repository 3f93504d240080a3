"""The daemon's loop: what the disk holds is looked at before anything else is decided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_daemon.adapters.store import Store
from edge_daemon.adapters.team import TeamTrainer
from edge_daemon.adapters.trainer import SubprocessTrainer
from edge_daemon.core.rollout import Rollout
from edge_daemon.core.state import Journal, Machine
from edge_daemon.placing import Placed
from edge_daemon.runtime import Examined, Ports, Runtime, Sampled
from shared.transport.memory import MemoryTransport
from shared.transport.memory_network import MemoryNetwork
from tests.unit.session_rig import SETTINGS, load
from tests.unit.test_rollout import spec


@pytest.mark.parametrize("first", [Examined(Machine()), Sampled(load()), None], ids=["machine", "load", "tick"])
def test_leftovers_are_gone_before_new_work_begins(tmp_path: Path, first: object) -> None:
    """A half-unpacked release of the former process; the removal must not meet the folder that this one fills."""
    store = Store(tmp_path, fsync=False)
    release = spec(1)
    store.save(Journal(rollout=Rollout(term=1, wanted=release, stage="verified")))
    leftover = tmp_path / "releases" / ".leftover"
    leftover.mkdir(parents=True)
    seen: list[bool] = []

    def offload(_work: Callable[[], Placed]) -> None:
        seen.append(leftover.exists())

    ports = Ports(
        transport=MemoryTransport(MemoryNetwork(1), "dev-1", store.next_epoch), store=store,
        trainer=TeamTrainer(lambda post: SubprocessTrainer(["/bin/false"], post, lambda: 0), lambda _spoke: None),
        clock=lambda: 100.0, wall=lambda: 1e9, minute=lambda: 720, sample_every=lambda _seconds: None, offload=offload,
    )  # fmt: skip
    runtime = Runtime(SETTINGS, ports, boot_id="boot", version="test")
    if first is None:
        runtime.tick()
    else:
        runtime.handle(first)
    assert seen == [False], "unpacked once, and after the leftovers were gone"
    store.close()
