"""Write a model whose every parameter was trained as an ordinary model folder, without torch.

`AutoModel....from_pretrained(folder)` gives the coordinator's model: `config.json` as the model worker described the
whole model, the parameters under the names and in the layout of transformers, and the base's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from coordinator.core.aggregation.base import narrow
from coordinator.core.aggregation.registry import name_of
from coordinator.core.facts import Metrics, ModelFacts
from coordinator.export import CONV1D_MODELS, factory_of, metrics_lines, write_folder
from coordinator.export_tensors import tensor_file
from shared import bases
from shared.adapter import Adapter
from shared.jobs import JobSpec
from shared.tensors import Array

_PICTURES = (
    "```python",
    "from transformers import AutoModelForImageClassification",
    "",
    "import shared.modeling.convolutional  # of Muster: it knows the architecture",
    "",
    'model = AutoModelForImageClassification.from_pretrained("path/of/this/folder")',
    "```",
)


def export_whole(
    adapter: Adapter, folder: Path, *, spec: JobSpec, facts: ModelFacts, base: str, metrics: Metrics | None = None
) -> None:
    """Write the model `adapter` to `folder`, whole or not at all; a former export there is replaced.

    `facts`: of the base; `base`: its folder or hub id; `metrics`: the held-out evaluation to quote in the README.
    Raises `UserError` where `folder` can't be written.
    """
    files = {
        "model.safetensors": tensor_file(_tensors(adapter.dense, facts), adapter.base_digest),
        "README.md": _readme(adapter, spec, base, metrics).encode(),
        **_tokenizer(base, spec.base.revision),
    }
    if facts.config:
        files["config.json"] = facts.config.encode()
    write_folder(folder, files)


def _tensors(dense: Mapping[str, Array], facts: ModelFacts) -> dict[str, Array]:
    """Parameters as transformers stores them: of a Conv1D W is (in x out)."""
    turned = transposed(facts)
    return {name: narrow(tensor.T if name in turned else tensor) for name, tensor in sorted(dense.items())}


def transposed(facts: ModelFacts) -> set[str]:
    """The weights that transformers stores as (in x out), where every linear layer may be among them."""
    config = json.loads(facts.config) if facts.config else {}
    return {f"{one.name}.weight" for one in facts.modules} if config.get("model_type") in CONV1D_MODELS else set()


def _tokenizer(base: str, revision: str) -> dict[str, bytes]:
    """The tokenizer's files of the base; none where there is no folder of it here."""
    folder = Path(base).expanduser()
    if not folder.is_dir():
        found = _cached(base, revision)
        if found is None:
            return {}
        folder = found
    return {name: (folder / name).read_bytes() for name in bases.TOKENIZER_FILES if (folder / name).is_file()}


def _cached(base: str, revision: str) -> Path | None:
    """Where the model worker's download of a hub model lies."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        return Path(snapshot_download(base, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):
        return None


def _readme(adapter: Adapter, spec: JobSpec, base: str, metrics: Metrics | None) -> str:
    lines = [
        f"# {adapter.job}",
        "",
        f"The whole model, trained by Muster in {adapter.round} rounds (aggregator `{name_of(spec.strategy)}`).",
        "",
        f"- base model: `{base}`, digest `{adapter.base_digest}`",
        f"- task: {spec.task.kind} on `{spec.task.dataset}`",
        f"- parameters: {sum(tensor.size for tensor in adapter.dense.values())}",
        *metrics_lines(metrics),
        "",
    ]
    if spec.task.kind == "least_squares":
        return "\n".join([*lines, "There is no transformer behind this task: read the tensor with safetensors.", ""])
    if spec.task.kind == "image":
        return "\n".join([*lines, *_PICTURES, ""])
    factory = factory_of(spec)
    usage = [
        "```python",
        f"from transformers import AutoTokenizer, {factory}",
        "",
        f'model = {factory}.from_pretrained("path/of/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
        "```",
    ]
    return "\n".join([*lines, *usage, ""])
