"""Counts of the host's work in a step: reads of the device, compiled graphs, collectives."""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.host import CPU, count_collectives, imagined_ranks, make_parts, narrow, random_inputs
from flowar.base.distributed import World
from flowar.base.errors import UserError
from flowar.config.models import variant_config
from flowar.config.training import EMAConfig, OptimConfig, ParallelConfig, TrainConfig
from flowar.models.build import create_model, family_of
from flowar.training import step as steps
from flowar.training.averages import EMA
from flowar.training.optim import LocalAdamW, make_optimizer
from tests.conftest import tiny_config

SMALL = dataclasses.replace(narrow(variant_config("flowar-h")), ar_depth=4, flow_depth=3)
GROUPS = 4 + 3 + 1  # blocks, and what is around them


class Reads(TorchDispatchMode):
    """Counts numbers that Python reads from a tensor: item(), int(), float(), if."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_a_step_reads_the_device_once(engine, monkeypatch):
    vectors = []
    read = steps.read_numbers
    monkeypatch.setattr(steps, "read_numbers", lambda values: vectors.append(len(values)) or read(values))
    with imagined_ranks(1 if engine == "single" else 4) as world:
        made, settings = make_parts(SMALL, ParallelConfig(engine=engine), world, parts=2)
        ema = EMA(EMAConfig(decays=(0.9, 0.99)), made.local_weights())
        for number in (1, 2):
            inputs = random_inputs(settings, 2, number)
            with Reads() as reads:
                numbers = steps.agree(made, steps.accumulate(made, inputs, settings), settings, asked_to_stop=3)
                made.step(1e-3, numbers.grad_norm)
                ema.update(made.local_weights(), number)
            assert reads.count == 0 and vectors == [len(numbers.losses) + 3] * number
        assert numbers.asked_to_stop == 3


def compiled_graphs(parallel, monkeypatch):
    """Train two steps of two parts; return the numbers of graphs and graph breaks in Dynamo."""
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph

    def train(world):
        made, settings = make_parts(SMALL, parallel, world, "bf16", parts=2)
        for number in (1, 2):
            terms = steps.accumulate(made, random_inputs(settings, 2, number), settings)
            made.step(1e-3, steps.agree(made, terms, settings).grad_norm)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=note))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if parallel.engine == "fsdp":
        with imagined_ranks(4) as world:
            train(world)
    else:  # DDP's hooks need more than simulated ranks give
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            train(World(0, 1, CPU, None))
        finally:
            dist.destroy_process_group()
    return len(graphs), sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
@pytest.mark.parametrize("recomputed", [0, 1])
def test_each_kind_of_block_is_compiled_once_and_whole(engine, recomputed, monkeypatch):
    parallel = ParallelConfig(engine=engine, compile=True, checkpoint_every_blocks=recomputed)
    assert compiled_graphs(parallel, monkeypatch) == (2, 0)


def test_settings_of_fsdp_send_what_they_say():
    def count(**changes):
        found = count_collectives(ParallelConfig(engine="fsdp", **changes), SMALL, parts=2)
        assert found.pop("allreduce float64")[0] == 1
        return found

    usual = count()
    (gathers, gathered), (reductions, reduced) = usual["allgather float32"], usual["reduce_scatter float32"]
    assert (gathers, reductions) == (2 * (2 * GROUPS - 1), 2 * GROUPS)
    assert count(fsdp_prefetch=2) == usual
    assert count(fsdp_reshard=False) == usual | {"allgather float32": (2 * GROUPS, reduced)}
    assert count(fsdp_sync_once=True) == usual | {"reduce_scatter float32": (GROUPS, reduced // 2)}
    norms, half = 3, count(fsdp_bf16=True)
    assert half["allgather bfloat16"][0] == gathers - 2 and half["allgather float32"][0] == 2 * (1 + norms)
    assert half["reduce_scatter float32"] == (reductions + 2 * norms, reduced)
    sent = half["allgather bfloat16"][1] + half["allgather float32"][1]
    assert sent == pytest.approx(gathered / 2, rel=0.15)  # the rest: norms, and what is around the blocks


@pytest.mark.parametrize(("max_norm", "max_value"), [(0.5, None), (None, 0.3), (60.0, 0.3), (None, None)])
def test_optimizer_on_local_tensors_has_the_bits_of_torchs(max_norm, max_value):
    settings = OptimConfig(max_grad_norm=max_norm, max_grad_value=max_value)
    models = [create_model(tiny_config()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    theirs, ours = (make_optimizer(model, family_of(model.config), settings) for model in models)
    ours = LocalAdamW(dict(models[1].named_parameters()), ours)
    for group in theirs.param_groups:
        group["lr"] = 1e-3
    for _ in range(3):
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(models[0].parameters(), max_norm or float("inf"))
        assert torch.equal(ours.take_gradients(), norm) and norm > (max_norm or 0)
        if max_value is not None:
            torch.nn.utils.clip_grad_value_(models[0].parameters(), max_value)
        ours.clip(norm, settings)
        theirs.step()
        ours.step(1e-3)
        assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_bfloat16_weights_need_bfloat16_training():
    with pytest.raises(UserError, match="parallel.fsdp_bf16=true needs precision=bf16, got precision=tf32"):
        TrainConfig(run_dir="none", parallel=ParallelConfig(fsdp_bf16=True))
