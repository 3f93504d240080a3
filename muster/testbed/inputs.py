"""What an emulation works on, found and checked before anything is started: data, base model, job.

The job file may leave out what the emulation knows: `base.model` (minilm), `task.dataset`, `task.labels`,
`evaluation.data`, `rounds.min_devices` and `rounds.train_for_s`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from coordinator.core import strategies
from muster.testbed import corpus, partition, toml
from muster.testbed.models import SmallGpt2, cut_bert, made_of, make_small_gpt2, minilm_folder
from muster.testbed.rows import Row, read_rows
from shared.errors import SettingsError, UserError
from shared.jobs import JobSpec, RoundsSpec, TaskSpec
from shared.settings import check, read_toml

Tell = Callable[[str], None]
DOCSTRINGS = "docstrings"
MINILM, MINILM3, MINILM3_NARROW, SMALL_GPT2 = "minilm", "minilm3", "minilm3-narrow", "gpt2-small"
NARROW = 512
"""Feed-forward channels of the narrow MiniLM, a third."""
_SUFFIXES = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True)
class DataFiles:
    """A data folder. `labels`: names of the classes by number; [] where the folder has no `labels.json`."""

    name: str
    train: Path
    test: Path
    labels: list[str]


def data_files(data: str, scratch: Path, tell: Tell) -> DataFiles:
    """The files of a folder, of a name in `MUSTER_DATA`, or of the docstrings, which are gathered into `scratch`."""
    if data == DOCSTRINGS:
        tell("gathering docstrings of the installed packages")
        corpus.build(scratch)
        folder = scratch
    else:
        folder = _data_folder(data)
    return DataFiles(
        name=DOCSTRINGS if data == DOCSTRINGS else folder.name,
        train=_file(folder, "train"),
        test=_file(folder, "test"),
        labels=_labels(folder / "labels.json"),
    )


def check_data(data: str) -> None:
    """Raise `UserError` where `data` names nothing; writes nothing."""
    if data != DOCSTRINGS:
        folder = _data_folder(data)
        _file(folder, "train")
        _file(folder, "test")


def job_tables(path: Path, over: Mapping[str, object]) -> toml.Table:
    """The tables of a job file under those of the command line. Raises `UserError`."""
    return toml.merged(read_toml(path), over)


def with_time(tables: toml.Table) -> toml.Table:
    """The job with a bound on the time of training, where it names none: half of its deadline.

    The devices share one machine with whatever else runs on it, so that the first plan can be wrong by a factor. What
    is trained by then counts, and shows the planner the true speed; after the deadline both would be lost.
    """
    given = tables.get("rounds", {})
    deadline = given.get("deadline_s", RoundsSpec().deadline_s) if isinstance(given, dict) else None
    if not isinstance(deadline, int | float) or isinstance(deadline, bool):
        return tables  # the check of the job says so
    return toml.merged({"rounds": {"train_for_s": deadline / 2}}, tables)


def filled(tables: toml.Table, data: DataFiles, devices: int, source: str) -> tuple[toml.Table, JobSpec]:
    """The job with all that the emulation knows. Raises `SettingsError` with every fault of it."""
    given = tables.get("task")
    kind = given.get("kind") if isinstance(given, dict) else None
    known: toml.Table = {
        "base": {"model": MINILM},
        "task": {"dataset": data.name, **({"labels": data.labels} if kind == "classification" else {})},
        # All have shown what they can do before the job is submitted; one that proves unable must not stop the rest.
        "rounds": {"min_devices": -(-devices // 2)},
        "evaluation": {"data": str(data.test.resolve())},
    }
    whole = toml.merged(known, tables)
    spec = check(JobSpec, whole, source)
    if spec.rounds.min_devices > devices:
        fault = f"{spec.rounds.min_devices} wanted, and --devices is {devices}: no round would ever begin"
        raise SettingsError(source, [f"rounds.min_devices: {fault}"])
    return whole, spec


def remark(spec: JobSpec, data: DataFiles) -> str:
    """What looks like a mistake and need not be one, in a line; "": nothing."""
    if spec.task.kind == "classification" and data.labels and list(spec.task.labels) != data.labels:
        return (
            f"note: task.labels of the job ({_some(spec.task.labels)}) are not those of the data's labels.json "
            f"({_some(data.labels)}); labels that are numbers mean places in the job's list"
        )
    return ""


def base_model(name: str, given: Mapping[str, str], texts: Path | None, tell: Tell) -> Path:
    """Folder of the base model `name`: one of `given`, MiniLM (whole or cut), the small GPT-2, or `name` itself."""
    if name in given or Path(name).is_dir():
        folder = Path(given.get(name, name)).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"base model {name}: {folder} has no config.json")
        return folder.resolve()
    if name == MINILM:
        return minilm_folder()
    if name in (MINILM3, MINILM3_NARROW):
        return _minilm3(name, NARROW if name == MINILM3_NARROW else 0)
    if name == SMALL_GPT2:
        return kept_gpt2(SMALL_GPT2, _texts(texts), tell)
    raise UserError(
        f"unknown base model {name!r}: give --model {name}=FOLDER, or use {MINILM}, {MINILM3}, {MINILM3_NARROW} or "
        f"{SMALL_GPT2}"
    )


def check_base(name: str, given: Mapping[str, str], texts: Path | None) -> None:
    """Raise `UserError` where `base_model` would for want of a file; makes nothing."""
    if name == SMALL_GPT2 and name not in given:
        _texts(texts)
    elif name == MINILM3 and name not in given:
        minilm_folder()
    else:
        base_model(name, given, texts, lambda _: None)


def rows_for(task: TaskSpec, path: Path) -> list[Row]:
    """The rows of a data file, checked against the task. Raises `UserError` naming the first faulty one."""
    rows = read_rows(path)
    if task.kind == "classification":
        partition.column(rows, task.text_field, str(path))
        for number, label in enumerate(partition.column(rows, task.label_field, str(path)), 1):
            if not _known(label, task.labels):
                names = f"0 to {len(task.labels) - 1}" if task.labels else "none"
                raise UserError(f"{path}: row {number} has label {label!r}, the job's labels are {names}")
    elif task.kind == "causal":
        partition.column(rows, task.prompt_field, str(path))
        partition.column(rows, task.completion_field, str(path))
    return rows


def held_out(spec: JobSpec, source: str, data: DataFiles) -> list[Row]:
    """The rows that the coordinator evaluates on, checked. Raises `UserError`; names the key if the job gave it."""
    path = Path(spec.evaluation.data)
    try:
        return rows_for(spec.task, path)
    except UserError as error:
        if path == data.test.resolve():
            raise
        raise UserError(f"{source}: evaluation.data: {error}; without that key it is {data.test}") from error


def shares(
    rows: Sequence[Row], task: TaskSpec, devices: int, *, alpha: float, by_field: str, seed: int, source: str
) -> partition.Shares:
    """Who gets which rows: by the field `by_field`, by label with Dirichlet(alpha), or at random."""
    if by_field:
        return partition.by_field(partition.column(rows, by_field, source), devices, seed)
    if task.kind == "classification" and alpha:
        return partition.dirichlet(partition.column(rows, task.label_field, source), devices, alpha, seed)
    return partition.at_random(len(rows), devices, seed)


def named_folders(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=FOLDER` as a mapping."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, folder = pair.partition("=")
        if not sign or not name or not folder:
            raise UserError(f"--model {pair}: expected NAME=FOLDER")
        if not Path(folder).expanduser().is_dir():
            raise UserError(f"--model {pair}: no such folder")
        found[name] = folder
    return found


def cache_folder() -> Path:
    """Where models made here are kept: `MUSTER_CACHE`, else `muster` in the user's cache folder."""
    given = os.environ.get("MUSTER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "muster"


def _data_folder(data: str) -> Path:
    root = os.environ.get("MUSTER_DATA")
    for folder in (Path(data).expanduser(), *([Path(root) / data] if root else [])):
        if folder.is_dir():
            return folder.resolve()
    raise UserError(f"--data {data}: no such folder (nor one of that name in MUSTER_DATA); or use {DOCSTRINGS}")


def _file(folder: Path, name: str) -> Path:
    for suffix in _SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise UserError(f"{folder}: no {name}.jsonl.gz there")


def _labels(path: Path) -> list[str]:
    """Names by number: a list, or an object with `names`."""
    if not path.is_file():
        return []
    try:
        found = msgspec.json.decode(path.read_bytes())
        return msgspec.convert(found["names"] if isinstance(found, dict) else found, list[str])
    except (OSError, KeyError, msgspec.MsgspecError) as error:
        raise UserError(f"{path}: expected a list of names, or an object with names: {error}") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _known(label: object, labels: Sequence[str]) -> bool:
    if isinstance(label, int) and not isinstance(label, bool):
        return 0 <= label < len(labels)
    return label in labels


def _texts(folder: Path | None) -> list[Path]:
    """Plain texts for the small GPT-2."""
    root = os.environ.get("MUSTER_DATA")
    place = folder or (Path(root) / "lm" if root else None)
    found = (
        sorted(path for path in place.iterdir() if path.name.endswith((".txt", ".txt.gz")))
        if place and place.is_dir()
        else []
    )
    if not found:
        where = f"{place} has none" if place else "name a folder with --lm, or set MUSTER_DATA"
        raise UserError(f"base model {SMALL_GPT2} is trained on plain texts (.txt, .txt.gz): {where}")
    return found


def _minilm3(name: str, channels: int) -> Path:
    """MiniLM cut to its last three blocks: small enough for many rounds, and its pooler knows what they give."""
    return cut_bert(minilm_folder(), cache_folder() / name, 3, last=True, channels=channels)


def kept_gpt2(name: str, texts: Sequence[Path], tell: Tell) -> Path:
    """The small GPT-2 of `texts` in the cache, under `name` and what it is made of: of other texts it is another."""
    size = SmallGpt2()
    return make_small_gpt2(cache_folder() / f"{name}-{made_of(texts, size)}", texts, size, tell=tell)


def check_job(tables: toml.Table, source: str, devices: int) -> None:
    """Raise `SettingsError` with every fault that does not depend on the data; writes nothing."""
    placeholder = DataFiles("data", Path("train"), Path("test"), ["a", "b"])
    _, spec = filled(tables, placeholder, devices, source)
    faults = strategies.job_faults(spec)
    if faults:
        raise SettingsError(source, faults)
