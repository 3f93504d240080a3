"""What the HTTP API refuses, by its status code."""

from __future__ import annotations

from shared.errors import UserError


class NotFound(UserError):
    """There is no such job or release (404)."""


class Conflict(UserError):
    """The job or release is in a phase where this can't be done (409)."""
