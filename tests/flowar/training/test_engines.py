import dataclasses
import functools
import signal

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch.distributed.checkpoint import FileSystemReader

from flowar.base.errors import EXIT_AGAIN
from flowar.base.run_folder import find_latest, list_checkpoints
from flowar.config.training import EMAConfig, ParallelConfig
from flowar.models.folders import load_model
from flowar.training.report import read_metrics
from flowar.training.shares import share_out
from tests.conftest import ALL, KILLS_ASKED, MORE, TRAININGS
from tests.flowar.ranks import run_ranks, start_ranks
from tests.processes import PATIENCE_S, Death, draw_deaths, join, stop, wait_until

NUM_KILLS = KILLS_ASKED or 2

ENGINES = {
    "ddp": ParallelConfig(engine="ddp"),
    "fsdp": ParallelConfig(engine="fsdp"),
    "zero1": ParallelConfig(engine="deepspeed", zero_stage=1, zero_files=True),
    "zero2": ParallelConfig(engine="deepspeed", zero_stage=2, zero_files=True),
    "zero3": ParallelConfig(engine="deepspeed", zero_stage=3, zero_files=True),
}
EPOCHS = 25 if ALL else 7  # of two steps
# After 50 steps in float32, as ranks add up in another order: relative for losses and norms, absolute for weights.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-5, 2e-5


def settings(shards, run_dir, engine, family="flowar", **changes):
    model = TRAININGS[family](shards, run_dir).model
    fixed = {
        "model": dataclasses.replace(model, dropout=0.0) if family == "flowar" else model,
        "epochs": EPOCHS,
        "batch_size": 12,
        "micro_batch_size": 3,
        "log_every_steps": 1,
        "save_every_steps": 20,
        "ema": EMAConfig(decays=(0.9, 0.99), stds=(0.1,)),
        "parallel": ENGINES.get(engine, ParallelConfig()),
    }
    return TRAININGS[family](shards, run_dir, **(fixed | changes))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """-> the undisturbed run of an engine and a family, on two ranks or alone."""

    @functools.cache
    def run(engine, family="flowar"):
        run_dir = tmp_path_factory.mktemp(engine) / "run"
        run_ranks(settings(shards, run_dir, engine, family), 1 if engine == "single" else 2, run_dir.parent / "log")
        return run_dir

    return run


@pytest.fixture(scope="module")
def alone(undisturbed):
    """The run on one process."""
    return undisturbed("single")


def assert_same_run(run_dir, needed):
    mine, theirs = read_metrics(run_dir), read_metrics(needed)
    assert [record["step"] for record in mine] == [record["step"] for record in theirs]
    for record, other in zip(mine, theirs, strict=True):
        for key in ("loss", "grad_norm", "lr", *(key for key in other if key.startswith("loss/"))):
            assert record[key] == pytest.approx(other[key], rel=LOSS_TOLERANCE), (record["step"], key)
    for weights in ("raw", "decay_0.9", "decay_0.99", "std_0.1"):
        found, expected = load_model(run_dir, weights).state_dict(), load_model(needed, weights).state_dict()
        for name in expected:
            torch.testing.assert_close(
                found[name], expected[name], rtol=0, atol=WEIGHT_TOLERANCE, msg=f"{weights} {name}"
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "engine"),
    [*(("flowar", engine) for engine in ENGINES), *(pytest.param("arflow", engine, marks=MORE) for engine in ENGINES)],
)
def test_all_engines_train_the_same_model(undisturbed, family, engine):
    run_dir = undisturbed(engine, family)
    assert len(read_metrics(run_dir)) == 2 * EPOCHS
    assert_same_run(run_dir, undisturbed("single", family))
    pieces = FileSystemReader(find_latest(run_dir)).read_metadata().state_dict_metadata.values()
    assert all(len(tensor.chunks) == 1 for tensor in pieces)  # one chunk, not one per rank, which would be slow to plan
    if engine.startswith("zero"):
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(find_latest(run_dir) / "deepspeed"))
        ours = load_model(run_dir, "raw").state_dict()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.slow
def test_two_copies_of_two_parts_train_the_same_model(shards, alone, tmp_path):
    parallel = ParallelConfig(engine="fsdp", replicas=2, checkpoint_every_blocks=2)
    config = settings(shards, tmp_path / "run", "fsdp", parallel=parallel)
    run_ranks(config, 4, tmp_path / "log")
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_fsdp_that_syncs_once_and_keeps_weights_trains_the_same_model(shards, alone, tmp_path):
    parallel = ParallelConfig(engine="fsdp", fsdp_reshard=False, fsdp_sync_once=True, fsdp_prefetch=1)
    run_ranks(settings(shards, tmp_path / "run", "fsdp", parallel=parallel), 2, tmp_path / "log")
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_weights_sent_as_bfloat16_are_those_that_autocast_computes_with(shards, tmp_path):
    found = []
    for is_sent in (False, True):
        run_dir = tmp_path / f"{is_sent}"
        parallel = ParallelConfig(engine="fsdp", fsdp_bf16=is_sent)
        model = dataclasses.replace(settings(shards, run_dir, "fsdp").model, flow_block="attn_cross_mlp")
        config = settings(shards, run_dir, "fsdp", precision="bf16", model=model, epochs=3, parallel=parallel)
        run_ranks(config, 2, tmp_path / "log")
        found.append([record["loss"] for record in read_metrics(run_dir)])
    assert found[0] == found[1] and len(found[0]) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "chain"),
    [
        ("flowar", ("fsdp", "zero3", "single")),
        ("flowar", ("zero2", "ddp", "zero1")),
        ("arflow", ("fsdp", "zero2", "single")),
        pytest.param("flowar", ("zero3", "single", "fsdp"), marks=MORE),
    ],
)
def test_a_run_resumes_with_another_engine_and_another_number_of_ranks(shards, undisturbed, tmp_path, family, chain):
    """The run is stopped twice by a signal in the middle of an epoch; batches of 12 on 4, 2 and 3 ranks, or on one."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    for place, engine in enumerate(chain):
        config = settings(shards, run_dir, engine, family, save_every_steps=1000, micro_batch_size=None)
        stopped = place < 2
        asked = Death(at=4, below=str(run_dir / "metrics.jsonl"), signal=(signal.SIGTERM, signal.SIGUSR2)[place % 2])
        world_size = 1 if engine == "single" else (4, 2, 3)[place]
        ranks = start_ranks(config, world_size, log, last_ones=asked if stopped else None)
        join(ranks, log, code=EXIT_AGAIN if stopped else 0)
    assert_same_run(run_dir, undisturbed("single", family))


def wait_for_step(run_dir, step, ranks, log):
    """Wait until the run has logged this step."""
    wait_until(lambda: (records := read_metrics(run_dir)) and records[-1]["step"] >= step, ranks, log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "engine"),
    [
        ("flowar", "fsdp"),
        pytest.param("flowar", "zero2", marks=MORE),
        pytest.param("flowar", "zero3", marks=MORE),
        pytest.param("arflow", "fsdp", marks=MORE),
        pytest.param("arflow", "zero2", marks=MORE),
    ],
)
def test_sigkill_at_random_moments_ends_in_the_same_bits(shards, undisturbed, tmp_path, family, engine):
    """Every step is saved; every other kill is in a save. FLOWAR_TEST_KILLS=20 for more."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    config = settings(shards, run_dir, engine, family, save_every_steps=1)
    uses_of_a_save = 24  # at least
    anywhere = draw_deaths(NUM_KILLS, 2 * EPOCHS * uses_of_a_save // NUM_KILLS, run_dir)
    saving = draw_deaths(NUM_KILLS, uses_of_a_save - 3, run_dir / "checkpoints" / ".step_", least=5, seed=1)
    for number in range(NUM_KILLS):
        death = (anywhere, saving)[number % 2][number]
        ranks = start_ranks(config, 2, log, deaths={0: death})
        ranks[0].join(PATIENCE_S)
        stop(ranks)  # as a launcher does with the others
        assert ranks[0].exitcode == -signal.SIGKILL, log.read_text()[-3000:]
        assert number % 2 == 0 or is_saving(run_dir)
    run_ranks(config, 2, log)
    needed = undisturbed(engine, family)
    for weights in ("raw", "decay_0.9", "std_0.1"):
        found, expected = load_model(run_dir, weights).state_dict(), load_model(needed, weights).state_dict()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert list_checkpoints(run_dir)[-1].name == list_checkpoints(needed)[-1].name


def is_saving(run_dir):
    return any((run_dir / "checkpoints").glob(".step_*"))


def test_weights_are_sharded_evenly():
    sizes = {"a": 10, "b": 6, "c": 5, "d": 4, "e": 1}
    owners = share_out(sizes, 2)
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(2)]
    assert loads == [14, 12] and share_out(sizes, 2) == owners
