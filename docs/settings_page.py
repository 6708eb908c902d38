"""A hook of mkdocs: fills settings.md with every setting of every verb, from the comments beside the settings."""

from typing import Any

from flowar.cli import VERBS
from flowar.config.explain import Explained, explain

MARK = "<!-- settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with all settings in place of the mark."""
    return markdown.replace(MARK, "\n".join(section_of(name) for name in VERBS)) if MARK in markdown else markdown


def section_of(name: str) -> str:
    """Return the settings of one verb as a table."""
    verb = VERBS[name]
    rows = [row_of(setting) for setting in explain(verb.schema) if setting.kind]
    head = ["", "| setting | default | values | what it is |", "|---|---|---|---|"]
    return "\n".join([f"\n## flowar {name}", "", f"{verb.summary}.", "", f"```bash\n{verb.example}\n```", *head, *rows])


def row_of(setting: Explained) -> str:
    """Return one setting as a row of a table."""
    default = f"`{setting.default}`" if setting.default else "required"
    cells = (f"`{setting.key}`", default, setting.kind, setting.text)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
