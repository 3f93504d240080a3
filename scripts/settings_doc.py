"""Writes `docs/jobs.md`, the reference of every key, from the structs that check the files.

`scripts/settings_doc.py` writes it; with `--check` it only says whether the page is current (exit code 1 if not).
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import msgspec
from msgspec import inspect as types

from coordinator.settings import CoordinatorSettings
from edge_daemon.settings import EdgeSettings
from shared.jobs import JobSpec

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "jobs.md"
MISSING = "-"

INTRO = """\
# Files you write: job, device, coordinator

<!-- Written by scripts/settings_doc.py from the docstrings in shared/jobs.py, shared/settings.py,
edge_daemon/settings.py and coordinator/settings.py: change those, then run `make docs`. -->

All three are TOML and are checked whole: an unknown key, a missing one, a wrong type or a number out of its range is
reported with its key and the reason, every fault of the file at once, and the command ends with exit code 2 (a service
with 78, so that systemd does not start it again).

`muster-edge --check --config edge.toml` looks further: every file of `[data]` must hold a row and every folder of
`[models]` a `config.json` and safetensors, or the command names each that does not and ends with exit code 78. The
daemon itself starts all the same and logs an error for each, since a disk may be mounted later. It offers the data
sets that could be read when its agent started: restart it after mounting one. `systemctl reload` (SIGHUP) reads the
file again: what a running service can't take over is named, and a file that does not hold changes nothing.

A key that is a *path* may hold `${NAME}`, which stands for that variable of the environment; one that is not set is a
fault. `"${CREDENTIALS_DIRECTORY}/mqtt.key"` is the file that the unit's `LoadCredential=mqtt.key:...` hands over.

A job file that leaves everything to the defaults:

```toml
name = "tickets"

[base]
model = "minilm"              # the name the devices' owners gave the model in [models]

[task]
kind = "classification"
dataset = "tickets"           # the name in the devices' [data]
labels = ["billing", "delivery", "returns"]

[evaluation]
data = "held-out.jsonl.gz"    # stays on the coordinator
```

Rows of a data set are JSON objects, one a line, `.jsonl` or `.jsonl.gz`: `{"text": ..., "label": 0}` for
classification, `{"prompt": ..., "completion": ...}` for causal generation, `{"image": [numbers], "label": 0}` for
pictures; other names of the text columns and the label's are settings of `[task]`.
"""

FILES: tuple[tuple[str, str, type[msgspec.Struct]], ...] = (
    ("The job file", "Given to `muster submit` and `muster emulate --job`.", JobSpec),
    ("edge.toml", "What the owner of a device decides; read by `muster-edge`.", EdgeSettings),
    ("coordinator.toml", "Read by `muster-coordinator`.", CoordinatorSettings),
)


def field_docs(struct: type) -> dict[str, str]:
    """Field name -> the docstring below it, inherited ones too."""
    docs: dict[str, str] = {}
    for owner in reversed(struct.__mro__):
        if issubclass(owner, msgspec.Struct) and owner is not msgspec.Struct:
            docs |= _own_docs(owner)
    return docs


def _own_docs(struct: type) -> dict[str, str]:
    tree = ast.parse(inspect.getsource(struct)).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs


def _bounds(low: float | None, above: float | None, high: float | None) -> str:
    parts = [f"{sign} {value:g}" for sign, value in ((">=", low), (">", above), ("<=", high)) if value is not None]
    return " " + " and ".join(parts) if parts else ""


def type_text(kind: types.Type) -> str:
    """A type as a person would say it."""
    match kind:
        case types.Metadata():
            return "path" if (kind.extra or {}).get("path") else type_text(kind.type)
        case types.BoolType():
            return "true or false"
        case types.IntType():
            return "integer" + _bounds(kind.ge, kind.gt, kind.le)
        case types.FloatType():
            return "number" + _bounds(kind.ge, kind.gt, kind.le)
        case types.StrType():
            return "text" + (f" matching `{kind.pattern}`" if kind.pattern else "")
        case types.LiteralType():
            return " or ".join(f"`{_toml(value)}`" for value in kind.values)
        case types.ListType():
            return f"list of {type_text(kind.item_type)}"
        case types.DictType():
            return f"table of names and {type_text(kind.value_type)}s"
        case types.UnionType():
            return " or ".join(type_text(one) for one in kind.types)
        case _:
            raise TypeError(f"no words for {kind}")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml("python" if one == sys.executable else one) for one in value) + "]"
    if isinstance(value, dict):
        return "{}"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _default(field: types.Field, outer: object) -> str:
    if field.required:
        return "required"
    return f"`{_toml(getattr(outer, field.name))}`" if outer is not None else f"`{_toml(_own_default(field))}`"


def _own_default(field: types.Field) -> object:
    return field.default_factory() if field.default is msgspec.NODEFAULT else field.default


def table(title: str, struct: type[msgspec.Struct], defaults: object) -> list[str]:
    """Markdown lines of one TOML table and of the tables in it. `defaults`: the value it has when left out."""
    described = types.type_info(struct)
    assert isinstance(described, types.StructType)
    docs = field_docs(struct)
    rows, inner = [], []
    for field in described.fields:
        if isinstance(field.type, types.StructType):
            value = None if field.required else _own_default(field)
            inner += table(f"[{field.encode_name}]", field.type.cls, value)
            continue
        text = docs.get(field.name, MISSING).replace("|", "\\|")
        kind = type_text(field.type).replace("|", "\\|")
        rows.append(f"| `{field.encode_name}` | {kind} | {_default(field, defaults)} | {text} |")
    about = (struct.__doc__ or "").strip()
    return [
        f"### {title}",
        "",
        about,
        "",
        "| key | value | default | meaning |",
        "|---|---|---|---|",
        *rows,
        "",
        *inner,
    ]


def page() -> str:
    """The whole page."""
    lines = [INTRO]
    for name, about, struct in FILES:
        lines += [f"## {name}", "", about, "", *table("Top level", struct, None)]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    """Write or check."""
    text = page()
    current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
    if "--check" in arguments:
        if text != current:
            print(f"{TARGET.relative_to(ROOT)} is not current: run make docs", file=sys.stderr)
        return int(text != current)
    TARGET.write_text(text, encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
