"""Quality on real text (MUSTER_DATA): federated rounds against what a central run and what one device alone reach.

    python bench/quality.py [dbpedia14] [20news] [e2e]

Each part is a run of `muster emulate` as its example says, then references on the same base. The exported adapter is
loaded by peft's own `PeftModel.from_pretrained` and evaluated on the whole test file, which no choice was made on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from muster.testbed import central
from muster.testbed.emulate import Emulation, Outcome, carry_out
from muster.testbed.exported import quality
from muster.testbed.rows import read_rows, write_rows

DATA = Path(os.environ.get("MUSTER_DATA") or Path(__file__).parents[2] / "shared" / "data")
SEEDS = (0, 1, 2)
"""Of data shares, order, fresh factors and head."""
CHUNKS = 20
"""Parts of a test file whose losses give the standard error of a difference."""
DBPEDIA_JOB = """
name = "dbpedia"
[base]
model = "minilm"
[task]
kind = "classification"
max_tokens = 48
[rounds]
count = 12
local_steps = 15
deadline_s = 600
[strategy]
rank = 8
batch = 16
batch_min = 4
[training]
lr = 2e-3
[evaluation]
rows = 500
"""


def main() -> int:
    """0: measured; 1: MUSTER_DATA is not there, which is said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["dbpedia14", "20news", "e2e"])
    options = parser.parse_args()
    if not DATA.is_dir():
        print(f"not run: MUSTER_DATA ({DATA} is no folder)", file=sys.stderr)
        return 1
    parts = {"dbpedia14": dbpedia14, "20news": news, "e2e": e2e}
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="muster-quality-") as folder:
        for name in options.parts:
            for figure in parts[name](Path(folder)):
                print(json.dumps(figure), flush=True)
    return 0


def dbpedia14(folder: Path) -> Iterator[dict[str, Any]]:
    """Federated `uniform` + `fsr` against central LoRA on as many samples, mean over seeds: one moves it by points."""
    job = folder / "dbpedia.toml"
    job.write_text(DBPEDIA_JOB, encoding="utf-8")
    gaps, pairs = [], []
    for seed in SEEDS:
        outcome = _run(folder, "dbpedia14", job, devices=4, profile="equal", seed=seed)
        effort = central.effort_of(outcome.job)
        pooled = central.central_lora(outcome.spec, Path(outcome.model), outcome.train, effort).after
        ours = _exported(outcome, [Path(outcome.spec.evaluation.data)])[0]
        assert pooled.accuracy is not None and ours.accuracy is not None
        gaps.append(100 * (pooled.accuracy - ours.accuracy))
        pairs.append(f"{ours.accuracy:.4f} against {pooled.accuracy:.4f}")
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    note = (
        f"accuracy {', '.join(pairs)} with seeds {', '.join(map(str, SEEDS))} on all {ours.rows} test rows, "
        f"{effort.steps * effort.batch} samples each, 4 equal devices; standard error of the mean {error:.1f} points"
    )
    what = "federated `uniform` + `fsr` behind central LoRA, dbpedia14, Dirichlet 1.0, mean over seeds"
    yield _figure("quality.dbpedia14_behind", what, statistics.fmean(gaps), "points", "<= 2", note)


def news(folder: Path) -> Iterator[dict[str, Any]]:
    """20news on six unequal devices against the head alone on one device's share."""
    outcome = _run(folder, "20news", Path("examples/20news.toml"), devices=6, profile="mixed")
    yield _export_figure(outcome, "20news")
    share = max(outcome.shares.values(), key=lambda path: path.stat().st_size)
    effort = central.effort_of(outcome.job)
    alone = central.head_alone(
        outcome.spec, Path(outcome.model), share, central.Effort(effort.steps, outcome.spec.strategy.batch)
    ).after
    ours = _exported(outcome, [Path(outcome.spec.evaluation.data)])[0]
    error = math.hypot(central.standard_error(alone), central.standard_error(ours))
    assert ours.accuracy is not None and alone.accuracy is not None
    note = (
        f"accuracy {ours.accuracy:.4f} against {alone.accuracy:.4f} on all {ours.rows} test rows, one standard error "
        f"of the difference {error:.4f}, one seed"
    )
    what = "20news, 6 unequal devices: above the head alone on the largest share, in standard errors"
    yield _figure("quality.20news_over_head", what, (ours.accuracy - alone.accuracy) / error, "SE", "> 2", note)


def e2e(folder: Path) -> Iterator[dict[str, Any]]:
    """e2e with a small GPT-2 against the untuned base."""
    outcome = _run(folder, "e2e", Path("examples/e2e.toml"), devices=4, profile="mixed")
    yield _export_figure(outcome, "e2e")
    rows = read_rows(Path(outcome.spec.evaluation.data))
    files = [folder / f"chunk-{part}.jsonl.gz" for part in range(CHUNKS)]
    for part, path in enumerate(files):
        write_rows(path, rows[part::CHUNKS])
    ours, base = _exported(outcome, files), _untuned(outcome, files)
    gains = [before.loss - after.loss for before, after in zip(base, ours, strict=True)]
    mean = sum(gains) / CHUNKS
    error = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (CHUNKS - 1) / CHUNKS)
    loss = [sum(part.loss for part in parts) / CHUNKS for parts in (ours, base)]
    note = (
        f"perplexity {math.exp(loss[0]):.2f} against {math.exp(loss[1]):.2f} per completion token on all {len(rows)} "
        f"test rows; loss lower by {mean:.3f}, its standard error {error:.4f} over {CHUNKS} parts, one seed"
    )
    what = "e2e, 4 unequal devices, small GPT-2: below the untuned base's loss, in standard errors"
    yield _figure("quality.e2e_over_base", what, mean / error, "SE", "> 2", note)


def _exported(outcome: Outcome, files: Sequence[Path], *, rows: int = 0) -> list[Any]:
    """Quality of the exported adapter on each file, loaded by peft alone."""
    return _quality(outcome, outcome.out / "adapter", files, rows)


def _untuned(outcome: Outcome, files: Sequence[Path]) -> list[Any]:
    """Quality of the base as it is."""
    return _quality(outcome, None, files, 0)


def _quality(outcome: Outcome, adapter: Path | None, files: Sequence[Path], rows: int) -> list[Any]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    return quality(outcome.spec, Path(outcome.model), adapter, files, rows=rows)


def _export_figure(outcome: Outcome, name: str) -> dict[str, Any]:
    """How far the export is from what the coordinator measured in the last round, on the same rows."""
    metrics = outcome.job.rounds[-1].metrics
    assert metrics is not None
    found = _exported(outcome, [Path(outcome.spec.evaluation.data)], rows=metrics.rows)[0]
    what = f"{name}: exported adapter under `PeftModel.from_pretrained` against the coordinator's evaluation, loss"
    note = f"{found.loss:.7f} against {metrics.loss:.7f} on {metrics.rows} rows, ranks unequal by module"
    return _figure(f"quality.{name}_export", what, abs(found.loss - metrics.loss), "", "<= 0.00001", note)


def _run(folder: Path, data: str, job: Path, *, devices: int, profile: str, seed: int | None = None) -> Outcome:
    out = folder / (data if seed is None else f"{data}-{seed}")
    outcome = carry_out(
        Emulation(
            devices=devices,
            profile=profile,
            data=str(DATA / data),
            job=job,
            out=out,
            alpha=1.0,
            lm=DATA / "lm",
            seed=seed,
        ),  # fmt: skip
        command=f"muster emulate --devices {devices} --profile {profile} --data {data} --job {job}",
    )
    if outcome.job.state != "finished":
        raise SystemExit(f"bench: {data} did not finish: {outcome.job.reason}")
    return outcome


def _figure(name: str, what: str, value: float, unit: str, target: str, note: str) -> dict[str, Any]:
    return {"name": name, "what": what, "value": round(value, 8), "unit": unit, "target": target, "note": note}


if __name__ == "__main__":
    sys.exit(main())
