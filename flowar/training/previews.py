"""Sample grids while training. Read next: models/family.py for how images are drawn."""

from pathlib import Path

import torch

from flowar.base.devices import drawing_precision
from flowar.base.distributed import gather_objects
from flowar.base.pictures import save_grid
from flowar.base.seeding import StepNoise, draw_image_noise
from flowar.config.training import PreviewConfig
from flowar.latents.vae import VAE, to_uint8
from flowar.models.build import create_model, family_of
from flowar.training.averages import EMA
from flowar.training.engine import Engine

PREVIEW_COLUMNS = 10


def save_previews(engine: Engine, ema: EMA, vae: VAE, preview: PreviewConfig, seed: int, name: Path) -> dict[str, Path]:
    """Write grids of images drawn with averaged and with raw weights, always from the same noise, classes in turn.

    All ranks call it; each draws its part.

    Args:
        engine, ema: of the run.
        vae: on the engine's device.
        preview: how many images, and how they are drawn.
        seed: of the images' noise.
        name: of the picture, without its suffix.

    Returns:
        {"preview": file, "preview_raw": file}.
    """
    world = engine.world
    with torch.device("meta"):
        model = create_model(engine.model.config).to_empty(device=world.device)
    buffers = dict(engine.model.named_buffers(remove_duplicate=False))
    for key, buffer in model.named_buffers(remove_duplicate=False):
        buffer.copy_(buffers[key])
    config, family = model.config, family_of(model.config)
    parameters = dict(model.named_parameters())
    mine = range(world.rank, preview.num_images, world.size)
    labels = torch.tensor([image % config.num_classes for image in mine], dtype=torch.int64, device=world.device)
    noise_shape = family.noise_shape(config)
    first_average = next(iter(ema.averages.values()))
    files = {}
    for suffix, weights in (("", first_average), ("_raw", engine.local_weights())):
        with torch.no_grad():
            for key, tensor in engine.full(weights):
                parameters[key].copy_(tensor.view_as(parameters[key]))
        images = torch.empty(0)
        if len(mine):
            noise = draw_image_noise(noise_shape, mine, seed).to(world.device)
            with drawing_precision(preview.precision, world.device):
                *_, latents = family.generate(model, labels, noise, preview, StepNoise(mine, seed, world.device))
            with torch.inference_mode():
                images = to_uint8(vae.decode(latents.float())).cpu()
        parts = [part for part in gather_objects(images) if len(part)]
        grid = torch.empty(preview.num_images, *parts[0].shape[1:], dtype=torch.uint8)
        for rank, part in enumerate(parts):
            grid[rank :: world.size] = part
        file = name.with_name(f"{name.name}{suffix}.png")
        files[f"preview{suffix}"] = file
        if world.is_main:
            save_grid(grid, file, columns=min(PREVIEW_COLUMNS, config.num_classes))
    return files
