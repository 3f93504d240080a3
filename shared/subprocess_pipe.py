"""A subprocess that a service talks to in frames: a pipe each way, and a thread that only reports what it reads."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from shared.errors import DecodeError
from shared.frames import FrameReader, FrameWriter
from shared.notify import unwatched
from shared.processes import die_with_parent

log = logging.getLogger(__name__)
T = TypeVar("T")


def start_piped(
    command: Sequence[str],
    wanted: Any,
    on_message: Callable[[T], None],
    on_end: Callable[[str], None],
    *,
    name: str,
    env: Mapping[str, str] | None = None,
    own_group: bool = False,
    quiet: bool = False,
) -> tuple[subprocess.Popen[bytes], FrameWriter]:
    """Start `command` with `--read-fd` and `--write-fd` added; it dies with the thread that called this.

    A thread calls `on_message` with each message of type `wanted` (a type or a union of types), then `on_end` once,
    with what was wrong with the pipe ("": it just ended). `name` is the subprocess's in logs; what it prints goes to
    our standard error (`quiet`: nowhere). `own_group`: it leads a process group. Raises `OSError` if it can't start.
    """
    to_child, from_child = os.pipe(), os.pipe()
    arguments = [*command, "--read-fd", str(to_child[0]), "--write-fd", str(from_child[1])]
    try:
        process = subprocess.Popen(
            arguments, pass_fds=(to_child[0], from_child[1]), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if quiet else 2, stderr=subprocess.DEVNULL if quiet else None,
            start_new_session=own_group, preexec_fn=die_with_parent,
            env=unwatched(os.environ if env is None else env),
        )  # fmt: skip
    except OSError:
        os.close(to_child[1])
        os.close(from_child[0])
        raise
    finally:
        os.close(to_child[0])
        os.close(from_child[1])
    reader: FrameReader[T] = FrameReader(os.fdopen(from_child[0], "rb"), wanted)
    what = (reader, on_message, on_end, name)
    threading.Thread(target=read_all, args=what, name=f"{name}-reader", daemon=True).start()
    return process, FrameWriter(os.fdopen(to_child[1], "wb"))


def read_all(reader: FrameReader[T], on_message: Callable[[T], None], on_end: Callable[[str], None], name: str) -> None:
    """Hand each message on until the pipe ends, then say so once; as in `start_piped`, for either side."""
    problem = ""
    try:
        while (message := reader.read()) is not None:
            on_message(message)
    except (DecodeError, OSError) as error:
        problem = str(error)
        log.error("the %s's pipe is broken: %s", name, problem)
    on_end(problem)
