"""Errors of this package, by what is at fault; each is one line that an operator can act on."""

from __future__ import annotations

from shared.errors import UserError


class DataFault(UserError):
    """The data set: missing, empty, or a row that does not fit the task."""


class ModelFault(UserError):
    """The base model: missing, of an unknown kind, or not the one that was asked for."""


class AdapterFault(UserError):
    """The adapter does not fit the base model."""


class BitsFault(UserError):
    """A precision that this device or model does not offer."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's text, cut to `limit` characters; its type where it has no text."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:limit]
