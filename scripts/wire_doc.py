"""The parts of `docs/wire-format.md` that are read off the code.

`scripts/wire_doc.py` renews them; with `--check` it only says whether they are current (exit code 1 if not).
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import get_args

from shared import (
    adapter,
    blob_folder,
    blob_sender,
    codec,
    fields,
    jobs,
    messages,
    pruning_order,
    release_messages,
    topics,
)

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "wire-format.md"
_PART = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def topic_table() -> str:
    """One row per topic."""
    rows = [
        "| topic, after `muster/v1/{fleet}/` | published by | QoS | retained | expiry | payload |",
        "|---|---|---|---|---|---|",
    ]
    for topic in topics.ALL:
        names = [kind.__name__ for kind in get_args(topic.message) or [topic.message] if isinstance(kind, type)]
        payload = ", ".join(f"`{name}`" for name in names) or "raw bytes of one chunk"
        expiry = f"{topic.expiry_s} s" if topic.expiry_s else ""
        retained = "yes" if topic.retain else ""
        rows.append(f"| `{topic.pattern}` | {topic.publisher} | {topic.qos} | {retained} | {expiry} | {payload} |")
    return "\n".join(rows) + "\n"


def message_tables() -> str:
    """Fields of every struct on the wire, in the order of their declaration."""
    parts = []
    for module in (messages, pruning_order, release_messages, jobs):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        wanted = {"BaseSpec", "TaskSpec", "TrainingSpec"} if module is jobs else None
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and (node.name in wanted if wanted else node.name != "Message"):
                parts.append(_struct(node))
    return "\n".join(parts)


def limits() -> str:
    """The numbers that a reader enforces."""
    bounds = codec.LIMITS
    rows = [
        ("control message", f"{codec.MAX_MESSAGE_BYTES} bytes"),
        ("array, map, text, binary in a control message", f"{bounds['max_array_len']} elements or bytes each"),
        ("extension types, map keys that are not text", "refused"),
        (
            "chunk",
            f"{fields.MAX_CHUNK_BYTES} bytes, and the broker's largest packet less {blob_sender.PACKET_RESERVE}",
        ),
        ("blob", f"{fields.MAX_BLOB_BYTES} bytes, {blob_folder.MAX_CHUNKS} chunks"),
        ("parts of unfinished blobs, together", f"{blob_folder.SPOOL_BYTES} bytes"),
        ("chunks queued for one receiver", f"{blob_sender.QUEUE_CHUNKS}, {blob_sender.QUEUE_BYTES} bytes"),
        ("modules, and dense tensors, of an adapter", str(adapter.MAX_PARTS)),
    ]
    return "\n".join(["| of | limit |", "|---|---|", *(f"| {of} | {limit} |" for of, limit in rows)]) + "\n"


def golden() -> str:
    """A `Want` in hex, as the tests hold it."""
    return "```\n" + (ROOT / "tests" / "goldens" / "message-Want.hex").read_text() + "```\n"


def renewed(text: str) -> str:
    """The document with its made parts as they should be."""
    parts = {"topics": topic_table(), "messages": message_tables(), "limits": limits(), "golden": golden()}
    return _PART.sub(lambda found: found[1] + parts[found[2]] + found[3], text)


def _struct(node: ast.ClassDef) -> str:
    tag = next((ast.unparse(word.value).strip("'") for word in node.keywords if word.arg == "tag"), "")
    lines = [
        f"**{node.name}**" + (f" (`type`: `{tag}`)" if tag else "") + f": {_line(ast.get_docstring(node) or '')}",
        "",
    ]
    fields = []
    for at, item in enumerate(node.body):
        if isinstance(item, ast.AnnAssign):
            after = node.body[at + 1] if at + 1 < len(node.body) else None
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            default = f" = {ast.unparse(item.value)}" if item.value is not None else ""
            kind = ast.unparse(item.annotation).replace("|", "\\|")
            fields.append(f"| `{ast.unparse(item.target)}` | `{kind}{default}` | {_line(str(text))} |")
    return "\n".join([*lines, "| field | type | |", "|---|---|---|", *fields]) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Renew the document, or say that it is stale (exit code 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    text = DOCUMENT.read_text(encoding="utf-8")
    if not parser.parse_args().check:
        DOCUMENT.write_text(renewed(text), encoding="utf-8")
    elif renewed(text) != text:
        print(f"{DOCUMENT}: stale; run scripts/wire_doc.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
