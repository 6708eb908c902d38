"""What a model costs: parameters and FLOPs, counted on tensors without memory."""

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowar.config.models import ModelConfig
from flowar.models.build import family_of
from flowar.models.family import weigh


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each part of the model, and in total."""
    family = family_of(config)
    with torch.device("meta"):
        model = family.create(config)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = family.part_of(name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    return {**dict(sorted(counts.items())), "total": sum(counts.values())}


@lru_cache
def count_training_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one image's forward and backward pass (matrix products and attention; multiply-add is 2)."""
    family = family_of(config)
    draws = {name: tensor[None].to("meta") for name, tensor in family.draw(config, torch.Generator()).items()}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = family.create(config)
        latents = torch.empty(config.images_per_sample, *config.latent_shape)
        labels = torch.zeros(1, dtype=torch.int64)
        losses = family.losses(model, config, latents, labels, draws)
        weigh(losses, family.loss_terms(config).values()).backward()
    total: int = counter.get_total_flops()
    return total // config.images_per_sample
