"""Count the operations of a training step and a sampled batch exactly, to compare versions without a machine.

python -m benchmarks.counts            print the counts of the code as it is
python -m benchmarks.counts --write    write them to benchmarks/counts.txt, which tests compare with the code
python -m benchmarks.counts --compiled [--write]
                                       of both with compiled blocks (compiled.txt): takes minutes, needs g++

Counted on meta tensors, float32, batches of 8, through the public API: `training_loss` and its backward pass, in
training mode; `sample_latents` with the released settings of FlowAR-L (25 steps, guidance 2.4 up to time 0.9), and for
ARFlow with 250 steps of its stochastic sampler, guidance 1.5. A batch of ARFlow's training is 8 sequences of 5 images.

- flops: of matrix products, a multiply-add is 2; per image. These are the counts of torch's FlopCounterMode.
- operations: calls of aten operations except views; per step, per batch. Attention counts as its matrix products,
  softmax and scalings, as torch computes it without a fused kernel.
- bytes: of all inputs and outputs of these operations, per image: the traffic if nothing were fused.

Inductor counts compiled blocks, on a CPU: the kernels of one block of each kind, forward and backward, and their reads
and writes. The rest of the step or batch is counted as above. The kernels are planned, not built, as only their counts
matter. Attention with dropout is one kernel on a GPU, but explicit products on a CPU, so it is counted without dropout.
In sampling, each scale is a graph of its own, as is each size of the batch: without and with guidance.

Each count grows by the same amount with every block, and with every step of the solver, guided or not (except ARFlow's
first step, which has no memory to read). So it is taken at two sizes each and extrapolated to the whole model; a test
compares that with counting everything.
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._inductor import compile_fx, metrics
from torch._inductor.async_compile import AsyncCompile

import flowar
from flowar.config.models import ARFlowConfig, FlowARConfig, ModelConfig, variant_config
from flowar.models.build import family_of
from flowar.models.tally import Tally

API: Any = flowar  # its names are imported when first used, so their types are not known
COUNTS_FILE = Path(__file__).with_name("counts.txt")
COMPILED_FILE = Path(__file__).with_name("compiled.txt")
COMPILED_MODELS = ("flowar-s", "flowar-l", "flowar-h")
MODELS = (*COMPILED_MODELS, "arflow-s/2", "arflow-xl/2")
BATCH = 8
NUM_STEPS, GUIDANCE, GUIDANCE_INTERVAL = 25, 2.4, (0.0, 0.9)  # of FlowAR-L, in its authors' README
UNGUIDED_TIME = 0.95  # above the interval
ARFLOW_STEPS, ARFLOW_GUIDANCE = 250, 1.5
LEAST_ARFLOW_STEPS = 3  # the first, one like all others, the last

Counts = Counter[str]  # flops, operations, bytes; of a batch


def counted(work: Callable[[], object]) -> Counts:
    """Return the counts of some work on meta tensors."""
    with Tally() as tally:
        work()
    return Counter({"flops": tally.flops, "operations": sum(tally.operations.values()), "bytes": tally.bytes})


def sized(config: FlowARConfig, ar_pairs: int, flow_blocks: int) -> FlowARConfig:
    """Return a model's shape with these numbers of blocks; a pair counts blocks below and above the middle."""
    return dataclasses.replace(config, variant="custom", ar_depth=2 * ar_pairs, flow_depth=flow_blocks)


def count_step(config: ModelConfig) -> Counts:
    """Return the counts of one training step, forward and backward, without the optimizer."""
    with torch.device("meta"):
        model = API.create_model(config).train()
        images = (config.images_per_sample,) if config.images_per_sample > 1 else ()
        latents = torch.empty(BATCH, *images, *config.latent_shape)
        labels = torch.zeros(BATCH, dtype=torch.int64)
    with torch.device("meta"):  # for the draws
        return counted(lambda: API.training_loss(model, latents, labels).backward())


def count_batch(config: ModelConfig, time_grid: torch.Tensor, **settings: Any) -> Counts:
    """Return the counts of sampling one batch of latents."""
    with torch.device("meta"):
        model = API.create_model(config).eval()
        labels = torch.zeros(BATCH, dtype=torch.int64)
    settings = {"guidance": GUIDANCE, "guidance_interval": GUIDANCE_INTERVAL} | settings
    return counted(lambda: API.sample_latents(model, labels, time_grid=time_grid, **settings))


def grid_of(unguided: int, guided: int) -> torch.Tensor:
    """Return a time grid with these numbers of steps above the guidance interval and in it."""
    ends = torch.tensor([1, UNGUIDED_TIME, GUIDANCE_INTERVAL[1], 0], dtype=torch.float64)
    above = torch.linspace(1, UNGUIDED_TIME, unguided, dtype=torch.float64) if unguided else ends[:0]
    return torch.cat([above, torch.linspace(GUIDANCE_INTERVAL[1], 0, guided + 1, dtype=torch.float64)])


def released_steps() -> tuple[int, int]:
    """Return how many steps of the released grid are above the guidance interval, and how many in it."""
    times = API.released_time_grid(NUM_STEPS)[:-1]
    guided = int((times <= GUIDANCE_INTERVAL[1]).sum())
    return len(times) - guided, guided


def carry_on(first: Counts, second: Counts, times: int) -> Counts:
    """Extrapolate: return `first` plus a number of steps of the size from `first` to `second`."""
    return Counter({name: first[name] + times * (second[name] - first[name]) for name in first})


def count_training(config: FlowARConfig) -> Counts:
    """Return the counts of a training step of the whole model."""
    one, more_ar, more_flow = (count_step(sized(config, *size)) for size in ((1, 1), (2, 1), (1, 2)))
    whole_flow = carry_on(one, more_flow, config.flow_depth - 1)
    return whole_flow + carry_on(one, more_ar, config.ar_depth // 2 - 1) - one


def count_sampling(config: FlowARConfig, unguided: int, guided: int) -> Counts:
    """Return the counts of a batch of the whole model; steps above the guidance interval, and in it."""
    return count_sampling_blocks(config, unguided, guided, config.ar_depth // 2, config.flow_depth)


def count_sampling_blocks(config: FlowARConfig, unguided: int, guided: int, ar_pairs: int, flow_blocks: int) -> Counts:
    """Return the counts of a batch of a model with these numbers of blocks, which may be 0, as may those of steps."""

    def at_depth(flow_blocks: int) -> Counts:
        shape = sized(config, 1, flow_blocks)
        one, more_unguided, more_guided = (count_batch(shape, grid_of(*steps)) for steps in ((1, 1), (2, 1), (1, 2)))
        found = carry_on(one, more_unguided, unguided - 1)  # `+` and `-` of counters would drop what is not positive
        found.update(carry_on(one, more_guided, guided - 1))
        found.subtract(one)
        return found

    short, two_pairs = (count_batch(sized(config, pairs, 1), grid_of(1, 1)) for pairs in (1, 2))
    found = carry_on(at_depth(1), at_depth(2), flow_blocks - 1)
    found.update(carry_on(short, two_pairs, ar_pairs - 1))
    found.subtract(short)
    return found


def count_arflow_training(config: ARFlowConfig) -> Counts:
    """Return the counts of a training step of the whole model."""
    one, two = (count_step(dataclasses.replace(config, variant="custom", depth=depth)) for depth in (1, 2))
    return carry_on(one, two, config.depth - 1)


def count_arflow_batch(config: ARFlowConfig, num_steps: int) -> Counts:
    """Return the counts of a batch of the released sampler, guided in all steps."""
    grid = API.released_time_grid(num_steps, family=config.family)
    return count_batch(config, grid, guidance=ARFLOW_GUIDANCE, guidance_interval=(0.0, 1.0))


def count_arflow_sampling(config: ARFlowConfig, num_steps: int) -> Counts:
    """Return the counts of a batch of the whole model."""

    def at_depth(depth: int) -> Counts:
        shape = dataclasses.replace(config, variant="custom", depth=depth)
        few, more = (count_arflow_batch(shape, LEAST_ARFLOW_STEPS + steps) for steps in (0, 1))
        return carry_on(few, more, num_steps - LEAST_ARFLOW_STEPS)

    return carry_on(at_depth(1), at_depth(2), config.depth - 1)


# By kind of model: the counts of a training step, and of a sampled batch.
COUNTERS: dict[type[ModelConfig], tuple[Callable[[Any], Counts], Callable[[Any], Counts]]] = {
    FlowARConfig: (count_training, lambda config: count_sampling(config, *released_steps())),
    ARFlowConfig: (count_arflow_training, lambda config: count_arflow_sampling(config, ARFLOW_STEPS)),
}


@contextlib.contextmanager
def planned_kernels(model: Any, config: FlowARConfig, kind: str) -> Iterator[None]:
    """Have inductor count what blocks of one kind do inside, without building their kernels: results are arbitrary."""
    torch._dynamo.reset()
    metrics.reset()
    told = logging.Logger("nobody", logging.INFO)  # inductor counts bytes only for a logger
    for block in family_of(config).blocks(model):
        if type(block).__name__ == kind:
            block.forward = torch.compile(block.forward, dynamic=False)
    with (
        torch._inductor.config.patch(force_disable_caches=True),  # cached kernels are not counted
        torch._dynamo.config.patch(recompile_limit=4 * len(config.scales)),
        mock.patch.object(compile_fx, "inductor_metrics_log", told),
        mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_, **__: lambda *_: None),
    ):
        yield


def counted_kernels() -> Counts:
    """Return inductor's counts since `planned_kernels` began: bytes of the whole batch, and kernels."""
    kernels = sum(elements > 0 for _, elements in metrics.nodes_num_elem)
    return Counter({"bytes": int(metrics.num_bytes_accessed), "kernels": kernels})


def count_compiled_block(config: FlowARConfig, kind: str) -> Counts:
    """Return inductor's counts of one block, forward and backward.

    Args:
        config: with as few blocks as possible; blocks of a kind are compiled once, so one is counted.
        kind: "AutoregressiveBlock", "FlowBlock" or "CrossAttentionFlowBlock".
    """
    model = API.create_model(config).train()
    latents, labels = torch.zeros(BATCH, *config.latent_shape), torch.zeros(BATCH, dtype=torch.int64)
    with planned_kernels(model, config, kind):
        API.training_loss(model, latents, labels).backward()
    return counted_kernels()


def count_compiled_drawing(config: FlowARConfig, kind: str, unguided: int, guided: int) -> Counts:
    """Return inductor's counts of one block in a sampled batch, of all scales.

    Args:
        config, kind: as in `count_compiled_block`.
        unguided, guided: steps without and with guidance; each graph counts once, however often it is called.
    """
    model = API.create_model(config).eval()
    labels = torch.zeros(BATCH, dtype=torch.int64)
    grid = torch.tensor([1.0] * unguided + [GUIDANCE_INTERVAL[1]] * guided + [0.0], dtype=torch.float64)
    with planned_kernels(model, config, kind):
        API.sample_latents(
            model, labels, time_grid=grid, guidance=GUIDANCE if guided else 1.0, guidance_interval=GUIDANCE_INTERVAL
        )
    return counted_kernels()


def count_compiled_sampling(config: FlowARConfig, flow_kind: str) -> Counts:
    """Return the bytes of a batch with compiled blocks, and the kernels of a flow block in one step of all scales.

    The modulation of a block by the time is counted for one time: the others add one vector each.
    """
    one, (unguided, guided) = sized(config, 1, 1), released_steps()
    without, with_guidance = (count_compiled_drawing(one, flow_kind, *steps) for steps in ((1, 0), (0, 1)))
    ar = count_compiled_drawing(one, "AutoregressiveBlock", 0, 1)["bytes"]
    outside = count_sampling_blocks(config, unguided, guided, 0, 0)["bytes"]
    prepared = count_sampling_blocks(config, 0, 0, 0, 1)["bytes"] - count_sampling_blocks(config, 0, 0, 0, 0)["bytes"]
    flow = prepared + unguided * without["bytes"] + guided * with_guidance["bytes"]
    return Counter(
        {
            "bytes": outside + config.ar_depth * ar + config.flow_depth * flow,
            "kernels": with_guidance["kernels"],
        }
    )


def compiled_lines_of(name: str) -> tuple[str, ...]:
    """Return the lines of compiled.txt of one model."""
    config = variant_config(name)
    assert isinstance(config, FlowARConfig)
    config = dataclasses.replace(config, dropout=0.0)
    flow_kind = {"attn_mlp": "FlowBlock", "attn_cross_mlp": "CrossAttentionFlowBlock"}[config.flow_block]
    one, more_ar, more_flow = (count_step(sized(config, *size)) for size in ((1, 1), (2, 1), (1, 2)))
    ar, flow = (count_compiled_block(sized(config, 1, 1), kind) for kind in ("AutoregressiveBlock", flow_kind))
    outside = 2 * one["bytes"] - more_ar["bytes"] + one["bytes"] - more_flow["bytes"]  # (1, 1) without its blocks
    bytes_of_all = outside + config.ar_depth * ar["bytes"] + config.flow_depth * flow["bytes"]
    batch = count_compiled_sampling(config, flow_kind)
    return (
        f"{name:9} compiled step bytes per image      {bytes_of_all // BATCH:>19,}",
        f"{name:9} compiled step kernels, AR block   {ar['kernels']:>19,}",
        f"{name:9} compiled step kernels, flow block {flow['kernels']:>19,}",
        f"{name:9} compiled batch bytes per image     {batch['bytes'] // BATCH:>19,}",
        f"{name:9} compiled batch kernels, flow block {batch['kernels']:>18,}",
    )


@functools.cache
def lines_of(name: str) -> tuple[str, ...]:
    """Return the lines of counts.txt of one model."""
    config = variant_config(name)
    count_step_of, count_batch_of = COUNTERS[type(config)]
    found = {
        "training step": (count_step_of(config), BATCH * config.images_per_sample),
        "sampled batch": (count_batch_of(config), BATCH),
    }
    return tuple(
        f"{f'{name:9} {what} {unit}':44} {value:>19,}"
        for what, (counts, images) in found.items()
        for unit, value in (
            ("flops per image", counts["flops"] // images),
            ("operations", counts["operations"]),
            ("bytes per image", counts["bytes"] // images),
        )
    )


def header() -> str:
    """Return the first line of counts.txt."""
    return f"# python -m benchmarks.counts --write; torch {torch.__version__.split('+')[0]}, batches of {BATCH}"


def all_lines(names: tuple[str, ...], of_model: Callable[[str], tuple[str, ...]]) -> list[str]:
    """Return the lines of counts.txt, or of compiled.txt, for the current code."""
    return [header(), *(line for name in names for line in of_model(name))]


def main() -> None:
    """Print the counts, or write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help=f"compiled steps, {COMPILED_FILE.name}")
    parser.add_argument("--write", action="store_true", help="write them to their file")
    options = parser.parse_args()
    file = COMPILED_FILE if options.compiled else COUNTS_FILE
    lines = all_lines(COMPILED_MODELS, compiled_lines_of) if options.compiled else all_lines(MODELS, lines_of)
    text = "\n".join(lines) + "\n"
    if options.write:
        file.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
