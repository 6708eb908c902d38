"""The gate: a training step and a sampled batch have the counts in benchmarks/counts.txt."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flowar
from benchmarks import counts
from flowar.config.models import ARFlowConfig, variant_config
from flowar.models.build import family_of
from flowar.models.family import weigh
from flowar.models.flowar import baseline
from flowar.models.tally import Tally
from tests.conftest import MORE, tiny_config

RECORDED = counts.COUNTS_FILE.read_text().splitlines()


def test_the_recorded_counts_are_of_this_torch():
    assert RECORDED[0] == counts.header(), "run python -m benchmarks.counts --write and say why in the commit"


@pytest.mark.slow
@pytest.mark.parametrize("name", counts.MODELS)
def test_nothing_costs_more_or_less_than_recorded(name):
    recorded = [line for line in RECORDED if line.startswith(name)]
    found = counts.lines_of(name)
    assert len(recorded) == len(found), f"counts.txt has {len(recorded)} lines of {name}, not {len(found)}"
    changes = [f"  {old}\n  -> {new.split()[-1]}" for old, new in zip(recorded, found, strict=True) if old != new]
    assert not changes, "\n".join(
        [
            "the code costs other than benchmarks/counts.txt says:",
            *changes,
            "run python -m benchmarks.counts --write and say why in the commit",
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=MORE) for name in counts.COMPILED_MODELS])
def test_compiled_blocks_move_no_more_than_recorded(name):
    recorded = [line for line in counts.COMPILED_FILE.read_text().splitlines() if line.startswith(name)]
    assert recorded == list(counts.compiled_lines_of(name)), "run python -m benchmarks.counts --compiled --write"


@pytest.mark.parametrize("block", ["attn_mlp", "attn_cross_mlp"])
def test_extrapolated_counts_equal_those_of_the_whole_model(block):
    config = tiny_config(ar_depth=6, flow_depth=3, flow_block=block, dropout=0.1)
    assert counts.count_training(config) == counts.count_step(config)
    assert counts.count_sampling(config, 3, 4) == counts.count_batch(config, counts.grid_of(3, 4))


def test_extrapolated_counts_of_arflow_equal_those_of_the_whole_model():
    """Even after 250 steps, as every step costs the same."""
    config = ARFlowConfig(variant="custom", num_classes=5, latent_size=8, depth=3, width=32, heads=2)
    assert counts.count_arflow_training(config) == counts.count_step(config)
    for depth, num_steps in ((3, 7), (1, 50), (1, 250)):
        shape = dataclasses.replace(config, depth=depth)
        assert counts.count_arflow_sampling(shape, num_steps) == counts.count_arflow_batch(shape, num_steps)


def test_the_released_grid_has_as_many_steps_of_each_kind_as_are_counted():
    config, grid = tiny_config(), flowar.released_time_grid(counts.NUM_STEPS)
    assert sum(counts.released_steps()) == len(grid) - 1 == 24
    assert counts.count_batch(config, grid) == counts.count_sampling(config, *counts.released_steps())


def test_known_shapes_do_not_change_a_count():
    model = flowar.create_model(tiny_config()).to("meta")
    work = torch.zeros(2, 3, 4, 4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        with Tally() as tally:
            flowar.training_loss(model, *work).backward()
        model.zero_grad()
        found = counts.counted(lambda: flowar.training_loss(model, *work).backward())
    assert found == {"flops": tally.flops, "operations": sum(tally.operations.values()), "bytes": tally.bytes}


def test_flops_are_those_of_torchs_counter():
    model = flowar.create_model(tiny_config(flow_block="attn_cross_mlp"))
    batch = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    with FlopCounterMode(display=False) as expected:
        flowar.training_loss(model, *batch).backward()
    with Tally() as tally:
        flowar.training_loss(model, *batch).backward()
    assert tally.flops == expected.get_total_flops() > 0


def test_views_cost_nothing_and_other_operations_their_inputs_and_outputs():
    table = torch.zeros(4, 6)
    with Tally() as tally:
        table.view(6, 4).t()[1:].unbind(0)
        table.chunk(2, dim=1)
    assert (tally.bytes, tally.operations) == (0, {})
    with Tally() as tally:
        (table + 1).mul_(2)
        table.sum().item()
    assert tally.operations == {
        "aten.add.Tensor": 1, "aten.mul_.Tensor": 1, "aten.sum.default": 1, "aten._local_scalar_dense.default": 1
    }  # fmt: skip
    assert tally.bytes == 2 * 96 + 2 * 96 + (96 + 4) + 4
    assert tally.reads == 1


def test_projecting_the_time_per_token_is_noticed():
    """The time alone modulates the attention of attn_cross_mlp: one row per sample and scale, not per token."""
    config = dataclasses.replace(variant_config("flowar-l"), ar_depth=2, flow_depth=2)
    family = family_of(config)
    draws = family.draw(config, torch.Generator())
    with torch.device("meta"):
        model = baseline.create(config)
        latents, labels = torch.empty(2, *config.latent_shape), torch.zeros(2, dtype=torch.int64)
        draws = {name: torch.empty(2, *draw.shape) for name, draw in draws.items()}

    def step():
        loss = weigh(baseline.losses(model, config, latents, labels, draws), family.loss_terms(config).values())
        loss.backward()

    per_sample = counts.counted(step)["flops"]

    def plant(block):
        """Expand the time to all tokens before the block projects it."""

        def expand(module, arguments):
            x, time, *others = arguments
            return x, time.expand(-1, x.shape[1], -1), *others

        block.register_forward_pre_hook(expand)

    for block in model.flownet.res_blocks:
        plant(block)
    tokens = [side * side for side in config.scales]
    rows, width = 2 * (sum(tokens) - len(tokens)), config.flow_width
    more = 2 * rows * width * 3 * width  # multiply-adds of Linear(E -> 3 E) for the extra rows
    assert counts.counted(step)["flops"] - per_sample == config.flow_depth * 3 * more  # forward, and both gradients
