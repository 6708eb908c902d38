"""Fréchet distance and distance to the exact solution against the work per image, for solvers, grids and annealing.

Run `python -m benchmarks.steps --demo runs/demo`, after `flowar demo`; it writes steps.json and steps.png. All points
draw the same images from the same noise, so their differences are more certain than the distances themselves. Images
that were drawn before are not drawn again.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from flowar.base.hashes import hash_weights
from flowar.base.seeding import StepNoise, draw_image_noise
from flowar.config.drawing import PRESETS, DrawConfig
from flowar.config.load import decisive_settings
from flowar.evaluation.demo_images import load_splits, to_model_range
from flowar.evaluation.judge import load_judge
from flowar.evaluation.metrics import Frechet, groups, jackknife_error, normal_interval, statistics, statistics_without
from flowar.latents.vae import load_vae, to_uint8
from flowar.models.build import family_of
from flowar.models.folders import load_model
from flowar.sampling.folder import hash_json

BATCH = 100
KEPT = 500  # images in a file, and images that are compared with the exact solution
ROUNDS = 12  # of timing
GROUPS = 50  # of images that are left out in turn, for intervals
GUIDANCE = 1.1  # suits the digits, as in `flowar demo`
RELEASED_GUIDANCE = 2.4  # for ImageNet
EXACT: dict[str, Any] = {"solver": "midpoint", "time_grid": "uniform", "num_steps": 60, "last_scale_steps": None}
ANNEALED = 0.6  # steps of the finest scale over those of the coarsest, as DiSA's 25 to 15

COLOURS = {
    "euler": "tab:blue", "adams-bashforth": "tab:red", "midpoint": "tab:green", "heun": "tab:purple",
    "euler-maruyama": "tab:orange",
}  # fmt: skip
MARKERS = {
    "released grid": "o", "uniform": "s", "shifted 0.5": "v", "shifted 2": "^", "uniform, annealed": "D",
    "shifted 0.5, annealed": "X",
    "released grid, annealed": "P",
}  # fmt: skip

# settings of a curve -> numbers of steps
CURVES: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("euler, released grid", {}, (8, 12, 18, 25)),
    ("euler, released grid, annealed", {"last_scale_steps": ANNEALED}, (25,)),
    ("euler, uniform", {"time_grid": "uniform"}, (12, 24)),
    ("euler, shifted 0.5", {"time_grid": "shifted", "shift": 0.5}, (12,)),
    ("euler, shifted 2", {"time_grid": "shifted", "shift": 2.0}, (12,)),
    ("euler-maruyama, released grid", {"solver": "euler-maruyama"}, (25,)),
    ("euler-maruyama, uniform", {"solver": "euler-maruyama", "time_grid": "uniform"}, (24,)),
    ("adams-bashforth, released grid", {"solver": "adams-bashforth"}, (8,)),
    ("adams-bashforth, uniform", {"solver": "adams-bashforth", "time_grid": "uniform"}, (4, 6, 8, 12)),
    ("adams-bashforth, shifted 0.5", {"solver": "adams-bashforth", "time_grid": "shifted", "shift": 0.5}, (8,)),
    ("adams-bashforth, shifted 2", {"solver": "adams-bashforth", "time_grid": "shifted", "shift": 2.0}, (8,)),
    ("heun, uniform", {"solver": "heun", "time_grid": "uniform"}, (3, 4)),
    ("midpoint, uniform", {"solver": "midpoint", "time_grid": "uniform"}, (3, 4, 6)),
    ("midpoint, uniform, annealed", {"solver": "midpoint", "time_grid": "uniform", "last_scale_steps": ANNEALED},
     (5, 7)),
    ("midpoint, shifted 0.5", {"solver": "midpoint", "time_grid": "shifted", "shift": 0.5}, (2, 3, 4, 6)),
    ("midpoint, shifted 0.5, annealed", {"solver": "midpoint", "time_grid": "shifted", "shift": 0.5,
                                         "last_scale_steps": ANNEALED}, (4, 5, 7)),
    ("midpoint, shifted 2", {"solver": "midpoint", "time_grid": "shifted", "shift": 2.0}, (3, 4)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The results of one way to draw."""

    latents: Tensor  # (N, C, h, w)
    features: Tensor  # (N, 64), of the digit classifier


class Judge:
    """Draws images in different ways, keeps them in a folder, and measures them."""

    def __init__(self, demo: Path, folder: Path) -> None:
        self.model, self.vae = load_model(demo / "train"), load_vae("demo")
        self.classifier = load_judge(demo / "judge.safetensors")[0]
        self.folder = folder / "drawn"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.weights = hash_weights(self.model.state_dict())
        real = np.concatenate([images for images, _ in load_splits().values()])
        self.distance = Frechet(statistics(self.features(real)))

    @torch.inference_mode()
    def features(self, images: NDArray[np.uint8]) -> Tensor:
        """Return the classifier's features of uint8 images (N, H, W, 3)."""
        features: Tensor = self.classifier(to_model_range(images))[0]
        return features

    def draw(self, how: DrawConfig, num_images: int) -> Drawn:
        """Return images drawn this way, from the folder if it has them."""
        parts = [self._draw_part(how, first) for first in range(0, num_images, KEPT)]
        latents, features = (np.concatenate([part[name] for part in parts]) for name in ("latents", "features"))
        return Drawn(torch.from_numpy(latents), torch.from_numpy(features))

    def _draw_part(self, how: DrawConfig, start: int) -> dict[str, NDArray[Any]]:
        """Return the results for KEPT images."""
        file = self.folder / f"{hash_json(decisive_settings(how), self.weights)}_{start:06d}.npz"
        if not file.exists():
            latents, features = [], []
            for first in range(start, start + KEPT, BATCH):
                own = self.draw_batch(how, range(first, first + BATCH))
                with torch.inference_mode():
                    images = to_uint8(self.vae.decode(own)).permute(0, 2, 3, 1).numpy()
                features.append(self.features(images).numpy())
                latents.append(own.numpy())
            np.savez(file, latents=np.concatenate(latents), features=np.concatenate(features))
        with np.load(file) as kept:
            return dict(kept)

    def draw_batch(self, how: DrawConfig, numbers: range) -> Tensor:
        """Return the latents of images with these numbers."""
        family, config = family_of(self.model.config), self.model.config
        labels = torch.tensor([number % config.num_classes for number in numbers])
        noise = draw_image_noise(family.noise_shape(config), numbers, seed=0)
        return family.generate(self.model, labels, noise, how, StepNoise(numbers, 0, noise.device))[-1]

    def speedups(self, ways: list[DrawConfig]) -> list[float]:
        """Return by what factor each way needs less CPU time than the first one; medians of alternating rounds."""
        seconds: list[list[float]] = [[] for _ in ways]
        for _ in range(ROUNDS):
            for own, how in zip(seconds, ways, strict=True):
                began = time.process_time()
                self.draw_batch(how, range(BATCH))
                own.append(time.process_time() - began)
        medians = [median(own) for own in seconds]
        return [medians[0] / own for own in medians]

    def gflops(self, how: DrawConfig) -> float:
        """Return the GFLOPs of one image's latents."""
        return family_of(self.model.config).sampling_flops(self.model.config, how) / 1e9

    def distances(self, drawn: Drawn) -> list[float]:
        """Return the Fréchet distance of all images to the real digits, then without each group in turn."""
        group = groups(torch.arange(len(drawn.features)) % self.model.config.num_classes, GROUPS)
        without = statistics_without(drawn.features, group)
        return [self.distance.distance(own) for own in (statistics(drawn.features), *without)]

    def measure(self, name: str, how: DrawConfig, num_images: int) -> dict[str, Any]:
        """Return the numbers of one way to draw, relative to the released settings with the same guidance."""
        released = DrawConfig(guidance=how.guidance)
        drawn, base = self.draw(how, num_images), self.draw(released, num_images)
        own, other = self.distances(drawn), self.distances(base)
        ratios = [a / b for a, b in zip(own, other, strict=True)]
        low, high = normal_interval(ratios[0], jackknife_error(ratios[1:]))
        error = None
        if how.solver != "euler-maruyama":
            exact = self.draw(dataclasses.replace(how, shift=1.0, **EXACT), KEPT).latents
            error = float((drawn.latents[:KEPT] - exact).norm() / exact.norm())
        row = {
            "name": name, "num_steps": how.num_steps, "last_scale_steps": how.last_scale_steps, "images": num_images,
            "guidance": how.guidance, "work": self.gflops(how) / self.gflops(released),
            "frechet": own[0], "ratio": ratios[0], "low": low, "high": high, "error": error,
        }  # fmt: skip
        print(describe(row), flush=True)
        return row


def describe(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    last = "" if row["last_scale_steps"] is None else f" to {row['last_scale_steps']}"
    error = "" if row["error"] is None else f"; {row['error']:.3f} from the exact solution"
    return (
        f"{row['name']:36} {row['num_steps']}{last} steps, guidance {row['guidance']:g}: {1 / row['work']:.2f}x fewer "
        f"FLOPs; Fréchet distance {row['frechet']:.3f} of {row['images']:,} images, over the released one's "
        f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}){error}"
    )


def point(settings: dict[str, Any], num_steps: int) -> DrawConfig:
    """Return a point of a curve."""
    share = settings.get("last_scale_steps")
    last = {"last_scale_steps": round(share * num_steps)} if share else {}
    return DrawConfig(**settings | {"num_steps": num_steps, "guidance": GUIDANCE} | last)


def save_picture(rows: list[dict[str, Any]], presets: list[dict[str, Any]], path: Path) -> None:
    """Write two diagrams against the work per image: distances to real digits, and to the exact solution."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    marked = [row for row in presets if row["guidance"] == GUIDANCE]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["work"])
        solver, _, grid = name.partition(", ")
        style = {"color": COLOURS[solver], "marker": MARKERS[grid], "linewidth": 1, "markersize": 5, "label": name}
        left.plot([row["work"] for row in own], [row["ratio"] for row in own], **style)
        if own[0]["error"] is not None:
            right.plot([row["work"] for row in own], [row["error"] for row in own], **style)
    for row in marked:
        for axes, key in ((left, "ratio"), (right, "error")):
            axes.plot(row["work"], row[key], marker="*", markersize=13, color="black", linestyle="", zorder=3)
            axes.annotate(row["name"], (row["work"], row[key]), textcoords="offset points", xytext=(6, -14))
    left.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    left.set(ylabel="Fréchet distance to real digits, over the released one", ylim=(0.7, 1.6))
    right.set(ylabel="relative distance to the exact solution", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="FLOPs of an image, over those of the released settings", xlim=(0, 1.05))
        axes.grid(alpha=0.3, which="both")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


def run() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished `flowar demo`")
    parser.add_argument("--out", type=Path, default=Path("runs/steps"))
    parser.add_argument("--images", type=int, default=1000, help=f"images per point, a multiple of {KEPT}")
    parser.add_argument("--preset-images", type=int, default=2000, help="images per preset")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(options.demo, options.out)
    rows = [
        judge.measure(name, point(settings, number), options.images)
        for name, settings, numbers in CURVES
        for number in numbers
    ]
    presets = [
        judge.measure(name, DrawConfig(guidance=guidance, **settings), num_images)
        for guidance, num_images in ((GUIDANCE, options.preset_images), (RELEASED_GUIDANCE, options.images))
        for name, settings in PRESETS.items()
    ]
    speedups = judge.speedups([DrawConfig(guidance=GUIDANCE, **settings) for settings in ({}, *PRESETS.values())])
    for name, speedup in zip(PRESETS, speedups[1:], strict=True):
        print(f"{name:36} {speedup:.2f}x less CPU time")
    (options.out / "steps.json").write_text(json.dumps({"curves": rows, "presets": presets}, indent=1) + "\n")
    save_picture(rows, presets, options.out / "steps.png")


if __name__ == "__main__":
    run()
