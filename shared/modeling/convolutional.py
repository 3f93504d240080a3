"""Small convolutional models for pictures: blocks of 3x3 convolution, batch normalisation and ReLU, then two layers.

They are registered with transformers, so that an ordinary model folder (`config.json`, safetensors) holds one and
everything that reads bases reads it. `write` makes a folder with first values, the same for the same seed; its model
has no classes yet, the job's labels give them. What batch normalisation remembers is kept as parameters that no
gradient moves: so it travels, is averaged, stored and exported as all others are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from shared.errors import UserError
from shared.modeling.faults import ModelFault, one_line

KIND = "muster-cnn"
_MOMENTUM = 0.1
_EPSILON = 1e-5


@dataclass(frozen=True)
class Pixels:
    """In a tokenizer's place: how many numbers a picture has."""

    count: int
    pad_token_id: int = 0


def pixels(folder: Path) -> Pixels:
    """Of the pictures that the model in `folder` takes. Raises `ModelFault` where it is of another kind."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
        if content["model_type"] != KIND:
            raise ModelFault(f"{folder}: a {content['model_type']} model; task.kind image takes {KIND} alone")
        return Pixels(math.prod(content["image"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFault(f"{folder}: no model for pictures: {one_line(error, 160)}") from error


class CnnConfig(PretrainedConfig):  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    """A model of one block per entry of `channels`; after those numbered in `pools` a picture's sides are halved.

    `image`: channels, height and width of a picture. `hidden_size`: features below the classes.
    """

    model_type = KIND

    def __init__(
        self, channels: Sequence[int] = (16, 32), pools: Sequence[int] = (1,), image: Sequence[int] = (1, 8, 8),
        hidden_size: int = 64, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.channels, self.pools, self.image = list(channels), list(pools), list(image)
        self.hidden_size = hidden_size
        super().__init__(**kwargs)

    def shape_after(self, block: int) -> tuple[int, int, int]:
        """Channels, height and width of a sample after `block` blocks."""
        channels, height, width = self.image
        for index in range(block):
            channels = self.channels[index]
            if index in self.pools:
                height, width = height // 2, width // 2
        return channels, height, width


class _Norm(nn.Module):
    """Batch normalisation over (n x channels x height x width)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean = nn.Parameter(torch.zeros(channels))
        self.running_var = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # One value of a channel has no variance: it is normalised as in use, and teaches nothing of the others.
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] > 1:
            with torch.no_grad():
                var, mean = torch.var_mean(x, dim=(0, 2, 3))
                self.running_mean.lerp_(mean, _MOMENTUM)
                self.running_var.lerp_(var, _MOMENTUM)
            return functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, _EPSILON)
        # A server's step beyond the mean may lead below zero.
        mean, var = self.running_mean.detach(), self.running_var.detach().clamp_min(0.0)
        return functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, _EPSILON)


class _Block(nn.Module):
    def __init__(self, inp: int, out: int, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, out, 3, padding=1, bias=False)
        self.norm = _Norm(out)
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.conv(x)))
        return functional.max_pool2d(x, 2) if self.pool else x


class _Last(nn.Module):
    """From the last block's pictures to features."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inp, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.dense(x.flatten(1)))


class _Cnn(nn.Module):
    def __init__(self, config: CnnConfig) -> None:
        super().__init__()
        self.image = tuple(config.image)
        sizes = [self.image[0], *config.channels]
        self.blocks = nn.ModuleList(
            [_Block(*pair, index in config.pools) for index, pair in enumerate(zip(sizes, sizes[1:], strict=False))]
        )
        self.last = _Last(math.prod(config.shape_after(len(config.channels))), config.hidden_size)

    def forward(
        self, pixel_values: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **_: object
    ) -> BaseModelOutput:
        """`pixel_values`: (n x channels x height x width) or flat; `inputs_embeds`: instead, after some blocks."""
        x = inputs_embeds
        if x is None:
            assert pixel_values is not None
            x = pixel_values.reshape(-1, *self.image)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutput(last_hidden_state=self.last(x))


class CnnForImageClassification(PreTrainedModel):  # type: ignore[no-untyped-call]  # the same
    """The model with its classes."""

    config_class = CnnConfig
    base_model_prefix = "cnn"
    main_input_name = "pixel_values"

    def __init__(self, config: CnnConfig) -> None:
        super().__init__(config)
        self.cnn = _Cnn(config)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()  # type: ignore[no-untyped-call]  # the same

    def forward(
        self, pixel_values: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **_: object
    ) -> ImageClassifierOutput:
        """As `_Cnn.forward`, with `logits`."""
        return ImageClassifierOutput(logits=self.classifier(self.cnn(pixel_values, inputs_embeds)[0]))


AutoConfig.register(KIND, CnnConfig, exist_ok=True)
AutoModelForImageClassification.register(CnnConfig, CnnForImageClassification, exist_ok=True)


def write(
    folder: Path, *, channels: Sequence[int], pools: Sequence[int] = (), image: Sequence[int] = (1, 8, 8),
    hidden: int = 64, seed: int = 0,
) -> Path:  # fmt: skip
    """Write a model folder with first values. Raises `UserError` for sizes that make no model."""
    from safetensors.torch import save_file

    if not channels or min(*channels, *image, hidden, 1) < 1 or len(image) != 3:
        raise UserError("a convolutional model needs channels of its blocks and of the picture, height and width, >= 1")
    if not set(pools) <= set(range(len(channels))):
        raise UserError(f"there are blocks 0 to {len(channels) - 1}: none else can halve the picture")
    config = CnnConfig(channels=list(channels), pools=list(pools), image=list(image), hidden_size=hidden)
    if min(config.shape_after(len(channels))) < 1:
        raise UserError("the picture is halved away; pool after fewer blocks")
    generator = np.random.default_rng([seed, 0xC0])
    values: dict[str, torch.Tensor] = {}
    for name, parameter in sorted(_Cnn(config).named_parameters()):
        values[name] = parameter.detach().clone()
        if parameter.ndim > 1:  # He: of what a unit reads
            scale = math.sqrt(2.0 / math.prod(parameter.shape[1:]))
            values[name] = torch.from_numpy(generator.normal(0.0, scale, tuple(parameter.shape)).astype(np.float32))
        elif name.endswith("dense.bias"):
            values[name] = torch.zeros_like(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors")
    content = {
        "model_type": KIND, "channels": list(channels), "pools": list(pools), "image": list(image),
        "hidden_size": hidden,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def main(argv: list[str] | None = None) -> int:
    """`python -m shared.modeling.convolutional FOLDER`: write a model folder."""
    parser = argparse.ArgumentParser(prog="python -m shared.modeling.convolutional", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where; its files are replaced")
    parser.add_argument("--channels", type=_numbers, default=[16, 32], help="of each block (default 16,32)")
    parser.add_argument("--pools", type=_numbers, default=[1], help="blocks, from 0, that halve the picture (1)")
    parser.add_argument("--image", type=_numbers, default=[1, 8, 8], help="channels,height,width (default 1,8,8)")
    parser.add_argument("--hidden", type=int, default=64, help="features below the classes (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the first values (default 0)")
    given: Any = parser.parse_args(argv)
    try:
        write(
            given.folder, channels=given.channels, pools=given.pools, image=given.image, hidden=given.hidden,
            seed=given.seed,
        )  # fmt: skip
    except UserError as error:
        parser.error(str(error))
    return 0


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    raise SystemExit(main())
