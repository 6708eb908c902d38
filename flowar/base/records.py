"""Records: JSON files that say themselves whether they are what was written. Every JSON of which no other file has a
hash is one.

The hash is taken of the values, not of the text, so that formatting doesn't matter. A record without a hash was written
by version 0.1, and is accepted.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import xxhash

from flowar.base.errors import UserError
from flowar.base.files import create_whole, write_text

HASH_KEY = "xxh3"


class DamagedRecordError(UserError):
    """A record is half-written, edited or damaged."""


def hash_record(values: Mapping[str, Any]) -> str:
    """Return the hash of a record's values."""
    own = {key: value for key, value in values.items() if key != HASH_KEY}
    plain = json.loads(json.dumps(own))  # with texts as keys, as it will be read
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())


def record_text(values: Mapping[str, Any]) -> str:
    """Return a record as JSON text with its hash."""
    return json.dumps(dict(values) | {HASH_KEY: hash_record(values)}, indent=2) + "\n"


def write_record(file: Path, values: Mapping[str, Any], *, private: bool = False) -> None:
    """Write a record, whole or not at all; a private one can be read by this user alone."""
    write_text(file, record_text(values), private=private)


def create_record(file: Path, values: Mapping[str, Any]) -> bool:
    """Write a record unless there is one; return whether this process did. Of all that try at once one succeeds."""
    text = record_text(values)
    return create_whole(file, lambda hidden: hidden.write_text(text))


def read_record(file: Path, cure: str, needs: Collection[str] = ()) -> dict[str, Any]:
    """Return the values of a record, without its hash.

    Args:
        file: what `write_record` wrote.
        cure: what to do about a damaged one; it ends the error's sentence.
        needs: keys that it must have.

    Raises:
        DamagedRecordError: if it is not what was written.
        FileNotFoundError: if it is missing.
    """
    try:
        values = parse_record(file.read_text())
        if lacking := [key for key in needs if key not in values]:
            raise ValueError(f"it has no {lacking[0]}")
        return values
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedRecordError(f"{file} is damaged ({error}); {cure}") from error


def record_line(values: Mapping[str, Any]) -> str:
    """Return a record as one line of a .jsonl file."""
    return json.dumps(dict(values) | {HASH_KEY: hash_record(values)}) + "\n"


def parse_record(text: str) -> dict[str, Any]:
    """Return the values of a record's text, without its hash.

    Raises:
        ValueError, TypeError, RecursionError: if it is not what was written.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise TypeError(f"it holds a {type(values).__name__}, not a JSON object")
    *others, (last, value) = values.items() or [("", None)]
    if HASH_KEY in values and values[HASH_KEY] != hash_record(values):
        raise ValueError("its values don't have the hash that it names: it was edited or damaged")
    if HASH_KEY not in values and value == hash_record(dict(others)):
        raise ValueError(f"its hash is called {last!r}")
    values.pop(HASH_KEY, None)
    return values
