"""`muster presence` against a real broker: as a gate it waits, judges, and says why it did not open."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from muster.cli.main import main
from muster.testbed.broker import Broker, free_port
from shared import topics
from shared.codec import pack
from shared.messages import DeviceState, Load
from shared.transport.base import Connected, Outgoing, Published

FLEET = "fleet1"


def say(owner: Any, version: str, epoch: int) -> None:
    name = topics.STATE.name(FLEET, device="edge-01")
    state = DeviceState(s="ready", epoch=epoch, version=version)
    owner.transport.publish(Outgoing(topics.STATE, name, pack(state), "state"))
    owner.wait(Published, len(owner.of(Published)) + 1)


def ask(broker: Broker, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    port = broker.settings().port
    code = main(["presence", "--broker", f"127.0.0.1:{port}", "--fleet", FLEET, "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def test_the_gate_opens_for_the_new_version_alone(
    broker: Broker, own: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    owner = own(broker.settings(), "edge-01")
    owner.wait(Connected)
    say(owner, "0.1.0", 4)
    expected = json.dumps({"edge-01": {"version": "0.2.0", "above": 4, "load": True}})
    code, found = ask(broker, capsys, "--expect", expected, "--within", "1.5")
    assert code == 1
    assert found["edge-01"]["fault"] == (
        "no connection since epoch 4; version 0.1.0, expected 0.2.0; no load was heard"
    )

    stop = threading.Event()

    def restarted() -> None:  # its last word came before the gate looks, its loads go on
        say(owner, "0.2.0", 5)
        while not stop.wait(0.1):
            name = topics.LOAD.name(FLEET, device="edge-01")
            owner.transport.publish(Outgoing(topics.LOAD, name, pack(Load(epoch=5, seq=1))))
            owner.turn()

    daemon = threading.Thread(target=restarted)
    daemon.start()
    try:
        code, found = ask(broker, capsys, "--expect", expected, "--within", "30")
    finally:
        stop.set()
        daemon.join()
    assert (code, found["edge-01"]["fault"]) == (0, "")
    assert found["edge-01"]["presence"] == {"state": "ready", "epoch": 5, "version": "0.2.0", "load": True}
    code, found = ask(broker, capsys)
    assert (code, list(found)) == (0, ["edge-01"])


def test_without_a_broker_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--fleet", FLEET, "--expect", '{"edge-01": {}}', "--within", "1"]
    assert main(["presence", "--broker", f"127.0.0.1:{free_port()}", *options]) == 2
    assert "no connection to the broker" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", '{"edge-01": {"versoin": "1"}}', '{"edge-01": 3}'])
def test_what_is_expected_is_read_strictly(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presence", "--broker", "127.0.0.1:1", "--fleet", FLEET, "--expect", text]) == 2
    assert "--expect" in capsys.readouterr().err
