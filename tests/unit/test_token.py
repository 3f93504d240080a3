"""The token of the coordinator's API that it makes for itself."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coordinator.service import _token
from coordinator.settings import CoordinatorSettings
from shared.errors import UserError


def settings(state: Path, **api: str) -> CoordinatorSettings:
    given = {"fleet": "fleet", "name": "coord-1", "state_dir": str(state), "broker": {"host": "localhost"}, "api": api}
    return msgspec.convert(given, CoordinatorSettings)


def test_it_is_made_once_and_for_nobody_else(tmp_path: Path) -> None:
    token = _token(settings(tmp_path))
    assert len(token) >= 32 and _token(settings(tmp_path)) == token
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600


def test_a_first_start_that_was_cut_off_does_not_keep_it_down(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    assert len(_token(settings(tmp_path))) >= 32


def test_an_owners_own_file_is_never_written(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.touch()
    with pytest.raises(UserError, match="at least 16 characters"):
        _token(settings(tmp_path, token_file=str(own)))
    assert own.read_bytes() == b""
