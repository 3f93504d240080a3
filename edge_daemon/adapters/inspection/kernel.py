"""Real kernels, in child processes: the agent's own probe, and CUDA step by step."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from edge_daemon import protocol
from edge_daemon.core.diagnosis import Finding, Kernel, cuda
from edge_daemon.settings import AgentSettings
from shared.subprocess_pipe import start_piped

CUDA_PROGRAM = ("-m", "edge_daemon.training.cuda_steps")


def probe(settings: AgentSettings, gpu: str) -> Kernel:
    """What an agent proves on `gpu` ("cpu": on the CPU); it may be silent for `settings.silence_s`."""
    spoken: queue.SimpleQueue[protocol.FromAgent | None] = queue.SimpleQueue()
    try:
        process, writer = start_piped(
            settings.command, protocol.FromAgent, spoken.put, lambda _problem: spoken.put(None), name="agent",
            own_group=True,
        )  # fmt: skip
    except OSError as error:
        return Kernel(gpu, problem=f"{settings.command[0]}: {error.strerror}")
    try:
        with contextlib.suppress(OSError):
            writer.write(protocol.Probe(datasets={}, gpu="" if gpu == "cpu" else gpu, threads=settings.threads or 1))
        while True:
            try:
                said = spoken.get(timeout=settings.silence_s)
            except queue.Empty:
                return Kernel(gpu, problem=f"it said nothing for {settings.silence_s:.0f} s")
            if isinstance(said, protocol.Probed):
                return Kernel(gpu, said.bits, said.notes)
            if said is None:
                return Kernel(gpu, problem=f"it ended with exit status {process.wait()}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Step(msgspec.Struct):
    step: str
    good: bool
    text: str
    code: str = ""


def cuda_steps(gpu: str, wait_s: float, program: Sequence[str] = CUDA_PROGRAM) -> list[Finding]:
    """CUDA from the driver to a 4-bit product on `gpu` ("": the first), each step a finding."""
    # As the agent does: CUDA's UUID of a Jetson is not one that it takes here.
    visible = {"CUDA_VISIBLE_DEVICES": "0" if gpu == protocol.INTEGRATED else gpu} if gpu else {}
    environment = {**os.environ, **visible}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *program], capture_output=True, timeout=wait_s, check=False, env=environment,
        )  # fmt: skip
        output, how = done.stdout, f"ended with exit status {done.returncode}"
        words = done.stderr.decode(errors="replace").strip().splitlines()
    except subprocess.TimeoutExpired as late:
        output, how, words = late.stdout or b"", f"no end after {time.monotonic() - began:.0f} s", []
    steps = [msgspec.json.decode(line, type=_Step) for line in output.splitlines() if line.startswith(b'{"step"')]
    findings = [cuda(step.step, step.good, step.text, step.code) for step in steps]
    if not steps or (all(step.good for step in steps) and steps[-1].step != "end"):
        findings.append(cuda("end", False, f"after {steps[-1].step if steps else 'nothing'}: {how} {words[-1:]}"))
    return findings
