"""An export as its user has it: an adapter loaded by peft alone, or by `muster.bottleneck`, on the base as transformers
loads it; or the whole model by transformers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muster import bottleneck
from shared.jobs import JobSpec

if TYPE_CHECKING:
    from shared.modeling.evaluation import Quality


def quality(spec: JobSpec, base: Path, adapter: Path | None, files: Sequence[Path], *, rows: int = 0) -> list[Quality]:
    """Quality on each file (its first `rows`; 0: all) of the job's `base` under the folder `adapter`; None: untuned."""
    from shared.modeling import base_model
    from shared.modeling.data import tokenize
    from shared.modeling.evaluation import evaluate

    model = _model(spec, base, adapter)
    # Tokenizer and device are ours; the model is not.
    loaded = base_model.load(base, spec.task)
    wrapped = dataclasses.replace(loaded, model=model.eval())
    found = []
    for path in files:
        data = tokenize(str(path), spec.task, loaded.tokenizer, rows=rows)
        found.append(evaluate(wrapped, data, spec.evaluation.batch))
    return found


def _model(spec: JobSpec, base: Path, adapter: Path | None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    whole = adapter if adapter is not None and (adapter / "config.json").is_file() else None
    source = whole or base
    model: Any
    if spec.task.kind == "causal":
        model = AutoModelForCausalLM.from_pretrained(source)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(spec.task.labels))
    if adapter is None or whole is not None:
        return model
    if (adapter / "bottleneck_config.json").is_file():
        return bottleneck.load(model, adapter)
    return PeftModel.from_pretrained(model, str(adapter))
