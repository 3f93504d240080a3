"""`docs/first-fleet.md` as it stands: its lines, in its order, on three 'machines' that are homes on this one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from muster.testbed.broker import free_port

PAGE = Path(__file__).parents[2] / "docs" / "first-fleet.md"
PAGES_ADDRESS, PAGES_PORT, PAGES_JOB = "192.0.2.10", "8883", "tickets-3f2a1c"
LABELS = {
    "billing": "charge invoice money twice",
    "delivery": "parcel late courier street",
    "returns": "back size label",
}
MARK = "MUSTER_TEST_FIRST_FLEET"


class Machine:
    """A home of its own, and a shell that runs the page's lines there."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.fleet = home / "fleet"
        self.name = home.name
        self._port = port
        home.mkdir()
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MUSTER_") or k == "MUSTER_TEST_SESSION"},
            "HOME": str(home), "BROKER": "127.0.0.1", MARK: str(home.parent),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip

    def runs(self, lines: str, *, job: str = "") -> str:
        """What the lines say; a line that fails fails the test."""
        done = subprocess.run(
            ["bash", "-eu", "-c", self._here(lines, job)], env=self.environment, capture_output=True, text=True,
            cwd=self.home, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{lines}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def serves(self, line: str) -> subprocess.Popen[bytes]:
        with (self.home / "log").open("ab") as log:
            return subprocess.Popen(
                ["bash", "-c", f"exec env {self._here(line, '')}"], env=self.environment, stdout=log, stderr=log
            )

    def _here(self, lines: str, job: str) -> str:
        changed = lines.replace(PAGES_ADDRESS, "127.0.0.1").replace(f"port = {PAGES_PORT}", f"port = {self._port}")
        changed = changed.replace("muster broker config ", f"muster broker config --port {self._port} ")
        changed = changed.replace(PAGES_JOB, job or PAGES_JOB)
        return changed.replace("edge-01", self.name) if self.name.startswith("edge") else changed


@pytest.fixture
def blocks() -> tuple[list[str], list[str]]:
    """(what is typed, what goes on running), in the page's order."""
    found = re.findall(r"^```bash( serves)?\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for serves, text in found if not serves], [text.strip() for serves, text in found if serves]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """What goes on running; it ends with the test, its children too."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in reversed(started):
        process.terminate()
        process.wait(60)
    for process_ in psutil.process_iter():
        try:
            if process_.environ().get(MARK) == str(tmp_path):
                process_.kill()
        except psutil.Error:
            continue


def write_rows(path: Path, first: int, count: int) -> None:
    names = list(LABELS)
    made = [{"text": f"{LABELS[names[i % 3]]} number {i}", "label": names[i % 3]} for i in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


@pytest.mark.slow
def test_the_page_leads_to_an_adapter(
    tmp_path: Path, blocks: tuple[list[str], list[str]], served: list[subprocess.Popen[bytes]]
) -> None:
    (keys, coordinator, enrol, sign, settle, job, look), (broker, plans, trains) = blocks
    port = free_port()
    center = Machine(tmp_path / "center", port)
    center.runs(keys)
    assert "coordinator.toml: good (models: minilm)" in center.runs(coordinator)
    served += [center.serves(broker), center.serves(plans)]
    for name, first in (("edge-01", 0), ("edge-02", 60)):
        device = Machine(tmp_path / name, port)
        device.runs(enrol)
        shutil.copy(device.fleet / "pki" / f"{name}.csr", center.fleet)
        center.runs(sign.replace("edge-01", name))
        for answer in (center.fleet / "pki" / "issued" / f"{name}.crt", center.fleet / "pki" / "ca.crt"):
            shutil.copy(answer, device.fleet)
        shutil.copytree(center.fleet / "minilm", device.fleet / "minilm")
        write_rows(device.fleet / "tickets.jsonl", first, 60)
        assert "edge.toml: good (data sets: tickets; models: minilm)" in device.runs(settle)
        with (device.fleet / "edge.toml").open("a") as settings:
            settings.write("\n[policy]\nforeign_limit = 1000.0\n")
        served.append(device.serves(trains))
    write_rows(center.fleet / "held-out.jsonl", 500, 60)
    said = center.runs(job)
    assert "finished, round 3 of 3" in said, said
    number = re.search(r"^(tickets-\w+)$", said, re.MULTILINE)
    assert number is not None, said
    told = center.runs(look, job=number[1])
    assert "edge-02 batch: batch" in told
    assert (center.fleet / "adapter" / "adapter_config.json").is_file()
