"""Two real agents of one device: they train beside each other, and one merges what both did."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_daemon.adapters.team import TeamTrainer
from edge_daemon.adapters.trainer import AgentEnded, AgentSpoke, SubprocessTrainer
from edge_daemon.core.team import CPU
from edge_daemon.protocol import Failed, Probed, Progressed, Stop, Trained
from edge_daemon.training.merging import mean_update
from shared import adapter
from tests.training.test_agent import Site, probe

COMMAND = [sys.executable, "-m", "edge_daemon.training.agent"]


class Pair:
    """A team of two agents on the CPU."""

    def __init__(self, colours: Path) -> None:
        self.spoken: queue.SimpleQueue[AgentSpoke] = queue.SimpleQueue()
        self.trainer = TeamTrainer(lambda post: SubprocessTrainer(COMMAND, post, lambda: 0), self.spoken.put)
        self.trainer.start(probe(colours), [CPU, CPU])

    def hear(self, *wanted: type[Any]) -> Any:
        """The team's next word of a wanted type."""
        while True:
            said = self.trainer.digest(self.spoken.get(timeout=60))
            if isinstance(said, wanted):
                return said
            assert not isinstance(said, AgentEnded | Failed), said


@pytest.fixture(scope="module")
def pair(colours: Path) -> Iterator[Pair]:
    made = Pair(colours)
    probed = made.hear(Probed)
    assert (probed.agents, probed.bits) == (2, [32, 16, 8, 4])
    yield made
    made.trainer.kill("the tests end")
    made.hear(AgentEnded)


def test_the_merged_update_is_the_mean_of_both(pair: Pair, tmp_path: Path, bert: Path, colours: Path) -> None:
    site = Site(tmp_path, bert, colours)
    order = site.train("shared", round=2)
    work = order.assignment.work
    order = msgspec.structs.replace(
        order, assignment=msgspec.structs.replace(order.assignment, work=msgspec.structs.replace(work, agents=2))
    )
    pair.trainer.tell(order)
    done = pair.hear(Trained)
    assert (done.facts.agents, done.facts.samples, done.facts.ended) == (2, 2 * work.steps * work.batch, "complete")
    parts = [adapter.read_file(Path(order.checkpoint_dir) / f"part-{part}" / "update.adapter") for part in (0, 1)]
    made = adapter.read_file(Path(order.update_path))
    expected = mean_update(parts, [0.5, 0.5], stack=True)
    assert adapter.write(made) == adapter.write(expected)
    for name, part in made.factors.items():
        assert part.rank == 2 * work.ranks[name]
    different = [not np.array_equal(parts[0].dense[name], parts[1].dense[name]) for name in parts[0].dense]
    assert all(different), "both took the same samples"


def test_a_stop_ends_both_and_what_is_done_counts(pair: Pair, tmp_path: Path, bert: Path, colours: Path) -> None:
    site = Site(tmp_path, bert, colours)
    order = site.train("stopped", steps=10_000)
    work = msgspec.structs.replace(order.assignment.work, agents=2)
    order = msgspec.structs.replace(order, assignment=msgspec.structs.replace(order.assignment, work=work))
    pair.trainer.tell(order)
    pair.hear(Progressed)
    pair.trainer.tell(Stop())
    done = pair.hear(Trained)
    assert (done.facts.agents, done.facts.ended) == (2, "drain")
    assert 0 < done.facts.samples < 2 * 10_000 * work.batch
