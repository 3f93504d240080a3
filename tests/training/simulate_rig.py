"""A simulation of tiny models on eight devices."""

from __future__ import annotations

import json
from pathlib import Path

from muster.testbed.simulate import Simulation
from tests.training.tiny_models import colour_rows, story_rows, write_jsonl

JOB = """
name = "tiny"
[base]
model = "tiny"
[task]
kind = "classification"
max_tokens = 16
[rounds]
count = 2
sample = 3
local_steps = 3
deadline_s = 200
[strategy]
rank = 2
batch = 8
batch_min = 2
[training]
lr = 1e-2
checkpoint_every = 2
[evaluation]
rows = 20
"""


def tiny_stories(folder: Path, model: Path) -> Simulation:
    """The same with a causal task."""
    data = folder / "stories"
    data.mkdir()
    write_jsonl(data / "train.jsonl", story_rows(120))
    write_jsonl(data / "test.jsonl", story_rows(30))
    job = folder / "stories.toml"
    job.write_text(JOB.replace("classification", "causal"))
    return Simulation(
        devices=6, data=str(data), job=job, models=(f"tiny={model}",), seed=4, workers=0, alpha=0.0, out=folder / "two"
    )


def tiny_simulation(folder: Path, bert: Path) -> Simulation:
    """Two rounds of three devices, three steps each."""
    data = folder / "colours"
    data.mkdir()
    write_jsonl(data / "train.jsonl", colour_rows(160))
    write_jsonl(data / "test.jsonl", colour_rows(40, seed=1))
    (data / "labels.json").write_text(json.dumps(["red", "green", "blue"]))
    job = folder / "tiny.toml"
    job.write_text(JOB)
    return Simulation(
        devices=8, data=str(data), job=job, models=(f"tiny={bert}",), seed=4, workers=0, out=folder / "one"
    )
