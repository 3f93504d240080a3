"""The job: what an operator asks for, as written in a TOML file and recorded by the coordinator.

Every field has its unit in its docstring line; `shared.settings.check` reports all faults of a file at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Rate = Annotated[float, Meta(gt=0.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]

TaskKind = Literal["classification", "causal", "image", "least_squares"]
Bits = Literal[4, 8, 16, 32]
Codec = Literal["fp32", "bf16", "int8"]


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the job file."""


class BaseSpec(Spec, frozen=True, kw_only=True):
    """The frozen base model."""

    model: str
    """A name from the `[models]` tables of devices and coordinator, or a hub id where owners allow it (`policy.hub`);
    for `least_squares`: "inputs x outputs"."""
    revision: str = ""
    """Commit of a hub model."""
    targets: list[str] = []
    """Last parts of the names of the linear layers to tune; empty: every linear layer of the blocks."""


class TaskSpec(Spec, frozen=True, kw_only=True):
    """What is learned, from which columns."""

    kind: TaskKind
    """`image`: pictures in classes, by a small convolutional model that is trained whole (strategy `full`).
    Of a picture, the column `image` holds its numbers in one list, channel by channel, row by row.
    `least_squares` is the task of the test agent: no torch, no base model."""
    dataset: str
    """Name of a data set in the devices' `[data]` table; what it stands for is each owner's choice."""
    labels: list[str] = []
    """Names of the classes in the order of the label numbers (classification, image)."""
    text_field: str = "text"
    """Column of the text (classification)."""
    label_field: str = "label"
    """Column of the label number, from 0 (classification, image)."""
    prompt_field: str = "prompt"
    """Column of the text that is given (causal)."""
    completion_field: str = "completion"
    """Column of the text to generate; the loss is over its tokens alone (causal)."""
    max_tokens: Annotated[int, Meta(ge=4, le=32768)] = 64
    """Tokens of a sample; longer ones are cut. Of a picture: its pixels, for the cost model alone."""


class RoundsSpec(Spec, frozen=True, kw_only=True):
    """How many rounds there are, and when one closes."""

    count: Positive = 3
    """Rounds to commit."""
    min_devices: Positive = 1
    """A round is planned once so many devices are ready."""
    quorum: Share = 0.5
    """Share of the participants whose updates suffice at the deadline."""
    deadline_s: Rate = 900.0
    """Seconds from planning to closing at the latest."""
    train_for_s: NonNegative = 0.0
    """Seconds a device may train in a round; 0: the steps decide alone. `fedpipe` and `legend` set a shorter limit, so
    that all devices of a round deliver at one time."""
    local_steps: Positive = 10
    """Optimizer steps per device and round; with `fedpipe` and `legend` up to a quarter more where a device is faster
    than was thought, and fewer where it is slower."""
    sample: Natural = 0
    """So many of the ready devices are drawn for a round; 0: all take part."""
    target: NonNegative = 0.0
    """The job ends early once an accepted round's accuracy reaches this (classification) or its loss falls to it; 0: it
    does not."""


class SplitSpec(Spec, frozen=True, kw_only=True):
    """Split learning (`mergesfl` and its rivals): devices run the lower blocks, the coordinator's top worker the rest.

    Features and labels leave the devices. Features of a lower block can be turned back into much of the text they came
    from, and labels are what they are: `clip` and `noise` weaken the first, nothing hides the second.
    """

    block: Natural = 0
    """Blocks that run on the devices; 0: the planner chooses by compute, memory and size of the features."""
    tuning: Literal["lora", "full"] = "lora"
    """What is trained on the devices: LoRA, or every parameter (at 32 bits)."""
    top_tuning: Literal["same", "lora", "full"] = "same"
    """What the top worker trains, beside the head: the same, LoRA, or every parameter. Another than on the devices
    needs `block`."""
    codec: Codec = "bf16"
    """Precision of features and of their gradients on the wire."""
    clip: NonNegative = 0.0
    """The features of a token are scaled down to this Euclidean norm at most; 0: as they are."""
    noise: NonNegative = 0.0
    """Standard deviation of Gaussian noise on every feature, as a share of `clip` (of 1 without it); 0: none."""
    step_s: Rate = 30.0
    """Seconds a step waits for a device before it goes on without it."""
    ingress: NonNegative = 0.0
    """Bytes per second of features that the coordinator takes; 0: not bounded."""
    overlap: bool = True
    """Whether a device computes the features of the next batch while it waits: then with weights one step old."""
    kl: Rate = 0.01
    """Divergence of the merged label mix from the fleet's below which a selection is even enough, in nats."""

    @property
    def above(self) -> Literal["lora", "full"]:
        """What the top worker trains."""
        return self.tuning if self.top_tuning == "same" else self.top_tuning

    @property
    def mixed(self) -> bool:
        """Whether the two sides are trained differently."""
        return self.above != self.tuning


class StrategySpec(Spec, frozen=True, kw_only=True):
    """Planner and aggregator, with their settings."""

    name: str = "uniform"
    """Planner and, where none is named below, aggregator; `docs/architecture.md` lists them under Strategies."""
    aggregator: str = ""
    """How updates become the next global adapter; empty: as the strategy's own paper does."""
    rank: Annotated[int, Meta(ge=1, le=1024)] = 8
    """LoRA rank of every tuned layer; planners may ask less of a device. Of `fedadapter`: the first width."""
    batch: Positive = 16
    """The batch a device of median speed gets."""
    batch_min: Positive = 1
    """The smallest batch a plan may ask for."""
    batch_max: Positive = 32
    """The largest batch a plan may ask for. Where batches differ, a device that could do more waits."""
    bits: Literal["auto", 4, 8, 16, 32] = "auto"
    """Precision of the frozen base; auto: the largest proven on the device that its memory holds."""
    global_rank: Annotated[int, Meta(ge=1, le=4096)] = 64
    """Hard cap of the rank of the global adapter, per module; of `fedadapter`: of the width."""
    global_codec: Codec = "fp32"
    """Precision of the global adapter, which devices fetch in each round and which is evaluated and exported. With
    `fsr`, `legend`, `fedspine` and `fresh` what rounding takes is carried over into the next round; of the factors of
    `fedit`, `hetlora` and `flexlora` it is lost, and small moves with it."""
    max_share: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """Largest share of a round's mean that one device may have: its sample count is its own claim, and where owners'
    data differ, fast devices with large batches outweigh the others: there take little more than 1 / devices of a
    round. Not with the aggregator `hetlora`, which weighs by norm."""
    warm_up_steps: Positive = 20
    """Local steps over all layers, to the end of their round, before those that matter are chosen (`fedpipe`): the
    first steps of an adapter tell little of that."""
    rescore_every: Positive = 10
    """Rounds between two measurements of how much each layer matters (`fedpipe`)."""
    server_lr: Annotated[float, Meta(gt=0.0, le=4.0)] = 1.0
    """How far a round moves the global adapter and the head: 1, to the mean of the devices; more, beyond it."""
    directions: Literal["largest", "sampled"] = "largest"
    """Which of the global adapter's directions a device of smaller rank trains: those of the largest singular values,
    or a draw in proportion to them, anew in each round."""
    prune: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.5
    """Share of the heads and FFN channels of every block that is gone in the end (strategies that prune)."""
    prune_step: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.1
    """The largest such share that goes on a device in one round."""
    prune_heads: bool = True
    """Whether attention heads go, too; else FFN channels alone. The config of BERT and GPT-2 can't say that heads are
    fewer, that of LLaMA's kind only where they divide the width: else an export brings a file of model code."""
    prune_every: Positive = 20
    """Optimizer steps between two prunings within a round; where a round is shorter, one in its middle."""
    energy: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.99
    """Share of the squared singular values that recompression keeps."""
    split: SplitSpec = SplitSpec()


class TrainingSpec(Spec, frozen=True, kw_only=True):
    """The local optimisation, the same on every device."""

    lr: Rate = 1e-3
    """Learning rate of AdamW: of factors B, of the head, of all that is trained densely."""
    lora_plus: Rate = 1.0
    """Learning rate of factors B divided by that of factors A (LoRA+, arXiv 2402.12354: above 1, about 16)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Over all rounds of the job, by round."""
    warmup_steps: Natural = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: NonNegative = 0.0
    """On dense tensors only: decaying LoRA factors would decay the global model's directions."""
    accumulation: Positive = 1
    """Micro-batches per optimizer step; the batch is what one optimizer step sees."""
    alpha_ratio: Rate = 2.0
    """LoRA alpha divided by its rank, so the scaling."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this norm; 0: not clipped."""
    checkpoint_every: Positive = 10
    """Optimizer steps between checkpoints on the device."""
    codec: Codec = "fp32"
    """Precision of the tensors in an update."""


class EvaluationSpec(Spec, frozen=True, kw_only=True):
    """The held-out evaluation on the coordinator after each round."""

    data: str = ""
    """JSONL(.gz) file on the coordinator; empty: no evaluation, every aggregate is accepted."""
    rows: Natural = 0
    """Rows used after each round, the first ones; 0: all."""
    batch: Positive = 64
    """Rows evaluated at once."""
    worse_by: NonNegative = 0.1
    """A round whose loss is more than this share above the best is refused; three in a row pause the job. Pruned
    models are compared with those as small, or smaller."""


class JobSpec(Spec, frozen=True, kw_only=True):
    """One fine-tuning run."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{1,40}\Z")]
    """What people call the job; its id adds a number."""
    base: BaseSpec
    task: TaskSpec
    seed: Natural = 0
    """Of every random choice: order of samples, fresh factors, head."""
    rounds: RoundsSpec = RoundsSpec()
    strategy: StrategySpec = StrategySpec()
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
