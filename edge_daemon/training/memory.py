"""How much memory the agent holds: resident (CPU) or allocated by torch (CUDA); and whether it ran out."""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own, or torch's for CPU or CUDA, known by their text."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return _status("VmRSS") or _highest_ever()


class MemoryGauge:
    """The highest memory held since this gauge was made."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device != "cpu":
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        try:
            # Sets the high-water mark (VmHWM) back to what is resident now.
            _CLEAR_REFS.write_text("5", encoding="ascii")
        except OSError:
            return

    def peak(self) -> int:
        """Bytes at the highest; where the mark can't be set back, since the process started."""
        if self._device != "cpu":
            import torch

            return int(torch.cuda.max_memory_allocated())
        return _status("VmHWM") or _highest_ever()

    @staticmethod
    def held(device: str) -> int:
        """Bytes held now."""
        if device != "cpu":
            import torch

            return int(torch.cuda.memory_allocated())
        return resident_bytes()


def _status(name: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _highest_ever() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
