"""What each setting is, said once: by the comment beside its field. For `flowar VERB --help` and `flowar help SETTING`.

Read next: kinds.py for what a setting may hold.
"""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import MISSING

from flowar.config.kinds import describe_kind, section_class, shorten

COLUMNS = 80  # columns
INDENT = 6  # of what is said of a setting, below it


class Explained(NamedTuple):
    """One setting, or a section of settings."""

    key: str  # as it is written: optim.lr
    default: str  # as it is written; nothing if it has to be given, or of a section
    kind: str  # what it may hold, in words; nothing of a section
    text: str  # what it is


def explain(schema: type[Any]) -> list[Explained]:
    """Return all settings of a schema, sections before what is in them."""
    return list(_explain(schema, {field.name: _default(field) for field in dataclasses.fields(schema)}, ""))


def _explain(schema: type[Any], defaults: dict[str, Any], prefix: str) -> Iterator[Explained]:
    hints, comments = typing.get_type_hints(schema), comments_of(schema)
    for field in dataclasses.fields(schema):
        key, default, text = prefix + field.name, defaults[field.name], comments.get(field.name, "")
        if dataclasses.is_dataclass(default):
            kind: type[Any] = type(default)
            yield Explained(key, "", "", text or (inspect.getdoc(kind) or "").partition("\n")[0])
            inner = {name: getattr(default, name) for name in (each.name for each in dataclasses.fields(kind))}
            yield from _explain(kind, inner, f"{key}.")
        elif (section := section_class(hints[field.name])) is not None:
            yield Explained(key, "null", f"settings of a {section.__name__}, or null", text)
        else:
            shown = "" if default is dataclasses.MISSING or default == MISSING else shorten(default)
            yield Explained(key, shown, describe_kind(hints[field.name]), text)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def comments_of(schema: type[Any]) -> dict[str, str]:
    """Return the comments of a dataclass's fields by name, those of its bases included: beside a field, or above it."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if dataclasses.is_dataclass(base):
            found |= {name: text for name, text in _own_comments(base).items() if text or name not in found}
    return found


def _own_comments(schema: type[Any]) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(schema))
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").split("  # noqa")[0]
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [line for line in range(first, (node.end_lineno or node.lineno) + 1) if line in comments]
            text = " ".join(comments[line] for line in lines)
            found[node.target.id] = re.sub(r"\bNone\b", "null", text)  # as it is written on a command line
    return found


def describe_settings(settings: list[Explained]) -> str:
    """Return settings as text for a terminal: of each its default, what it may hold, and what it is."""
    lines: list[str] = []
    for setting in settings:
        if not setting.kind:
            lines += ["", *_wrapped(f"{setting.key}: {setting.text}", "", "  ")]
            continue
        value = f"={setting.default}" if setting.default else "=... (has to be given)"
        lines += _wrapped(f"{setting.key}{value}", "  ", " " * INDENT)
        said = f"{setting.text} [{setting.kind}]" if setting.text else f"[{setting.kind}]"
        lines += _wrapped(said, " " * INDENT, " " * INDENT)
    return "\n".join(lines)


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
