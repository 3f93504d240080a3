"""A pruned job's export: plain transformers loads it, says what the masked model says, and it is smaller."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coordinator import export
from muster import smaller
from shared import units
from shared.adapter import Adapter
from shared.errors import UserError
from shared.jobs import BaseSpec, JobSpec, TaskSpec
from shared.modeling import base_model, lora, pruning, weights
from tests.training.tiny_models import COLOURS, STORIES, global_adapter, make_llama

TOKENS = [[5, 6, 7, 8, 9, 10], [9, 4, 4, 6, 5, 8]]
TASKS = [("bert", COLOURS), ("gpt2", STORIES), ("llama", STORIES)]


def exported(base: Path, folder: Path, task: TaskSpec, *, heads: bool = True) -> tuple[Path, Adapter]:
    """The PEFT folder of a job that pruned half."""
    loaded = base_model.load(base, task)
    known = pruning.chosen(pruning.groups_of(loaded), heads=heads)
    rng = np.random.default_rng(3)
    scores = {group.name: rng.uniform(0.1, 1.0, group.count) for group in known}
    kept = units.pack(known, units.best(known, scores, 0.5))
    adapter = replace(
        global_adapter(loaded, 3, size=0.3), base_digest=weights.base_digest(base), kept=kept,
        scores=units.pack_scores(scores),
    )  # fmt: skip
    spec = JobSpec(name="tiny", base=BaseSpec(model="tiny"), task=task)
    export.export_peft(adapter, folder, spec=spec, base=str(base), groups=known, classes={"Orin": 0.25, "T4": 0.5})
    return folder, adapter


PLAIN = """
import json, sys, torch, transformers
for line in sys.stdin:
    made, classifies, trusting, out = json.loads(line)  # out: a file of this request alone
    kind = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(made, trust_remote_code=trusting).eval()
    tokens = torch.tensor(TOKENS)
    count = sum(p.numel() for p in model.parameters())
    torch.save((model(input_ids=tokens).logits.detach(), count), out)
    if not classifies:
        model.generate(tokens, max_new_tokens=3, do_sample=False)
    transformers.AutoTokenizer.from_pretrained(made)
    assert not any(name.split(".")[0] in ("shared", "muster") for name in sys.modules)
    print(out, flush=True)
"""
Plain = Callable[..., tuple[torch.Tensor, int]]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """Logits and parameters of a model in a process that knows nothing of Muster; one for all, it starts slowly."""
    folder = tmp_path_factory.mktemp("plain")
    process = subprocess.Popen(
        [sys.executable, "-c", PLAIN.replace("TOKENS", str(TOKENS))],
        cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    asked = itertools.count()

    def ask(made: Path, *, classifies: bool, trusting: bool) -> tuple[torch.Tensor, int]:
        assert process.stdin is not None and process.stdout is not None
        out = folder / f"said-{next(asked)}"
        process.stdin.write(json.dumps([str(made), classifies, trusting, str(out)]) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{out}\n", "plain transformers does not take it: see stderr"
        said, count = torch.load(out)
        return said, int(count)

    try:
        yield ask
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(("name", "task"), TASKS)
@pytest.mark.parametrize("heads", [True, False])
def test_plain_transformers_says_what_the_coordinator_evaluated(
    name: str, task: TaskSpec, heads: bool, tmp_path: Path, request: pytest.FixtureRequest, colours: Path,
    stories: Path, plainly: Plain,
) -> None:  # fmt: skip
    base: Path = request.getfixturevalue(name)
    folder, adapter = exported(base, tmp_path / "adapter", task, heads=heads)
    rows = colours if name == "bert" else stories
    made = smaller.make(folder, tmp_path / "small", data=str(rows))
    ours = base_model.load(base, task)
    whole = sum(p.numel() for p in ours.model.parameters())
    lora.merge(ours, adapter)
    with torch.no_grad():
        wanted = ours.model(input_ids=torch.tensor(TOKENS)).logits
    said, count = plainly(made, classifies=name == "bert", trusting=heads and name != "llama")
    assert said.numpy() == pytest.approx(wanted.numpy(), abs=2e-5)
    measured = json.loads((made / "measured.json").read_text())
    assert measured["smaller"]["parameters"] == count < whole == measured["whole"]["parameters"]
    assert measured["smaller"]["loss"] > 0 and set(measured["smaller"]["latency_ms"]) == {"1", "16"}
    card = (made / "README.md").read_text()
    assert f"| parameters | {whole:,} | {count:,} |" in card and "tiny" not in card.split("\n")[0]
    assert (made / smaller.CODE).is_file() == (heads and name != "llama")


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize(("ratio", "coded"), [(0.2, True), (0.5, False)])
def test_a_number_of_heads_that_does_not_divide_the_width_brings_model_code(
    kind: str, ratio: float, coded: bool, tmp_path: Path, plainly: Plain
) -> None:
    base = make_llama(tmp_path / "base", kind, hidden=48, heads=12, key_heads=6)
    folder, adapter = exported(base, tmp_path / "adapter", STORIES)
    made = smaller.make(folder, tmp_path / "small", ratio=ratio)
    assert (made / smaller.CODE).is_file() == coded
    ours = base_model.load(base, STORIES)
    known = pruning.groups_of(ours)
    kept = units.best(known, units.scores_of(known, adapter.scores), ratio)
    lora.merge(ours, replace(adapter, kept=units.pack(known, kept)))
    with torch.no_grad():
        wanted = ours.model(input_ids=torch.tensor(TOKENS)).logits
    said, count = plainly(made, classifies=False, trusting=coded)
    assert count == sum(p.numel() for p in ours.model.parameters())
    assert said.numpy() == pytest.approx(wanted.numpy(), abs=2e-5)


def test_any_size_and_that_of_a_class(bert: Path, tmp_path: Path) -> None:
    folder, _ = exported(bert, tmp_path / "adapter", COLOURS)
    counts = {}
    for label, asked in {
        "0": {"ratio": 0.0},
        "own": {},
        "Orin": {"device_class": "Orin"},
        ".75": {"ratio": 0.75},
    }.items():
        made = smaller.make(folder, tmp_path / label, **asked)  # type: ignore[arg-type]  # keywords of it
        counts[label] = json.loads((made / "measured.json").read_text())["smaller"]["parameters"]
    assert counts["0"] > counts["Orin"] > counts["own"] > counts[".75"]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"ratio": 0.5, "device_class": "T4"}, "exclude each other"),
        ({"device_class": "X9"}, "no device class 'X9' took part; there are Orin, T4"),
    ],
)
def test_what_can_not_be_made_is_said(asked: dict[str, Any], reason: str, bert: Path, tmp_path: Path) -> None:
    folder, _ = exported(bert, tmp_path / "adapter", COLOURS)
    with pytest.raises(UserError, match=reason):
        smaller.make(folder, tmp_path / "small", **asked)
    assert not (tmp_path / "small").exists()
    (folder / "pruning.json").unlink()
    with pytest.raises(UserError, match="the job pruned nothing"):
        smaller.make(folder, tmp_path / "small", ratio=0.5)
