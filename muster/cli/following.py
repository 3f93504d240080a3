"""Following what goes on at the coordinator, over its absences."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from muster.cli.options import Place
from muster.client import Client, Unreachable

T = TypeVar("T")
LOOK_EVERY_S = 1.0


def follow(
    place: Place, look: Callable[[Client], T], line: Callable[[T], str], ended: Callable[[T], bool], goes_on: str,
    patience_s: float,
) -> T:  # fmt: skip
    """Say each change of what `look` finds, as `line` words it, on standard error until it has `ended`.

    A coordinator that does not answer is waited for; raises `Unreachable`, with `goes_on`, after `patience_s`.
    """
    said, gone_at = "", None
    while True:
        try:
            # Found anew each time: one that was restarted may have another port.
            with place.client() as client:
                found = look(client)
        except Unreachable as error:
            gone_at = gone_at or time.monotonic()
            if time.monotonic() - gone_at > patience_s:
                raise Unreachable(f"{error}; {goes_on}") from error
            words = f"the coordinator does not answer: waiting for it, {patience_s:.0f} s at most"
        else:
            gone_at, words = None, line(found)
        if words != said:
            print(words, file=sys.stderr)
            said = words
        if gone_at is None and ended(found):
            return found
        time.sleep(LOOK_EVERY_S)
