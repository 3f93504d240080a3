"""Tiny models, tokenizers, data files and adapters for the tests of everything that touches torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_daemon.protocol import FromAgent, ToAgent
from edge_daemon.training.control import Control
from shared import adapter
from shared.adapter import Adapter, Factors
from shared.frames import FrameReader, FrameWriter
from shared.jobs import BaseSpec, Bits, TaskSpec, TrainingSpec
from shared.messages import Assignment, BlobRef, Work
from shared.modeling import base_model, split
from shared.modeling.base_model import Base
from shared.starts import START_NOTE

WORDS = ["red", "green", "blue", "cold", "warm", "sun", "rain", "sea", "hill", "road", "bird", "fish", "the", "a"]
COLOURS = TaskSpec(kind="classification", dataset="colours", labels=["red", "green", "blue"], max_tokens=16)
STORIES = TaskSpec(kind="causal", dataset="stories", max_tokens=24)


def make_bert(folder: Path, layers: int = 2) -> Path:
    """A BERT of a few layers without a head, with a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(str(folder))
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(str(folder))
    return folder


def make_gpt2(folder: Path) -> Path:
    """A GPT-2 of two layers, with byte-level BPE."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = _bpe(folder)
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(str(folder))
    return folder


def make_llama(folder: Path, kind: str = "Llama", *, hidden: int = 32, heads: int = 4, key_heads: int = 2) -> Path:
    """A LLaMA of two layers with grouped heads, with byte-level BPE. `kind`: as transformers names one of its kind."""
    import transformers

    size = _bpe(folder)
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=key_heads, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2, **({"pad_token_id": 0} if kind == "Qwen2" else {}),
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # of Qwen2
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return folder


def _bpe(folder: Path) -> int:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, vocab_size=300, special_tokens=["<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    fast.save_pretrained(str(folder))
    return int(tokenizer.get_vocab_size())


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def colour_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts that name one colour, with its number."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = int(rng.integers(3))
        words = [WORDS[i] for i in rng.integers(3, len(WORDS), size=int(rng.integers(2, 9)))]
        words.insert(int(rng.integers(len(words) + 1)), WORDS[label])
        rows.append({"text": " ".join(words), "label": label})
    return rows


def story_rows(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        a, b = (WORDS[i] for i in rng.integers(0, len(WORDS), size=2))
        rows.append({"prompt": f"{a} {b}", "completion": f"{b} {a} the {a}"})
    return rows


def global_adapter(base: Base, rank: int, *, triplets: bool = True, size: float = 0.5, seed: int = 5) -> Adapter:
    """A global adapter of `rank` on every linear layer; as triplets, or as plain factors with a scaling."""
    rng = np.random.default_rng(seed)
    factors = {}
    for name, linear in base.linears.items():
        b = np.linalg.qr(rng.standard_normal((linear.out, rank)))[0].astype(np.float32)
        a = np.linalg.qr(rng.standard_normal((linear.inp, rank)))[0].T.astype(np.float32)
        sigma = np.sort(rng.uniform(0.1, 1.0, rank))[::-1].astype(np.float32) * np.float32(size)
        factors[name] = Factors(b=b, a=a, sigma=sigma) if triplets else Factors(b=b * sigma, a=a, scaling=0.7)
    return Adapter(
        kind="global", job="test", round=1, base_digest="d", factors=factors, dense=base_model.fresh_head(base, 1)
    )


def sided_adapter(base: Base, *, upper: bool, digest: str = "d") -> Adapter:
    """The global adapter of a model cut after block 1: LoRA on one side, every parameter of the other."""
    rng, made, of = np.random.default_rng(4), global_adapter(base, 3, size=0.3), split.places(base, base.shapes)
    mine = {name for name, place in of.items() if (place >= 1) == upper} - split.tied(base)
    dense = {name: base.model.get_parameter(name).detach().numpy() for name in sorted(mine)}
    dense = {name: one + 0.05 * rng.standard_normal(one.shape).astype(np.float32) for name, one in dense.items()}
    dense |= {name: one + rng.standard_normal(one.shape).astype(np.float32) for name, one in made.dense.items()}
    factors = {name: part for name, part in made.factors.items() if (base.linears[name].block >= 1) != upper}
    return dataclasses.replace(made, base_digest=digest, dense=dense, factors=factors, notes={START_NOTE: "sides"})


def empty_adapter(base: Base, digest: str = "d") -> Adapter:
    return Adapter(
        kind="global", job="test", round=0, base_digest=digest, factors={}, dense=base_model.fresh_head(base, 0)
    )


def assignment(
    base: Base, *, ranks: dict[str, int] | None = None, batch: int = 4, steps: int = 6, bits: Bits = 32,
    training: TrainingSpec | None = None, task: TaskSpec = COLOURS, round: int = 1, digest: str = "d",
    content: bytes = b"", score: bool = False, extra_steps: int = 0,
) -> Assignment:  # fmt: skip
    chosen = dict.fromkeys(base.linears, 2) if ranks is None else ranks
    return Assignment(
        job="test", round=round, attempt=1,
        work=Work(ranks=chosen, batch=batch, bits=bits, steps=steps, extra_steps=extra_steps, score=score),
        base=BaseSpec(model="tiny"), base_digest=digest, task=task,
        training=training or TrainingSpec(lr=1e-2, checkpoint_every=2), rounds=3, seed=7,
        adapter=BlobRef(sha=hashlib.sha256(content).hexdigest(), size=len(content)),
    )  # fmt: skip


class Pipes:
    """A `Control` and the daemon's end of its pipes; what the agent says is collected in `said`."""

    def __init__(self) -> None:
        agent_reads, daemon_writes = os.pipe()
        daemon_reads, agent_writes = os.pipe()
        self._agent_writes = os.fdopen(agent_writes, "wb")
        self.said: list[FromAgent] = []
        self.daemon = FrameWriter(os.fdopen(daemon_writes, "wb"))
        # A union of messages is no class to a checker.
        self._from_agent: FrameReader[Any] = FrameReader(os.fdopen(daemon_reads, "rb"), FromAgent)  # type: ignore[arg-type]
        reader: FrameReader[Any] = FrameReader(os.fdopen(agent_reads, "rb"), ToAgent)  # type: ignore[arg-type]
        self.control = Control(reader, FrameWriter(self._agent_writes))
        self._collector = threading.Thread(target=self._collect, daemon=True)
        self._collector.start()

    def close(self) -> None:
        """End the agent's side, so that `said` is complete."""
        self._agent_writes.close()
        self._collector.join()

    def _collect(self) -> None:
        while (message := self._from_agent.read()) is not None:
            self.said.append(message)


def write_adapter(path: Path, content: Adapter) -> bytes:
    data = adapter.write(content)
    path.write_bytes(data)
    return data


Make = Callable[[Path], Path]
