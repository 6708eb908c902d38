"""Sample grids while training. Read next: sample.py for how images are drawn."""

from pathlib import Path

import torch

from flowar.config import TrainConfig
from flowar.distributed import collect
from flowar.ema import EMA
from flowar.generate import draw_noise, sample_latents
from flowar.parallel import Engine
from flowar.pictures import save_grid
from flowar.solvers import released_time_grid
from flowar.vae import VAE, to_uint8
from flowar.weights import create_model


def save_previews(engine: Engine, ema: EMA, vae: VAE, config: TrainConfig, step: int) -> dict[str, Path]:
    """Write grids of images drawn with averaged and with raw weights; always the same noise, classes in turn.

    All ranks call it: each draws its part. Returns {"preview": file, "preview_raw": file}.
    """
    world, preview = engine.world, config.preview
    model = create_model(config.model).to(world.device)
    parameters = dict(model.named_parameters())
    mine = range(world.rank, preview.num_images, world.size)
    labels = torch.tensor([image % config.model.num_classes for image in mine], dtype=torch.int64)
    first_average = next(iter(ema.averages.values()))
    files = {}
    for name, weights in (("preview", first_average), ("preview_raw", engine.local_weights())):
        with torch.no_grad():
            for key, tensor in engine.full(weights):
                parameters[key].copy_(tensor.view_as(parameters[key]))
        images = torch.empty(0)
        if len(mine):
            latents = sample_latents(
                model,
                labels.to(world.device),
                time_grid=released_time_grid(preview.num_steps),
                guidance=preview.guidance,
                guidance_interval=preview.guidance_interval,
                noise=draw_noise(config.model, mine, config.seed).to(world.device),
            )
            with torch.inference_mode():
                images = to_uint8(vae.decode(latents)).cpu()
        parts = [part for part in collect(images) if len(part)]
        grid = torch.empty(preview.num_images, *parts[0].shape[1:], dtype=torch.uint8)
        for rank, part in enumerate(parts):
            grid[rank :: world.size] = part
        suffix = name.removeprefix("preview")
        files[name] = Path(config.run_dir) / "previews" / f"step_{step:08d}{suffix}.png"
        if world.is_main:
            save_grid(grid, files[name], columns=min(10, config.model.num_classes))
    return files
