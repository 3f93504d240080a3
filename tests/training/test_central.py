"""The central references, and the base models that emulations make."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from coordinator.core.facts import Metrics
from coordinator.web.views import JobView, ParticipantView, RoundView
from muster.testbed import central, models
from muster.testbed.central import Effort
from shared.errors import UserError
from shared.jobs import BaseSpec, EvaluationSpec, JobSpec, StrategySpec, TaskSpec, TrainingSpec
from shared.messages import UpdateFacts, Work
from tests.training.tiny_models import COLOURS, STORIES, colour_rows, write_jsonl


def job(task: TaskSpec, held_out: Path, lr: float = 1e-2) -> JobSpec:
    return JobSpec(
        name="central", base=BaseSpec(model="tiny"), task=task, strategy=StrategySpec(rank=4),
        training=TrainingSpec(lr=lr), evaluation=EvaluationSpec(data=str(held_out)),
    )  # fmt: skip


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "held-out.jsonl", colour_rows(90, seed=7))


def test_a_central_run_learns_more_than_its_head_alone(bert: Path, colours: Path, held_out: Path) -> None:
    spec, effort = job(COLOURS, held_out), Effort(steps=40, batch=16)
    pooled = central.central_lora(spec, bert, colours, effort)
    alone = central.head_alone(spec, bert, colours, effort)
    # Both begin with the job's own head on the same base.
    assert pooled.before.loss == pytest.approx(alone.before.loss, abs=1e-6)
    assert pooled.before.rows == 90
    assert pooled.after.loss < alone.after.loss < alone.before.loss
    assert pooled.after.accuracy is not None
    assert alone.after.accuracy is not None
    assert pooled.after.accuracy > alone.after.accuracy
    assert len(pooled.losses) == 40


def test_the_same_run_twice_gives_the_same_losses(bert: Path, colours: Path, held_out: Path) -> None:
    spec, effort = job(COLOURS, held_out), Effort(steps=3, batch=8)
    assert central.central_lora(spec, bert, colours, effort).losses == (
        central.central_lora(spec, bert, colours, effort).losses
    )


def test_a_causal_base_learns_but_has_no_head(gpt2: Path, stories: Path) -> None:
    spec = job(STORIES, stories)
    found = central.central_lora(spec, gpt2, stories, Effort(steps=15, batch=8), rows=10)
    assert found.after.rows == 10
    assert found.after.perplexity is not None
    assert found.before.perplexity is not None
    assert found.after.perplexity < found.before.perplexity
    with pytest.raises(UserError, match="no head"):
        central.head_alone(spec, gpt2, stories, Effort(steps=1, batch=1))


def test_effort_is_the_fleets_steps_with_all_its_samples() -> None:
    def part(device: str, steps: int, batch: int) -> ParticipantView:
        facts = UpdateFacts(
            samples=steps * batch, steps=steps, batch=batch, bits=32, loss_first=1, loss_last=1, step_s=1, train_s=1
        )
        return ParticipantView(device=device, work=Work(ranks={}, batch=batch, bits=32, steps=steps), facts=facts)

    lost = msgspec.structs.replace(part("c", 10, 4), facts=None)
    rounds = [
        RoundView(round=1, phase="committed", participants=[part("a", 10, 16), part("b", 10, 8), lost]),
        RoundView(round=2, phase="committed", participants=[part("a", 10, 16), part("b", 10, 16)]),
    ]
    view = JobView(id="j", name="j", state="finished", rounds=rounds)
    assert central.effort_of(view) == Effort(steps=20, batch=28)
    with pytest.raises(UserError, match="nothing yet"):
        central.effort_of(msgspec.structs.replace(view, rounds=[]))


def test_the_standard_error_of_an_accuracy() -> None:
    assert central.standard_error(Metrics(loss=1, rows=100, accuracy=0.5)) == pytest.approx(0.05)
    assert central.standard_error(Metrics(loss=1, rows=100, perplexity=3.0)) == 0.0


def words_of(seed: int) -> str:
    rng, words = random.Random(seed), ["river", "engine", "violet", "market", "signal", "winter"]
    return "\n".join(" ".join(rng.choices(words, k=9)) + " ." for _ in range(400))


@pytest.mark.usefixtures("threads")
def test_a_small_gpt2_is_the_same_whatever_number_of_threads_there_is(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(words_of(1))
    size = models.SmallGpt2(vocabulary=300, layers=1, width=192, heads=2, context=128, steps=3)
    made = []
    for count in (1, 2):
        torch.set_num_threads(count)
        out = models.make_small_gpt2(tmp_path / f"gpt2-{count}", [tmp_path / "text.txt"], size)
        made.append((out / "model.safetensors").read_bytes())
        assert torch.get_num_threads() == count
    assert made[0] == made[1]


def test_a_small_gpt2_is_an_ordinary_folder_that_learned_its_text(tmp_path: Path) -> None:
    import transformers

    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(words_of(0).encode()))
    size = models.SmallGpt2(vocabulary=300, layers=1, width=32, heads=2, context=16, steps=150)
    told: list[str] = []
    out = models.make_small_gpt2(tmp_path / "gpt2", [tmp_path / "text.txt.gz"], size, tell=told.append)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(out))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(out))
    inputs = tokenizer("river engine violet market signal winter .", return_tensors="pt")
    assert tokenizer.decode(inputs["input_ids"][0]) == "river engine violet market signal winter ."
    loss = model(**inputs, labels=inputs["input_ids"]).loss.item()
    assert loss < 4.0  # log(300) = 5.7 before training
    assert told
    before = (out / "model.safetensors").stat().st_mtime_ns
    models.make_small_gpt2(out, [tmp_path / "none"])
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_texts_that_are_missing_or_too_short_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match="1 step of training or more, not 0"):
        models.make_small_gpt2(tmp_path / "gpt2", [tmp_path / "short.txt"], models.SmallGpt2(steps=0))
    for texts, reason in (([tmp_path / "none.txt"], "none.txt"), ([tmp_path / "short.txt"], "more text")):
        with pytest.raises(UserError, match=reason):
            models.make_small_gpt2(tmp_path / "gpt2", texts)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    assert models.main([str(tmp_path / "gpt2"), str(tmp_path / "none.txt")]) == 2


def test_minilm_is_found_without_being_imported() -> None:
    """In a process of its own: another test may have imported it here."""
    program = (
        "import sys; from muster.testbed import models; "
        "assert (models.minilm_folder() / 'model.safetensors').is_file(); "
        "assert models.MINILM_PACKAGE not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
