"""What is printed in a terminal: words of users and of files stand there as they are, whatever brackets are in them."""

from rich.console import Console


def plain_console(width: int | None = None) -> Console:
    """Return a console that takes nothing it prints for markup, in tables and their titles neither."""
    return Console(width=width, markup=False, emoji=False, highlight=False)
