import dataclasses
import os
import random
import signal
import time

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from flowar.base.run_folder import find_latest, list_checkpoints
from flowar.config.training import EMAConfig, ParallelConfig
from flowar.models.folders import load_model
from flowar.training.engine import share_out
from flowar.training.report import read_metrics
from tests.conftest import MORE, training
from tests.flowar.ranks import run_ranks, start_ranks

ENGINES = {
    "ddp": ParallelConfig(engine="ddp"),
    "fsdp": ParallelConfig(engine="fsdp"),
    "zero1": ParallelConfig(engine="deepspeed", zero_stage=1),
    "zero2": ParallelConfig(engine="deepspeed", zero_stage=2),
    "zero3": ParallelConfig(engine="deepspeed", zero_stage=3),
}
# After 50 steps in float32, as ranks add up in another order: relative for losses and norms, absolute for weights.
NUM_KILLS = int(os.environ.get("FLOWAR_TEST_KILLS", "2"))
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-5, 2e-5


def settings(shards, run_dir, engine, **changes):
    model = dataclasses.replace(training(shards, run_dir).model, dropout=0.0)
    fixed = {
        "model": model,
        "epochs": 25,  # 50 steps of 12
        "batch_size": 12,
        "micro_batch_size": 3,
        "log_every_steps": 1,
        "save_every_steps": 20,
        "ema": EMAConfig(decays=(0.9, 0.99), stds=(0.1,)),
        "parallel": ENGINES.get(engine, ParallelConfig()),
    }
    return training(shards, run_dir, **(fixed | changes))


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """The run on one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    run_ranks(settings(shards, run_dir, "single"), 1, run_dir.parent / "log")
    return run_dir


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
@pytest.mark.parametrize("engine", ENGINES)
def test_all_engines_train_the_same_model(shards, alone, tmp_path, engine):
    run_ranks(settings(shards, tmp_path / "run", engine), 2, tmp_path / "log")
    assert len(read_metrics(tmp_path / "run")) == 50
    assert_same_run(tmp_path / "run", alone)
    if engine.startswith("zero"):
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(find_latest(tmp_path / "run") / "deepspeed"))
        ours = load_model(tmp_path / "run", "raw").state_dict()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.slow
def test_two_copies_of_two_parts_train_the_same_model(shards, alone, tmp_path):
    parallel = ParallelConfig(engine="fsdp", replicas=2, checkpoint_every_blocks=2)
    config = settings(shards, tmp_path / "run", "fsdp", parallel=parallel)
    run_ranks(config, 4, tmp_path / "log")
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        ("fsdp", "zero3", "single"),
        ("zero2", "ddp", "zero1"),
        pytest.param(("zero3", "single", "fsdp"), marks=MORE),
    ],
)
def test_a_run_goes_on_with_another_engine_and_another_number_of_ranks(shards, alone, tmp_path, chain):
    """Stopped by a signal in the middle of an epoch, twice; batches of 12 on 4, 2 and 3 ranks, or on one."""
    for place, engine in enumerate(chain):
        config = settings(shards, tmp_path / "run", engine, save_every_steps=1000, micro_batch_size=None)
        ranks = start_ranks(config, 1 if engine == "single" else (4, 2, 3)[place], tmp_path / "log")
        if place < 2:
            wait_for_step(tmp_path / "run", (13, 31)[place], ranks)
            os.kill(ranks[-1].pid, (signal.SIGTERM, signal.SIGUSR2)[place])
        for process in ranks:
            process.join(timeout=120)
        codes = [process.exitcode for process in ranks]
        assert codes == [0 if place == 2 else 75] * len(ranks), (tmp_path / "log").read_text()[-3000:]
    assert_same_run(tmp_path / "run", alone)


def wait_for_step(run_dir, step, ranks):
    """Wait until the run has logged this step."""
    while not (records := read_metrics(run_dir)) or records[-1]["step"] < step:
        assert any(process.is_alive() for process in ranks)
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero2", marks=MORE), "zero3"])
def test_sigkill_at_random_moments_ends_in_the_same_bits(shards, tmp_path, engine):
    """Every step is saved; every other kill waits for the beginning of a save. FLOWAR_TEST_KILLS=20 for more."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    short = {"save_every_steps": 1, "epochs": max(8, 1.5 * NUM_KILLS)}  # 2 steps each: enough for all kills
    run_ranks(settings(shards, undisturbed, engine, **short), 2, tmp_path / "log")
    config = settings(shards, killed, engine, **short)
    moments, kills, in_a_save = random.Random(0), 0, 0
    while kills < NUM_KILLS:
        before = find_latest(killed)
        ranks = start_ranks(config, 2, tmp_path / "log")
        while find_latest(killed) == before and all(process.is_alive() for process in ranks):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.25))
        while kills % 2 and not is_saving(killed) and ranks[0].is_alive():
            time.sleep(0.001)
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        kills += ranks[0].exitcode == -signal.SIGKILL
        in_a_save += is_saving(killed)
        if ranks[0].exitcode == 0:
            break
    assert kills == NUM_KILLS and in_a_save >= NUM_KILLS // 2
    run_ranks(config, 2, tmp_path / "log")
    for weights in ("raw", "decay_0.9", "std_0.1"):
        found, expected = load_model(killed, weights).state_dict(), load_model(undisturbed, weights).state_dict()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert list_checkpoints(killed)[-1].name == list_checkpoints(undisturbed)[-1].name


def is_saving(run_dir):
    return any((run_dir / "checkpoints").glob(".step_*"))


def test_weights_are_shared_out_evenly():
    sizes = {"a": 10, "b": 6, "c": 5, "d": 4, "e": 1}
    owners = share_out(sizes, 2)
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(2)]
    assert loads == [14, 12] and share_out(sizes, 2) == owners
