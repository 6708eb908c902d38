import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowar.config.drawing import DrawConfig
from flowar.models.costs import count_parameters, count_training_flops
from flowar.models.flowar import family
from flowar.models.flowar.generate import make_time_grids, sample_latents
from flowar.models.flowar.model import FlowAR
from tests.conftest import tiny_config


def multiply_adds(config):
    """Count one forward pass by hand, for `attn_mlp`."""
    tokens, width = sum(s * s for s in config.scales), config.ar_width
    last = config.scales[-1] ** 2
    others = tokens - last  # one call with a mask
    causal, local = others**2 + last * tokens, others**2 + last**2
    hidden = int(width * 8 / 3)
    block = tokens * (4 * width**2 + 3 * width * hidden) + 2 * width * causal
    ar = config.ar_depth * (block + 6 * width**2) + (tokens - 1) * config.token_width * width + tokens * width**2
    flow_block = tokens * (4 * width**2 + 3 * width * hidden + 6 * width**2) + 2 * width * local
    time = len(config.scales) * (256 * width + width**2)
    flow = config.flow_depth * flow_block + tokens * (2 * config.token_width * width + width**2 + 2 * width**2) + time
    return ar + flow


def test_training_flops_are_three_forward_passes_except_for_the_inputs():
    config = tiny_config()
    found, forward = count_training_flops(config), 2 * multiply_adds(config)
    tokens, width = sum(s * s for s in config.scales), config.ar_width
    no_gradient = (2 * tokens - 1) * config.token_width * width + len(config.scales) * 256 * width  # of the inputs
    norms = (2 * config.ar_depth + 3) * tokens * width  # their scale is the same for all tokens, a product in backward
    assert found == 3 * forward - 2 * no_gradient + 2 * norms


@pytest.mark.parametrize(
    "how",
    [
        DrawConfig(num_steps=9, guidance=2.0, guidance_interval=(0.2, 0.8)),
        DrawConfig(num_steps=9, guidance=1.0),
        DrawConfig(
            num_steps=8, last_scale_steps=4, solver="heun", guidance=2.0, guidance_interval=(0.2, 0.8),
            guidance_schedule="constant",
        ),
    ],
    ids=["guided", "unguided", "heun-annealed-constant"],
)  # fmt: skip
def test_sampling_flops_equal_a_count_of_the_whole_run(how):
    config = tiny_config()
    with torch.device("meta"):
        model = FlowAR(config).eval()
        label = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        sample_latents(
            model, label, time_grid=make_time_grids(how, 3), guidance=how.guidance,
            guidance_interval=how.guidance_interval, guidance_schedule=how.guidance_schedule, solver=how.solver,
        )  # fmt: skip
    assert family.sampling_flops(config, how) == counter.get_total_flops()


def test_parts_add_up_to_the_model():
    config = dataclasses.replace(tiny_config(), flow_block="attn_cross_mlp")
    counts = count_parameters(config)
    assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for p in FlowAR(config).parameters())
