"""Write bottleneck adapters as a folder of their own form, without torch: no PEFT folder and no base can hold them.

`bottleneck.safetensors` holds the adapters and the head by name, `bottleneck_config.json` the base and each block's
width; `muster.bottleneck.load` puts them on a model.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.core.aggregation.base import narrow
from coordinator.core.aggregation.bottleneck import PART
from coordinator.core.aggregation.registry import name_of
from coordinator.core.facts import Metrics
from coordinator.export import as_json, factory_of, metrics_lines, write_folder
from coordinator.export_tensors import tensor_file
from shared.adapter import Adapter
from shared.jobs import JobSpec


def export_bottleneck(
    adapter: Adapter, folder: Path, *, spec: JobSpec, base: str, metrics: Metrics | None = None
) -> None:
    """Write `adapter` to `folder`, whole or not at all; a former export there is replaced.

    `metrics`: the held-out evaluation to quote in the README. Raises `UserError` where `folder` can't be written.
    """
    first = f"{PART}down.weight"
    widths = {name.removesuffix(first): len(adapter.dense[name]) for name in sorted(adapter.dense) if first in name}
    config = {
        "kind": "bottleneck",
        "base_model_name_or_path": base,
        "revision": spec.base.revision or None,
        "base_digest": adapter.base_digest,
        "task": spec.task.kind,
        "activation": "gelu",
        "widths": widths,
        "labels": spec.task.labels,
    }
    files = {
        "bottleneck_config.json": as_json(config),
        "bottleneck.safetensors": tensor_file(
            {name: narrow(tensor) for name, tensor in sorted(adapter.dense.items())}, adapter.base_digest
        ),
        "README.md": _readme(adapter, widths, spec, base, metrics).encode(),
    }
    write_folder(folder, files)


def _readme(adapter: Adapter, widths: dict[str, int], spec: JobSpec, base: str, metrics: Metrics | None) -> str:
    factory = factory_of(spec)
    labels = f", num_labels={len(spec.task.labels)}" if spec.task.kind == "classification" else ""
    lines = [
        f"# {adapter.job}",
        "",
        f"Bottleneck adapters trained by Muster in {adapter.round} rounds (aggregator `{name_of(spec.strategy)}`).",
        "",
        f"- base model: `{base}`, digest `{adapter.base_digest}`",
        f"- task: {spec.task.kind} on `{spec.task.dataset}`",
        f"- blocks with an adapter: {len(widths)}" + (f", width {max(widths.values())}" if widths else ""),
        *metrics_lines(metrics),
        "",
        "After the last projection h of a block's feed-forward part: h + up(gelu(down(h))). This is not linear, so",
        "it can't be merged into the base, and no LoRA library loads it. The other tensors are the head.",
        "",
        "```python",
        "from muster.bottleneck import load",
        f"from transformers import {factory}",
        "",
        f'model = {factory}.from_pretrained("{base}"{labels})',
        'model = load(model, "path/of/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)
