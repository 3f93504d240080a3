"""A merged export: the base's modules, the global model's numbers, and one-line reasons where it can't be made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402 - after the packages that may be missing
from peft.tuners.lora import LoraLayer  # noqa: E402

from coordinator import export  # noqa: E402
from muster.merged import merge  # noqa: E402
from shared.adapter import Adapter  # noqa: E402
from shared.errors import UserError  # noqa: E402
from shared.jobs import BaseSpec, JobSpec, TaskSpec  # noqa: E402
from shared.modeling import base_model, evaluation, lora, weights  # noqa: E402
from shared.modeling.data import tokenize  # noqa: E402
from tests.training.tiny_models import COLOURS, STORIES, global_adapter, make_bert, sided_adapter  # noqa: E402


def exported(base: Path, folder: Path, task: TaskSpec, named: str = "") -> tuple[Path, Adapter]:
    """The PEFT folder of a global adapter of rank 3 on every module, and that adapter."""
    loaded = base_model.load(base, task)
    made = global_adapter(loaded, 3, size=0.3)
    adapter = Adapter(**{**vars(made), "base_digest": weights.base_digest(base)})
    spec = JobSpec(name="tiny", base=BaseSpec(model="tiny"), task=task)
    export.export_peft(adapter, folder, spec=spec, base=named or str(base))
    return folder, adapter


@pytest.mark.parametrize(("name", "task"), [("bert", COLOURS), ("gpt2", STORIES), ("llama", STORIES)])
def test_the_merged_model_is_the_global_one(
    name: str, task: TaskSpec, tmp_path: Path, colours: Path, stories: Path, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(name)
    adapter, whole = exported(base, tmp_path / "adapter", task)
    folder = merge(adapter, tmp_path / "merged")
    factory: Any = (
        transformers.AutoModelForSequenceClassification if name == "bert" else transformers.AutoModelForCausalLM
    )
    given = {"num_labels": 3} if name == "bert" else {}
    model, plain = factory.from_pretrained(str(folder)).eval(), factory.from_pretrained(str(base), **given)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert not [path for path in folder.iterdir() if "adapter" in path.name]

    ours = base_model.load(base, task)
    data = tokenize(str(colours if name == "bert" else stories), task, ours.tokenizer)
    lora.merge(ours, whole)
    wanted = evaluation.evaluate(ours, data)
    ours.model = model
    found = evaluation.evaluate(ours, data)
    assert found.loss == pytest.approx(wanted.loss, abs=1e-5)
    assert found.accuracy == wanted.accuracy
    ours.model = plain.eval()
    assert abs(evaluation.evaluate(ours, data).loss - wanted.loss) > 1e-3, "the adapter does something"
    if name == "bert":
        assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}


@pytest.mark.parametrize("upper", [True, False], ids=["top", "devices"])
@pytest.mark.parametrize(
    ("name", "task"), [("bert", COLOURS), ("gpt2", STORIES), ("gpt2", COLOURS), ("llama", STORIES)]
)
def test_a_side_that_was_tuned_itself_is_merged_too(
    name: str, task: TaskSpec, upper: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Split learning with LoRA on one side of the cut after block 1, and every parameter on the other."""
    base: Path = request.getfixturevalue(name)
    loaded = base_model.load(base, task)
    adapter = sided_adapter(loaded, upper=upper, digest=weights.base_digest(base))
    spec = JobSpec(name="tiny", base=BaseSpec(model="tiny"), task=task)
    turned = {f"{n}.weight" for n in loaded.linears} if name == "gpt2" else ()
    export.export_peft(adapter, tmp_path / "adapter", spec=spec, base=str(base), transposed=turned)
    kind: Any = transformers.AutoModelForSequenceClassification
    model = (kind if task is COLOURS else transformers.AutoModelForCausalLM).from_pretrained(
        str(merge(tmp_path / "adapter", tmp_path / "merged"))
    )
    ids = torch.arange(1, 13).reshape(1, 12)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain = loaded.model.eval()(**given).logits
        lora.merge(loaded, adapter)
        wanted, found = loaded.model.eval()(**given).logits, model.eval()(**given).logits
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found, plain, atol=1e-2)


def test_why_there_is_nothing_to_merge(bert: Path, tmp_path: Path) -> None:
    adapter, _ = exported(bert, tmp_path / "adapter", COLOURS, named="/no/such/base")
    with pytest.raises(UserError, match="/no/such/base: no such model folder; name the base's folder with --base"):
        merge(adapter, tmp_path / "out")
    other = make_bert(tmp_path / "other")
    (other / "vocab.txt").write_text("another tokenizer\n")
    with pytest.raises(UserError, match="the adapter was trained on"):
        merge(adapter, tmp_path / "out", str(other))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(UserError, match="stored quantized"):
        merge(adapter, tmp_path / "out", str(other))
    assert not (tmp_path / "out").exists()
    assert merge(adapter, tmp_path / "out", str(bert)) == tmp_path / "out"
    with pytest.raises(UserError, match="exists already and is not an empty folder"):
        merge(adapter, tmp_path / "out", str(bert))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other", "out"]
    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**told, "task_type": None}))
    with pytest.raises(UserError, match="no transformer behind this task"):
        merge(adapter, tmp_path / "new", str(bert))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="can't be read"):
        merge(adapter, tmp_path / "new", str(bert))
