"""Releases on real models: their files opened as any program opens them, measured by the agent, asked on the device."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from coordinator.export import as_json, export_peft
from coordinator.export_bottleneck import export_bottleneck
from coordinator.export_whole import export_whole
from edge_daemon import protocol
from edge_daemon.core.state import Journal
from shared import release_pack, units
from shared.adapter import Adapter
from shared.files import write_whole
from shared.jobs import BaseSpec, Bits, JobSpec, TaskSpec
from shared.modeling import base_model, bottleneck, evaluation, lora, pruning, released, stored_form, weights
from shared.modeling.base_model import Base
from shared.modeling.data import TokenData, tokenize
from shared.modeling.faults import AdapterFault, ModelFault
from shared.modeling.parameters import set_module
from shared.release_messages import ReleaseKind
from shared.starts import START_NOTE
from tests.training.test_agent import Agent, probe
from tests.training.test_full import whole_adapter
from tests.training.tiny_models import (
    COLOURS,
    STORIES,
    colour_rows,
    empty_adapter,
    global_adapter,
    sided_adapter,
    write_jsonl,
)

pytestmark = pytest.mark.timeout(300)  # some start torch three times
CASES = [("bert", COLOURS), ("gpt2", STORIES), ("llama", STORIES)]
RELEASE = "tiny.r1-1"


def spec(task: TaskSpec) -> JobSpec:
    return JobSpec(name="tiny", base=BaseSpec(model="tiny"), task=task)


def data_of(task: TaskSpec, request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue("colours" if task.kind == "classification" else "stories")
    return path


def release(folder: Path, adapter: Adapter, base: Path, task: TaskSpec, kind: ReleaseKind = "lora") -> Path:
    """The files of a release, as the coordinator makes them."""
    about = release_pack.About(
        release=folder.name, job="tiny", round=1, kind=kind, base=BaseSpec(model="tiny"),
        base_digest=weights.base_digest(base), task=task,
    )  # fmt: skip
    if kind == "bottleneck":
        export_bottleneck(adapter, folder, spec=spec(task), base="elsewhere")
    elif kind == "lora":
        export_peft(adapter, folder, spec=spec(task), base="elsewhere")
    (folder / release_pack.ABOUT).write_bytes(as_json(msgspec.to_builtins(about)))
    return folder


def loss(base: Base, data: Path, task: TaskSpec) -> float:
    return evaluation.evaluate(base, tokenize(str(data), task, base.tokenizer)).loss


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("upper", [True, False], ids=["top", "devices"])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_side_that_was_trained_itself_is_opened_at_any_bits(
    name: str, task: TaskSpec, upper: bool, bits: Bits, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What is not trained itself has these bits; the other side is exact."""
    folder: Path = request.getfixturevalue(name)
    whole, ids = base_model.load(folder, task), torch.arange(1, 13).reshape(1, 12)

    def logits(base: Base) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = base.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return found.float()

    adapter = sided_adapter(whole, upper=upper)
    turned = {f"{n}.weight" for n in whole.linears} if name == "gpt2" else ()
    export_peft(adapter, tmp_path / "out", spec=spec(task), base="elsewhere", transposed=turned)
    found = logits(released.opened(tmp_path / "out", "lora", folder, task, bits, "cpu"))

    base = base_model.load(folder, task, bits)
    head = {key: adapter.dense[key] for key in base.head}
    lora.carry(base, dataclasses.replace(adapter, dense=head, notes={}), {}, alpha_ratio=1.0, seed=0, round=1)
    kind = base.model.get_input_embeddings().weight.dtype
    for module in whole.linears:
        if f"{module}.weight" in adapter.dense:
            out, inp = adapter.dense[f"{module}.weight"].shape
            set_module(base.model, module, torch.nn.Linear(inp, out, f"{module}.bias" in adapter.dense).to(kind))
    with torch.no_grad():
        for key, value in adapter.dense.items():
            base.model.get_parameter(key).copy_(torch.from_numpy(np.array(value)))
    wanted, plain = logits(base), logits(released.untuned(folder, task, bits, "cpu", 1))
    moved = float((plain - wanted).abs().max())
    assert moved > 0.2, "it makes no difference: the test shows nothing"
    assert float((found - wanted).abs().max()) < (1e-4 if bits == 32 else 0.05) * moved


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_peft_folder_on_a_base_of_any_bits_is_the_model_that_was_trained(
    name: str, task: TaskSpec, bits: Bits, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, data = request.getfixturevalue(name), data_of(task, request)
    base = base_model.load(folder, task, bits)
    given = global_adapter(base, 3, size=4.0 if name == "llama" else 0.4)
    lora.carry(base, given, {}, alpha_ratio=1.0, seed=0, round=1)
    wanted = loss(base, data, task)
    made = release(tmp_path / RELEASE, given, folder, task)
    found = loss(released.opened(made, "lora", folder, task, bits, "cpu"), data, task)
    plain = loss(released.untuned(folder, task, bits, "cpu", 0), data, task)
    assert abs(plain - wanted) > 0.01, "the release makes no difference: the test shows nothing"
    assert found == pytest.approx(wanted, rel=1e-5 if bits == 32 else 2e-2)
    assert abs(found - wanted) < 0.2 * abs(plain - wanted)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_release_of_a_job_that_pruned_is_the_smaller_model(
    name: str, task: TaskSpec, bits: Bits, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, data = request.getfixturevalue(name), data_of(task, request)
    base = base_model.load(folder, task, bits)
    known = pruning.groups_of(base)
    rng = np.random.default_rng(3)
    kept = units.best(known, {group.name: rng.uniform(0.1, 1.0, group.count) for group in known}, 0.5)
    given = dataclasses.replace(
        global_adapter(base, 3, size=4.0 if name == "llama" else 0.4), kept=units.pack(known, kept)
    )
    pruning.prune(base, kept)
    lora.carry(base, given, {}, alpha_ratio=1.0, seed=0, round=1)
    wanted, left = loss(base, data, task), sum(linear.out * linear.inp for linear in base.linears.values())
    made = tmp_path / RELEASE
    export_peft(given, made, spec=spec(task), base="elsewhere", groups=known)
    opened = released.opened(made, "lora", folder, task, bits, "cpu")
    assert sum(linear.out * linear.inp for linear in opened.linears.values()) == left
    assert loss(opened, data, task) == pytest.approx(wanted, rel=1e-5 if bits == 32 else 2e-2)
    assert "muster export --ratio" in (made / "README.md").read_text()
    (made / "pruning.json").write_text("{}")
    with pytest.raises(AdapterFault, match="the release does not load"):
        released.opened(made, "lora", folder, task, bits, "cpu")


@pytest.mark.parametrize(("name", "task"), CASES)
def test_bottleneck_adapters_and_whole_models_open_too(
    name: str, task: TaskSpec, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, data = request.getfixturevalue(name), data_of(task, request)
    base = base_model.load(folder, task)
    shapes = {block: bottleneck.shapes(site, 4) for block, site in bottleneck.sites(base).items()}
    rng = np.random.default_rng(3)
    parts = {
        bottleneck.tensor_names(block)[part]: rng.normal(0, 0.3, shape).astype(np.float32)
        for block, sizes in shapes.items()
        for part, shape in sizes.items()
    }
    given = dataclasses.replace(empty_adapter(base), notes={START_NOTE: "bottleneck"})
    given = dataclasses.replace(given, dense={**given.dense, **parts})
    lora.merge(base, given)
    wanted = loss(base, data, task)
    made = release(tmp_path / RELEASE, given, folder, task, "bottleneck")
    assert loss(released.opened(made, "bottleneck", folder, task, 32, "cpu"), data, task) == pytest.approx(wanted)

    lora.detach(base)
    base.restore()
    whole = whole_adapter(base, 1, 0.05)
    lora.merge(base, whole)
    wanted = loss(base, data, task)
    facts = _facts(folder, task)
    export_whole(whole, tmp_path / "whole", spec=spec(task), facts=facts, base=str(folder))
    opened = released.opened(tmp_path / "whole", "model", None, task, 32, "cpu")
    assert loss(opened, data, task) == pytest.approx(wanted, rel=1e-5)


def _facts(folder: Path, task: TaskSpec) -> Any:
    """What the export of a whole model needs of its base."""
    from coordinator.core.facts import ModelFacts, ModuleSpec

    base = base_model.load(folder, task)
    return ModelFacts(
        modules=[ModuleSpec(name=one.name, out=one.out, inp=one.inp, block=one.block) for one in base.linears.values()],
        base_digest=weights.base_digest(folder), linear_params=1, other_params=1, blocks=2, hidden=32,
        config=stored_form.whole_config(base, task),
    )  # fmt: skip


def test_what_does_not_fit_its_base_does_not_load(bert: Path, gpt2: Path, tmp_path: Path) -> None:
    base = base_model.load(bert, COLOURS)
    made = release(tmp_path / RELEASE, global_adapter(base, 2), bert, COLOURS)
    with pytest.raises(AdapterFault, match="does not load"):
        released.opened(made, "lora", gpt2, STORIES, 32, "cpu")
    with pytest.raises(ModelFault, match="its base is not here"):
        released.opened(made, "lora", None, COLOURS, 32, "cpu")
    (made / "adapter_model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(AdapterFault, match="does not load"):
        released.opened(made, "lora", bert, COLOURS, 32, "cpu")


# ---- the agent


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    running = Agent()
    yield running
    running.kill()


@pytest.fixture
def made(bert: Path, tmp_path: Path, colours: Path) -> Any:
    """An order to try a release that was trained a little: its head knows the colours."""
    base = base_model.load(bert, COLOURS)
    given = dataclasses.replace(global_adapter(base, 2, size=0.0), dense=trained_head(base, colours))
    return release(tmp_path / RELEASE, given, bert, COLOURS)


def trained_head(base: Base, colours: Path) -> dict[str, Any]:
    """The head after some steps of gradient descent on the rows."""
    base.set_dense(base_model.fresh_head(base, 1))
    data = tokenize(str(colours), COLOURS, base.tokenizer)
    head = list(base.head.values())
    for tensor in head:
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam(head, lr=0.05)
    batch = data.batch(np.arange(data.rows))
    for _ in range(60):
        optimizer.zero_grad()
        logits = base.model(input_ids=batch.ids, attention_mask=batch.mask).logits
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        optimizer.step()
    return {name: tensor.detach().numpy().copy() for name, tensor in base.head.items()}


def order(folder: Path, base: Path, data: Path | str, **changes: Any) -> protocol.Evaluate:
    about = release_pack.about(folder)
    values = {
        "release": about.release, "folder": str(folder), "kind": about.kind, "task": about.task, "base": about.base,
        "base_path": str(base), "base_digest": about.base_digest, "bits": 32, "data_path": str(data), **changes,
    }  # fmt: skip
    return protocol.Evaluate(**values)


def test_what_is_for_another_base_is_not_compared_with(
    agent: Agent, bert: Path, made: Path, colours: Path, tmp_path: Path
) -> None:
    """Its tokenizer counts other tokens: the untuned base stands for it, and nothing of it is read."""
    other = tmp_path / "other"
    shutil.copytree(made, other)
    about = json.loads((other / "muster.json").read_text())
    about["base_digest"] = "0" * 64
    (other / "muster.json").write_text(json.dumps(about))
    agent.ask(probe(colours), protocol.Probed)
    untuned = agent.ask(order(made, bert, colours), protocol.Evaluated)
    found = agent.ask(order(made, bert, colours, previous=str(other)), protocol.Evaluated)
    assert found.before == untuned.before


def test_the_agent_measures_a_release_beside_what_it_replaces(
    agent: Agent, bert: Path, made: Path, colours: Path, tmp_path: Path
) -> None:
    agent.ask(probe(colours), protocol.Probed)
    found = agent.ask(order(made, bert, colours), protocol.Evaluated)
    assert found.before is not None and found.after is not None
    assert found.after.loss < found.before.loss
    assert (found.after.rows, found.before.rows) == (60, 60)
    assert found.after.accuracy is not None and found.after.accuracy > 0.6
    # The files name this device's base from now on.
    config = json.loads((made / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bert)

    other = release(tmp_path / "tiny.r1-2", _nonsense(bert), bert, COLOURS)
    worse = agent.ask(order(other, bert, colours, previous=str(made)), protocol.Evaluated)
    assert worse.before == found.after, "it is compared with what is in use"
    assert worse.after is not None and worse.after.loss > 3 * found.after.loss


def _nonsense(bert: Path) -> Adapter:
    return global_adapter(base_model.load(bert, COLOURS), 4, size=40.0)


def test_a_share_of_the_rows_is_enough(agent: Agent, bert: Path, made: Path, colours: Path) -> None:
    agent.ask(probe(colours), protocol.Probed)
    found = agent.ask(order(made, bert, colours, share=0.25, rows=10), protocol.Evaluated)
    assert found.after is not None and found.after.rows == 10
    assert agent.ask(order(made, bert, colours, share=0.25), protocol.Evaluated).after.rows == 15  # type: ignore[union-attr]  # there are rows


def test_rows_that_training_left_out_are_measured_on(agent: Agent, bert: Path, made: Path, colours: Path) -> None:
    base = base_model.load(bert, COLOURS)
    data = tokenize(str(colours), COLOURS, base.tokenizer)
    held_out, learned = data.held_out(0.2), data.learned(0.2)
    assert (held_out.rows, learned.rows) == (12, 48)
    assert sorted([*rows_of(held_out), *rows_of(learned)]) == sorted(rows_of(data))
    agent.ask(probe(colours), protocol.Probed)
    found = agent.ask(order(made, bert, colours, hold_out=0.2, share=0.25, trained_on=True), protocol.Evaluated)
    opened = released.opened(made, "lora", bert, COLOURS, 32, "cpu")
    wanted = evaluation.evaluate(opened, held_out, 16)
    assert found.after is not None
    assert (found.after.rows, found.after.trained_on) == (12, False)
    assert found.after.loss == pytest.approx(wanted.loss, rel=1e-5)
    # Of too few rows none is left out: those that were trained on do then, and it says so.
    few = agent.ask(order(made, bert, colours, hold_out=0.01, share=0.25, trained_on=True), protocol.Evaluated)
    assert few.after is not None and (few.after.rows, few.after.trained_on) == (15, True)


def rows_of(data: TokenData) -> list[tuple[int, ...]]:
    return [(*map(int, data.ids[data.starts[i] : data.starts[i + 1]]), int(data.targets[i])) for i in range(data.rows)]


def test_without_rows_it_is_loaded(agent: Agent, bert: Path, made: Path, colours: Path) -> None:
    agent.ask(probe(colours), protocol.Probed)
    assert agent.ask(order(made, bert, ""), protocol.Evaluated) == protocol.Evaluated(release=RELEASE)


def test_what_is_whose_fault(agent: Agent, bert: Path, made: Path, colours: Path, tmp_path: Path) -> None:
    agent.ask(probe(colours), protocol.Probed)
    unfit = agent.ask(order(made, tmp_path / "none", colours), protocol.Unfit)
    assert unfit.kind == "base"
    unfit = agent.ask(order(made, bert, colours, base_digest="0" * 64), protocol.Unfit)
    assert (unfit.kind, "the release is for 000000000000" in unfit.reason) == ("base", True)
    unfit = agent.ask(order(made, bert, tmp_path / "none.jsonl"), protocol.Unfit)
    assert unfit.kind == "data"
    spoil(made, float("nan"))
    unfit = agent.ask(order(made, bert, colours), protocol.Unfit)
    assert (unfit.kind, unfit.reason) == ("score", "it answers with what is no number")
    (made / "adapter_model.safetensors").unlink()
    unfit = agent.ask(order(made, bert, colours), protocol.Unfit)
    assert unfit.kind == "load"


def spoil(folder: Path, value: float) -> None:
    """Fill the tensors of a release with `value`."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, value) for name, tensor in load_file(path).items()}, path)


# ---- asked on the device


def ask(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_daemon.service", words[0], "--config", str(config), *words[1:]],
        capture_output=True, text=True, timeout=110, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The settings file of a device without a release."""
    path = tmp_path / "edge.toml"
    path.write_text(f'fleet = "lab"\ndevice = "edge-01"\nstate_dir = "{tmp_path / "state"}"\n')
    return path


def put_in_use(config: Path, folder: Path, base: Path) -> None:
    from edge_daemon.adapters.releases import ReleaseFolder

    releases = ReleaseFolder(config.parent / "state")
    releases.root.mkdir(parents=True)
    folder.rename(releases.folder(folder.name))
    released.name_base(releases.folder(folder.name), base)
    releases.activate(folder.name)
    write_whole(config.parent / "state" / "journal", msgspec.msgpack.encode(Journal()))


def test_a_device_without_a_release_says_so(config: Path) -> None:
    done = ask(config, "classify", "red")
    assert done.returncode == 2
    assert done.stderr.startswith("muster-edge: no release is in use on this device (")
    assert done.stderr.count("\n") == 1


def test_the_precision_is_that_of_the_trial_after_a_rollback_too(tmp_path: Path) -> None:
    from edge_daemon import asking
    from edge_daemon.core.rollout import Installed, Rollout

    there = (Installed(id="tiny.r1-1", number=1, bits=4), Installed(id="tiny.r2-2", number=2, bits=16))
    for active, bits in (("tiny.r1-1", 4), ("tiny.r2-2", 16), ("other.r1-1", 32)):
        journal = Journal(rollout=Rollout(active=active, installed=there))
        write_whole(tmp_path / "journal", msgspec.msgpack.encode(journal))
        assert asking._bits(tmp_path) == bits


def test_classify_answers_with_a_label(config: Path, made: Path, bert: Path) -> None:
    put_in_use(config, made, bert)
    done = ask(config, "classify", "red red red the sea", "the green hill green")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["red", "green"]
    assert all(0.3 < float(line[1]) <= 1.0 for line in lines)
    assert lines[0][2] == "red red red the sea"
    (one,) = [json.loads(line) for line in ask(config, "classify", "--json", "--", "red red red").stdout.splitlines()]
    assert one["label"] == "red" and set(one) == {"text", "label", "probability"}
    done = ask(config, "generate", "red")
    assert (done.returncode, done.stderr) == (
        2,
        f"muster-edge: release {RELEASE} can't generate: use muster-edge classify\n",
    )


def test_generate_continues_a_prompt(config: Path, gpt2: Path, tmp_path: Path) -> None:
    base = base_model.load(gpt2, STORIES)
    put_in_use(config, release(tmp_path / RELEASE, global_adapter(base, 2), gpt2, STORIES), gpt2)
    done = ask(config, "generate", "--tokens", "5", "sun rain")
    assert done.returncode == 0, done.stderr
    assert 0 < len(done.stdout.strip()) <= 60


def test_without_torch_it_says_what_to_install(config: Path, made: Path, bert: Path, tmp_path: Path) -> None:
    put_in_use(config, made, bert)
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')\n")
    paths = os.pathsep.join([str(tmp_path / "without"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "edge_daemon.service", "classify", "--config", str(config), "red"],
        capture_output=True, text=True, timeout=110, env={**os.environ, "PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "muster-edge: torch is not installed here; the model needs it: pip install 'muster[train]'\n"
    )


def test_the_held_out_rows_are_the_same_each_time(bert: Path, tmp_path: Path) -> None:
    base = base_model.load(bert, COLOURS)
    path = write_jsonl(tmp_path / "rows.jsonl", colour_rows(10))
    data = tokenize(str(path), COLOURS, base.tokenizer)
    some = data.some(0.34, 0)
    assert some.rows == 4
    assert list(some.targets) == [int(data.targets[i]) for i in (0, 3, 6, 9)]
    whole, part = data.batch(np.array([3])), some.batch(np.array([1]))
    assert torch.equal(whole.ids, part.ids)
    assert data.some(1.0, 0) is data
    assert data.some(1.0, 3).rows == 3
