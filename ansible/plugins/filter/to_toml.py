# Copyright: Muster contributors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Settings as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError

DOCUMENTATION = """
name: to_toml
author: Muster contributors
version_added: 0.1.0
short_description: Settings as TOML
description:
  - Writes a mapping as TOML, tables nested as they are, keys in alphabetic order.
  - The same settings give the same text, so that a second run changes nothing.
options:
  _input:
    description: Mapping of settings; values are text, numbers, booleans, lists and mappings.
    type: dict
    required: true
"""

EXAMPLES = """
- name: Write settings
  ansible.builtin.copy:
    content: "{{ {'fleet': 'fleet1', 'broker': {'port': 8883}} | muster.fleet.to_toml }}"
    dest: /etc/muster/edge.toml
    mode: "0644"
"""

RETURN = """
_value:
  description: The text of a TOML file.
  type: str
"""


def to_toml(settings):
    """The text of a TOML file."""
    if not isinstance(settings, Mapping):
        raise AnsibleFilterError(f"to_toml takes a mapping, got {type(settings).__name__}")
    return "\n".join(_table(settings, ())).strip() + "\n"


def _table(table, path):
    plain = {name: value for name, value in table.items() if not isinstance(value, Mapping)}
    inner = {name: value for name, value in table.items() if isinstance(value, Mapping)}
    lines = []
    if path and (plain or not inner):
        lines += ["", "[" + ".".join(_key(name) for name in path) + "]"]
    lines += [f"{_key(name)} = {_value(plain[name], (*path, name))}" for name in sorted(plain)]
    for name in sorted(inner):
        lines += _table(inner[name], (*path, name))
    return lines


def _key(name):
    text = str(name)
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else _text(text)


def _value(value, path):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item, path) for item in value) + "]"
    raise AnsibleFilterError(f"{'.'.join(map(str, path))}: {type(value).__name__} has no form in TOML")


def _text(value):
    # Strings of JSON are basic strings of TOML, but for DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


class FilterModule:
    """Filters of this collection."""

    def filters(self):
        """Name to function."""
        return {"to_toml": to_toml}
