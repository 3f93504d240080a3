"""Errors of Muster, by whose fault they are.

`UserError` is the operator's or a file's fault: one line that says what to do, exit code 2 (78 of a service, which
systemd then does not start again).
`RemoteError` is the other side's fault: a message or blob that must be refused, with the reason that is sent back.
Anything else is ours.
"""


class MusterError(Exception):
    """Root of all errors raised on purpose."""


class UserError(MusterError):
    """Bad configuration or input. The text is one line, shown as is; commands exit with 2, services with 78."""


class Occupied(UserError):
    """Another process has what this one needs (folder, port); later it may be free. Services exit with 75."""


class SettingsError(UserError):
    """Faults of a settings or job file, all at once."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.source = source
        self.faults = faults
        super().__init__(f"{source}: " + "; ".join(faults))


class RemoteError(MusterError):
    """The other side sent something that must be refused; the text is the reason."""


class DecodeError(RemoteError):
    """Bytes that are not a valid message or adapter of this schema."""
