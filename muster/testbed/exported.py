"""An exported adapter as its user has it: loaded by peft alone, on the base as transformers loads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.jobs import JobSpec

if TYPE_CHECKING:
    from shared.modeling.evaluation import Quality


def quality(spec: JobSpec, base: Path, adapter: Path | None, files: Sequence[Path], *, rows: int = 0) -> list[Quality]:
    """Quality on each file (its first `rows`; 0: all) of the job's `base` under the folder `adapter`; None: untuned."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from shared.modeling import base_model
    from shared.modeling.data import tokenize
    from shared.modeling.evaluation import evaluate

    model: Any
    if spec.task.kind == "causal":
        model = AutoModelForCausalLM.from_pretrained(base)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(spec.task.labels))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    # Tokenizer and device are ours; the model is not.
    loaded = base_model.load(base, spec.task)
    wrapped = dataclasses.replace(loaded, model=model.eval())
    found = []
    for path in files:
        data = tokenize(str(path), spec.task, loaded.tokenizer, rows=rows)
        found.append(evaluate(wrapped, data, spec.evaluation.batch))
    return found
