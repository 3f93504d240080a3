"""`make demo` as its page promises it: the real command, the report with its plots, an adapter that peft loads."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def demo_command() -> list[str]:
    """The arguments that `make demo` gives to `muster`."""
    found = re.search(r"^demo:.*\n\t\$\(MUSTER\) (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, "the Makefile's demo has another form"
    return shlex.split(found[1])


@pytest.mark.slow
def test_the_demo_gives_its_report_and_an_adapter_that_loads(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from muster.testbed import inputs
    from muster.testbed.emulate import DEMO_JOB
    from muster.testbed.exported import quality
    from muster.testbed.models import minilm_folder

    arguments = demo_command()
    assert arguments[-2:] == ["--out", "runs/demo"]
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "muster.cli.main", *arguments[:-1], str(out)], cwd=ROOT, capture_output=True, text=True,
        timeout=800, env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "demo: finished" in report
    plots = re.findall(r"\]\(([\w.-]+\.png)\)", report)
    assert plots
    for name in plots:
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name
    for device in ("edge-01", "edge-02", "edge-03", "edge-04"):
        assert device in report
        assert (out / "logs" / f"{device}.log").is_file()
    adapter = out / "adapter"
    labels = json.loads((adapter / "labels.json").read_text(encoding="utf-8"))["id2label"]
    data = inputs.data_files(str(out / "data"), tmp_path, lambda _: None)
    assert data.labels == list(labels.values())
    _, spec = inputs.filled(inputs.job_tables(DEMO_JOB, {}), data, 4, "demo")
    found = quality(spec, minilm_folder(), adapter, [data.test], rows=spec.evaluation.rows)[0]
    assert found.accuracy is not None
    told = re.search(r"accuracy ([\d.]+)", (adapter / "README.md").read_text(encoding="utf-8"))
    assert told is not None
    assert float(told[1]) == pytest.approx(found.accuracy, abs=1e-5)
    assert found.accuracy > 3 / len(labels), "no better than guessing"
