import functools
import json
import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from flowar.base.distributed import World
from flowar.base.errors import UserError
from flowar.base.records import write_record
from flowar.base.run_folder import find_latest, list_checkpoints
from flowar.config.data import DataConfig, VAEConfig
from flowar.config.training import OptimConfig, ParallelConfig, PreviewConfig, TrainConfig, WandbConfig
from flowar.latents.batches import Batch
from flowar.models.build import create_model
from flowar.models.folders import load_state
from flowar.train import main
from flowar.training.engine import EngineSettings
from flowar.training.report import read_metrics
from flowar.training.setup import make_engine, split_batch
from flowar.training.step import StepSettings, accumulate, agree, draw_training_inputs
from tests.conftest import KILLS_ASKED, TRAININGS, tiny_config, training, upload
from tests.processes import draw_deaths, run_with_deaths

NUM_KILLS = KILLS_ASKED or 4


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """-> the undisturbed run of a family."""

    @functools.cache
    def run(family):
        run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
        main(TRAININGS[family](shards, run_dir))
        return run_dir

    return run


@pytest.fixture(scope="module")
def finished(undisturbed):
    """An undisturbed run."""
    return undisturbed("flowar")


def final_state(run_dir):
    folder = find_latest(run_dir)
    assert folder.name == "step_00000030"
    tensors = {}
    keys = FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, metadata in keys.items():
        tensors[key] = torch.empty(metadata.size)
    load_state(tensors, folder)
    return tensors


def losses(run_dir):
    return [(record["step"], record["lr"], record["loss"]) for record in read_metrics(run_dir)]


def assert_same_run(run_dir, finished):
    mine, theirs = final_state(run_dir), final_state(finished)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different
    assert losses(run_dir) == losses(finished)


def test_a_run_leaves_checkpoints_metrics_config_and_passport(finished):
    assert [folder.name for folder in list_checkpoints(finished)] == ["step_00000028", "step_00000030"]
    records = read_metrics(finished)
    assert [record["step"] for record in records] == [5, 10, 15, 20, 25, 30]
    assert {"loss", "loss/scale_1", "loss/scale_2", "grad_norm", "lr", "images_per_s", "data_wait_share"} <= records[
        0
    ].keys()
    assert records[-1]["loss"] < records[0]["loss"]
    assert (finished / "config.yaml").exists() and (finished / "dataset.json").exists()


def test_running_a_finished_run_again_changes_nothing(shards, finished):
    before = {file: file.stat().st_mtime_ns for file in (finished / "checkpoints").rglob("*")}
    main(training(shards, finished))
    assert len(before) > 8
    assert {file: file.stat().st_mtime_ns for file in (finished / "checkpoints").rglob("*")} == before


@pytest.mark.slow
def test_readers_previews_and_wandb_do_not_change_the_weights(shards, finished, tmp_path):
    changes = {
        "data": DataConfig(path=str(shards), num_workers=2),
        "preview": PreviewConfig(every_steps=12, num_images=4, num_steps=2),
        "save_every_steps": 7,
        "wandb": WandbConfig(mode="offline"),
    }
    main(training(shards, tmp_path, **changes))
    assert_same_run(tmp_path, finished)
    assert [file.name for file in sorted((tmp_path / "previews").iterdir())] == [
        f"step_{step:08d}{weights}.png" for step in (12, 24, 30) for weights in ("", "_raw")
    ]
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAININGS)
def test_sigkill_at_random_moments_ends_in_the_same_weights_bit_for_bit(shards, undisturbed, tmp_path, family):
    """Kills at some of about 1,000 uses of files, 32 per step; nearly all belong to a save or to deleting old ones."""
    run_dir = tmp_path / "run"
    deaths = draw_deaths(NUM_KILLS, 800 // NUM_KILLS, run_dir)
    config = TRAININGS[family](shards, run_dir, save_every_steps=1)
    run_with_deaths(main, config, num_workers=1, deaths=deaths, log=tmp_path / "log")
    assert_same_run_but_for_the_log(run_dir, undisturbed(family))
    assert not list((run_dir / "checkpoints").glob(".*"))


def assert_same_run_but_for_the_log(run_dir, finished):
    mine, theirs = final_state(run_dir), final_state(finished)
    assert not [name for name in theirs if not torch.equal(mine[name], theirs[name])]
    steps = [record["step"] for record in read_metrics(run_dir)]
    assert steps == sorted(set(steps))


def test_another_model_or_seed_in_the_same_run_is_refused(shards, finished):
    config = training(shards, finished)
    changed = tiny_config(**{**vars(config.model), "ar_depth": 6})
    with pytest.raises(UserError, match=r"holds another run: model.ar_depth was 2, now 6; give another run_dir"):
        main(training(shards, finished, model=changed))
    with pytest.raises(UserError, match=r"seed was 0, now 1"):
        main(training(shards, finished, seed=1))
    main(training(shards, finished, log_every_steps=3), dry_run=True)  # changes no weight


@pytest.mark.slow
def test_a_run_on_remote_shards_gives_the_same_weights(bucket, shards, finished, tmp_path):
    path = upload(bucket, shards, "training")
    main(training(shards, tmp_path / "run", data=DataConfig(path=path, cache=str(tmp_path / "cache"), num_workers=2)))
    assert_same_run(tmp_path / "run", finished)


def test_other_shards_in_the_same_run_are_refused(shards, finished, tmp_path):
    other = tmp_path / "shards"
    shutil.copytree(shards, other)
    content = json.loads((shards / "dataset.json").read_text())
    write_record(other / "dataset.json", content | {"vae_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"was trained on other shards: vae_sha256 was"):
        main(training(shards, finished, data=DataConfig(path=str(other), num_workers=0)))


def test_shards_of_another_vae_are_refused(shards, tmp_path):
    other = tmp_path / "shards"
    shutil.copytree(shards, other)
    content = json.loads((shards / "dataset.json").read_text())
    write_record(other / "dataset.json", content | {"vae_name": "mar", "vae_sha256": "0" * 64})
    config = training(shards, tmp_path / "run", data=DataConfig(path=str(other)), preview=PreviewConfig(every_steps=10))
    with pytest.raises(UserError, match=r"made with VAE mar \(weights 000000000000\), but vae.name=demo has"):
        main(config)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_folder_is_one_clear_error(shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write to run_dir="):
        main(training(shards, tmp_path / "file" / "run"))


def test_batches_that_processes_cannot_share_are_refused_with_a_suggestion():
    assert (split_batch(48, 6, 1), split_batch(48, 6, 4), split_batch(8, None, 4)) == (6, 6, 2)
    with pytest.raises(UserError, match="batch_size=48 is not a multiple of 5 processes; try batch_size=50"):
        split_batch(48, 6, 5)
    message = r"batch_size=48 is not a multiple of micro_batch_size=6 x 3 processes = 18; try micro_batch_size=4"
    with pytest.raises(UserError, match=message):
        split_batch(48, 6, 3)


def plain_config(tmp_path, **changes):
    settings = {"model": tiny_config(), "precision": "fp32", "parallel": ParallelConfig(engine="single")}
    return TrainConfig(run_dir=str(tmp_path), data=DataConfig(path="none"), **(settings | changes))


def one_step(config, batch, number=1):
    """The clipped gradients of one step on one process: engine, terms of the loss, gradient norm."""
    torch.manual_seed(0)
    micro = config.micro_batch_size or len(batch.labels)
    settings = EngineSettings(config.parallel, config.optim, config.precision, micro, len(batch.labels) // micro)
    engine = make_engine(settings, create_model(config.model).train(), World(0, 1, torch.device("cpu"), None))
    settings = StepSettings.of(config, micro, 1.0)
    losses = accumulate(engine, draw_training_inputs(batch, number, settings), settings)
    return engine, losses, agree(engine, losses, settings).grad_norm


def random_batch(size):
    return Batch(torch.randn(size, 6, 4, 4), torch.zeros(size, dtype=torch.int64), torch.arange(size))


def test_labels_are_dropped_at_the_set_rate_and_draws_follow_from_the_place_in_the_batch(tmp_path):
    config = plain_config(tmp_path)
    batch = Batch(torch.zeros(4000, 6, 4, 4), torch.zeros(4000, dtype=torch.int64), torch.arange(4000))
    settings = StepSettings.of(config, 1, 1.0)
    whole = draw_training_inputs(batch, 5, settings)
    at, noise = whole.draws["time"], whole.draws["noise"]
    assert (whole.labels == config.model.num_classes).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (whole.labels == 0).sum() + (whole.labels == config.model.num_classes).sum() == 4000
    assert whole.latents.std().item() == pytest.approx(1, abs=0.02)  # log-variance 0
    assert at.shape == (4000, 3) and at.min() >= 0 and at.max() < 1
    assert noise.shape == (4000, 21, 3) and noise.std().item() == pytest.approx(1, abs=0.02)
    part = Batch(*(tensor[1000:1010] for tensor in batch))
    again = draw_training_inputs(part, 5, settings, rank=100)
    latents, labels, draws = whole.part(slice(1000, 1010), torch.device("cpu"))
    assert torch.equal(latents, again.latents) and torch.equal(labels, again.labels)
    assert all(torch.equal(draws[name], again.draws[name]) for name in draws)
    assert not torch.equal(draw_training_inputs(part, 6, settings, rank=100).draws["noise"], draws["noise"])


def test_gradients_are_clipped_to_the_recipes_norm(tmp_path):
    config = plain_config(tmp_path, optim=OptimConfig(max_grad_norm=0.01))
    engine, _, norm = one_step(config, random_batch(2))
    clipped = torch.stack([p.grad.norm() for p in engine.parameters.values()]).norm().item()
    assert norm > 0.01 and clipped == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_keeps_weights_and_loss_in_float32_and_stays_near_float32(tmp_path):
    batch = random_batch(2)
    losses = {}
    for precision in ("fp32", "bf16"):
        engine, losses[precision], _ = one_step(plain_config(tmp_path, precision=precision), batch)
        assert losses[precision].dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in engine.parameters.values())
    assert not torch.equal(losses["bf16"], losses["fp32"])
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 2},
        {"parallel": ParallelConfig(checkpoint_every_blocks=1)},
        {"micro_batch_size": 3, "parallel": ParallelConfig(checkpoint_every_blocks=2)},
    ],
)
def test_parts_and_recomputation_do_not_change_the_gradients(tmp_path, changes):
    batch = random_batch(6)
    whole, losses, norm = one_step(plain_config(tmp_path), batch)
    parts, other_losses, other_norm = one_step(plain_config(tmp_path, **changes), batch)
    torch.testing.assert_close(losses, other_losses, rtol=1e-5, atol=1e-6)
    assert norm == pytest.approx(other_norm, rel=1e-5)
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(parts.parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_another_vae_is_refused_by_name_if_none_is_loaded(shards, tmp_path):
    with pytest.raises(UserError, match=r"was made with VAE demo, but vae.name=mar; set vae.name=demo"):
        main(training(shards, tmp_path / "run", vae=VAEConfig(name="mar")))


def test_an_unstable_run_can_resume_with_another_learning_rate(shards, finished, capsys):
    main(training(shards, finished, optim=OptimConfig(lr=1e-4, warmup_epochs=1)), dry_run=True)
    assert "optim.lr was 0.001, now 0.0001" in capsys.readouterr().out


@pytest.mark.slow
def test_ddp_trains_in_one_process_too(shards, finished, tmp_path):
    config = training(shards, tmp_path / "run", parallel=ParallelConfig(engine="ddp"))
    main(config)
    assert read_metrics(tmp_path / "run")[-1]["loss"] == pytest.approx(read_metrics(finished)[-1]["loss"], rel=1e-5)
