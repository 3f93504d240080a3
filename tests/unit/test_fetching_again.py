"""What is being fetched is asked for again in each session, and now and then: nothing given up waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from shared.blob_folder import BlobFolder
from shared.blobs import BlobReceiver, BlobSender
from shared.messages import BlobRef, CoordState
from tests.unit.blob_fleet import RETRY_S, content
from tests.unit.releasing_rig import Device
from tests.unit.releasing_rig import device as device  # a fixture
from tests.unit.session_rig import ADAPTER, assignment
from tests.unit.test_rollout import spec

RELEASE = spec(1).blob.sha


@pytest.fixture
def fetching(device: Device) -> Device:
    """An adapter and a release are under way."""
    device.assign(assignment())
    device.want(spec(1))
    return device


def _asked(device: Device) -> list[str]:
    return [fetch.ref.sha for fetch in device.did(cmd.Fetch)]


def _seen(device: Device, *, online: bool, term: int = 1) -> None:
    device.feed(ev.CoordinatorSeen, coordinator="coord-1", state=CoordState(online=online, term=term))


def test_a_new_session_asks_again(fetching: Device) -> None:
    fetching.feed(ev.Unlinked, reason="cut")
    assert _asked(fetching) == []
    fetching.link()
    assert _asked(fetching) == [ADAPTER, RELEASE]


def test_a_coordinator_that_is_back_is_asked_again_whatever_its_term(fetching: Device) -> None:
    _seen(fetching, online=False)
    assert _asked(fetching) == []
    _seen(fetching, online=True)
    assert _asked(fetching) == [ADAPTER, RELEASE]


def test_what_takes_long_is_asked_for_again_as_long_as_someone_is_there(fetching: Device) -> None:
    at = [second for second in range(150) if fetching.tick() and _asked(fetching)]
    assert [later - sooner for sooner, later in zip(at, at[1:], strict=False)] == [60]
    _seen(fetching, online=False)
    assert not [second for second in range(150) if fetching.tick() and _asked(fetching)]


def test_what_is_here_is_not_asked_for_again(fetching: Device) -> None:
    fetching.feed(ev.AdapterStored, sha=ADAPTER)
    fetching.fetched()
    fetching.link()
    assert _asked(fetching) == []


def test_a_release_goes_on_where_its_own_part_fills_the_disk(fetching: Device) -> None:
    fetching.feed(ev.Tick, wall=fetching.wall, disk_free=0)
    fetching.link()
    assert RELEASE in _asked(fetching)


def test_a_part_that_is_kept_survives_the_end_of_its_pull(tmp_path: Path) -> None:
    data = content(1000)
    folder = BlobFolder(tmp_path / "in", fsync=False)
    sender = BlobSender(BlobFolder(tmp_path / "out", fsync=False))
    ref: BlobRef = BlobFolder(tmp_path / "out", fsync=False).put(data)
    receiver = BlobReceiver(folder, credit_bytes=200, retry_s=RETRY_S, part_s=float("inf"))
    assert not receiver.want("peer", ref, 100, 0.0)
    for peer, want in receiver.due(0.0):
        sender.on_want(peer, want)
    for chunk in sender.take(9):
        receiver.on_chunk("peer", chunk.sha, chunk.index, chunk.data, 0.0)
    now = 0.0
    while (due := receiver.next_due()) is not None:
        now = max(now, due)
        receiver.due(now)
    assert (receiver.stats.expired, receiver.outstanding, now >= 900.0) == (1, 0, True)
    assert receiver.due(10 * now) == []
    assert folder.parts() == {ref.sha}
    assert not receiver.want("peer", ref, 100, 10 * now)
    ((_, want),) = receiver.due(10 * now)
    assert want.ranges == [(2, 2)], "what had come is fetched once more"
