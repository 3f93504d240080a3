"""NormalFloat layers at 8 and 4 bits: levels, error, gradients, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from shared.jobs import Bits
from shared.modeling import base_model, lora, quantization
from shared.modeling.faults import BitsFault, ModelFault
from shared.modeling.quantization import LinearNF
from tests.training.tiny_models import COLOURS, STORIES, empty_adapter, global_adapter

NF4 = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


def weight(out: int = 96, inp: int = 128) -> torch.Tensor:
    return torch.randn(out, inp, generator=torch.Generator().manual_seed(0))


def dequantized(layer: Any) -> torch.Tensor:
    if isinstance(layer, LinearNF):
        return layer.dequantized()
    import bitsandbytes

    found: torch.Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found


def test_a_program_that_loads_the_library_says_nothing() -> None:
    """On processors with bf16 products it warns of a kernel that nothing here uses."""
    code = "import shared.modeling, bitsandbytes, logging; logging.getLogger('bitsandbytes.x').warning('kernels')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == ""


def test_levels_reproduce_the_known_table_of_nf4() -> None:
    assert torch.allclose(quantization.normal_levels(4), torch.tensor(NF4), atol=1e-6)
    eight = quantization.normal_levels(8)
    assert len(eight.unique()) == 256
    assert (eight[0], eight[-1], int((eight > 0).sum())) == (-1.0, 1.0, 128)


def test_levels_of_nf8_by_hand() -> None:
    """0 is level 127. Above it ppf at 128 even steps from 0.5 to 0.9677083, by the last; below 127 steps, negated."""
    eight = quantization.normal_levels(8)
    # The first step is so short that ppf is straight: 0.4677083 / 128 sqrt(2 pi) = 0.009159; ppf(0.9677083) = 1.848131.
    assert float(eight[128]) == pytest.approx(0.0049560, abs=5e-8)
    # Half of the 128 steps up is as far as half of NF4's 8.
    assert float(eight[191]) == pytest.approx(NF4[11], abs=1e-7)
    # The last but one below: -ppf(0.9677083 - 0.4677083 / 127) = -ppf(0.9640255) = -1.799441.
    assert float(eight[1]) == pytest.approx(-0.9736547, abs=5e-8)
    above, below = np.linspace(0.5, 0.9677083, 129), np.linspace(0.5, 0.9677083, 128)
    wanted = np.concatenate([-norm.ppf(below[:0:-1]), norm.ppf(above)]) / norm.ppf(0.9677083)
    np.testing.assert_allclose(eight.numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize(("bits", "bound"), [(8, 3.2e-5), (4, 0.0092)])
def test_relative_error_of_normal_weights(bits: Bits, bound: float) -> None:
    exact = weight(512, 512)
    found = dequantized(quantization.quantized(exact, False, bits, torch.float32, "cpu"))
    assert float((found.float() - exact).square().mean() / exact.square().mean()) < bound


@pytest.mark.parametrize("bits", [8, 4])
def test_product_and_gradient_are_those_of_the_dequantized_weight(bits: Bits) -> None:
    layer = quantization.quantized(weight(), True, bits, torch.float32, "cpu")
    with torch.no_grad():
        layer.get_parameter("bias").copy_(torch.linspace(-1, 1, 96))
    x = torch.randn(5, 7, 128, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(5, 7, 96, generator=torch.Generator().manual_seed(2))
    mine, plain = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    product = layer(mine)
    product.backward(grad)
    reference = nn.functional.linear(plain, dequantized(layer).float(), layer.get_parameter("bias"))
    reference.backward(grad)
    assert torch.allclose(product, reference, atol=1e-4)
    assert mine.grad is not None
    assert plain.grad is not None
    assert torch.allclose(mine.grad, plain.grad, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_dequantized_is_kept_for_the_gradient(bits: Bits) -> None:
    layer = quantization.quantized(weight(256, 256), False, bits, torch.float32, "cpu")
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, 256, requires_grad=True))
    assert not [tensor for tensor in kept if tensor.is_floating_point() and tensor.numel() >= 256 * 256]


def held_bytes(model: nn.Module) -> int:
    """Bytes of everything the model holds, also what is no parameter (scales of blocks)."""
    storages = {}
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is None:
                continue
            storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                storages[state.absmax.data_ptr()] = state.absmax.numel() * state.absmax.element_size()
    return sum(storages.values())


def test_every_step_down_in_bits_holds_less(bert: Path) -> None:
    held = [held_bytes(base_model.load(bert, COLOURS, bits).model) for bits in (32, 16, 8, 4)]
    linear = base_model.count_parameters(base_model.load(bert, COLOURS))[0]
    assert held == sorted(held, reverse=True)
    assert held[0] - held[1] > 1.9 * linear
    assert held[1] - held[2] > 0.85 * linear
    assert held[2] - held[3] > 0.45 * linear


def test_heads_and_embeddings_are_never_quantized(bert: Path) -> None:
    base = base_model.load(bert, COLOURS, 4)
    assert all(tensor.dtype == torch.float32 for tensor in base.head.values())
    assert base.model.get_parameter("bert.embeddings.word_embeddings.weight").dtype == torch.bfloat16
    assert isinstance(base.model.get_submodule("bert.pooler.dense"), nn.Linear)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_base_of_fewer_bits_is_the_full_one_with_its_weights(
    name: str, bits: Bits, request: pytest.FixtureRequest
) -> None:
    folder, task = request.getfixturevalue(name), COLOURS if name == "bert" else STORIES
    ids = torch.arange(4, 16).reshape(2, 6)
    full, base = base_model.load(folder, task), base_model.load(folder, task, bits)
    found = []
    for one in (base, full):
        one.set_dense(base_model.fresh_head(one, 0))
        if one is full:
            for linear in base.linears:
                layer = base.model.get_submodule(linear)
                stored = layer.weight if bits == 16 else dequantized(layer)
                full.model.get_submodule(linear).weight.data.copy_(stored)
        with torch.no_grad():
            found.append(one.model(input_ids=ids).logits.float())
    # What is left is the precision of activations, bf16.
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.04


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_gradients_reach_the_factors_also_after_an_evaluation(bert: Path, bits: Bits) -> None:
    base = base_model.load(bert, COLOURS, bits)
    carried = lora.carry(
        base, global_adapter(base, 2), dict.fromkeys(base.linears, 4), alpha_ratio=2.0, seed=0, round=1
    )
    ids = torch.arange(4, 16).reshape(2, 6)
    with torch.no_grad():
        base.model(input_ids=ids)
    base.model.train()
    base.model(input_ids=ids).logits.sum().backward()
    for name, (b, a) in carried.factors.items():
        assert b.grad is not None and float(b.grad.abs().sum()) > 0, name
        assert a.grad is not None and float(a.grad.abs().sum()) > 0, name
    assert all(tensor.grad is not None for tensor in carried.dense.values())


def test_nothing_is_folded_or_merged_into_a_quantized_base(bert: Path) -> None:
    base = base_model.load(bert, COLOURS, 8)
    with pytest.raises(ModelFault, match="only an fp32 base"):
        lora.merge(base, global_adapter(base, 2))
    lora.carry(base, empty_adapter(base), dict.fromkeys(base.linears, 2), alpha_ratio=2.0, seed=0, round=1)
    with pytest.raises(BitsFault, match="merge it into an fp32 copy"):
        base.model.get_submodule("bert.encoder.layer.0.attention.self.query").merge()


def test_this_device_proves_its_bits_with_real_products() -> None:
    proven, notes = quantization.probe_bits("cpu")
    assert proven == [32, 16, 8, 4], notes
    assert notes == {}
    for bits in proven:
        assert 0 < quantization.product_error(bits, "cpu") <= quantization.ERROR_BOUNDS[bits]


def test_bits_out_of_bounds_are_not_offered_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantization.ERROR_BOUNDS, 4, 1e-9)
    proven, notes = quantization.probe_bits("cpu")
    assert proven == [32, 16, 8]
    assert "relative error 0.0087" in notes["4"]


def test_a_device_without_kernels_says_why() -> None:
    proven, notes = quantization.probe_bits("meta")
    assert proven == []
    assert set(notes) == {"32", "16", "8", "4"}
    assert all(notes.values())
