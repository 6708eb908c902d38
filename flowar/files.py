"""Files that are there whole or not at all, whenever the process dies."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a hidden file beside `path`, then give it its name."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(hidden)
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, lambda hidden: hidden.write_text(text))
