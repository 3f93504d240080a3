# Copyright: Muster contributors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What is in the folders of base models."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from ansible.errors import AnsibleFilterError

DOCUMENTATION = """
name: model_folders
author: Muster contributors
version_added: 0.1.0
short_description: What is in the folders of base models
description:
  - Lists the files of each folder on the controller with their sha256, and where a host keeps that content.
  - Digests are kept in C(~/.cache/muster/digests.json) on the controller, by path, size and time of change, so that
    large models are not read again for every host and run.
options:
  _input:
    description: Name of a base model to its folder on the controller.
    type: dict
    required: true
  root:
    description: Folder on the hosts below which each content has a folder of its own.
    type: str
    required: true
"""

EXAMPLES = """
- name: See what there is to copy
  ansible.builtin.debug:
    msg: "{{ {'minilm': '/srv/models/minilm'} | muster.fleet.model_folders('/opt/muster/models') }}"
"""

RETURN = """
_value:
  description: >-
    A mapping for each model with its C(name), C(path) on the controller, C(place) on a host, C(folders) below it,
    C(files), and their list C(sums) as sha256sum reads it.
  type: list
  elements: dict
"""


CACHE = Path("~/.cache/muster/digests.json")


def model_folders(models, root):
    """One description for each model, by name."""
    return [{"name": name, **_described(Path(str(models[name])), root)} for name in sorted(models)]


def _described(folder, root):
    files = _digests(folder)
    sums = "".join(f"{digest}  {name}\n" for name, digest in files)
    place = f"{root}/{hashlib.sha256(sums.encode()).hexdigest()[:16]}"
    inner = {str(parent) for name, _ in files for parent in Path(name).parents} - {"."}
    return {
        "path": str(folder),
        "place": place,
        "folders": [f"{place}/{name}" for name in sorted(inner)],
        "files": [{"path": name, "sha256": digest} for name, digest in files],
        "sums": sums,
    }


def _digests(folder):
    if not folder.is_dir():
        raise AnsibleFilterError(f"base model {folder}: no such folder on the controller")
    found, known = [], _read()
    before = dict(known)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            facts = path.stat()
            key = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
            if key not in known:
                known[key] = _digest(path)
            found.append((str(path.relative_to(folder)), known[key]))
    if not found:
        raise AnsibleFilterError(f"base model {folder}: the folder is empty")
    if known != before:
        _write(known)
    return found


def _digest(path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1024 * 1024):
            digest.update(block)
    return digest.hexdigest()


def _read():
    try:
        return dict(json.loads(CACHE.expanduser().read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _write(known):
    place = CACHE.expanduser()
    place.parent.mkdir(parents=True, exist_ok=True)
    # Several workers may write at once: each its own file, and the last one stays.
    with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
        json.dump(known, file)
    Path(file.name).replace(place)


class FilterModule:
    """Filters of this collection."""

    def filters(self):
        """Name to function."""
        return {"model_folders": model_folders}
