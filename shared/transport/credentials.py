"""What a connection to the broker proves itself with."""

from __future__ import annotations

import ssl
from pathlib import Path

from shared.errors import UserError
from shared.settings import BrokerSettings


def read_credentials(settings: BrokerSettings) -> tuple[ssl.SSLContext | None, str | None]:
    """(TLS context, password) from the files of `settings`; None for what is not set. TLS 1.3 is the least.

    Raises `UserError` naming the files where one can't be read. Call it for every connection: files may be rotated.
    """
    context = None
    try:
        if settings.cafile:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_verify_locations(settings.cafile)
            if settings.crlfile:
                context.load_verify_locations(settings.crlfile)
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
            if settings.certfile:
                context.load_cert_chain(settings.certfile, settings.keyfile or None)
        password = Path(settings.password_file).read_text("utf-8").rstrip("\n") if settings.password_file else None
    except (OSError, ValueError) as error:
        files = (settings.cafile, settings.crlfile, settings.certfile, settings.keyfile, settings.password_file)
        raise UserError(f"broker credentials ({' '.join(filter(None, files))}): {error}") from error
    return context, password
