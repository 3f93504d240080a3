"""The exported folder under real transformers and peft, on tiny models made from a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from safetensors import safe_open  # noqa: E402 - after the packages that may be missing

from coordinator import export  # noqa: E402
from coordinator.core.aggregation.base import product  # noqa: E402
from coordinator.core.facts import Metrics  # noqa: E402
from shared.adapter import Adapter, Factors  # noqa: E402
from shared.errors import UserError  # noqa: E402
from shared.jobs import BaseSpec, JobSpec, TaskKind, TaskSpec  # noqa: E402

IDS = torch.arange(1, 13).reshape(2, 6)


def bert() -> Any:
    torch.manual_seed(0)
    # 24 linear layers: above the number from which on peft rewrites target_modules to suffixes.
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def linears(model: Any) -> Iterator[tuple[str, int, int, bool]]:
    """(name, out, in, stored as in x out) of the linear layers of the blocks."""
    for name, module in model.named_modules():
        if ".layer." not in f".{name}." and ".h." not in f".{name}.":
            continue
        if isinstance(module, torch.nn.Linear):
            yield name, module.out_features, module.in_features, False
        elif type(module).__name__ == "Conv1D":
            yield name, module.weight.shape[1], module.weight.shape[0], True


def global_adapter(model: Any, *, triplets: bool = True, head: bool = True) -> Adapter:
    """Random factors whose rank differs by module, 0 included (every fifth module is absent)."""
    rng = np.random.default_rng(3)
    factors = {}
    for index, (name, out, inp, _) in enumerate(linears(model)):
        rank = index % 5
        if rank == 0:
            continue
        factors[name] = Factors(
            b=rng.standard_normal((out, rank), dtype=np.float32),
            a=rng.standard_normal((rank, inp), dtype=np.float32),
            scaling=1.0 if triplets else 2.0,
            sigma=np.linspace(0.3, 0.01, rank, dtype=np.float32) if triplets else None,
        )
    dense = {}
    if head:
        dense["classifier.weight"] = rng.standard_normal((3, 16), dtype=np.float32)
        dense["classifier.bias"] = rng.standard_normal(3, dtype=np.float32)
        dense["bert.pooler.dense.weight"] = rng.standard_normal((16, 16), dtype=np.float32) * np.float32(0.1)
        dense["bert.pooler.dense.bias"] = np.zeros(16, dtype=np.float32)
    return Adapter(kind="global", job="topics-1", round=3, base_digest="ab" * 32, factors=factors, dense=dense)


def spec(kind: TaskKind, labels: list[str]) -> JobSpec:
    return JobSpec(name="topics", base=BaseSpec(model="tiny"), task=TaskSpec(kind=kind, dataset="texts", labels=labels))


def added(model: Any, adapter: Adapter) -> Any:
    """`model` with the adapter added densely: what the coordinator evaluates."""
    transposed = {name: turned for name, _, _, turned in linears(model)}
    with torch.no_grad():
        for name, part in adapter.factors.items():
            delta = torch.from_numpy(product(part).astype(np.float32))
            model.get_submodule(name).weight += delta.T if transposed[name] else delta
        for name, tensor in adapter.dense.items():
            model.get_parameter(name).copy_(torch.from_numpy(tensor))
    return model


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


CLASSES = spec("classification", ["a", "b", "c"])


@pytest.mark.parametrize("triplets", [True, False], ids=["triplets", "factors"])
def test_bert_with_head_and_unequal_ranks_reproduces_the_global_model(tmp_path: Path, triplets: bool) -> None:
    adapter = global_adapter(bert(), triplets=triplets)
    export.export_peft(adapter, tmp_path / "out", spec=CLASSES, base="tiny")
    loaded = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "out"))
    wanted = logits(added(bert(), adapter))
    assert not torch.allclose(wanted, logits(bert()), atol=1e-2)
    assert torch.allclose(logits(loaded), wanted, atol=1e-5, rtol=1e-5)
    assert torch.allclose(logits(loaded.merge_and_unload()), wanted, atol=1e-5, rtol=1e-5)


def test_only_the_tuned_modules_carry_lora_and_each_has_its_rank(tmp_path: Path) -> None:
    adapter = global_adapter(bert())
    export.export_peft(adapter, tmp_path / "out", spec=CLASSES, base="tiny")
    loaded = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "out"))
    ranks = {
        name.removeprefix("base_model.model."): module.lora_A["default"].out_features
        for name, module in loaded.named_modules()
        if hasattr(module, "lora_A")
    }
    assert ranks == {name: part.rank for name, part in adapter.factors.items()}
    scalings = {m.scaling["default"] for m in loaded.modules() if hasattr(m, "lora_A")}
    assert scalings == {1.0}


def test_what_peft_saves_again_loads_again(tmp_path: Path) -> None:
    adapter = global_adapter(bert())
    export.export_peft(adapter, tmp_path / "out", spec=CLASSES, base="tiny")
    loaded = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "out"))
    loaded.save_pretrained(str(tmp_path / "again"))
    again = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "again"))
    assert torch.equal(logits(again), logits(loaded))
    keys = []
    for folder in ("out", "again"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", "np") as file:
            keys.append({name: file.get_tensor(name).shape for name in file.keys()})  # noqa: SIM118 - no mapping
    assert keys[0] == keys[1]


def test_gpt2_stores_its_layers_transposed(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = gpt2()
    model.config.save_pretrained(tmp_path / "base")
    adapter = global_adapter(model, head=False)
    export.export_peft(adapter, tmp_path / "out", spec=spec("causal", []), base=str(tmp_path / "base"))
    loaded = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path / "out"))
    wanted = logits(added(gpt2(), adapter))
    assert not torch.allclose(wanted, logits(gpt2()), atol=1e-3)
    assert torch.allclose(logits(loaded), wanted, atol=1e-5, rtol=1e-5)
    assert not [str(w.message) for w in recwarn if "fan_in_fan_out" in str(w.message)]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True and config["modules_to_save"] is None


def test_gpt2_whose_base_folder_is_not_known_is_still_right(tmp_path: Path) -> None:
    adapter = global_adapter(gpt2(), head=False)
    export.export_peft(adapter, tmp_path / "out", spec=spec("causal", []), base="a/hub-id")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        loaded = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path / "out"))
    assert torch.allclose(logits(loaded), logits(added(gpt2(), adapter)), atol=1e-5, rtol=1e-5)


def test_a_head_alone_loads_without_any_lora(tmp_path: Path) -> None:
    adapter = global_adapter(bert())
    adapter = Adapter(kind="global", job="j", round=1, base_digest="d", factors={}, dense=adapter.dense)
    export.export_peft(adapter, tmp_path / "out", spec=CLASSES, base="tiny")
    loaded = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "out"))
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert torch.allclose(logits(loaded), logits(added(bert(), adapter)), atol=1e-6)


def test_a_head_of_several_layers_is_saved_as_a_whole(tmp_path: Path) -> None:
    def roberta() -> Any:
        torch.manual_seed(0)
        config = transformers.RobertaConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
        )
        return transformers.RobertaForSequenceClassification(config).eval()

    rng = np.random.default_rng(0)
    names = [name for name, _ in roberta().named_parameters() if name.startswith("classifier.")]
    shapes = {name: tuple(roberta().get_parameter(name).shape) for name in names}
    dense = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    adapter = Adapter(
        kind="global",
        job="j",
        round=1,
        base_digest="d",
        factors=global_adapter(roberta(), head=False).factors,
        dense=dense,
    )
    export.export_peft(adapter, tmp_path / "out", spec=CLASSES, base="tiny")
    loaded = peft.PeftModel.from_pretrained(roberta(), str(tmp_path / "out"))
    assert torch.allclose(logits(loaded), logits(added(roberta(), adapter)), atol=1e-5, rtol=1e-5)


def test_the_folder_tells_what_it_holds_and_replaces_a_former_one(tmp_path: Path) -> None:
    folder = tmp_path / "exports" / "topics-1"
    export.export_peft(global_adapter(bert()), folder, spec=CLASSES, base="tiny")
    (folder / "stale").write_text("of a former export")
    (folder.parent / ".topics-1.killed").mkdir()
    metrics = Metrics(loss=0.5, rows=120, accuracy=0.875)
    export.export_peft(global_adapter(bert()), folder, spec=CLASSES, base="tiny", metrics=metrics)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.json",
    ]
    assert [p.name for p in folder.parent.iterdir()] == ["topics-1"]
    assert json.loads((folder / "labels.json").read_text()) == {"id2label": {"0": "a", "1": "b", "2": "c"}}
    readme = (folder / "README.md").read_text()
    for part in ("topics-1", "3 rounds", "accuracy 0.875", "120 rows", "num_labels=3", "ab" * 32):
        assert part in readme


def test_the_usage_in_the_readme_runs(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    adapter = global_adapter(bert())
    export.export_peft(adapter, tmp_path / "out", spec=CLASSES, base=str(tmp_path / "base"))
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("path/of/this/folder", str(tmp_path / "out")), scope)
    assert torch.allclose(logits(scope["model"]), logits(added(bert(), adapter)), atol=1e-5, rtol=1e-5)


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="can't be written"):
        export.export_peft(global_adapter(bert()), tmp_path / "file" / "out", spec=CLASSES, base="tiny")
    with pytest.raises(UserError, match="can't be written"):
        export.export_peft(global_adapter(bert()), tmp_path / "file", spec=CLASSES, base="tiny")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_export_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, coordinator.export, coordinator.fold; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
