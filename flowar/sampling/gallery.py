"""Pictures of what a model draws: contact sheet, growth by scale, guidance against steps. Read next: sample.py."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowar.base.devices import drawing_precision
from flowar.base.pictures import SMALLEST_SHOWN, make_grid, save_grid, save_labelled
from flowar.base.seeding import StepNoise, draw_image_noise
from flowar.config.drawing import SamplingConfig
from flowar.latents.vae import VAE, to_uint8
from flowar.models.build import family_of
from flowar.models.family import Model

SHEET_CLASSES, SHEET_EACH = 10, 10  # of the contact sheet
GUIDED_CLASSES = 3  # shown at several guidances and steps
GUIDANCE_PARTS = (0.0, 0.5, 1.0, 1.5, 2.0)  # of guidance - 1

STEP_PARTS = (0.25, 0.5, 1.0, 2.0)  # of num_steps

LEAST_STEPS = 2


def save_gallery(config: SamplingConfig, model: Model, vae: VAE, classes: Sequence[int], folder: Path) -> None:
    """Write contact_sheet.png (a row per class), growth.png and guidance.png, with the images that would be drawn.

    Args:
        config: how they are drawn; each picture uses the noise of the image with the same number.
        model, vae: on one device.
        classes: shown in turn by the images.
        folder: where the pictures go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = list(dict.fromkeys(classes))[:SHEET_CLASSES]
    numbers = [first_numbers(classes, label, SHEET_EACH) for label in shown]
    firsts = [own[0] for own in numbers]
    rows = [
        draw_images(config, model, vae, [label] * SHEET_EACH, own) for label, own in zip(shown, numbers, strict=True)
    ]
    enlarge = max(1, SMALLEST_SHOWN // rows[0].shape[-1])
    save_grid(torch.cat(rows), folder / "contact_sheet.png", columns=SHEET_EACH, enlarge=enlarge)
    growth = draw_growth(config, model, vae, shown, firsts)
    save_grid(growth, folder / "growth.png", columns=len(shown), enlarge=enlarge)
    save_guidance(config, model, vae, shown[:GUIDED_CLASSES], firsts[:GUIDED_CLASSES], folder / "guidance.png")


def first_numbers(classes: Sequence[int], label: int, count: int) -> list[int]:
    """Return the numbers of the first images of a class, if images show `classes` in turn, over and over."""
    places = [place for place, shown in enumerate(classes) if shown == label]
    return [places[i % len(places)] + len(classes) * (i // len(places)) for i in range(count)]


def draw_images(
    config: SamplingConfig, model: Model, vae: VAE, labels: Sequence[int], numbers: Sequence[int]
) -> Tensor:
    """Return the images with these labels and numbers, uint8 (N, 3, H, W) on the CPU."""
    return decode_stages(vae, draw_stages(config, model, labels, numbers)[-1:])


def draw_growth(
    config: SamplingConfig, model: Model, vae: VAE, labels: Sequence[int], numbers: Sequence[int]
) -> Tensor:
    """Return images after each stage, upsampled to full size and decoded: uint8 (stages N, 3, H, W)."""
    return decode_stages(vae, draw_stages(config, model, labels, numbers))


def draw_stages(config: SamplingConfig, model: Model, labels: Sequence[int], numbers: Sequence[int]) -> list[Tensor]:
    """Return the latents of images stage by stage."""
    family, device = family_of(model.config), next(model.parameters()).device
    noise = draw_image_noise(family.noise_shape(model.config), numbers, config.seed).to(device)
    step_noise = StepNoise(numbers, config.seed, device)
    with drawing_precision(config.precision, device):
        return family.generate(model, torch.tensor(labels, device=device), noise, config, step_noise)


def decode_stages(vae: VAE, stages: Sequence[Tensor]) -> Tensor:
    """Return latents of several sizes, resized to the size of the last and decoded: uint8 on the CPU."""
    size = stages[-1].shape[-2:]
    with torch.inference_mode():
        full = (torch.nn.functional.interpolate(each.float(), size=size, mode="bicubic") for each in stages[:-1])
        return torch.cat([to_uint8(vae.decode(latents)).cpu() for latents in (*full, stages[-1].float())])


def save_guidance(
    config: SamplingConfig, model: Model, vae: VAE, labels: list[int], numbers: list[int], path: Path
) -> None:
    """Write one picture per class, drawn from the same noise at several guidances (rows) and step counts (columns)."""
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
    pictures = [make_grid(own, len(steps)) for own in by_class]
    save_labelled(
        pictures,
        path,
        titles=[f"class {label}" for label in labels],
        rows=("guidance", [f"{guidance:g}" for guidance in guidances]),
        columns=("steps", [str(number) for number in steps]),
    )
