"""Devices that send what they must not, and strangers: refused with a reason and counted, while the round goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgpack
import msgspec
import numpy as np
import pytest

from coordinator.core import records as rec
from edge_daemon import protocol
from muster.testbed.least_squares import MODULE
from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_nodes import FLEET
from shared import adapter as adapters
from shared import messages, topics
from shared.adapter import Adapter, Factors
from shared.codec import pack
from shared.transport.base import Outgoing
from shared.transport.memory import MemoryTransport
from tests.fleet import fleet_rig as rig

Forge = Callable[[protocol.Train, bytes], bytes]
LIAR = "dev-000"


def _with(change: Callable[[Adapter], Adapter]) -> Forge:
    return lambda _order, data: adapters.write(change(adapters.read(data)))


def _factors(change: Callable[[Factors], Factors]) -> Forge:
    def forge(update: Adapter) -> Adapter:
        return _replace(update, factors={MODULE: change(update.factors[MODULE])})

    return _with(forge)


def _replace(update: Adapter, **changes: object) -> Adapter:
    fields = {name: getattr(update, name) for name in Adapter.__dataclass_fields__}
    return Adapter(**{**fields, **changes})  # type: ignore[arg-type]  # names are checked by the constructor


def _part(part: Factors, **changes: object) -> Factors:
    fields = {name: getattr(part, name) for name in Factors.__dataclass_fields__}
    return Factors(**{**fields, **changes})  # type: ignore[arg-type]  # names are checked by the constructor


def _bomb(_order: protocol.Train, data: bytes) -> bytes:
    """A tensor that claims terabytes."""
    message = msgpack.unpackb(data)
    message["modules"][0]["b"][1] = [2**20, 2**20]
    return bytes(msgpack.packb(message))


class _Replay:
    """The update of the first round, sent in every round."""

    def __init__(self) -> None:
        self.first = b""

    def __call__(self, _order: protocol.Train, data: bytes) -> bytes:
        self.first = self.first or data
        return self.first


FORGERIES: dict[str, tuple[Forge, str]] = {
    "shape of b": (_factors(lambda p: _part(p, b=np.zeros((9, p.rank), np.float32))), "9"),
    "rank": (
        _factors(lambda p: _part(p, b=np.zeros((8, 7), np.float32), a=np.zeros((7, 16), np.float32))), "rank",
    ),
    "nan": (_factors(lambda p: _part(p, b=np.full_like(p.b, np.nan))), "finite"),
    "infinite": (_factors(lambda p: _part(p, a=np.full_like(p.a, np.inf))), "finite"),
    "huge": (_factors(lambda p: _part(p, b=np.full_like(p.b, 1e30))), "norm"),
    "unknown module": (_with(lambda u: _replace(u, factors={**u.factors, "other": u.factors[MODULE]})), "other"),
    "bomb": (_bomb, ""),
    "truncated": (lambda _order, data: data[: len(data) // 2], ""),
    "garbage": (lambda _order, _data: b"\xc1" * 500, ""),
    "another device": (_with(lambda u: _replace(u, device="dev-001")), "dev-001"),
    "another job": (_with(lambda u: _replace(u, job="job-9")), "job-9"),
    "another base": (_with(lambda u: _replace(u, base_digest="f" * 64)), "base"),
    "another attempt": (_with(lambda u: _replace(u, attempt=7)), "7"),
    "a global adapter": (_with(lambda u: _replace(u, kind="global")), "global"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_update_is_refused_and_the_round_goes_on(tmp_path: Path, name: str) -> None:
    forge, word = FORGERIES[name]
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        fleet.daemons[LIAR].member.behaviour.forge = forge
        job = fleet.submit(rig.spec(3, quorum=0.6, count=1))
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        (refused,) = rig.of_kind(fleet, job, rec.UpdateRefused)
        assert refused.device == LIAR
        assert refused.reason
        assert word in refused.reason
        assert fleet.coordinator.runtime.state.counters["refused updates"] == 1
        (closed,) = rig.of_kind(fleet, job, rec.RoundClosed)
        assert closed.devices == ["dev-001", "dev-002"]
        fleet.run(1.0)
        done = fleet.daemons[LIAR].runtime.state.journal.finished[-1]
        assert (done.verdict, done.reason) == ("refused", refused.reason)


def test_a_replayed_update_counts_once(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        fleet.daemons[LIAR].member.behaviour.forge = _Replay()
        job = fleet.submit(rig.spec(3, quorum=0.6))
        found = fleet.finish(job)
        assert (found.phase, found.committed) == ("finished", 3)
        refusals = rig.of_kind(fleet, job, rec.UpdateRefused)
        assert [(refusal.round, refusal.device) for refusal in refusals] == [(2, LIAR), (3, LIAR)]
        rig.check(fleet, job)


class Stranger:
    """A client that may publish what it likes, as behind a broker without access rules."""

    def __init__(self, fleet: MemoryFleet) -> None:
        self._fleet = fleet
        self._transport = MemoryTransport(fleet.network, "stranger", lambda: 1)
        self._transport.start(lambda _event: None)
        fleet.run(0.5)

    def say(self, topic: topics.Topic, payload: bytes, **parts: object) -> None:
        name = topic.name(FLEET, **parts)
        self._transport.publish(Outgoing(topic, name, payload))
        self._fleet.run(0.2)


def _at_work(fleet: MemoryFleet, job: str, round: int) -> None:
    def there() -> bool:
        found = fleet.job(job)
        return found is not None and found.phase == "open" and found.round is not None and found.round.number == round

    fleet.run_until(there, 120.0, f"round {round}")
    fleet.run(0.3)


def test_strange_messages_are_counted_and_change_nothing(tmp_path: Path) -> None:
    spec = rig.spec(3, count=2)
    with MemoryFleet(tmp_path / "strange", rig.members(3, step_s=1.0)) as fleet:
        job = fleet.submit(spec)
        stranger = Stranger(fleet)
        _at_work(fleet, job, 2)
        first = rig.of_kind(fleet, job, rec.UpdateAdmitted)[0]
        manifest = messages.Manifest(
            sha=first.blob.sha, size=first.blob.size, chunk=1000, kind="update", job=job, round=1, attempt=1,
            facts=first.facts,
        )  # fmt: skip
        current = msgspec.structs.replace(manifest, round=2, sha="a" * 64)
        ack = messages.Ack(epoch=1, job=job, round=1, attempt=1, verdict="failed", reason="an old one")
        stranger.say(topics.LOAD, b"\x00garbage", device="dev-001")
        stranger.say(topics.INFO, pack({"schema": 99, "epoch": 1}), device="dev-001")
        stranger.say(topics.STATE, b"\xff" * 4000, device="no-such-device")
        stranger.say(topics.LOAD, b"", device="UPPER")
        stranger.say(topics.UP_CHUNK, b"x" * 100, device="dev-001", sha="c" * 64, index=0)
        stranger.say(topics.UP_BLOB, pack(manifest), device="dev-001")
        stranger.say(topics.UP_BLOB, pack(msgspec.structs.replace(manifest, round=2, attempt=9)), device="dev-001")
        stranger.say(topics.UP_BLOB, pack(current), device="dev-stranger")
        stranger.say(topics.ACK, pack(ack), device="dev-001")
        stranger.say(topics.ACK, pack(msgspec.structs.replace(ack, round=2, attempt=9)), device="dev-001")
        counters = fleet.coordinator.runtime.state.counters
        assert counters == {
            "undecodable messages": 3, "foreign messages": 1, "unexpected chunks": 1, "late updates": 2,
            "refused updates": 1, "stale acks": 2,
        }  # fmt: skip
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        assert {attempt for _, attempt, _ in rig.planned(fleet, job)} == {1}
        assert fleet.adapter(job) == rig.undisturbed(tmp_path, 3, spec)


def test_claims_of_more_samples_than_assigned_are_refused(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(3, step_s=1.0)) as fleet:
        job = fleet.submit(rig.spec(3, quorum=0.6, count=1))
        stranger = Stranger(fleet)
        _at_work(fleet, job, 1)
        facts = messages.UpdateFacts(
            samples=10**9, steps=8, batch=4, bits=32, loss_first=1.0, loss_last=1.0, step_s=0.1, train_s=1.0
        )
        manifest = messages.Manifest(
            sha="b" * 64, size=100, chunk=1000, kind="update", job=job, round=1, attempt=1, facts=facts
        )
        stranger.say(topics.UP_BLOB, pack(manifest), device=LIAR)
        (refused,) = rig.of_kind(fleet, job, rec.UpdateRefused)
        assert "1000000000 samples" in refused.reason
        assert fleet.finish(job).phase == "finished"


def test_an_old_coordinator_is_not_obeyed(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2, step_s=0.5)) as fleet:
        job = fleet.submit(rig.spec(2, count=1))
        stranger = Stranger(fleet)
        _at_work(fleet, job, 1)
        stranger.say(topics.ASSIGN, pack(messages.Assign(term=0, reason="stop")), device=LIAR)
        stranger.say(topics.ASSIGN, b"\x93garbage", device=LIAR)
        assert fleet.daemons[LIAR].phase == "training"
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
