"""What an emulation is given, found and checked before anything is started."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from muster.testbed import inputs
from muster.testbed.models import SmallGpt2
from muster.testbed.rows import write_rows
from shared.errors import SettingsError, UserError
from shared.jobs import TaskSpec


def say(_: str) -> None:
    """Nobody listens."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "news"
    place.mkdir()
    for name in ("train", "test"):
        write_rows(
            place / f"{name}.jsonl.gz", [{"text": f"text {i}", "label": i % 2, "site": i % 3} for i in range(60)]
        )
    (place / "labels.json").write_text(json.dumps({"names": ["no", "yes"]}))
    return place


def test_a_job_is_filled_with_what_the_data_folder_tells(folder: Path, tmp_path: Path) -> None:
    data = inputs.data_files(str(folder), tmp_path / "scratch", say)
    tables, spec = inputs.filled({"name": "try", "task": {"kind": "classification"}}, data, 4, "job")
    assert (spec.base.model, spec.task.dataset, spec.task.labels) == ("minilm", "news", ["no", "yes"])
    assert spec.evaluation.data == str(folder / "test.jsonl.gz")
    assert spec.rounds.min_devices == 2
    assert tables["task"]["kind"] == "classification"
    assert not (tmp_path / "scratch").exists()


def test_what_the_job_says_itself_stays(folder: Path, tmp_path: Path) -> None:
    data = inputs.data_files(str(folder), tmp_path / "scratch", say)
    given = {
        "name": "try", "base": {"model": "other"}, "rounds": {"min_devices": 4},
        "task": {"kind": "classification", "labels": ["a", "b", "c"]}, "evaluation": {"rows": 5},
    }  # fmt: skip
    _, spec = inputs.filled(given, data, 4, "job")
    assert (spec.base.model, spec.task.labels, spec.rounds.min_devices) == ("other", ["a", "b", "c"], 4)
    assert spec.evaluation.rows == 5


def test_a_data_folder_can_be_named_in_muster_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSTER_DATA", str(tmp_path))
    monkeypatch.chdir("/")
    inputs.check_data("news")
    with pytest.raises(UserError, match="--data olds: no such folder"):
        inputs.check_data("olds")
    (folder / "test.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"news: no test.jsonl.gz there"):
        inputs.check_data("news")


def test_rows_are_checked_against_the_task(folder: Path) -> None:
    task = TaskSpec(kind="classification", dataset="news", labels=["no", "yes"])
    assert len(inputs.rows_for(task, folder / "train.jsonl.gz")) == 60
    with pytest.raises(UserError, match="row 2 has label 1, the job's labels are 0 to 0"):
        inputs.rows_for(TaskSpec(kind="classification", dataset="news", labels=["no"]), folder / "train.jsonl.gz")
    with pytest.raises(UserError, match="row 1 has no plain value in field 'prompt'"):
        inputs.rows_for(TaskSpec(kind="causal", dataset="news"), folder / "train.jsonl.gz")


def test_shares_go_by_label_by_field_or_at_random(folder: Path) -> None:
    task = TaskSpec(kind="classification", dataset="news", labels=["no", "yes"])
    rows = inputs.rows_for(task, folder / "train.jsonl.gz")

    def deal(alpha: float, by_field: str) -> list[list[int]]:
        return inputs.shares(rows, task, 3, alpha=alpha, by_field=by_field, seed=1, source="rows")

    assert [len(share) for share in deal(0.0, "")] == [20, 20, 20]
    assert all(len({rows[i]["site"] for i in share}) == 1 for share in deal(1.0, "site"))
    skewed = deal(0.2, "")
    assert sorted(i for share in skewed for i in share) == list(range(60))
    assert skewed != deal(0.0, "")


def test_faults_of_a_job_are_found_before_there_is_data() -> None:
    tables = {"name": "try", "task": {"kind": "classification"}, "strategy": {"name": "magic", "aggregator": "sum"}}
    with pytest.raises(SettingsError) as error:
        inputs.check_job(tables, "job.toml", 4)
    assert [fault.split(":")[0] for fault in error.value.faults] == ["strategy.name", "strategy.aggregator"]
    with pytest.raises(SettingsError, match="rounds.cuont: unknown key, did you mean 'count'"):
        inputs.check_job({"name": "try", "task": {"kind": "causal"}, "rounds": {"cuont": 3}}, "job.toml", 4)


def test_base_models_are_found_by_name_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(UserError, match="has no config.json"):
        inputs.base_model("mine", {"mine": str(model)}, None, say)
    (model / "config.json").write_text("{}")
    assert inputs.base_model("mine", {"mine": str(model)}, None, say) == model
    assert inputs.base_model(str(model), {}, None, say) == model
    with pytest.raises(UserError, match="unknown base model 'bert': give --model bert=FOLDER"):
        inputs.base_model("bert", {}, None, say)
    monkeypatch.delenv("MUSTER_DATA", raising=False)
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="name a folder with --lm, or set MUSTER_DATA"):
        inputs.check_base("gpt2-small", {}, None)
    with pytest.raises(UserError, match=r"trained on plain texts .* has none"):
        inputs.check_base("gpt2-small", {}, model)


def test_a_small_gpt2_of_other_texts_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def make(out: Path, texts: Sequence[Path], size: SmallGpt2, *, tell: Callable[[str], None]) -> Path:
        made.append(out)
        return out

    monkeypatch.setattr(inputs, "make_small_gpt2", make)
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text)
        assert inputs.base_model("gpt2-small", {}, tmp_path / name, say) == made[-1]
    assert made[0] == made[2] != made[1]
    monkeypatch.setattr(inputs, "SmallGpt2", lambda: SmallGpt2(steps=7))
    assert inputs.base_model("gpt2-small", {}, tmp_path / "a", say) not in made[:3]
    assert {path.parent for path in made} == {tmp_path / "cache"}


def test_models_are_given_as_name_and_folder(tmp_path: Path) -> None:
    assert inputs.named_folders([f"a={tmp_path}"]) == {"a": str(tmp_path)}
    with pytest.raises(UserError, match="expected NAME=FOLDER"):
        inputs.named_folders(["a"])
    with pytest.raises(UserError, match="no such folder"):
        inputs.named_folders(["a=/no/such"])


def test_more_devices_wanted_than_there_are_is_refused(folder: Path, tmp_path: Path) -> None:
    tables = {"name": "try", "task": {"kind": "classification"}, "rounds": {"min_devices": 5}}
    with pytest.raises(SettingsError, match=r"rounds.min_devices: 5 wanted, and --devices is 4: no round"):
        inputs.check_job(tables, "job.toml", 4)
    inputs.check_job(tables, "job.toml", 5)


def test_training_is_bounded_by_half_the_deadline_unless_the_job_says_otherwise() -> None:
    assert inputs.with_time({"rounds": {"deadline_s": 120}})["rounds"] == {"deadline_s": 120, "train_for_s": 60.0}
    assert inputs.with_time({"name": "try"})["rounds"] == {"train_for_s": 450.0}
    for given in ({"deadline_s": 120, "train_for_s": 0}, {"train_for_s": 700}):
        assert inputs.with_time({"rounds": given})["rounds"] == given
    for wrong in ({"rounds": {"deadline_s": "soon"}}, {"rounds": 3}):
        assert inputs.with_time(wrong) == wrong


def test_held_out_rows_that_the_job_names_are_named_by_their_key(folder: Path, tmp_path: Path) -> None:
    data = inputs.data_files(str(folder), tmp_path / "scratch", say)
    tables = {"name": "try", "task": {"kind": "classification"}}
    assert len(inputs.held_out(inputs.filled(tables, data, 4, "job.toml")[1], "job.toml", data)) == 60
    _, spec = inputs.filled({**tables, "evaluation": {"data": "held-out.jsonl.gz"}}, data, 4, "job.toml")
    told = r"job.toml: evaluation.data: held-out.jsonl.gz: no such file; without that key it is .*/test.jsonl.gz"
    with pytest.raises(UserError, match=told):
        inputs.held_out(spec, "job.toml", data)
    (folder / "test.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"^.*/test.jsonl.gz: no such file$"):
        inputs.held_out(inputs.filled(tables, data, 4, "job.toml")[1], "job.toml", data)


def test_labels_that_differ_from_those_of_the_data_are_remarked(folder: Path, tmp_path: Path) -> None:
    data = inputs.data_files(str(folder), tmp_path / "scratch", say)
    task: dict[str, object] = {"kind": "classification"}
    assert inputs.remark(inputs.filled({"name": "try", "task": task}, data, 4, "job")[1], data) == ""
    task["labels"] = ["yes", "no"]
    said = inputs.remark(inputs.filled({"name": "try", "task": task}, data, 4, "job")[1], data)
    assert "task.labels of the job (yes, no) are not those of the data's labels.json (no, yes)" in said
