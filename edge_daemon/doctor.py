"""`muster-edge doctor`: is this device fit, and if not, what is to be done? Needs no running daemon, changes nothing.

Each check is an adapter that reads and a pure judgement (`core.diagnosis`). It ends with 0 where nothing fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from edge_daemon.adapters import sources
from edge_daemon.adapters.inspection import broker, kernel, keys, machine, sandboxed
from edge_daemon.core import diagnosis, policy
from edge_daemon.core.diagnosis import Finding
from edge_daemon.settings import AgentSettings, EdgeSettings, TelemetrySettings
from shared import service, settings
from shared.errors import SettingsError, UserError
from shared.messages import Gpu
from shared.version import VERSION

CONFIG = "/etc/muster/edge.toml"
_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "-   "}
Say = Callable[[str], None]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints."""

    device: str
    version: str
    fit: bool
    findings: list[Finding]


def examine(source: Path, *, cuda: bool, wait_s: float, say: Say) -> Iterator[Finding]:
    """Every check in turn. `say` is told what begins; `wait_s` bounds each answer of broker and drivers."""
    yield diagnosis.sandbox(machine.sandbox())
    say("configuration")
    config, findings = _configuration(source)
    yield from findings
    if config is not None:
        yield from _connection(config, wait_s, say)
        free, fault = machine.disk(Path(config.state_dir))
        yield diagnosis.disk(config.state_dir, free, config.policy.disk_reserve_bytes, fault)
        yield from _sources(config)
    agent = config.agent if config is not None else AgentSettings()
    say("GPUs")
    found = machine.gpus(config.telemetry if config is not None else TelemetrySettings(), wait_s)
    yield diagnosis.gpus(found, agent.gpus, machine.has_driver())
    for gpu in _kernels(agent, found):
        say(f"kernels on {gpu}: an agent starts, which takes a while")
        yield diagnosis.kernel(kernel.probe(agent, gpu))
    if cuda:
        for gpu in _cuda(agent, found):
            say(f"CUDA on {gpu or 'the first GPU'}")
            yield from kernel.cuda_steps(gpu, agent.silence_s)


def _configuration(source: Path) -> tuple[EdgeSettings | None, list[Finding]]:
    try:
        config = settings.load(source, EdgeSettings)
        faults = policy.faults(config)
    except SettingsError as error:
        config, faults = None, error.faults
    except UserError as error:
        config, faults = None, [str(error)]
    if not faults:
        return config, [diagnosis.ok("configuration", f"{source} holds")]
    return config, [diagnosis.fail("configuration", fault, _configuration_advice(fault, source)) for fault in faults]


def _configuration_advice(fault: str, source: Path) -> str:
    if "CREDENTIALS_DIRECTORY" in fault:
        return "run it as the service does: `muster-edge doctor --sandbox`, as root"
    return f"correct {source}; docs/jobs.md lists every key"


def _connection(config: EdgeSettings, wait_s: float, say: Say) -> Iterator[Finding]:
    held = keys.read(config.broker)
    yield from diagnosis.keys(held, config.device, time.time())
    say(f"broker {config.broker.host}:{config.broker.port}")
    met = broker.visit(config, wait_s)
    yield from met.findings
    yield diagnosis.clock(
        diagnosis.Clock(
            now=time.time(), synchronized=machine.synchronized(wait_s), windows=(*held.windows, *met.windows),
            coordinator_ts=met.coordinator_ts,
        )
    )  # fmt: skip


def _sources(config: EdgeSettings) -> list[Finding]:
    if not config.data:
        return [
            diagnosis.warn("data and models", "[data] names no data set", "without one there is nothing to train on")
        ]
    advice = (
        "correct the path, or let the service's user read it; what lies under /home the unit sees by BindReadOnlyPaths="
    )
    wrong = [diagnosis.fail("data and models", fault, advice) for fault in sources.faults(config, whole=True)]
    text = f"{len(config.data)} data set(s) and {len(config.models)} model(s) can be read"
    return wrong or [diagnosis.ok("data and models", text)]


def _kernels(agent: AgentSettings, found: list[Gpu] | None) -> list[str]:
    """The GPUs that an agent each would serve, by the settings or all of them; else the CPU."""
    there = {gpu.uuid for gpu in found or []}
    wanted = [gpu for gpu in dict.fromkeys(agent.gpus) if gpu == "cpu" or gpu in there]
    return wanted or sorted(there) or (["cpu"] if found is not None else [])


def _cuda(agent: AgentSettings, found: list[Gpu] | None) -> list[str]:
    return [gpu for gpu in _kernels(agent, found) if gpu != "cpu"] or [""]


def text_line(finding: Finding) -> str:
    """A finding for people."""
    line = f"{_MARKS[finding.verdict]}  {finding.check}: {finding.text}"
    return f"{line}\n        -> {finding.advice}" if finding.advice else line


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"examining {what} ...\n")


def _report(arguments: argparse.Namespace) -> int:
    source = Path(arguments.config)
    findings = []
    for finding in examine(source, cuda=arguments.cuda, wait_s=arguments.wait, say=_progress):
        findings.append(finding)
        if not arguments.json:
            _print(text_line(finding))
    fit = not diagnosis.failed(findings)
    if arguments.json:
        report = Report(device=_device(source), version=VERSION, fit=fit, findings=findings)
        _print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        failures = sum(finding.verdict == "fail" for finding in findings)
        _print("this device is fit" if fit else f"this device is not fit: {failures} of {len(findings)} checks fail")
    return 0 if fit else 1


def _device(source: Path) -> str:
    try:
        return settings.load(source, EdgeSettings).device
    except UserError:
        return ""


def main(argv: Sequence[str]) -> int:
    """Examine this device. Exit code 0: fit; 1: something fails; 78: it can't be examined like this."""
    parser = argparse.ArgumentParser(
        prog="muster-edge doctor", description="Examines this device: settings, keys, broker, clock, disk, data, GPU, "
        "and a real 4-bit kernel. Changes nothing; ends with 0 where nothing fails.",
    )  # fmt: skip
    parser.add_argument("--config", default=CONFIG, help="settings file (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.add_argument("--cuda", action="store_true", help="go through CUDA step by step, from the driver to 4 bits")
    parser.add_argument("--sandbox", action="store_true", help="as root: examine in the sandbox of the installed unit")
    parser.add_argument("--wait", type=float, default=15.0, help="seconds to wait for broker and drivers (%(default)s)")
    arguments = parser.parse_args(list(argv))
    if not arguments.sandbox:
        return service.guarded("muster-edge doctor", lambda: _report(arguments))
    inner = [word for flag, word in ((arguments.json, "--json"), (arguments.cuda, "--cuda")) if flag]
    return service.guarded("muster-edge doctor", lambda: sandboxed.run([*inner, f"--wait={arguments.wait}"]))
