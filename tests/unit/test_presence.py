"""The gate's judgement of what a fleet says of itself."""

from __future__ import annotations

import pytest

from muster.presence import Board, Expected
from shared import topics
from shared.codec import pack
from shared.messages import CoordState, DeviceState, Lifecycle, Load

FLEET = "fleet1"


def say(board: Board, s: Lifecycle, epoch: int, version: str = "0.2.0", device: str = "edge-01") -> None:
    name = topics.STATE.name(FLEET, device=device)
    board.hear(name, pack(DeviceState(s=s, epoch=epoch, version=version)))


def load(board: Board, epoch: int) -> None:
    board.hear(topics.LOAD.name(FLEET, device="edge-01"), pack(Load(epoch=epoch, seq=1)))


@pytest.mark.parametrize(
    ("state", "epoch", "version", "fault"),
    [
        ("ready", 8, "0.2.0", ""),
        ("training", 8, "0.2.0", ""),
        ("ready", 7, "0.2.0", "no connection since epoch 7"),
        ("ready", 8, "0.1.0", "version 0.1.0, expected 0.2.0"),
        ("init", 8, "0.2.0", "state init, expected ready or training or online"),
        ("lost", 7, "0.1.0", "no connection since epoch 7; version 0.1.0, expected 0.2.0; state lost, expected ready"),
    ],
)
def test_a_device_is_as_expected_or_the_fault_is_named(state: Lifecycle, epoch: int, version: str, fault: str) -> None:
    board = Board(FLEET)
    say(board, state, epoch, version)
    found = board.verdict("edge-01", Expected(version="0.2.0", above=7)).fault
    assert found.startswith(fault) if fault else found == ""


def test_nothing_was_heard() -> None:
    board = Board(FLEET)
    say(board, "ready", 8, device="edge-02")
    assert board.verdict("edge-01", Expected()).fault == "nothing was heard of it"


def test_the_will_of_an_older_connection_says_nothing() -> None:
    board = Board(FLEET)
    say(board, "ready", 8)
    say(board, "lost", 7)
    assert board.verdict("edge-01", Expected(above=7)).fault == ""
    say(board, "lost", 8)
    assert "state lost" in board.verdict("edge-01", Expected(above=7)).fault


def test_a_load_counts_in_its_epoch_alone() -> None:
    board = Board(FLEET)
    say(board, "ready", 8)
    load(board, 7)
    assert board.verdict("edge-01", Expected(load=True)).fault == "no load was heard"
    load(board, 8)
    say(board, "training", 8)
    assert board.verdict("edge-01", Expected(load=True)).fault == ""
    say(board, "ready", 9)
    assert board.verdict("edge-01", Expected(load=True)).fault == "no load was heard"


def test_a_coordinator_is_online_or_not_and_has_a_term() -> None:
    board = Board(FLEET)
    name = topics.COORD_STATE.name(FLEET, coordinator="coord-1")
    board.hear(name, pack(CoordState(online=True, term=3)))
    assert board.verdict("coord-1", Expected(above=2)).fault == ""
    assert board.verdict("coord-1", Expected(above=3)).fault == "no connection since epoch 3"
    board.hear(name, pack(CoordState(online=False, term=3)))
    assert "state offline" in board.verdict("coord-1", Expected(above=2)).fault


def test_what_is_none_of_this_fleets_presence_changes_nothing() -> None:
    board = Board(FLEET)
    say(board, "ready", 8)
    before = dict(board.known)
    for name, payload in (
        (topics.STATE.name("fleet2", device="edge-01"), pack(DeviceState(s="lost", epoch=9))),
        (topics.STATE.name(FLEET, device="edge-01"), b"\xc1"),
        (topics.STATE.name(FLEET, device="edge-01"), pack(DeviceState(s="ready", epoch=9, schema=2))),
        (topics.LOAD.name(FLEET, device="edge-02"), pack(Load(epoch=1, seq=1))),
        ("muster/v2/fleet1/device/edge-01/state", b""),
    ):
        board.hear(name, payload)
    assert board.known == before


def test_an_empty_state_takes_the_device_out() -> None:
    board = Board(FLEET)
    say(board, "ready", 8)
    board.hear(topics.STATE.name(FLEET, device="edge-01"), b"")
    assert board.verdict("edge-01", Expected()).presence is None
