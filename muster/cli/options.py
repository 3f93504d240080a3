"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

if TYPE_CHECKING:
    from muster.client import Client

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@dataclass(frozen=True)
class Place:
    """Where the coordinator is, as the options say."""

    url: str
    token_file: str
    config: str

    def client(self) -> Client:
        """Connect. Imported here: the help must not wait for the HTTP library."""
        from muster.client import Client

        return Client.find(url=self.url, token_file=self.token_file, config=self.config)


def where(context: typer.Context) -> Place:
    """The place given to the main command."""
    place = context.obj
    assert isinstance(place, Place)
    return place


def as_json(value: object) -> str:
    """A value of the API for people and programs."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
