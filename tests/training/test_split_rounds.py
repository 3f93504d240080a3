"""Rounds of split learning: the device's loop and the top worker's conductor, with deaths and lost packets between."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from coordinator.core.planning.regulation import Regulated, Regulation
from edge_daemon.protocol import Pause, Resume
from edge_daemon.training.loop import Loop
from shared import adapter, steps, tensors
from shared.jobs import Bits, SplitSpec, TrainingSpec
from shared.messages import Assignment, Work
from shared.modeling import base_model, lora, split
from shared.modeling.data import tokenize
from tests.training.split_rig import Rig
from tests.training.tiny_models import Pipes, colour_rows, make_bert, write_jsonl

ALONE = TrainingSpec(lr=5e-3, checkpoint_every=2, max_grad_norm=0.0)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers without dropout: what it gives does not depend on who draws when."""
    from transformers import BertConfig, BertModel

    folder = make_bert(tmp_path_factory.mktemp("model") / "still")
    config = BertConfig.from_pretrained(str(folder))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = config.classifier_dropout = 0.0
    BertModel.from_pretrained(str(folder), config=config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def shares(tmp_path: Path) -> dict[str, Path]:
    return {
        name: write_jsonl(tmp_path / f"{name}.jsonl", colour_rows(24, seed=seed))
        for seed, name in enumerate(("edge-1", "edge-2", "edge-3"))
    }


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


def close(one: dict[str, Any], other: dict[str, Any], by: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=by, err_msg=name)


def whole_model(rig: Rig, device: str, folder: Path) -> dict[str, Any]:
    """The same work done by one device that has the whole model."""
    base = base_model.load(rig.model, rig.task, 32)
    data = tokenize(str(rig.shares[device]), rig.task, base.tokenizer)
    ranks = {} if rig.asked.tuning == "full" else dict.fromkeys(rig.modules, rig.rank)
    given = lora.carry(base, rig.given, ranks, alpha_ratio=rig.training.alpha_ratio, seed=3, round=1)
    work: Assignment = rig.loops[device].assignment
    order = Work(ranks=ranks, batch=rig.batch, bits=32, steps=rig.count)
    loop = Loop(base, given, data, msgspec.structs.replace(work, work=order), Pipes().control, folder)
    assert loop.run() == "complete"
    return {name: tensor.detach().numpy().copy() for name, tensor in given.named().items()}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_one_device_and_the_top_are_the_whole_model(
    still: Path, shares: dict[str, Path], tmp_path: Path, tuning: Any
) -> None:
    asked = SplitSpec(block=1, codec="fp32", step_s=5.0, overlap=False, tuning=tuning)
    rig = Rig(tmp_path / "rig", still, {"edge-1": shares["edge-1"]}, asked=asked, training=ALONE)
    rig.finish()
    whole = whole_model(rig, "edge-1", tmp_path / "whole")
    mine = rig.values("edge-1") | rig.top_values()
    lacking = whole.keys() - mine.keys()
    assert all("pooler" not in name and ".layer." not in name for name in lacking) and not lacking
    close(mine, whole, 2e-5)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("merges", [True, False])
def test_rounds_teach(still: Path, shares: dict[str, Path], tmp_path: Path, overlap: bool, merges: bool) -> None:
    asked = SplitSpec(block=1, step_s=5.0, overlap=overlap)
    rig = Rig(tmp_path / "rig", still, shares, asked=asked, count=24, training=TrainingSpec(lr=1e-2), merges=merges)
    updates = rig.finish()
    assert set(rig.ended.values()) == {"complete"}
    losses = [loss for copy in rig.top.model.copies.values() for loss in copy.losses]
    assert len(losses) == (24 if merges else 72)
    per_step = losses if merges else np.mean(np.reshape(losses, (3, 24)), axis=0)
    assert np.mean(per_step[-5:]) < 0.8 * np.mean(per_step[:5])
    assert sum(one.samples for one in updates) == 3 * 24 * 4 and len(updates) == (1 if merges else 3)
    for device, loop in rig.loops.items():
        assert (loop.position.step, loop.position.samples) == (24, 96), device
        assert len(loop.position.waits) == 24
    names = set(adapter.read_file(Path(updates[0].path)).factors)
    assert names == {name for name, block in rig.modules.items() if block >= 1}


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_devices_of_fewer_bits_take_part(still: Path, shares: dict[str, Path], tmp_path: Path, bits: Bits) -> None:
    rig = Rig(tmp_path / "rig", still, shares, bits=bits, count=4)
    rig.finish()
    assert all(loop.position.step == 4 for loop in rig.loops.values())


def test_what_is_lost_on_the_way_is_sent_again(still: Path, shares: dict[str, Path], tmp_path: Path) -> None:
    calm = Rig(tmp_path / "calm", still, shares, count=4)
    calm.finish()
    asked = SplitSpec(block=1, codec="fp32", step_s=60.0, overlap=False)
    rough = Rig(tmp_path / "rough", still, shares, count=4, lost=0.03, asked=asked)
    for loop in rough.loops.values():
        loop.again_s = 1.0
    rough.finish()
    assert rough.top.round.dropped == 0
    for device in shares:
        close(rough.values(device), calm.values(device), 0.0)
    close(rough.top_values(), calm.top_values(), 0.0)


def test_a_device_that_is_killed_takes_all_back_to_a_checkpoint(
    still: Path, shares: dict[str, Path], tmp_path: Path
) -> None:
    calm = Rig(tmp_path / "calm", still, shares)
    calm.finish()
    rig = Rig(tmp_path / "rig", still, shares)
    rig.to(5)
    rig.kill("edge-2")
    rig.start("edge-2")
    rig.finish()
    assert rig.top.round.run > 1 and rig.top.round.dropped == 0
    assert all(loop.position.step == rig.count for loop in rig.loops.values())
    for device in shares:
        close(rig.values(device), calm.values(device), 0.0)
    close(rig.top_values(), calm.top_values(), 0.0)


@pytest.mark.parametrize("merges", [True, False])
def test_a_top_that_is_killed_goes_on_from_the_last_checkpoint_that_all_hold(
    still: Path, shares: dict[str, Path], tmp_path: Path, merges: bool
) -> None:
    calm = Rig(tmp_path / "calm", still, shares, merges=merges)
    calm.finish()
    rig = Rig(tmp_path / "rig", still, shares, merges=merges)
    rig.to(5)
    rig.start_top()
    assert rig.top.round.done == 0, "nothing is decided before the devices were asked"
    rig.to(1)
    assert rig.top.round.done >= 4, "it went on from a checkpoint"
    rig.finish()
    for device in shares:
        close(rig.values(device), calm.values(device), 0.0)
    if merges:
        close(rig.top_values(), calm.top_values(), 0.0)
    mine, theirs = rig.top.model.updates(), calm.top.model.updates()
    assert [Path(a.path).read_bytes() == Path(b.path).read_bytes() for a, b in zip(mine, theirs, strict=True)]


def test_batches_follow_the_links_that_downloads_show(
    still: Path, shares: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """edge-1's download came at half the speed of plan: its batch halves, before the first step and after a death."""
    monkeypatch.setattr("coordinator.workers.top_worker.measures_link", lambda size, took: took > 0)
    seats = {name: Regulated(compute_s=0.01, transmit_s=1.0, most=8, mix=[0.5, 0.5]) for name in shares}
    plan = Regulation(participants=seats, sample_bytes=1e6, goal=[0.5, 0.5], kl=9.0)
    probe = Rig(tmp_path / "probe", still, shares, count=1)
    probe.finish()
    size = (tmp_path / "probe/global").stat().st_size
    fetched = {name: (2.0 if name == "edge-1" else 1.0) * size / 1e6 for name in shares}
    rig = Rig(tmp_path / "rig", still, shares, count=6, regulation=plan, fetched=fetched)
    rig.to(3)
    rig.kill("edge-1")
    rig.start("edge-1")
    rig.finish()
    for name, loop in rig.loops.items():
        assert loop.position.samples == 6 * (2 if name == "edge-1" else 4), name


def test_a_pause_is_none_of_what_a_device_waited(still: Path, shares: dict[str, Path], tmp_path: Path) -> None:
    asked = SplitSpec(block=1, codec="fp32", step_s=60.0, overlap=False)
    rig = Rig(tmp_path / "rig", still, shares, asked=asked)
    rig.to(2)
    control = rig.loops["edge-1"].control
    control._inbox.put(Pause(reason="the owner works"))
    time.sleep(2.0)  # the pause itself, longer than these small steps let anyone wait
    control._inbox.put(Resume())
    rig.finish()
    paused, other = rig.loops["edge-1"].position, rig.loops["edge-2"].position
    assert paused.paused_s > 0 and max(paused.waits) < paused.paused_s and max(other.waits) > 0.5 * paused.paused_s
    assert other.paused_s == 0 and other.cpu_s > 0 and paused.cpu_s > 0


def test_a_device_that_stays_away_is_not_waited_for(still: Path, shares: dict[str, Path], tmp_path: Path) -> None:
    asked = SplitSpec(block=1, codec="fp32", step_s=0.5, overlap=False)
    rig = Rig(tmp_path / "rig", still, shares, asked=asked)
    rig.to(3)
    rig.kill("edge-3")
    rig.to(rig.count)
    rig.finish()
    assert rig.top.round.dropped == 1 and rig.top.round.done == rig.count
    assert rig.loops["edge-1"].position.step == rig.count > rig.loops["edge-3"].position.step


def test_features_that_are_none_are_refused(still: Path, shares: dict[str, Path], tmp_path: Path) -> None:
    good = {name: shares[name] for name in ("edge-1", "edge-2")}
    rig = Rig(tmp_path / "rig", still, good, count=3)
    bad = rig.loops["edge-2"]
    inner = bad._line.send

    def spoiled(message: Any) -> None:
        if hasattr(message, "targets"):
            labels = np.full(4, 77, "<i4").tobytes()
            message = msgspec.structs.replace(message, targets=memoryview(labels))
        inner(message)

    bad._line.send = spoiled  # type: ignore[method-assign]  # a device that lies
    rig.finish()
    assert rig.loops["edge-1"].position.step == 3
    assert rig.top.model.copies[""].samples == 3 * 4, "of the honest one alone"


@pytest.mark.parametrize("what", ["huge", "not numbers", "odd bytes"])
def test_what_would_ruin_the_top_is_refused(still: Path, shares: dict[str, Path], tmp_path: Path, what: str) -> None:
    rig = Rig(tmp_path / "rig", still, {name: shares[name] for name in ("edge-1", "edge-2")}, count=4)
    bad = rig.loops["edge-2"]
    inner = bad._line.send

    def spoiled(message: Any) -> None:
        if hasattr(message, "targets"):
            values = np.full(np.shape(tensors.decode(message.hidden)), {"huge": 3e37}.get(what, np.nan), np.float32)
            if what == "odd bytes":
                message = msgspec.structs.replace(message, targets=memoryview(b"abc"))
            else:
                message = msgspec.structs.replace(message, hidden=tensors.encode(values, "fp32"))
        inner(message)

    bad._line.send = spoiled  # type: ignore[method-assign]  # a device that lies
    rig.finish()
    assert all(np.isfinite(value).all() for value in rig.top_values().values())
    assert rig.loops["edge-1"].position.step == 4 and rig.top.model.copies[""].samples == 4 * 4


def test_a_device_that_comes_back_after_the_end_delivers_its_last_checkpoint(
    still: Path, shares: dict[str, Path], tmp_path: Path
) -> None:
    asked = SplitSpec(block=1, codec="fp32", step_s=0.5, overlap=False)
    rig = Rig(tmp_path / "rig", still, shares, asked=asked)
    rig.to(5)
    rig.kill("edge-3")
    rig.to(rig.count)
    rig.start("edge-3")
    rig.finish()
    assert rig.ended["edge-3"] == "complete" and rig.loops["edge-3"].position.step in (2, 4)


def test_the_noise_on_features_is_the_devices_own(still: Path, shares: dict[str, Path], tmp_path: Path) -> None:
    asked = SplitSpec(block=1, codec="fp32", step_s=5.0, overlap=False, clip=1.0, noise=0.1)
    found = []
    for folder in ("one", "two"):
        rig = Rig(tmp_path / folder, still, {"edge-1": shares["edge-1"]}, asked=asked, count=1)
        loop = rig.loops["edge-1"]
        rig.finish()
        loop.base.model.train()
        again = [tensors.decode(loop._forward(1, 0).message.hidden).copy() for _ in range(2)]
        assert np.array_equal(again[0], again[1]), "the same after a rollback"
        found.append(again[0])
    assert not np.allclose(found[0], found[1], atol=1e-3), "nobody else can draw it"


def test_a_merged_batch_that_does_not_fit_is_computed_in_pieces(
    still: Path, shares: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = Rig(tmp_path / "calm", still, shares, count=3)
    calm.finish()
    inner = split.merged_step

    def small(base: Any, parts: Any, most: int = 0) -> Any:
        if not most or most > 5:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return inner(base, parts, most)

    monkeypatch.setattr(split, "merged_step", small)
    rig = Rig(tmp_path / "rig", still, shares, count=3)
    rig.finish()
    close(rig.top_values(), calm.top_values(), 1e-5)


@pytest.mark.parametrize(
    ("overlap", "which"), [(False, [4]), (True, [4]), (True, [1, 2]), (True, [3, 4]), (True, [1, 2, 3, 4])]
)
def test_gradients_that_are_lost_are_asked_for_even_if_the_end_is_said(
    still: Path, shares: dict[str, Path], tmp_path: Path, overlap: bool, which: list[int]
) -> None:
    """Between a device and the top worker two steps may be under way: a broker that dies takes both gradients along."""
    asked = SplitSpec(block=1, codec="fp32", step_s=20.0, overlap=overlap)
    calm = Rig(tmp_path / "calm", still, shares, count=4, asked=asked)
    calm.finish()
    rig = Rig(tmp_path / "rig", still, shares, count=4, asked=asked)
    for loop in rig.loops.values():
        loop.again_s = 1.0
    inner, lost = rig.send, []

    def losing(device: str, message: Any) -> None:
        step = message.step if isinstance(message, steps.Gradient) else 0
        if device == "edge-1" and step in which and step not in lost:
            lost.append(step)
        else:
            inner(device, message)

    heard: list[int] = []
    hear = rig.top.hear

    def hearing(device: str, message: steps.Up) -> None:
        if device == "edge-1" and isinstance(message, steps.Features):
            heard.append(message.step)
        hear(device, message)

    rig.send, rig.top.hear = losing, hearing  # type: ignore[method-assign]  # some messages do not arrive at first
    rig.finish()
    assert len(heard) <= 4 + len(which) + 1, f"one that lags is in step again: {heard}"
    assert lost == which and all(loop.position.step == 4 for loop in rig.loops.values())
    for device in shares:
        close(rig.values(device), calm.values(device), 0.0)
