"""Errors of this package, by what is at fault, each one line to act on; and whether memory ran out."""

from __future__ import annotations

from shared.errors import UserError

_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


class DataFault(UserError):
    """The data set: missing, empty, or a row that does not fit the task."""


class ModelFault(UserError):
    """The base model: missing, of an unknown kind, or not the one that was asked for."""


class AdapterFault(UserError):
    """The adapter does not fit the base model."""


class BitsFault(UserError):
    """A precision that this device or model does not offer."""


class OutOfMemory(UserError):
    """Memory ran out where a smaller batch is no help."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's text, cut to `limit` characters; its type where it has no text."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:limit]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own, or torch's for CPU or CUDA, known by their text."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)
