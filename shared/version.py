"""The version of Muster, as installed."""

from __future__ import annotations

VERSION = "0.1.0"
