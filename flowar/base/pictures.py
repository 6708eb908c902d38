"""Grids and curves as PNG files. Read next: pages.py."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from flowar.base.files import write_whole
from flowar.base.pages import GRID_PADDING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST_SHOWN = 64  # pixels; smaller images are enlarged


def save_png(image: Tensor, path: Path) -> None:
    """Write a uint8 image (3, H, W); the file appears whole or not at all."""
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    write_whole(path, lambda hidden: picture.save(hidden, format="PNG"))


def make_grid(images: Tensor, columns: int) -> Tensor:
    """Return uint8 images (N, 3, H, W) as one (3, H, W), white between them."""
    import torchvision.utils  # takes a second

    grid: Tensor = torchvision.utils.make_grid(images, nrow=columns, padding=GRID_PADDING, pad_value=255)
    return grid


def save_grid(images: Tensor, path: Path, *, columns: int, enlarge: int = 1) -> None:
    """Write uint8 images (N, 3, H, W) as one picture with `columns` columns, each pixel `enlarge` pixels wide."""
    images = images.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(make_grid(images, columns), path)


def save_loss_curve(records: list[dict[str, float]], path: Path) -> None:
    """Write the total loss and each of its terms over the steps, of the records of a metrics.jsonl."""
    figure = _figure(width=8, height=4)
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    for key in [name for name in records[0] if name.startswith("loss/")]:
        label = key.removeprefix("loss/").replace("_", " ")
        axes.plot(steps, [record[key] for record in records], linewidth=1, label=label)
    axes.plot(steps, [record["loss"] for record in records], linewidth=2, color="black", label="total, weighted")
    axes.set_xlabel("step")
    axes.set_ylabel("mean squared velocity error")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def save_labelled(
    pictures: list[Tensor],
    path: Path,
    *,
    titles: list[str],
    rows: tuple[str, list[str]],
    columns: tuple[str, list[str]],
) -> None:
    """Write grids (3, H, W) uint8 side by side, with what their rows and columns mean.

    Args:
        pictures: all of one size.
        path: the PNG file.
        titles: one for each.
        rows, columns: what they show, and the values.
    """
    figure = _figure(width=1 + 3.5 * len(pictures), height=1 + 3.5 * pictures[0].shape[1] / pictures[0].shape[2])
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        axes = figure.add_subplot(1, len(pictures), number + 1)
        axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title)
        height, width = picture.shape[1:]
        axes.set_yticks([(place + 0.5) * height / len(rows[1]) for place in range(len(rows[1]))], rows[1])
        axes.set_xticks([(place + 0.5) * width / len(columns[1]) for place in range(len(columns[1]))], columns[1])
        axes.set_xlabel(columns[0])
        if number == 0:
            axes.set_ylabel(rows[0])
        axes.tick_params(length=0)
    figure.savefig(path, dpi=120)


def save_curve(
    x: list[float], y: list[float], path: Path, *, labels: list[str], axes: tuple[str, str], title: str
) -> None:
    """Write labelled points in the unit square, joined by a line."""
    figure = _figure(width=5, height=5)
    plot = figure.add_subplot()
    plot.plot(x, y, marker="o")
    for where_x, where_y, label in zip(x, y, labels, strict=True):
        plot.annotate(label, (where_x, where_y), textcoords="offset points", xytext=(-6, 6), ha="right")
    plot.set(xlim=(-0.02, 1.05), ylim=(-0.02, 1.05), xlabel=axes[0], ylabel=axes[1], title=title)
    plot.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def save_scatter(
    points: list[tuple[float, float, str, str]], path: Path, *, axes: tuple[str, str], marked: set[str]
) -> None:
    """Write points (x, y, name, group), those of a group in one colour, the marked ones with their names."""
    figure = _figure(width=9, height=6)
    plot = figure.add_subplot()
    for group in dict.fromkeys(point[3] for point in points):
        own = [point for point in points if point[3] == group]
        plot.scatter([point[0] for point in own], [point[1] for point in own], label=group, s=24)
    for x, y, name, _ in points:
        if name in marked:
            plot.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=7)
    plot.set(xlabel=axes[0], ylabel=axes[1])
    plot.margins(x=0.15, y=0.1)
    plot.grid(alpha=0.3)
    plot.legend()
    figure.savefig(path, dpi=120)


def _figure(*, width: float, height: float) -> "Figure":
    """Return an empty figure that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
