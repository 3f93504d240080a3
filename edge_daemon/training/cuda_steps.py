"""CUDA step by step, from the driver's library to a 4-bit product; a line of JSON for each step, up to one that fails.

`muster-edge doctor --cuda` runs it as a process of its own: a kernel that hangs or crashes costs nothing else. Not run
on hardware yet: the steps after the driver's are tested with `--device cpu`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable, Iterator

from shared.jobs import Bits

_MIB = 1024 * 1024


class StepFailed(Exception):
    """The step went wrong; `code` is CUDA's, where it gave one."""

    def __init__(self, text: str, code: int | None = None) -> None:
        super().__init__(text)
        self.code = "" if code is None else str(code)


def driver(library: str = "libcuda.so.1") -> str:
    """Initialize the driver itself, without torch."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        raise StepFailed(f"{library} can't be loaded: {error}") from error
    code = cuda.cuInit(0)
    if code:
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(name))
        raise StepFailed(f"cuInit: error {code} ({(name.value or b'?').decode()})", code)
    count, version = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return f"{count.value} device(s), driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def sees(device: str) -> str:
    """What torch says of the device."""
    import torch

    built = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    if device == "cpu":
        return built
    if not torch.cuda.is_available():
        raise StepFailed(f"{built} sees no GPU")
    major, minor = torch.cuda.get_device_capability(0)
    return f"{built}, {torch.cuda.get_device_name(0)}, compute {major}.{minor}"


def memory(device: str) -> str:
    """Allocate, write, read."""
    import torch

    count = 64 * _MIB // 4
    found = float(torch.ones(count, device=device).sum(dtype=torch.float64))
    if found != count:
        raise StepFailed(f"the sum of {count} ones is {found}")
    return "64 MiB written and read"


def product(bits: Bits, device: str) -> str:
    """Quantize, dequantize, multiply, and the gradient, against the exact product."""
    from shared.modeling import quantization

    error = quantization.product_error(bits, device)
    bound = quantization.ERROR_BOUNDS[bits]
    if not error <= bound:
        raise StepFailed(f"relative error {error:.2g} of a product, the bound is {bound:.2g}")
    return f"relative error {error:.2g} of a product (bound {bound:.2g})"


def steps(device: str) -> Iterator[dict[str, object]]:
    """Each step with how it went; the last one is `end` where all went well."""
    all_steps: dict[str, Callable[[], str]] = {
        "driver": driver,
        "torch": lambda: sees(device),
        "memory": lambda: memory(device),
        "32 bits": lambda: product(32, device),
        "16 bits": lambda: product(16, device),
        "8 bits": lambda: product(8, device),
        "4 bits": lambda: product(4, device),
        "end": lambda: "all steps done",
    }
    if device == "cpu":
        del all_steps["driver"]
    for name, run in all_steps.items():
        try:
            yield {"step": name, "good": True, "text": run()}
        except StepFailed as error:
            yield {"step": name, "good": False, "text": str(error), "code": error.code}
            return
        except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
            yield {"step": name, "good": False, "text": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            return


def main(argv: list[str] | None = None) -> int:
    """Print the steps; exit code 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="torch's name of the device (%(default)s)")
    good = True
    for step in steps(parser.parse_args(argv).device):
        good = bool(step["good"])
        sys.stdout.write(json.dumps(step) + "\n")
        sys.stdout.flush()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
