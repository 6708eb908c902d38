import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowar.generate import sample_latents
from flowar.info import count_parameters, count_sampling_flops, count_training_flops
from flowar.model import FlowAR
from flowar.solvers import released_time_grid
from tests.conftest import tiny_config


def multiply_adds(config):
    """Count one forward pass by hand, for `attn_mlp`."""
    tokens, width = sum(s * s for s in config.scales), config.ar_width
    seen = [sum(s * s for s in config.scales[: k + 1]) for k in range(len(config.scales))]
    causal = sum(s * s * keys for s, keys in zip(config.scales, seen, strict=True))
    local = sum(s**4 for s in config.scales)
    hidden = int(width * 8 / 3)
    block = tokens * (4 * width**2 + 3 * width * hidden) + 2 * width * causal
    ar = config.ar_depth * (block + 6 * width**2) + (tokens - 1) * config.token_width * width + tokens * width**2
    flow_block = tokens * (4 * width**2 + 3 * width * hidden + 6 * width**2) + 2 * width * local
    time = len(config.scales) * (256 * width + width**2)
    flow = config.flow_depth * flow_block + tokens * (2 * config.token_width * width + width**2 + 2 * width**2) + time
    return ar + flow


def test_training_flops_are_three_forward_passes_but_for_the_inputs():
    config = tiny_config()
    found, forward = count_training_flops(config), 2 * multiply_adds(config)
    tokens, width = sum(s * s for s in config.scales), config.ar_width
    no_gradient = (2 * tokens - 1) * config.token_width * width + len(config.scales) * 256 * width  # of the inputs
    assert found == 3 * forward - 2 * no_gradient


def test_sampling_flops_equal_a_count_of_the_whole_run():
    config = tiny_config()
    settings = {"time_grid": released_time_grid(9), "guidance": 2.0, "guidance_interval": (0.2, 0.8)}
    with torch.device("meta"):
        model = FlowAR(config).eval()
        label = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        sample_latents(model, label, **settings)
    assert count_sampling_flops(config, **settings) == counter.get_total_flops()
    assert count_sampling_flops(config, **(settings | {"guidance": 1.0})) < counter.get_total_flops()


def test_parts_add_up_to_the_model():
    config = dataclasses.replace(tiny_config(), flow_block="attn_cross_mlp")
    counts = count_parameters(config)
    assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for p in FlowAR(config).parameters())


def test_sampling_flops_follow_solver_annealing_and_schedule():
    config = tiny_config()
    grids = [released_time_grid(steps) for steps in (8, 6, 4)]
    settings = {"time_grid": grids, "guidance": 2.0, "guidance_interval": (0.2, 0.8), "guidance_schedule": "constant"}
    settings["solver"] = "heun"
    with torch.device("meta"):
        model = FlowAR(config).eval()
        label = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        sample_latents(model, label, **settings)
    assert count_sampling_flops(config, **settings) == counter.get_total_flops()
