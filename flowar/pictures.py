"""Grids and curves as PNG files. Read next: demo_report.py."""

from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from flowar.files import write_whole

GRID_PADDING = 2  # pixels between the images of a grid


def save_png(image: Tensor, path: Path) -> None:
    """Write a uint8 image (3, H, W); the file appears whole or not at all."""
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    write_whole(path, lambda hidden: picture.save(hidden, format="PNG"))


def save_grid(images: Tensor, path: Path, *, columns: int, enlarge: int = 1) -> None:
    """Write uint8 images (N, 3, H, W) as one picture with `columns` columns, each pixel `enlarge` pixels wide."""
    images = images.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(make_grid(images, nrow=columns, padding=GRID_PADDING, pad_value=255), path)


def save_loss_curve(records: list[dict[str, float]], path: Path) -> None:
    """Write the total loss and the loss of every scale over the steps, of the records of a metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    for key in [name for name in records[0] if name.startswith("loss/scale_")]:
        side = key.removeprefix("loss/scale_")
        axes.plot(steps, [record[key] for record in records], linewidth=1, label=f"scale {side} x {side}")
    axes.plot(steps, [record["loss"] for record in records], linewidth=2, color="black", label="total, weighted")
    axes.set_xlabel("step")
    axes.set_ylabel("mean squared velocity error")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
