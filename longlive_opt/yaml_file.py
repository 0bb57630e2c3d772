"""Reading a file of parameters: plain YAML, and nothing that YAML would decide silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .checks import check_texts
from .errors import UserError


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one flat YAML file of parameters.

    Raises:
        UserError: the file is missing, unreadable, not YAML, empty, repeats a key, is no mapping, or holds
            text that cannot be written.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"{path}: {reason}; name a YAML file with one 'key: value' per line.") from error
    try:
        loader = _StrictLoader(text)
        loader.name = str(path)
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: this is not plain YAML ({reason}).") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path}: expected keys and values, found {found}; write one 'key: value' per line.")
    return content


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key, which YAML would let win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain word", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        content = super().construct_mapping(node, deep=True)
        for (key_node, _), (key, value) in zip(node.value, content.items()):
            line = f"{self.name} line {key_node.start_mark.line + 1}"
            check_texts(key, f"{line}, a key")
            content[key] = check_texts(value, f"{line}, {key}")
        return content
