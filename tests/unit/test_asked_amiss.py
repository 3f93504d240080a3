"""An offer that is asked for in pieces which can't be sent is announced anew; it is not lost."""

from __future__ import annotations

from typing import Any

from edge_daemon.core import events as ev
from shared.messages import Manifest
from tests.unit.session_rig import UPDATE, Rig


def _offering() -> Rig:
    rig = Rig().training()
    rig.trained()
    assert len(rig.said(Manifest)) == 1
    return rig


def _ask(rig: Rig, sha: str = UPDATE) -> list[Any]:
    rig.feed(ev.WantUnfit, sha=sha, reason="chunks of 122880 bytes, the limit here is 50000")
    return rig.said(Manifest)


def test_it_is_announced_at_once_with_what_fits_now() -> None:
    rig = _offering()
    rig.feed(ev.Linked, epoch=rig.epoch + 1, max_chunk=50_000)
    (manifest,) = _ask(rig)
    assert (manifest.sha, manifest.chunk) == (UPDATE, 50_000)
    assert [offer.sha for offer in rig.state.journal.outbox] == [UPDATE]
    assert rig.state.phase == "offering"


def test_what_is_not_offered_is_not_announced() -> None:
    rig = _offering()
    assert _ask(rig, "e" * 64) == []


def test_offline_it_waits() -> None:
    rig = _offering()
    rig.feed(ev.Unlinked, reason="cut")
    assert _ask(rig) == []
    assert [offer.sha for offer in rig.state.journal.outbox] == [UPDATE]
