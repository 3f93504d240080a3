"""The daemon's loop: what the disk holds is looked at before anything else is decided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_daemon.adapters.store import Store
from edge_daemon.adapters.team import TeamTrainer
from edge_daemon.adapters.trainer import SubprocessTrainer
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.rollout import Rollout
from edge_daemon.core.state import Journal, Machine, State
from edge_daemon.placing import Placed
from edge_daemon.runtime import Examined, Ports, Runtime, Sampled
from shared.messages import BlobRef
from shared.transport.memory import MemoryTransport
from shared.transport.memory_network import MemoryNetwork
from tests.unit.session_rig import SETTINGS, assignment, load
from tests.unit.test_rollout import spec


def _runtime(store: Store, offload: Callable[[Callable[[], Placed]], None]) -> Runtime:
    ports = Ports(
        transport=MemoryTransport(MemoryNetwork(1), "dev-1", store.next_epoch), store=store,
        trainer=TeamTrainer(lambda post: SubprocessTrainer(["/bin/false"], post, lambda: 0), lambda _spoke: None),
        clock=lambda: 100.0, wall=lambda: 1e9, minute=lambda: 720, sample_every=lambda _seconds: None, offload=offload,
    )  # fmt: skip
    return Runtime(SETTINGS, ports, boot_id="boot", version="test")


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

    runtime = _runtime(store, offload)
    if first is None:
        runtime.tick()
    else:
        runtime.handle(first)
    assert seen == [False], "unpacked once, and after the leftovers were gone"
    store.close()


def test_what_comes_of_a_failure_comes_after_all_that_its_step_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its step may say that it trains; that would be retained if it were said after the end."""
    store = Store(tmp_path, fsync=False)
    order = cmd.Train(assignment(), base_path="", data_path="", train_for_s=0.0, batch_limit=0, fetch_s=0.0)

    def decide(state: State, event: ev.AnyEvent) -> tuple[State, list[cmd.Command]]:
        if isinstance(event, ev.AgentFailed):
            return state, [cmd.Note("info", "it ended")]
        if event.now == 1.0:
            return state, [order, cmd.Note("info", "it trains")]
        return state, [cmd.Fetch(BlobRef(sha="0" * 64, size=100), 1000), cmd.Note("info", "it has work")]

    monkeypatch.setattr("edge_daemon.runtime.step", decide)
    runtime = _runtime(store, lambda _work: None)
    # The adapter is there at once, so that the work begins within the step that fetches it.
    monkeypatch.setattr(runtime, "_fetch", lambda _command: runtime.step(ev.Tick(now=1.0)))
    with caplog.at_level("INFO", logger="edge_daemon.runtime"):
        runtime.step(ev.Tick(now=0.0))
    assert [record.getMessage() for record in caplog.records] == ["it trains", "it has work", "it ended"]
    store.close()
