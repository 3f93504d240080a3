"""How much memory the agent holds.

Resident memory on the CPU, what torch allocated on a GPU with memory of its own, and both together where the GPU shares
the machine's: what CUDA allocates there is in no process's resident memory.
"""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return _status("VmRSS") or _highest_ever()


def shares_memory(device: str) -> bool:
    """Whether this device's GPU has no memory of its own."""
    if device == "cpu":
        return False
    import torch

    # Releases of torch that don't have the property have no builds for such GPUs.
    return bool(getattr(torch.cuda.get_device_properties(0), "is_integrated", False))


def let_go(device: str) -> int:
    """After a work: give back what the GPU's allocator keeps of the machine's memory, and tell what it still holds.

    0 where the GPU has memory of its own, or there is none.
    """
    if not shares_memory(device):
        return 0
    import torch

    torch.cuda.empty_cache()
    return int(torch.cuda.memory_reserved())


class MemoryGauge:
    """The highest memory held since this gauge was made."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device != "cpu":
            import torch

            torch.cuda.reset_peak_memory_stats()
            if not shares_memory(device):
                return
        try:
            # Sets the high-water mark (VmHWM) back to what is resident now.
            _CLEAR_REFS.write_text("5", encoding="ascii")
        except OSError:
            return

    def peak(self) -> int:
        """Bytes at the highest; where the mark can't be set back, since the process started."""
        resident = _status("VmHWM") or _highest_ever()
        if self._device == "cpu":
            return resident
        import torch

        # The two peaks need not be at the same moment: rather too much than too little.
        return int(torch.cuda.max_memory_allocated()) + (resident if shares_memory(self._device) else 0)

    @staticmethod
    def held(device: str) -> int:
        """Bytes held now."""
        if device == "cpu":
            return resident_bytes()
        import torch

        return int(torch.cuda.memory_allocated()) + (resident_bytes() if shares_memory(device) else 0)


def _status(name: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _highest_ever() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
