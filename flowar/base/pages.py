"""One-page reports: a style, and pictures that are inside the page. Read next: demo_report.py, evaluation_report.py."""

import base64
from html import escape
from pathlib import Path

from flowar.base.files import write_text

REPORT_FILE = "report.html"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; } img { max-width: 100%; image-rendering: pixelated; }
img.curve { image-rendering: auto; } table { border-collapse: collapse; }
td, th { padding: .3em 1em; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; }
.note { color: #666; }
"""


def write_page(file: Path, title: str, body: str) -> None:
    """Write a page that opens without a network.

    Args:
        file: where to.
        title: plain text.
        body: HTML.
    """
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    write_text(file, f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n')


def embed(file: Path, kind: str = "") -> str:
    """Return a picture as HTML; kind "curve" is scaled smoothly, pixels are not."""
    encoded = base64.b64encode(file.read_bytes()).decode()
    return f'<img class="{kind}" alt="{file.stem}" src="data:image/png;base64,{encoded}">'


def html_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table; cells are escaped."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"
