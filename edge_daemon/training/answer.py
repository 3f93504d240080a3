"""The released model answers, in a process of its own: `muster-edge classify` and `muster-edge generate`.

`python -m edge_daemon.training.answer classify --folder RELEASE --bits 32 -- TEXT...`. It reads the folder alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared import release_pack
from shared.errors import MusterError, UserError

if TYPE_CHECKING:
    from shared.modeling.base_model import Base

ASKS = {"classification": "classify", "causal": "generate"}
"""Kind of a task -> what such a model can be asked."""


def classify(base: Base, labels: list[str], texts: list[str]) -> list[dict[str, Any]]:
    """The most likely label of each text, with its probability."""
    import torch

    answers = []
    for text in texts:
        given = base.tokenizer(text, truncation=True, max_length=base.max_tokens, return_tensors="pt").to(base.device)
        with torch.inference_mode():
            logits = base.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
        shares = logits.float().softmax(dim=-1)[0]
        best = int(shares.argmax())
        answers.append({"text": text, "label": labels[best], "probability": round(float(shares[best]), 4)})
    return answers


def generate(base: Base, prompts: list[str], tokens: int) -> list[dict[str, Any]]:
    """The likeliest continuation of each prompt, at most so many tokens."""
    import torch

    answers = []
    base.model.config.use_cache = True
    end = base.tokenizer.eos_token_id
    for prompt in prompts:
        given = base.tokenizer(prompt, return_tensors="pt").to(base.device)
        with torch.inference_mode():
            ids = base.model.generate(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=tokens,
                do_sample=False, eos_token_id=end, pad_token_id=end if end is not None else 0,
            )  # fmt: skip
        text = base.tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append({"prompt": prompt, "completion": text})
    return answers


def answers(folder: Path, ask: str, texts: list[str], bits: Any, tokens: int) -> list[dict[str, Any]]:
    """What the model in `folder` says. Raises `UserError` where it can't be asked that, or does not load."""
    about = release_pack.about(folder)
    can = ASKS.get(about.task.kind)
    if can is None:
        raise UserError(f"release {about.release} is of a test task ({about.task.kind}): no text can be asked of it")
    if can != ask:
        raise UserError(f"release {about.release} can't {ask}: use muster-edge {can}")
    import torch

    from shared.modeling import released

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = released.opened(folder, about.kind, released.base_of(folder), about.task, bits, device)
    return classify(base, about.task.labels, texts) if ask == "classify" else generate(base, texts, tokens)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the process. Exit code 2: it can't be answered, said in one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ask", choices=sorted(ASKS.values()))
    parser.add_argument("--folder", required=True)
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("texts", nargs="+")
    asked = parser.parse_args(argv)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        found = answers(Path(asked.folder), asked.ask, asked.texts, asked.bits, asked.tokens)
    except ModuleNotFoundError as error:
        return _fault(f"{error.name} is not installed here; the model needs it: pip install 'muster[train]'")
    except MusterError as error:
        return _fault(str(error))
    for one in found:
        sys.stdout.write((json.dumps(one, ensure_ascii=False) if asked.json else _line(one)) + "\n")
    return 0


def _line(answer: dict[str, Any]) -> str:
    if "completion" in answer:
        return str(answer["completion"])
    return f"{answer['label']}\t{answer['probability']:.3f}\t{answer['text']}"


def _fault(text: str) -> int:
    sys.stderr.write(f"muster-edge: {' '.join(text.split())}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
