import math
import os
import shutil
import signal

import pytest
import torch

from flowar import cli, replay, train
from flowar.base.distributed import SETUP_TIMEOUT
from flowar.base.errors import UserError
from flowar.base.run_folder import Progress, find_latest, read_progress
from flowar.config.data import DataConfig
from flowar.config.load import save_described
from flowar.config.training import EMAConfig, GuardConfig, ParallelConfig, ReplayConfig
from flowar.latents.batches import StepOrder
from flowar.latents.schema import row_checksum
from flowar.latents.shards import LatentShards
from flowar.models.folders import load_model
from flowar.train import main
from flowar.training.guard import Guard, load_bundle
from flowar.training.report import read_metrics
from tests import processes
from tests.conftest import MORE, training
from tests.flowar.ranks import run_ranks, start_ranks
from tests.flowar.training.test_engines import settings, wait_for_step
from tests.processes import PATIENCE_S, stop


def poison(shards, folder, images, factor=math.nan):
    """Copy the shards, and multiply the moments of some images; their checksums are right."""
    shutil.copytree(shards, folder)
    opened = LatentShards(DataConfig(path=str(folder)))
    for image in images:
        for row in (2 * image, 2 * image + 1):
            found = opened.read([row])
            shard = opened.shards[opened._shards_of([row])[0]]
            found["moments"] *= factor
            found["checksum"] = row_checksum(found["moments"][0], int(found["label"][0]), opened.place_of(shard, row))
            offset = shard.num_bytes - (shard.num_rows - (row - shard.first_row)) * opened.dtype.itemsize
            with (folder / shard.name).open("r+b") as file:
                os.pwrite(file.fileno(), found.tobytes(), offset)
    return folder


def images_of_step(step, batch_size=8):
    """The images of a step, counted from 1, of a run with seed 0 on the fixture's 24 images."""
    rows = next(iter(StepOrder(24, 2, batch_size=batch_size, seed=0, steps=range(step - 1, step))))
    return [row // 2 for row in rows]


def test_infinite_or_jumping_losses_are_problems_and_usual_losses_are_not():
    judge = Guard(GuardConfig(spike_factor=3), Progress())
    assert all(judge.judge(1.0 + 0.01 * step, 1.0) is None for step in range(30))
    assert "not both finite" in judge.judge(math.nan, 1.0) and "not both finite" in judge.judge(1.0, math.inf)
    assert "is more than 3 times the usual" in judge.judge(4.0, 1.0)
    assert judge.in_a_row == 3
    assert judge.judge(1.2, 1.0) is None and judge.in_a_row == 0
    assert Guard(GuardConfig(), Progress()).judge(1e9, 1.0) is None


@pytest.mark.slow
def test_a_bad_sample_is_skipped_kept_and_replayed(shards, tmp_path, capsys):
    bad = images_of_step(2)[3]
    config = training(
        shards, tmp_path / "run", data=DataConfig(path=str(poison(shards, tmp_path / "bad", [bad])), num_workers=0)
    )
    main(config)
    bundles = sorted((tmp_path / "run" / "anomalies").iterdir())
    assert len(bundles) == 3 and bundles[0].name == "batch_00000002"  # the first three of one in each of ten epochs
    assert sum(record["skipped_steps"] for record in read_metrics(tmp_path / "run")) == 10
    assert all(math.isfinite(record["loss"]) for record in read_metrics(tmp_path / "run"))
    assert read_progress(find_latest(tmp_path / "run")).updates == 20
    assert all(torch.isfinite(p).all() for p in load_model(tmp_path / "run", "raw").parameters())
    bundle = load_bundle(bundles[0])
    rows = [row for row in bundle["samples"].tolist() if row // 2 == bad]
    assert len(rows) == 1 and math.isnan(bundle["losses"][0])
    assert all(math.isnan(value) for name, value in bundle["activations"].items() if name.startswith("flow"))
    capsys.readouterr()

    replay.main(ReplayConfig(bundle=str(bundles[0])))
    found = capsys.readouterr().out
    assert f"samples with values that are not finite: {rows}" in found
    assert "gradient norm" in found and "nan" in found


@pytest.mark.slow
def test_a_spike_is_skipped_and_its_replay_gives_the_same_numbers(shards, tmp_path, capsys):
    bad = images_of_step(28)[0]
    path = poison(shards, tmp_path / "bad", [bad], factor=50)
    config = training(
        shards,
        tmp_path / "run",
        data=DataConfig(path=str(path), num_workers=0),
        guard=GuardConfig(spike_factor=2),
        model=settings(shards, tmp_path, "single").model,  # without dropout
    )
    main(config)
    bundle = load_bundle(tmp_path / "run" / "anomalies" / "batch_00000028")
    assert "times the usual" in bundle["problem"]
    replay.main(ReplayConfig(bundle=str(tmp_path / "run" / "anomalies" / "batch_00000028")))
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "loss: scale" in line or "norm" in line]
    for row in rows:
        then, now = float(row[2]), float(row[3])
        assert then == pytest.approx(now, rel=1e-4)


@pytest.mark.slow
def test_the_run_rolls_back_past_bad_batches_and_then_stops(shards, tmp_path):
    bad = images_of_step(2)[3]
    changes = {
        "data": DataConfig(path=str(poison(shards, tmp_path / "bad", [bad])), num_workers=0),
        "epochs": 2,
        "save_every_steps": 1,
        "log_every_steps": 1,
    }
    often = GuardConfig(skips_before_rollback=1, max_rollbacks=5)
    main(training(shards, tmp_path / "run", guard=often, **changes))
    progress = read_progress(find_latest(tmp_path / "run"))
    assert (progress.step, progress.updates) == (6, 6)
    assert progress.rollbacks == progress.data_offset == len(list((tmp_path / "run" / "anomalies").iterdir())) >= 2
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    once = GuardConfig(skips_before_rollback=1, max_rollbacks=1)
    with pytest.raises(UserError, match=r"1 steps in a row went wrong, .*was rolled back before.*flowar replay"):
        main(training(shards, tmp_path / "other", guard=once, **changes))


def test_without_a_checkpoint_a_run_cannot_roll_back(shards, tmp_path):
    path = poison(shards, tmp_path / "bad", range(24))
    config = training(shards, tmp_path / "run", data=DataConfig(path=str(path), num_workers=0))
    with pytest.raises(UserError, match=r"3 steps in a row went wrong, the last is 3: .*no checkpoint yet"):
        main(config)


@pytest.fixture(scope="module")
def troubled(shards, tmp_path_factory):
    """A run on one process with a sample that isn't finite and one whose loss jumps: its folder and settings."""
    root = tmp_path_factory.mktemp("troubled")
    path = poison(shards, root / "nan", [images_of_step(2)[3]])
    path = poison(path, root / "bad", [images_of_step(28)[0]], factor=50)
    changes = {
        "data": DataConfig(path=str(path), num_workers=0),
        "guard": GuardConfig(spike_factor=2, skips_before_rollback=9),
        "save_every_steps": 5,
        "ema": EMAConfig(decays=(0.9,), stds=(0.1,), keep_every_steps=10),
        "epochs": 13,
        "batch_size": 8,
        "micro_batch_size": 2,
    }
    run_ranks(settings(shards, root / "alone", "single", **changes), 1, root / "log")
    return root / "alone", changes


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("fsdp", marks=MORE), pytest.param("zero2", marks=MORE), "zero3"])
def test_all_ranks_skip_a_step_that_went_wrong_on_one(shards, troubled, tmp_path, engine):
    """One sample isn't finite in every epoch, and from about the 30th step on the loss of another one jumps."""
    alone, changes = troubled
    together = tmp_path / "run"
    run_ranks(settings(shards, together, engine, **changes), 2, tmp_path / "log")
    skipped = [
        [record["step"] for record in read_metrics(run_dir) if record["skipped_steps"]] for run_dir in (together, alone)
    ]
    assert skipped[0] == skipped[1] and len(skipped[0]) > 13
    found, needed = (load_model(run_dir, "raw").state_dict() for run_dir in (together, alone))
    for name in needed:
        torch.testing.assert_close(found[name], needed[name], rtol=0, atol=2e-5)
    bundles = [load_bundle(run_dir / "anomalies" / "batch_00000002") for run_dir in (together, alone)]
    assert bundles[0]["samples"].tolist() == bundles[1]["samples"].tolist()
    assert not math.isfinite(bundles[0]["grad_norm"]) and not math.isfinite(bundles[1]["grad_norm"])


def train_until_one_fails(words):
    """`flowar train`, but rank 1 fails at step 3, and process groups never end, which can happen with NCCL."""
    fine = train.accumulate

    def accumulate(engine, inputs, settings):
        if engine.world.rank == 1 and inputs.number == 2:
            raise UserError("shard 7 is damaged")
        return fine(engine, inputs, settings)

    train.accumulate = accumulate
    torch.distributed.destroy_process_group = signal.pause
    cli.main(words)


@pytest.mark.slow
def test_a_rank_that_fails_says_why_and_ends_although_process_groups_do_not(shards, tmp_path):
    config = settings(shards, tmp_path / "run", "fsdp", epochs=10_000, save_every_steps=1)
    save_described(config, tmp_path / "config.yaml")
    words = ["train", str(tmp_path / "config.yaml")]
    ranks = processes.start_ranks(train_until_one_fails, words, world_size=2, log=tmp_path / "log")
    processes.join(ranks, tmp_path / "log", code=1)
    text = (tmp_path / "log").read_text()
    assert "flowar train: shard 7 is damaged" in text and "rank 0 lost the other ranks" in text


@pytest.mark.slow
@pytest.mark.parametrize("harm", [signal.SIGSTOP, signal.SIGKILL], ids=["stalls", "dies"])
def test_a_rank_that_stalls_or_dies_ends_the_others_with_a_message(shards, tmp_path, harm):
    """In a run of 20,000 steps. Without parallel.timeout_s the others would wait longer than this test does."""
    assert SETUP_TIMEOUT.total_seconds() > PATIENCE_S
    parallel = ParallelConfig(engine="fsdp", timeout_s=10)
    config = settings(shards, tmp_path / "run", "fsdp", epochs=10_000, parallel=parallel, save_every_steps=2)
    ranks = start_ranks(config, 2, tmp_path / "log")
    wait_for_step(tmp_path / "run", 5, ranks, tmp_path / "log")
    os.kill(ranks[1].pid, harm)
    ranks[0].join(PATIENCE_S)
    code = ranks[0].exitcode
    stop(ranks)
    assert code not in (0, None)
    text = (tmp_path / "log").read_text()
    assert "rank 0 lost the other ranks" in text and "resumes from" in text
