"""Reading, checking and ordering local data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from shared.jobs import TaskSpec
from shared.modeling import data
from shared.modeling.data import IGNORED, DataStore, SampleOrder, tokenize
from shared.modeling.faults import DataFault
from tests.training.tiny_models import COLOURS, STORIES, colour_rows, write_jsonl


@pytest.fixture(scope="module")
def words(bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(bert))


@pytest.fixture(scope="module")
def bpe(gpt2: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(gpt2))


def test_facts_count_rows_and_labels_only_where_the_owner_allows(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in (0, 2, 2, 1, 2)]
    plain = write_jsonl(tmp_path / "d.jsonl", rows)
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        assert data.describe(str(path), share_labels=True).labels == {"0": 1, "1": 1, "2": 3}
        assert data.describe(str(path), share_labels=False).labels == {}
        assert data.describe(str(path), share_labels=False).rows == 5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no rows"),
        ("\n\n", "no rows"),
        ('{"text": "a", "label": 0}\n{"label": 1}\n', "row 2 has no field 'text'"),
        ('{"text": "a"}\n', "row 1 has no field 'label'"),
        ('{"text": 3, "label": 1}\n', "row 1 has no text in field 'text'"),
        ('{"text": "a", "label": 3}\n', "row 1 has label 3, the job has labels 0 to 2"),
        ('{"text": "a", "label": -1}\n', "row 1 has label -1"),
        ('{"text": "a", "label": true}\n', "row 1 has label true"),
        ('{"text": "a", "label": "pink"}\n', 'row 1 has label "pink"'),
        ("[1]\n", "row 1 is not a JSON object"),
        ('{"text": "a", "label": 0}\n{"te\n', "row 2 is not JSON"),
    ],
)
def test_a_row_that_does_not_fit_is_named_in_one_line(tmp_path: Path, words: Any, content: str, says: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataFault) as error:
        tokenize(str(path), COLOURS, words)
    assert str(error.value).startswith(f"{path}: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files_are_named(tmp_path: Path, words: Any) -> None:
    with pytest.raises(DataFault, match="no such data file"):
        tokenize(str(tmp_path / "none.jsonl"), COLOURS, words)
    damaged = tmp_path / "d.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"text": "a", "label": 0}\n' * 50)[:-20])
    with pytest.raises(DataFault, match="can't be read"):
        tokenize(str(damaged), COLOURS, words)
    turned = bytearray(gzip.compress(b'{"text": "a", "label": 0}\n' * 500))
    turned[20] ^= 0xFF
    damaged.write_bytes(turned)
    with pytest.raises(DataFault, match="can't be read"):
        tokenize(str(damaged), COLOURS, words)


def test_labels_may_be_names(tmp_path: Path, words: Any) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "sea", "label": name} for name in ("blue", "red")])
    assert tokenize(str(path), COLOURS, words).targets.tolist() == [2, 0]


def test_a_batch_is_padded_to_eight_and_masks_the_padding(tmp_path: Path, words: Any) -> None:
    rows = [{"text": " ".join(["sea"] * n), "label": 0} for n in (1, 8, 40)]
    tokens = tokenize(str(write_jsonl(tmp_path / "d.jsonl", rows)), COLOURS, words)
    assert tokens.lengths.tolist() == [3, 10, 16]
    batch = tokens.batch(np.array([1, 0]))
    assert batch.ids.shape == (2, 16)
    assert batch.mask.sum(dim=1).tolist() == [10, 3]
    assert batch.ids[1, 3:].unique().tolist() == [words.pad_token_id]
    assert tokens.batch(np.array([0])).ids.shape == (1, 8)


def test_only_completion_tokens_and_the_end_are_learned(tmp_path: Path, bpe: Any) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "red green", "completion": "the sea"}])
    tokens = tokenize(str(path), STORIES, bpe)
    batch = tokens.batch(np.array([0]))
    learned = batch.targets[0] != IGNORED
    assert bpe.decode(batch.ids[0][learned]) == " the sea<|end|>"
    assert bpe.decode(batch.ids[0][: tokens.lengths[0]]) == "<|end|>red green the sea<|end|>"
    assert batch.weight == int(learned.sum()) == tokens.weight(np.array([0]))


@pytest.mark.parametrize(("prompt", "completion"), [(100, 3), (3, 100), (100, 100)])
def test_a_long_prompt_loses_its_beginning_and_something_is_left_to_learn(
    tmp_path: Path, bpe: Any, prompt: int, completion: int
) -> None:
    row = {"prompt": " ".join(["red"] * prompt), "completion": " ".join(["sea"] * completion)}
    tokens = tokenize(str(write_jsonl(tmp_path / "d.jsonl", [row])), STORIES, bpe)
    assert tokens.lengths.tolist() == [STORIES.max_tokens]
    assert 0 < tokens.targets[0] < STORIES.max_tokens
    assert tokens.weight(np.array([0])) >= min(completion, STORIES.max_tokens // 2)


def test_every_sample_comes_once_a_pass_in_an_order_of_seed_and_round() -> None:
    order = SampleOrder(rows=10, seed=1, round=2)
    taken = np.concatenate([order.take(position, 4) for position in range(0, 20, 4)])
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken.tolist() == order.take(0, 20).tolist()
    assert taken.tolist() == SampleOrder(10, 1, 2).take(0, 20).tolist()
    assert taken.tolist() != SampleOrder(10, 1, 3).take(0, 20).tolist()
    assert len(order.take(3, 35)) == 35


def test_data_is_tokenised_once_until_file_or_task_changes(tmp_path: Path, words: Any) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", colour_rows(5))
    store = DataStore()
    first = store.load(str(path), COLOURS, words, "w")
    assert store.load(str(path), COLOURS, words, "w") is first
    assert store.load(str(path), COLOURS, words, "w", rows=3).rows == 3
    assert store.loads == 2
    write_jsonl(path, colour_rows(6))
    assert store.load(str(path), COLOURS, words, "w").rows == 6
    shorter = TaskSpec(kind="classification", dataset="colours", labels=COLOURS.labels, max_tokens=4)
    assert store.load(str(path), shorter, words, "w").lengths.max() == 4


def test_a_hub_id_is_only_tried_where_it_is_allowed(words: Any) -> None:
    with pytest.raises(DataFault, match="no such data file"):
        tokenize("nobody/nothing", COLOURS, words)


def test_batches_are_what_training_takes(tmp_path: Path, words: Any) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", colour_rows(7))
    tokens = tokenize(str(path), COLOURS, words)
    taken = list(data.batches(tokens, seed=3, round=1, batch=4, steps=3))
    order = SampleOrder(7, 3, 1)
    assert json.dumps([b.targets.tolist() for b in taken]) == json.dumps(
        [tokens.targets[order.take(4 * step, 4)].tolist() for step in range(3)]
    )
