"""The page of `flowar sweep`: all settings by FID and cost, and the recipe of the best one. Read next: page.py."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from flowar.base.pages import REPORT_FILE, embed, html_table, write_page


def write_sweep_page(
    out_dir: Path, *, model: str, reference: str, rows: Sequence[dict[str, Any]], picture: Path, recipe: Path
) -> None:
    """Write report.html, with the picture inside.

    Args:
        out_dir: of the sweep.
        model, reference: what was swept, and what it was measured against.
        rows: of sweep.json, the best of the last round first.
        picture: a plot of distance over cost.
        recipe: the YAML of the best setting.
    """
    most = rows[0]["num_images"]
    columns = ["setting", "images", "FID", "95% interval", "GFLOPs an image", "Pareto"]
    cells = []
    for row in rows:
        interval = "" if row["interval"] is None else "{:.3f} to {:.3f}".format(*row["interval"])
        numbers = (f"{row['num_images']:,}", f"{row['fid']:.3f}", interval, f"{row['gflops']:,.1f}")
        cells.append([row["name"], *numbers, "yes" if row["pareto"] else ""])
    body = "\n".join(
        (
            f"<h1>Ways to sample {escape(model)}</h1>",
            f'<p class="note">Measured against {escape(reference)}; settings compared: {len(rows)}. The best of each '
            f"round were measured again on more images, the last ones on {most:,}. All draw from the same noise.</p>",
            "<h2>FID over cost</h2>",
            embed(picture, "curve", "FID over GFLOPs of all settings"),
            "<h2>Settings</h2>",
            html_table(columns, cells),
            '<p class="note">Pareto: no other setting with as many images has both a lower FID and a lower cost. '
            "FID is larger for fewer images: compare rows with the same number. Intervals cover the choice of "
            "samples.</p>",
            "<h2>The best, as a recipe</h2>",
            f"<pre>{escape(recipe.read_text())}</pre>",
        )
    )
    write_page(out_dir / REPORT_FILE, f"{model}: sweep", body)
