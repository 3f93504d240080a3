"""Local text as tokens: reading, checking against the task, a reproducible order of samples, padded batches.

Rows are JSON objects, one a line. A classification row has a text and a label (its number, or its name out of the
task's labels), or a picture instead of the text; a causal row has a prompt and a completion, and only the completion's
tokens are learned.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from shared import held_out
from shared.files import UNREADABLE
from shared.jobs import TaskSpec
from shared.messages import DatasetFacts
from shared.modeling.faults import DataFault, one_line

Ints = npt.NDArray[np.int64]
Beat = Callable[[str], None]
Row = dict[str, Any]

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:\w+)?$")
_TOKENIZE_ROWS = 512
_PAD_TO = 8
_IMAGE = "image"


def silent(what: str) -> None:
    """A beat that nobody hears."""


def read_rows(source: str, *, hub: bool = False) -> Iterator[tuple[int, Row]]:
    """Row number (from 1) and row of a JSONL(.gz) file, or with `hub` of a hub data set "id" or "id:split".

    Raises `DataFault` where the source is missing, unreadable or a line is no JSON object.
    """
    path = Path(source).expanduser()
    if path.is_file():
        yield from _file_rows(path)
    elif hub and _HUB_ID.match(source) and not source.endswith((".jsonl", ".gz", ".json")):
        yield from enumerate(_hub_rows(source), start=1)
    else:
        raise DataFault(f"{source}: no such data file")


def describe(
    source: str, *, share_labels: bool, label_field: str = "label", hub: bool = False, hold_out: float = 0.0
) -> DatasetFacts:
    """Rows of a data set that are trained on and, where its owner allows it, how many have each label.

    Raises `DataFault`, also where there is no row.
    """
    rows, labels, left_out = 0, Counter[str](), held_out.places(sys.maxsize, hold_out)
    for _, row in read_rows(source, hub=hub):
        rows += 1
        if share_labels and rows - 1 not in left_out and isinstance(row.get(label_field), (int, str)):
            labels[str(row[label_field])] += 1
    if not rows:
        raise DataFault(f"{source}: no rows")
    return DatasetFacts(rows=rows - len(held_out.places(rows, hold_out)), labels=dict(sorted(labels.items())))


@dataclass(frozen=True)
class TokenData:
    """Tokenised samples: `ids[starts[i]:starts[i + 1]]`; `targets[i]` is the label, or where the completion begins.

    Of pictures `ids` are float32 numbers, as many of each.
    """

    kind: str
    ids: npt.NDArray[Any]
    starts: Ints
    targets: Ints
    pad_id: int

    @property
    def rows(self) -> int:
        """How many samples there are."""
        return len(self.targets)

    @property
    def lengths(self) -> Ints:
        """Tokens of each sample."""
        return np.diff(self.starts)

    def batch(self, indices: Ints, device: str = "cpu") -> Batch:
        """The samples at `indices`, padded on the right to the longest of them, rounded up to eight tokens."""
        if self.kind == "image":
            pictures, labels = self.ids.reshape(self.rows, -1)[indices], self.targets[indices]
            return Batch(
                ids=torch.from_numpy(pictures).to(device),
                mask=torch.ones((len(indices), 1), dtype=torch.long, device=device),
                targets=torch.from_numpy(labels).to(device),
                weight=len(indices),
            )
        lengths = self.starts[indices + 1] - self.starts[indices]
        width = int(-(-lengths.max() // _PAD_TO) * _PAD_TO)
        ids = np.full((len(indices), width), self.pad_id, dtype=np.int64)
        positions = np.arange(width)
        mask = positions[None, :] < lengths[:, None]
        ids[mask] = np.concatenate([self.ids[self.starts[i] : self.starts[i + 1]] for i in indices])
        targets = self.targets[indices]
        if self.kind == "causal":
            learned = mask & (positions[None, :] >= targets[:, None])
            targets = np.where(learned, ids, IGNORED)
        return Batch(
            ids=torch.from_numpy(ids).to(device),
            mask=torch.from_numpy(mask.astype(np.int64)).to(device),
            targets=torch.from_numpy(targets).to(device),
            weight=int((targets[:, 1:] != IGNORED).sum()) if self.kind == "causal" else len(indices),
        )

    def some(self, share: float, most: int) -> TokenData:
        """Every so many-th sample of all, so that `share` of them is left, and at most `most` (0: all of these)."""
        return self._only(np.asarray(held_out.some(self.rows, share, most), dtype=np.int64))

    def learned(self, hold_out: float) -> TokenData:
        """What is trained on: all but the share that is left out (`shared.held_out`)."""
        return self._only(np.delete(np.arange(self.rows), self._left_out(hold_out)))

    def held_out(self, hold_out: float) -> TokenData:
        """The share that is left out; it may hold nothing."""
        return self._only(self._left_out(hold_out))

    def _left_out(self, share: float) -> Ints:
        return np.asarray(held_out.places(self.rows, share), dtype=np.int64)

    def _only(self, places: Ints) -> TokenData:
        if len(places) == self.rows:
            return self
        parts = [self.ids[:0], *(self.ids[self.starts[i] : self.starts[i + 1]] for i in places)]
        starts = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return dataclasses.replace(self, ids=np.concatenate(parts), starts=starts, targets=self.targets[places])

    def weight(self, indices: Ints) -> int:
        """What the samples at `indices` weigh in a mean loss: rows, or completion tokens."""
        if self.kind != "causal":
            return len(indices)
        return int((self.starts[indices + 1] - self.starts[indices] - self.targets[indices]).sum())


IGNORED = -100
"""Target of a token that is not learned."""


@dataclass(frozen=True)
class Batch:
    """Padded samples as tensors (rows x width); `weight`: rows, or completion tokens, that the mean loss is over.

    Of pictures `ids` are their numbers, and the mask is a single one per row.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    weight: int


@dataclass
class DataStore:
    """Tokenised data sets by file, tokenizer and task; keeps the last `keep` of them."""

    keep: int = 2
    loads: int = 0
    """How often a data set was read and tokenised, not found loaded."""
    _held: dict[tuple[object, ...], TokenData] = field(default_factory=dict)

    def load(
        self, source: str, task: TaskSpec, tokenizer: Any, tokenizer_key: str, *, rows: int = 0, hub: bool = False,
        beat: Beat = silent,
    ) -> TokenData:  # fmt: skip
        """The data of `source` (its first `rows`; 0: all) for `task`. `tokenizer_key` names the tokenizer's content."""
        path = Path(source).expanduser()
        stat = path.stat() if path.is_file() else None
        version = (stat.st_size, stat.st_mtime_ns) if stat else ()
        key = (source, version, tokenizer_key, msgspec.json.encode(task), rows)
        if key not in self._held:
            while len(self._held) >= self.keep:
                del self._held[next(iter(self._held))]
            self.loads += 1
            self._held[key] = tokenize(source, task, tokenizer, rows=rows, hub=hub, beat=beat)
        return self._held[key]


def tokenize(
    source: str, task: TaskSpec, tokenizer: Any, *, rows: int = 0, hub: bool = False, beat: Beat = silent
) -> TokenData:
    """Read and tokenise `source`. Raises `DataFault` naming the row of the first fault, and where there is no row."""
    ids: list[npt.NDArray[Any]] = []
    targets: list[int] = []
    encode: _Encode = _ENCODERS.get(task.kind, _encode_classification)
    number: Any = np.float32 if task.kind == "image" else np.int32
    for chunk in _chunks(read_rows(source, hub=hub), rows):
        for sample, target in encode(source, chunk, task, tokenizer):
            ids.append(np.asarray(sample, dtype=number))
            targets.append(target)
        beat("tokenising")
    if not ids:
        raise DataFault(f"{source}: no rows")
    starts = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(sample) for sample in ids], out=starts[1:])
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id or 0
    return TokenData(
        kind=task.kind, ids=np.concatenate(ids), starts=starts, targets=np.asarray(targets, dtype=np.int64),
        pad_id=int(pad),
    )  # fmt: skip


@dataclass(frozen=True)
class SampleOrder:
    """An endless, reproducible order of `rows` samples: one shuffled pass after the other.

    Of `parts` agents that divide it, `part` takes every `parts`-th place.
    """

    rows: int
    seed: int
    round: int
    part: int = 0
    parts: int = 1

    def take(self, position: int, count: int) -> Ints:
        """The samples at places `position` .. `position + count` of this part of the order."""
        return self._stretch(position * self.parts, count * self.parts)[self.part :: self.parts]

    def _stretch(self, position: int, count: int) -> Ints:
        parts: list[Ints] = []
        while count > 0:
            epoch, offset = divmod(position, self.rows)
            part = self._pass(epoch)[offset : offset + count]
            parts.append(part)
            position += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def _pass(self, epoch: int) -> Ints:
        return np.random.default_rng([self.seed, self.round, epoch]).permutation(self.rows)


def batches(data: TokenData, seed: int, round: int, batch: int, steps: int) -> Iterator[Batch]:
    """The batches of `steps` optimizer steps of a round, as training takes them."""
    order = SampleOrder(data.rows, seed, round)
    for step in range(steps):
        yield data.batch(order.take(step * batch, batch))


def _file_rows(path: Path) -> Iterator[tuple[int, Row]]:
    decoder = msgspec.json.Decoder()
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = decoder.decode(line)
                if not isinstance(row, dict):
                    raise DataFault(f"{path}: row {number} is not a JSON object")
                yield number, row
    except msgspec.DecodeError as error:
        raise DataFault(f"{path}: row {number} is not JSON: {error}") from error
    except UNREADABLE as error:
        raise DataFault(f"{path}: can't be read: {error}") from error


def _hub_rows(source: str) -> Iterable[Row]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise DataFault(f"{source}: a hub data set needs the package datasets (extra hub)") from None
    name, _, split = source.partition(":")
    try:
        rows: Iterable[Row] = datasets.load_dataset(name, split=split or "train", trust_remote_code=False)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataFault(f"{source}: the hub data set can't be loaded: {one_line(error)}") from error
    return rows


def _chunks(rows: Iterator[tuple[int, Row]], limit: int) -> Iterator[list[tuple[int, Row]]]:
    chunk: list[tuple[int, Row]] = []
    for count, row in enumerate(rows, start=1):
        chunk.append(row)
        if len(chunk) == _TOKENIZE_ROWS:
            yield chunk
            chunk = []
        if count == limit:
            break
    if chunk:
        yield chunk


def _encode_classification(
    source: str, chunk: list[tuple[int, Row]], task: TaskSpec, tokenizer: Any
) -> Iterator[tuple[list[int], int]]:
    texts = [_text(source, number, row, task.text_field) for number, row in chunk]
    labels = [_label(source, number, row, task) for number, row in chunk]
    encoded = tokenizer(texts, truncation=True, max_length=task.max_tokens)["input_ids"]
    for (number, _), sample, label in zip(chunk, encoded, labels, strict=True):
        if not sample:
            raise DataFault(f"{source}: row {number} has no tokens")
        yield sample, label


def _encode_causal(
    source: str, chunk: list[tuple[int, Row]], task: TaskSpec, tokenizer: Any
) -> Iterator[tuple[list[int], int]]:
    prompts = [_text(source, number, row, task.prompt_field) for number, row in chunk]
    completions = [_text(source, number, row, task.completion_field) for number, row in chunk]
    before = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    after = tokenizer([_joined(*pair) for pair in zip(prompts, completions, strict=True)], add_special_tokens=False)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for prompt, completion in zip(before, after["input_ids"], strict=True):
        # A long prompt loses its beginning, so that half of the tokens at least are left to learn from.
        learned = (completion + end)[: task.max_tokens - 1]
        room = max(task.max_tokens - len(learned), task.max_tokens // 2)
        head = (start + prompt)[-room:] or start or end
        learned = learned[: task.max_tokens - len(head)]
        yield head + learned, len(head)


def _encode_image(
    source: str, chunk: list[tuple[int, Row]], task: TaskSpec, pixels: Any
) -> Iterator[tuple[npt.NDArray[np.float32], int]]:
    for number, row in chunk:
        try:
            with np.errstate(over="ignore"):  # what is no float32 is not finite then
                picture = np.asarray(row.get(_IMAGE), dtype=np.float32).reshape(-1)
        except (TypeError, ValueError):
            picture = np.zeros(0, dtype=np.float32)
        if len(picture) != pixels.count or not np.isfinite(picture).all():
            raise DataFault(f"{source}: row {number} has no {pixels.count} numbers in field {_IMAGE!r}")
        yield picture, _label(source, number, row, task)


_Encode = Callable[[str, list[tuple[int, Row]], TaskSpec, Any], Iterator[tuple[Any, int]]]
_ENCODERS: dict[str, _Encode] = {"causal": _encode_causal, "image": _encode_image}


def _joined(prompt: str, completion: str) -> str:
    """The completion as it follows the prompt: with a space before it where neither side has one."""
    if prompt and not prompt[-1].isspace() and completion and not completion[0].isspace():
        return " " + completion
    return completion


def _text(source: str, number: int, row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        what = "no field" if name not in row else "no text in field"
        raise DataFault(f"{source}: row {number} has {what} {name!r}")
    return value


def _label(source: str, number: int, row: Row, task: TaskSpec) -> int:
    value = row.get(task.label_field)
    if value is None:
        raise DataFault(f"{source}: row {number} has no field {task.label_field!r}")
    if isinstance(value, str) and value in task.labels:
        return task.labels.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(task.labels):
        return value
    raise DataFault(
        f"{source}: row {number} has label {json.dumps(value)[:40]}, the job has labels 0 to {len(task.labels) - 1}"
    )
