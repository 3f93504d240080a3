"""What the doctor says to what it read, by table: the verdict, and advice for everything that is not well."""

from __future__ import annotations

from typing import Any

import pytest

from edge_daemon.core import diagnosis
from edge_daemon.core.diagnosis import Clock, Finding, Kernel, Keys, Window
from shared.messages import Gpu

DAY = 86400.0
NOW = 1_000 * DAY
FILES = {"cafile": "/ca", "certfile": "/crt", "keyfile": "/key"}
GOOD = (Window("this device's certificate", NOW - DAY, NOW + 100 * DAY),)


def held(**changes: Any) -> Keys:
    return Keys(**{"files": FILES, "name": "edge-01", "windows": GOOD, **changes})


@pytest.mark.parametrize(
    ("keys", "verdicts", "said"),
    [
        (held(), ["ok"], "good for 100 days"),
        (Keys(), ["warn"], "no TLS"),
        (held(files={"cafile": "/ca"}, name=""), ["warn"], "no certificate of this device"),
        (held(faults={"keyfile": "/key: No such file"}), ["fail"], "broker.keyfile: /key: No such file"),
        (held(exposed="0644"), ["fail"], "mode 0644"),
        (held(name="edge-07"), ["fail"], "edge-07's"),
        (held(matches=False), ["fail"], "not that of the certificate"),
        (held(issued=False), ["fail"], "not issued by the authority"),
        (held(windows=(Window("w", NOW + DAY, NOW + 9 * DAY),)), ["fail"], "not valid yet, for another 1.0 days"),
        (held(windows=(Window("w", NOW - 9 * DAY, NOW - DAY),)), ["fail"], "w expired 1.0 days ago"),
        (held(windows=(Window("w", NOW - 9 * DAY, NOW + 13 * DAY),)), ["warn"], "w expires in 13.0 days"),
        (held(exposed="0640", name="x"), ["fail", "fail"], "mode 0640"),
    ],
)
def test_keys(keys: Keys, verdicts: list[str], said: str) -> None:
    findings = diagnosis.keys(keys, "edge-01", NOW)
    assert [finding.verdict for finding in findings] == verdicts
    assert said in findings[0].text
    assert_advice(findings)


@pytest.mark.parametrize(
    ("clock", "verdict", "said"),
    [
        (Clock(now=NOW, synchronized=True), "ok", "synchronized"),
        (Clock(now=NOW, synchronized=False), "warn", "not synchronized"),
        (Clock(now=NOW), "ok", "can't be asked"),
        (Clock(now=NOW, windows=(Window("w", NOW + 1, NOW + 2),)), "fail", "w is not valid by this clock"),
        (Clock(now=NOW, synchronized=True, coordinator_ts=NOW - 29), "ok", "agrees with the coordinator's"),
        (Clock(now=NOW, synchronized=True, coordinator_ts=NOW - 40), "warn", "+10 s from the coordinator's"),
        (Clock(now=NOW, synchronized=True, coordinator_ts=NOW + 7), "warn", "-7 s from the coordinator's"),
        (Clock(now=NOW, synchronized=True, coordinator_ts=NOW + 400), "fail", "-400 s from the coordinator's"),
        (Clock(now=NOW, synchronized=False, coordinator_ts=NOW + 400), "fail", "-400 s"),
    ],
)
def test_clock(clock: Clock, verdict: str, said: str) -> None:
    finding = diagnosis.clock(clock)
    assert finding.verdict == verdict
    assert said in finding.text
    assert_advice([finding])


@pytest.mark.parametrize(
    ("free", "reserve", "fault", "verdict"),
    [
        (10**10, 10**9, "", "ok"),
        (15 * 10**8, 10**9, "", "warn"),
        (9 * 10**8, 10**9, "", "fail"),
        (None, 10**9, "", "skip"),
        (None, 10**9, "can't be written: Permission denied", "fail"),
    ],
)
def test_disk(free: int | None, reserve: int, fault: str, verdict: str) -> None:
    finding = diagnosis.disk("/var/lib/muster", free, reserve, fault)
    assert finding.verdict == verdict
    assert_advice([finding])


CARD = Gpu(uuid="GPU-1", name="A2", memory_bytes=2**30, compute="8.6")


@pytest.mark.parametrize(
    ("found", "wanted", "driver", "verdict", "said"),
    [
        ([CARD], [], True, "ok", "A2 1024 MiB, compute 8.6"),
        ([], [], False, "ok", "agents train on the CPU"),
        ([], ["cpu"], True, "ok", "agents train on the CPU"),
        ([], [], True, "fail", "no GPU can be seen"),
        ([CARD], ["GPU-1", "GPU-2"], True, "fail", "not found: GPU-2"),
        (None, [], True, "fail", "does not answer"),
    ],
)
def test_gpus(found: list[Gpu] | None, wanted: list[str], driver: bool, verdict: str, said: str) -> None:
    finding = diagnosis.gpus(found, wanted, driver)
    assert finding.verdict == verdict
    assert said in finding.text
    assert_advice([finding])


@pytest.mark.parametrize(
    ("kernel", "verdict", "advice"),
    [
        (Kernel("cpu", [32, 16, 8, 4]), "ok", ""),
        (Kernel("GPU-1", [32, 16, 4], {"8": "relative error 1"}), "warn", "proven bits only"),
        (Kernel("GPU-1", [32, 16], {"4": "RuntimeError: named symbol not found"}), "fail", "-DCOMPUTE_CAPABILITY=87"),
        (Kernel("GPU-1", [], {"gpu": "GPU-1: torch does not see this GPU"}), "fail", "doctor --cuda"),
        (Kernel("cpu", [32, 16], {"4": "ModuleNotFoundError: No module named 'bitsandbytes'"}), "warn", "[train]"),
        (Kernel("cpu", [32, 16]), "warn", "proven bits only"),
        (Kernel("GPU-1", [32, 16]), "fail", "proven bits only"),
        (Kernel("cpu", [], {"32": "x"}), "fail", "proven bits only"),
        (Kernel("cpu", problem="it ended with exit status 1"), "fail", "muster[train]"),
    ],
)
def test_kernels(kernel: Kernel, verdict: str, advice: str) -> None:
    finding = diagnosis.kernel(kernel)
    assert finding.verdict == verdict
    assert advice in finding.advice
    assert_advice([finding])


@pytest.mark.parametrize(
    ("step", "code", "advice"),
    [
        ("driver", "", "install the NVIDIA driver"),
        ("driver", "100", "/dev/nvidia*"),
        ("driver", "304", "ProcSubset=all"),
        ("driver", "999", "nvidia-modprobe -u -c=0"),
        ("driver", "12345", "install the NVIDIA driver"),
        ("torch", "", "torch"),
        ("memory", "", "nvidia-smi"),
        ("4 bits", "", "proven bits only"),
        ("end", "", "dmesg"),
    ],
)
def test_each_step_of_cuda_has_advice(step: str, code: str, advice: str) -> None:
    assert diagnosis.cuda(step, True, "good") == Finding(check=f"cuda {step}", verdict="ok", text="good")
    assert advice in diagnosis.cuda(step, False, "bad", code).advice


@pytest.mark.parametrize(
    ("status", "degraded", "word", "verdict"),
    [
        ({"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0000000000000000"}, False, "full", "ok"),
        ({"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0000000000000000"}, True, "degraded", "warn"),
        ({"Seccomp": "0", "NoNewPrivs": "1", "CapEff": "0000000000000000"}, False, "", "skip"),
        ({"Seccomp": "2", "NoNewPrivs": "0", "CapEff": "0000000000000000"}, True, "", "skip"),
        ({"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "000001ffffffffff"}, False, "", "skip"),
        ({}, False, "", "skip"),
    ],
)
def test_sandbox(status: dict[str, str], degraded: bool, word: str, verdict: str) -> None:
    assert diagnosis.confined(status, degraded) == word
    finding = diagnosis.sandbox(diagnosis.confined(status, degraded))
    assert finding.verdict == verdict
    assert_advice([finding])


def test_a_device_is_fit_unless_something_fails() -> None:
    good = [diagnosis.ok("a", ""), diagnosis.warn("b", "", "x"), diagnosis.skip("c", "")]
    assert not diagnosis.failed(good)
    assert diagnosis.failed([*good, diagnosis.fail("d", "", "y")])


def assert_advice(findings: list[Finding]) -> None:
    """Whoever is told that something is wrong is told what to do."""
    for finding in findings:
        assert bool(finding.advice) is (finding.verdict in ("warn", "fail")), finding
        assert "\n" not in finding.text + finding.advice
