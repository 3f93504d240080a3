"""A session with NVIDIA's driver (NVML, by `nvidia-ml-py`): begun when it is needed, begun anew when it is lost."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

_SESSION_LOST = ("NVMLError_DriverNotLoaded", "NVMLError_Uninitialized", "NVMLError_LibRmVersionMismatch")
_GPU_LOST = ("NVMLError_GpuIsLost", "NVMLError_ResetRequired", "NVMLError_GpuNotFound")


class Lost(Exception):
    """The session is gone."""


class GpuLost(Lost):
    """One GPU is gone: a new session may find it again, and the others with it."""


class Session:
    """One session at a time. Not safe from several threads; any call may hang with the driver.

    `nvml`: the module `pynvml` (another one in tests). `retry_s`: how long a driver that is not there, or a GPU that a
    new session did not bring back, is left alone: beginning a session costs tens of milliseconds.
    """

    def __init__(self, nvml: Any = None, *, retry_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.number = 0
        """Rises with every session; handles and event sets belong to one."""
        self._nvml = nvml
        self._retry_s = retry_s
        self._clock = clock
        self._ready = False
        self._absent_until = self._renewed_until = float("-inf")
        self._said = self._said_lost = ""

    def run(self, work: Callable[[], T], otherwise: T) -> T:
        """What `work` answers; a session that is lost in it is begun anew once. `otherwise`: there is none."""
        for _ in range(2):
            if not self._begin():
                return otherwise
            try:
                return work()
            except Lost as error:
                level = logging.DEBUG if str(error) == self._said_lost else logging.WARNING
                log.log(level, "the NVIDIA driver's session is lost (%s); a new one begins", error)
                self._said_lost = str(error)
                self._renewed_until = self._clock() + self._retry_s
                self.close()
        return otherwise

    @property
    def renewable(self) -> bool:
        """Whether a lost GPU is worth a new session: the last one began long enough ago."""
        return self._clock() >= self._renewed_until

    def call(self, name: str, *arguments: Any, nothing: Any = None) -> Any:
        """The answer of NVML's function `name`, or None where this driver or GPU does not support it. Raises `Lost`.

        `nothing`: the answer where there is none of what was asked for.
        """
        function = getattr(self._nvml, name, None)
        if function is None:
            return None
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            kind = type(error).__name__
            if kind in _GPU_LOST:
                raise GpuLost(str(error)) from error
            if kind in _SESSION_LOST:
                raise Lost(str(error)) from error
            return nothing if kind == "NVMLError_NotFound" else None

    def constant(self, *names: str) -> Any:
        """The first of these names that the bindings have, or None: newer ones rename."""
        return next((value for name in names if (value := getattr(self._nvml, name, None)) is not None), None)

    def close(self) -> None:
        """End the session."""
        if self._ready:
            self._ready = False
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError as error:
                log.debug("NVML did not shut down: %s", error)

    def _begin(self) -> bool:
        if self._ready:
            return True
        if self._clock() < self._absent_until:
            return False
        problem = self._begun()
        if problem and problem != self._said:
            # A machine without a driver is ordinary; say so once.
            log.info("no NVIDIA GPUs: %s", problem)
        self._said = problem
        self._ready = not problem
        self._absent_until = self._clock() + self._retry_s if problem else float("-inf")
        return self._ready

    def _begun(self) -> str:
        """Begin; why not, or ""."""
        if self._nvml is None:
            try:
                self._nvml = importlib.import_module("pynvml")
            except ImportError as error:
                return str(error)
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            return str(error)
        self.number += 1
        return ""


def text(value: Any) -> str:
    """Older bindings answer bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)
