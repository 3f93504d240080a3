"""What the model worker found out: facts of a base model, metrics of an evaluation."""

from __future__ import annotations

import msgspec

from shared.messages import BaseSource
from shared.units import Group


class ModuleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A linear layer that can be tuned: W is (out x in). `block`: index of its transformer block, -1 outside."""

    name: str
    out: int
    inp: int
    block: int = -1


class ActivationFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What backward needs of the forward pass, in bytes per sample: `block` for each block that the gradient passes,
    `fixed` for all above the blocks."""

    fixed: float
    block: float


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What planners need to know of the base; counts are parameters, sizes are per sample where it says so."""

    modules: list[ModuleSpec]
    dense: dict[str, list[int]] = {}
    """Tensors that are tuned themselves (the head, or every parameter of the base): name -> shape."""
    dense_blocks: dict[str, int] = {}
    """Of those in jobs that split the model: name -> index of its block; -1 before the blocks, their number after."""
    base_digest: str
    linear_params: int
    """Parameters in linear layers that quantization covers."""
    other_params: int
    """Parameters kept at full precision (embeddings, norms, head)."""
    blocks: int
    hidden: int
    """Width of the model: features of a token between the blocks."""
    heads: int = 1
    intermediate: int = 0
    """Width of the feed-forward layer; 0: not known."""
    largest: int = 0
    """Parameters of the largest linear layer where `modules` are no such layers; 0: they are."""
    activations: dict[str, ActivationFacts] = {}
    """As counted on the architecture, for computing in fp32 ("32") and bf16 ("16"); {}: not counted."""
    activations_gpu: dict[str, ActivationFacts] = {}
    """The same on a GPU, which keeps less; {}: as `activations`."""
    config: str = ""
    """`config.json` of a folder with the whole model; empty where the base is not tuned itself."""
    features: list[int] = []
    """Numbers that a sample has after each block; []: tokens x `hidden` after every one."""
    groups: list[Group] = []
    """Heads and FFN channels that can be pruned; [] where the job prunes nothing."""
    served: dict[str, BaseSource] = {}
    """Bits as text -> where devices can fetch the base at these; {}: nowhere."""


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Of one evaluation: accuracy for classification, `perplexity` = exp(loss per completion token) for causal."""

    loss: float
    rows: int
    accuracy: float | None = None
    perplexity: float | None = None
    pruned: float = 0.0
    """Share of the model's units that is gone (`shared.units.ratio_of`)."""
    seconds: float = 0.0
