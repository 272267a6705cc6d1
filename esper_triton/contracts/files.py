"""TOML and JSON of contracts: read with a plain message, and written in a form that people can edit."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from typing import Any

__all__ = ["read_body", "write_toml"]


def read_body(text: str, *, is_json: bool) -> dict[str, Any]:
    """The table that the text holds. Raises ValueError that says what is wrong."""
    if not is_json:
        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ValueError(f"not valid TOML: {error}") from error
    try:
        body = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"not a JSON object but {type(body).__name__}")
    return body


def write_toml(body: Mapping[str, Any]) -> str:
    """TOML that `tomllib` reads back as `body`: strings of several lines as such, tables with one line for each entry.

    Values are what JSON has, without null.
    """
    lines, tables = [], []
    for key, value in body.items():
        if isinstance(value, Mapping):
            entries = "".join(f"{_key(name)} = {_inline(item)}\n" for name, item in value.items())
            tables.append(f"\n[{_key(key)}]\n{entries}")
        elif isinstance(value, str) and "\n" in value:
            text = "".join(_escaped(line, keep_newline=True) for line in value.splitlines(keepends=True))
            lines.append(f'{_key(key)} = """\n{text}"""\n')
        else:
            lines.append(f"{_key(key)} = {_inline(value)}\n")
    return "".join(lines + tables)


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "").replace("-", "").isalnum() else _escaped(key, quoted=True)


def _inline(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _escaped(value, quoted=True)
        case Mapping():
            return "{ " + ", ".join(f"{_key(key)} = {_inline(item)}" for key, item in value.items()) + " }"
        case list() | tuple():
            return "[" + ", ".join(_inline(item) for item in value) + "]"
    return repr(value)


def _escaped(text: str, *, quoted: bool = False, keep_newline: bool = False) -> str:
    """JSON's escapes are TOML's, but for DEL, which only TOML escapes."""
    body = json.dumps(text, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f")
    if keep_newline:
        if text.endswith("\n") and not text.endswith("\r\n"):
            body = body.removesuffix("\\n") + "\n"
        if '""' not in text and not text.endswith('"'):
            body = body.replace('\\"', '"')
    return f'"{body}"' if quoted else body
