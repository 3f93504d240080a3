"""Work that is given up: what its checkpoint holds counts."""

from __future__ import annotations

import pytest

from edge_daemon import protocol
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from shared.jobs import TrainingSpec
from shared.messages import Ack
from tests.unit.session_rig import ADAPTER, Rig


def _given_up(reached: int, *, out_of_memory: bool) -> Rig:
    """An agent got to step `reached`, with a checkpoint every 4, and then died until nothing was left to try."""
    rig = Rig().training(training=TrainingSpec(checkpoint_every=4))
    step = protocol.Progressed(step=reached, steps=8, samples=8, loss=1.0, samples_per_s=1.0)
    rig.feed(ev.AgentBeat, progressed=step)
    for _ in range(2):
        rig.gone(out_of_memory=out_of_memory)
        rig.tick(60.0)
        rig.probe()
    rig.gone(out_of_memory=out_of_memory)
    return rig


@pytest.mark.parametrize("out_of_memory", [True, False])
def test_what_a_checkpoint_holds_counts_when_the_work_is_given_up(out_of_memory: bool) -> None:
    rig = _given_up(4, out_of_memory=out_of_memory)
    assert rig.said(Ack) == []
    rig = rig.restart().up()  # the decision survives the daemon
    rig.feed(ev.AdapterStored, sha=ADAPTER)
    (order,) = rig.did(cmd.Train)
    assert 0 < order.train_for_s < 0.001
    rig.trained()
    (offer,) = rig.state.journal.outbox
    assert offer.facts.batch_limit == (1 if out_of_memory else 0)
    # The last agent only loaded: nothing it measured may be learned.
    assert (offer.facts.peak_bytes, offer.facts.step_s) == (0, 0.0)
    assert rig.state.phase == "offering"


@pytest.mark.parametrize("end", ["failed", "gone"])
@pytest.mark.parametrize("out_of_memory", [True, False])
def test_a_last_agent_that_finds_no_checkpoint_ends_the_work_with_its_first_reason(
    end: str, out_of_memory: bool
) -> None:
    rig = _given_up(4, out_of_memory=out_of_memory)
    rig.tick(60.0)
    rig.probe()
    assert len(rig.did(cmd.Train)) == 1
    if end == "failed":
        rig.failed("stopped")
    else:
        rig.gone()
    (ack,) = rig.said(Ack)
    assert (ack.verdict, ack.out_of_memory) == ("failed", out_of_memory)
    assert ("not even a batch of one" if out_of_memory else "died 3 times") in ack.reason


def test_without_a_checkpoint_nothing_is_tried_once_more() -> None:
    rig = _given_up(3, out_of_memory=True)
    assert rig.said(Ack)[0].verdict == "failed"
    assert rig.state.phase == "idle"


@pytest.mark.parametrize(("told", "limit"), [(16, 8), (2, 1), (0, 2)])
def test_an_agent_killed_for_memory_goes_on_with_half_of_what_it_tried(told: int, limit: int) -> None:
    """The batch of split learning follows the round's link: what was tried may be more or less than the work's 4."""
    rig = Rig().training()
    assert rig.state.work is not None and rig.state.work.work.batch == 4
    begun = protocol.Progressed(step=0, steps=8, samples=0, loss=0.0, samples_per_s=0.0, batch=told)
    rig.feed(ev.AgentBeat, progressed=begun)
    rig.gone(out_of_memory=True)
    assert rig.state.journal.batch_limit == limit
