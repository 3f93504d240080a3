"""Which release is in place on a device, which folders are worth their room, what counts as worse."""

from __future__ import annotations

from typing import Any

import pytest

from edge_daemon.core.rollout import Installed, Rollout, due, found, kept, verdict, withdrawn
from shared.jobs import BaseSpec, TaskSpec
from shared.messages import BlobRef
from shared.release_messages import ReleaseSpec, Score


def spec(number: int, **changes: Any) -> ReleaseSpec:
    """Release `number` of a least-squares job."""
    values: dict[str, Any] = {
        "kind": "lora", "blob": BlobRef(sha=f"{number:064x}", size=1000), "base": BaseSpec(model="16x8"),
        "base_digest": "b" * 64, "task": TaskSpec(kind="least_squares", dataset="points"), **changes,
    }  # fmt: skip
    return ReleaseSpec(id=f"job-1.r1-{number}", number=number, job="job-1", round=1, **values)


def there(number: int, committed: bool = True) -> Installed:
    return Installed(id=spec(number).id, number=number, committed=committed)


R1, R2, R3 = (spec(number).id for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("rollout", "wanted"),
    [
        (Rollout(), ""),
        (Rollout(wanted=spec(1), stage="wanted"), ""),
        (Rollout(wanted=spec(1), stage="staged"), ""),
        (Rollout(wanted=spec(1), stage="staged", tried=True), R1),
        (Rollout(wanted=spec(1), stage="active"), R1),
        # The one before stays until the new one has passed, or where it does not.
        (Rollout(wanted=spec(2), stage="staged", active=R1, installed=(there(1),)), R1),
        (Rollout(wanted=spec(2), stage="failed", active=R1, installed=(there(1),)), R1),
        (Rollout(wanted=spec(2), stage="skipped", active=R1, installed=(there(1),)), R1),
        (Rollout(wanted=spec(2), stage="staged", tried=True, active=R1, installed=(there(1),)), R2),
        # A rollback: at once, without a trial, to what had come to stay.
        (Rollout(wanted=spec(1), stage="wanted", active=R2, installed=(there(1), there(2))), R1),
        (Rollout(wanted=spec(1), stage="wanted", active=R2, installed=(there(1), there(2, False))), R1),
        # It was never here, or never passed: what was withdrawn goes all the same.
        (Rollout(wanted=spec(2), stage="wanted", active=R3, installed=(there(1), there(3))), R1),
        (Rollout(wanted=spec(1), stage="wanted", active=R2, installed=(there(2),)), ""),
        (Rollout(wanted=None, term=1, stage="none", active=R2, installed=(there(1), there(2))), ""),
        # Nobody has said yet what it is to have: the journal was lost, and what is in use stays.
        (Rollout(wanted=None, stage="none", active=R2, installed=(there(2),)), R2),
        # It is in place, and only the journal does not know.
        (Rollout(wanted=spec(1), stage="wanted", active=R1, installed=(there(1),)), R1),
    ],
)
def test_what_is_due(rollout: Rollout, wanted: str) -> None:
    assert due(rollout) == wanted


def test_what_is_in_use_is_known_without_a_journal() -> None:
    assert found(Rollout(), R2) == (there(2),)
    assert found(Rollout(), "") == found(Rollout(), "of-another-kind") == ()
    assert found(Rollout(term=1), R2) == found(Rollout(installed=(there(1),)), R2) == ()


def test_what_was_withdrawn_is_newer_than_what_is_wanted() -> None:
    folders = (there(1), there(2), there(3, False))
    assert withdrawn(Rollout(wanted=spec(1), active=R1, installed=folders)) == (there(2), there(3, False))
    assert withdrawn(Rollout(wanted=spec(2), active=R3, installed=folders)) == (), "in use until the other is in place"
    assert withdrawn(Rollout(active="", installed=folders)) == folders
    assert withdrawn(Rollout(wanted=spec(3), active=R1, installed=folders)) == ()


def test_so_many_releases_are_kept_before_the_one_in_use() -> None:
    folders = tuple(there(number) for number in range(1, 6))
    rollout = Rollout(wanted=spec(5), stage="committed", active=spec(5).id, installed=folders)
    assert [one.number for one in kept(rollout, 2)] == [3, 4, 5]
    assert [one.number for one in kept(rollout, 1)] == [4, 5]
    trial = Rollout(wanted=spec(6), stage="active", active=spec(6).id, installed=(*folders, there(6, False)))
    assert [one.number for one in kept(trial, 1)] == [5, 6], "the one to go back to stays"


@pytest.mark.parametrize(
    ("before", "after", "allowed", "worse"),
    [
        (1.0, 1.0, 0.0, False),
        (1.0, 1.1, 0.1, False),
        (1.0, 1.11, 0.1, True),
        (2.0, 1.0, 0.0, False),
        (0.0, 0.0, 0.1, False),
        (0.0, 0.01, 0.1, True),
        (None, 9.0, 0.1, False),
        (1.0, None, 0.1, False),
    ],
)
def test_what_counts_as_worse(before: float | None, after: float | None, allowed: float, worse: bool) -> None:
    one = None if before is None else Score(loss=before, rows=7)
    other = None if after is None else Score(loss=after, rows=7)
    reason = verdict(one, other, allowed)
    assert bool(reason) == worse
    if worse:
        assert reason.startswith(f"worse here: loss {after:.4g} on 7 rows, before {before:.4g}, the limit is ")
