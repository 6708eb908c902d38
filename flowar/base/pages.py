"""One-page reports: a style for light and dark, wide and narrow; pictures inside the page. Read next: charts.py.

A page opens without a network and runs no code: its content security policy allows pictures that are inside it and its
own style, and nothing else, even with hostile names in it.
"""

import base64
from html import escape
from pathlib import Path

from PIL import Image

from flowar.base.files import write_text

REPORT_FILE = "report.html"
GRID_PADDING = 2  # pixels between the images of a grid
PAGE_WIDTH = 1080  # pixels of the text; wider pictures are scaled down
SMALLEST_CURVE = 0.55  # of its own size; a plot isn't scaled down further, so that its letters can be read: it scrolls
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --quiet: #57606a; --ground: #fff; --raised: #f4f6f8; --line: #d5dbe1;
  --accent: #0a5cba; --good: #1a7f37; --bad: #b3261e;
  --c0: #1c2128; --c1: #0a6cce; --c2: #c65102; --c3: #1a8a5f; --c4: #a03bb5; --c5: #94760a; --c6: #c2255c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --quiet: #a5afba; --ground: #14171b; --raised: #1e2329; --line: #363d46;
    --accent: #7cb7ff; --good: #5cc97c; --bad: #ff8a80;
    --c0: #f0f2f4; --c1: #6cb2ff; --c2: #ff9d57; --c3: #58cf9f; --c4: #d991ea; --c5: #dcbe4e; --c6: #ff86ab; }
  img.curve { filter: invert(.92) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 1112px; margin: 0 auto; padding: 1.5em 16px 4em;
  color: var(--ink); background: var(--ground); overflow-wrap: anywhere; }
h1 { font-size: 1.7em; line-height: 1.2; margin: 0 0 .3em; }
h2 { font-size: 1.2em; margin: 2.2em 0 .6em; padding-bottom: .25em; border-bottom: 1px solid var(--line); }
p { margin: .6em 0; max-width: 46em; }
img, svg { max-width: 100%; height: auto; display: block; }
img { border-radius: 4px; } img.pixels { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
td, th { padding: .35em .9em; text-align: right; vertical-align: top; } td { white-space: nowrap; }
th { color: var(--quiet); min-width: 5em; font-weight: 600; font-size: .9em; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: .2em; min-width: 6em; }
@media (max-width: 600px) { td, th { padding: .35em .5em; } }
tr { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--raised); padding: 1em; border-radius: 6px; overflow-x: auto; font-size: .85em; }
a { color: var(--accent); }
.note { color: var(--quiet); font-size: .93em; }
.bad { color: var(--bad); } .good { color: var(--good); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 10px; margin: 1em 0; }
.tile { background: var(--raised); border-radius: 8px; padding: .6em .8em; font-size: .88em; color: var(--quiet); }
.tile b { display: block; font-size: 1.35em; line-height: 1.3; color: var(--ink); font-variant-numeric: tabular-nums; }
.bar { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; }
.bar div { height: 100%; background: var(--accent); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 20px 28px; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .2em; }
.chart { width: 100%; } .chart text { fill: var(--quiet); font-size: 11px; }
.chart line { stroke: var(--line); } .chart .mark { stroke: var(--quiet); stroke-dasharray: 3 3; }
.chart polyline { fill: none; stroke-width: 1.4; stroke-linejoin: round; stroke-linecap: round; }
.chart polyline.strong { stroke-width: 2.2; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .85em; color: var(--quiet); }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
.film { display: grid; grid-template-columns: max-content 1fr; gap: 4px 12px; align-items: center; font-size: .85em; }
.film span { color: var(--quiet); text-align: right; font-variant-numeric: tabular-nums; }
"""


def write_page(file: Path, title: str, body: str, refresh_s: float | None = None) -> None:
    """Write a page that opens without a network, whole or not at all.

    Args:
        file: where to.
        title: plain text.
        body: HTML.
        refresh_s: after how many seconds a browser loads the page again; None: never.
    """
    refresh = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{max(1, round(refresh_s))}">'
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{refresh}<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>'
    )
    write_text(file, f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n')


def embed(file: Path, kind: str = "", alt: str = "") -> str:
    """Return a picture as HTML.

    Args:
        file: a PNG.
        kind: "curve" for a plot on white, which a dark page inverts; else an image, shown pixel by pixel if it fits.
        alt: what it shows; by default the file's name.
    """
    content = file.read_bytes()
    with Image.open(file) as picture:
        size = picture.size
    return embed_png(content, size, kind, alt or file.stem.replace("_", " "))


def embed_png(content: bytes, size: tuple[int, int], kind: str, alt: str) -> str:
    """Return the bytes of a PNG of this width and height as HTML; `kind` and `alt` as of `embed`."""
    is_curve = kind == "curve"
    kind = kind or ("pixels" if size[0] <= PAGE_WIDTH else "grid")
    least = f' style="min-width: {SMALLEST_CURVE * size[0]:.0f}px"' if is_curve else ""
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    image = f'<img class="{kind}"{least} alt="{escape(alt)}" width="{size[0]}" height="{size[1]}" src="{source}">'
    return f'<div class="scroll" tabindex="0">{image}</div>' if is_curve else image


def fold(summary: str, text: str) -> str:
    """Return a long text, which is shown when its summary is clicked; both are escaped."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def html_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table, which scrolls where the page is too narrow for it; cells are escaped."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="scroll" tabindex="0"><table>{"".join(lines)}</table></div>'
