"""Answers of the HTTP API."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Response


def answer(value: Any, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")
