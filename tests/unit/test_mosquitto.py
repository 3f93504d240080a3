"""The broker's configuration: as shipped, as printed, and what a broker of the testbed takes of it."""

from __future__ import annotations

from pathlib import Path

from muster import mosquitto

SHIPPED = Path(__file__).parents[2] / "deploy" / "mosquitto" / "mosquitto.conf"


def test_the_shipped_file_is_what_is_printed() -> None:
    assert SHIPPED.read_text("utf-8") == mosquitto.configuration(mosquitto.Places()), "run make docs"


def test_places_go_where_they_belong() -> None:
    places = mosquitto.Places(1234, "/p", "broker-1", "/a/acl", "/state/")
    found = mosquitto.options(places)
    assert found["listener"] == "1234"
    assert [found[name] for name in ("cafile", "certfile", "keyfile", "crlfile")] == [
        "/p/ca.crt", "/p/broker-1.crt", "/p/broker-1.key", "/p/crl.pem",
    ]  # fmt: skip
    assert found["acl_file"] == "/a/acl"
    assert found["persistence_location"] == "/state/"


def test_options_are_all_of_the_file() -> None:
    found = mosquitto.options(mosquitto.Places())
    assert set(mosquitto.OF_TLS) <= set(found)
    assert found["log_type"].splitlines() == ["error", "log_type warning", "log_type notice"]
    lines = "".join(f"{name} {value}\n" for name, value in found.items()).split()
    written = [line for line in SHIPPED.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert lines == " ".join(written).split()
