"""Small files of the kernel: a text, a number, or nothing."""

from __future__ import annotations

from pathlib import Path


def line(path: Path) -> str:
    """The text without blanks and NULs around it; "" where it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \t\r\n")
    except OSError:
        return ""


def number(path: Path) -> int | None:
    """The whole number, or None where there is none to read."""
    try:
        return int(line(path))
    except ValueError:
        return None


def field(path: Path, key: str) -> str:
    """The value after `key:` in a status file, or ""."""
    for row in line(path).splitlines():
        name, _, value = row.partition(":")
        if name == key:
            return value.strip()
    return ""


def degrees(path: Path) -> float | None:
    """Thousandths of a degree Celsius as degrees; None for an absent or impossible reading.

    A Jetson's zone of a GPU that sleeps is such: it can't be read, or says -256.
    """
    value = number(path)
    return value / 1000 if value is not None and -50_000 < value < 150_000 else None


def zones(root: Path) -> dict[str, float]:
    """Name of a thermal zone in lower case, without "-thermal" or "-therm" -> degrees Celsius; the first of a name."""
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value = degrees(zone / "temp")
        if value is not None:
            found.setdefault(_short(line(zone / "type")), value)
    return found


def _short(name: str) -> str:
    name = name.lower().replace("_", "-")
    return name.removesuffix("-thermal").removesuffix("-therm")
