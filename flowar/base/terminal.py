"""Terminal output: names from users and files are printed as they are, even with brackets in them."""

from rich.console import Console


def plain_console(width: int | None = None) -> Console:
    """Return a console that takes nothing it prints for markup, in tables and their titles neither."""
    return Console(width=width, markup=False, emoji=False, highlight=False)
