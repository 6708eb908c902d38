"""What a setting may hold, in words: from its type hint and its default. For the errors of load.py."""

import dataclasses
import types
import typing
from typing import Any, Literal

import yaml
from omegaconf import MISSING

MOST_SHOWN = 80  # characters of a wrong value
WORDS = {  # of one, and of several in a list; an example of it
    int: ("a whole number", "whole numbers", "1"),
    float: ("a number", "numbers", "0.5"),
    bool: ("true or false", "values true or false", "true"),
    str: ("a text", "texts", "a"),
}


def section_class(hint: Any) -> type[Any] | None:
    """Return the dataclass that a type hint names, alone or as `... | None`."""
    return next((one for one in _options(hint) if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def describe_kind(hint: Any) -> str:
    """Return what values a type hint allows, for example "a list of whole numbers, or null"."""
    return ", or ".join(_describe(option) for option in _options(hint))


def example_of(hint: Any, default: object) -> str:
    """Return a value that a type hint allows, as it is written on the command line: the default where that is one."""
    if default not in (None, MISSING, dataclasses.MISSING, (), {}):
        return shorten(default)
    first = _options(hint)[0]
    if typing.get_origin(first) is Literal:
        return str(typing.get_args(first)[0])
    if typing.get_origin(first) is tuple:
        kinds = typing.get_args(first)
        if kinds[0] is int:
            return "[1,2]"
        return f"[{','.join(example_of(kind, None) for kind in kinds if kind is not ...)}]"
    return WORDS[first][2] if first in WORDS else "{name: value}"


def shorten(value: object) -> str:
    """Return a value as it is written on the command line, or the beginning of it."""
    if isinstance(value, str):
        text = value
    else:
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
        text = text.replace(", ", ",") if text.startswith("[") else text
    text = " ".join(text.split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types of `a | b`."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _describe(hint: Any) -> str:
    if hint is types.NoneType:
        return "null"
    if section := section_class(hint):
        return f"a section with settings among {', '.join(field.name for field in dataclasses.fields(section))}"
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, kinds))}"
    if typing.get_origin(hint) is tuple:
        number = "" if kinds[1:] == (...,) else f"{len(kinds)} "
        items = WORDS[kinds[0]][1] if kinds[0] in WORDS else f"values, each {describe_kind(kinds[0])}"
        return f"a list of {number}{items}"
    return WORDS[hint][0] if hint in WORDS else "a section of names and values"
