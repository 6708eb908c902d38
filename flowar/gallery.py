"""Pictures of what a model draws: contact sheet, growth scale by scale, guidance beside steps. Read next: sample.py."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid

from flowar.config import SampleConfig
from flowar.generate import StepNoise, draw_noise, make_time_grids, sample_latents, sample_token_maps
from flowar.model import FlowAR
from flowar.pictures import GRID_PADDING, save_grid, save_labelled
from flowar.vae import VAE, to_uint8

ROWS, COLUMNS = 10, 10  # of the contact sheet: classes, images of each
GUIDED_CLASSES = 3  # shown at several guidances and steps
GUIDANCE_PARTS = (0.0, 0.5, 1.0, 1.5, 2.0)  # of guidance - 1
STEP_PARTS = (0.25, 0.5, 1.0, 2.0)  # of num_steps
LEAST_STEPS = 2
MIN_SIDE = 64  # pixels; smaller images are enlarged


def save_gallery(config: SampleConfig, model: FlowAR, vae: VAE, classes: Sequence[int], folder: Path) -> None:
    """Write contact_sheet.png (a row per class), growth.png and guidance.png: of the images that would be drawn.

    Args:
        config: how they are drawn; everything here has the noise of the images of the same numbers.
        model, vae: on one device.
        classes: that the images show in turn.
        folder: where the pictures go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = list(dict.fromkeys(classes))[:ROWS]
    firsts = [classes.index(label) for label in shown]  # the first image of each class
    rows = [
        draw_images(config, model, vae, [label] * COLUMNS, [first + len(classes) * i for i in range(COLUMNS)])
        for label, first in zip(shown, firsts, strict=True)
    ]
    enlarge = max(1, MIN_SIDE // rows[0].shape[-1])
    save_grid(torch.cat(rows), folder / "contact_sheet.png", columns=COLUMNS, enlarge=enlarge)
    growth = draw_growth(config, model, vae, shown, firsts)
    save_grid(growth, folder / "growth.png", columns=len(shown), enlarge=enlarge)
    save_guidance(config, model, vae, shown[:GUIDED_CLASSES], firsts[:GUIDED_CLASSES], folder / "guidance.png")


def draw_images(config: SampleConfig, model: FlowAR, vae: VAE, labels: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """Return the images with these labels and numbers, uint8 (N, 3, H, W) on the CPU."""
    latents = sample_latents(model, **_settings(config, model, labels, numbers))
    with torch.inference_mode():
        return to_uint8(vae.decode(latents)).cpu()


def draw_growth(config: SampleConfig, model: FlowAR, vae: VAE, labels: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """Return images after each scale, coarse to fine, brought to full size and decoded: uint8 (K N, 3, H, W)."""
    token_maps = sample_token_maps(model, **_settings(config, model, labels, numbers))
    side = model.config.latent_size
    with torch.inference_mode():
        return torch.cat(
            [
                to_uint8(vae.decode(torch.nn.functional.interpolate(own, size=(side, side), mode="bicubic"))).cpu()
                for own in token_maps
            ]
        )


def _settings(config: SampleConfig, model: FlowAR, labels: Sequence[int], numbers: Sequence[int]) -> dict[str, object]:
    device = next(model.parameters()).device
    return {
        "labels": torch.tensor(labels, device=device),
        "time_grid": make_time_grids(config, len(model.config.scales)),
        "guidance": config.guidance,
        "guidance_interval": config.guidance_interval,
        "guidance_schedule": config.guidance_schedule,
        "solver": config.solver,
        "draw_noise": StepNoise(numbers, config.seed, device),
        "noise": draw_noise(model.config, numbers, config.seed).to(device),
    }


def save_guidance(
    config: SampleConfig, model: FlowAR, vae: VAE, labels: list[int], numbers: list[int], path: Path
) -> None:
    """Write one picture per class of the same noise at several guidances (rows) and numbers of steps (columns)."""
    guidances = sorted({1 + (config.guidance - 1) * part for part in GUIDANCE_PARTS})
    steps = sorted({max(LEAST_STEPS, round(config.num_steps * part)) for part in STEP_PARTS})
    cells = []  # guidance by guidance, steps by steps: (classes, 3, H, W)
    for guidance in guidances:
        for num_steps in steps:
            last = config.last_scale_steps
            last = None if last is None else max(LEAST_STEPS, round(last * num_steps / config.num_steps))
            own = dataclasses.replace(config, guidance=guidance, num_steps=num_steps, last_scale_steps=last)
            cells.append(draw_images(own, model, vae, labels, numbers))
    by_class = torch.stack(cells).transpose(0, 1)  # (classes, cells, 3, H, W)
    pictures = [make_grid(own, nrow=len(steps), padding=GRID_PADDING, pad_value=255) for own in by_class]
    save_labelled(
        pictures,
        path,
        titles=[f"class {label}" for label in labels],
        rows=("guidance", [f"{guidance:g}" for guidance in guidances]),
        columns=("steps", [str(number) for number in steps]),
    )
