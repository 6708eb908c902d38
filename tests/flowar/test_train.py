import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from data_prep.schema import read_passport
from flowar.config import (
    DataConfig,
    OptimConfig,
    PreviewConfig,
    TrainConfig,
    VAEConfig,
    WandbConfig,
    describe_config,
)
from flowar.data import Batch
from flowar.errors import UserError
from flowar.optim import make_optimizer
from flowar.report import read_metrics
from flowar.run_folder import find_latest, list_checkpoints
from flowar.train import draw, main, train_step
from flowar.weights import create_model
from tests.conftest import tiny_config, upload


def training(shards, run_dir, **changes) -> TrainConfig:
    passport = read_passport(shards)
    model = tiny_config(
        scales=(1, 2, passport.latent_size), latent_channels=passport.latent_channels, num_classes=2, dropout=0.1
    )
    settings = {
        "model": model,
        "vae": VAEConfig(name="demo"),
        "data": DataConfig(path=str(shards), num_workers=0),
        "optim": OptimConfig(lr=1e-3, warmup_epochs=1),
        "epochs": 10,
        "batch_size": 8,  # 30 steps
        "ema_decay": 0.9,
        "precision": "fp32",
        "log_every_steps": 5,
        "save_every_steps": 4,
        "preview": PreviewConfig(every_steps=0),
    }
    return TrainConfig(run_dir=str(run_dir), **(settings | changes))


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """An undisturbed run."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    main(training(shards, run_dir))
    return run_dir


def final_state(run_dir):
    folder = find_latest(run_dir)
    assert folder.name == "step_00000030"
    optimizer = torch.load(folder / "training.pt", weights_only=True)["optimizer"]["state"]
    tensors = {f"optimizer {i} {key}": value for i, state in optimizer.items() for key, value in state.items()}
    for weights in ("raw", "ema"):
        state = load_file(folder / weights / "model.safetensors")
        tensors |= {f"{weights} {name}": tensor for name, tensor in state.items()}
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
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}
    main(training(shards, finished))
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")} == before


def test_readers_and_previews_do_not_change_the_weights(shards, finished, tmp_path):
    changes = {
        "data": DataConfig(path=str(shards), num_workers=2),
        "preview": PreviewConfig(every_steps=12, num_images=4, num_steps=2),
        "save_every_steps": 7,
    }
    main(training(shards, tmp_path, **changes))
    assert_same_run(tmp_path, finished)
    assert [file.name for file in sorted((tmp_path / "previews").iterdir())] == [
        "step_00000012.png",
        "step_00000024.png",
        "step_00000030.png",
    ]


@pytest.mark.slow
def test_sigkill_at_random_moments_ends_in_the_same_weights_bit_for_bit(shards, finished, tmp_path):
    config = training(shards, tmp_path / "run", save_every_steps=1)
    (tmp_path / "config.yaml").write_text(describe_config(config))
    command = [sys.executable, "-m", "flowar", "train", str(tmp_path / "config.yaml")]
    moments = random.Random(0)
    kills = 0
    while kills < 6:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = find_latest(tmp_path / "run")
        while find_latest(tmp_path / "run") == before and process.poll() is None and time.monotonic() - start < 120:
            time.sleep(0.005)  # until it has got a step further: now it trains, saves, deletes
        time.sleep(moments.uniform(0, 0.2))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read().decode()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert_same_run_but_for_the_log(tmp_path / "run", finished)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def assert_same_run_but_for_the_log(run_dir, finished):
    mine, theirs = final_state(run_dir), final_state(finished)
    assert not [name for name in theirs if not torch.equal(mine[name], theirs[name])]
    steps = [record["step"] for record in read_metrics(run_dir)]
    assert steps == sorted(set(steps))


def test_another_model_or_seed_in_the_same_run_is_refused(shards, finished):
    config = training(shards, finished)
    changed = tiny_config(**{**vars(config.model), "ar_depth": 6})
    with pytest.raises(UserError, match=r"holds another run: model.ar_depth was 4, now 6; give another run_dir"):
        main(training(shards, finished, model=changed))
    with pytest.raises(UserError, match=r"seed was 0, now 1"):
        main(training(shards, finished, seed=1))
    main(training(shards, finished, log_every_steps=3), dry_run=True)  # changes no weight


def test_a_run_on_remote_shards_gives_the_same_weights(bucket, shards, finished, tmp_path):
    path = upload(bucket, shards, "training")
    main(training(shards, tmp_path / "run", data=DataConfig(path=path, cache=str(tmp_path / "cache"), num_workers=2)))
    assert_same_run(tmp_path / "run", finished)


def test_other_shards_in_the_same_run_are_refused(shards, finished, tmp_path):
    other = tmp_path / "shards"
    shutil.copytree(shards, other)
    content = json.loads((shards / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(content | {"vae_sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"was trained on other shards: vae_sha256 was"):
        main(training(shards, finished, data=DataConfig(path=str(other), num_workers=0)))


def test_shards_of_another_vae_are_refused(shards, tmp_path):
    other = tmp_path / "shards"
    shutil.copytree(shards, other)
    content = json.loads((shards / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(content | {"vae_name": "mar", "vae_sha256": "0" * 64}))
    config = training(shards, tmp_path / "run", data=DataConfig(path=str(other)), preview=PreviewConfig(every_steps=10))
    with pytest.raises(UserError, match=r"made with VAE mar \(weights 000000000000\), but vae.name=demo has"):
        main(config)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_folder_is_one_clear_error(shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write to run_dir="):
        main(training(shards, tmp_path / "file" / "run"))


def test_several_processes_are_refused(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process in this version, but WORLD_SIZE=2"):
        main(training(shards, tmp_path))


def test_labels_are_dropped_at_the_asked_rate_and_draws_are_those_of_the_seed():
    model = tiny_config()
    batch = Batch(torch.zeros(4000, 6, 4, 4), torch.zeros(4000, dtype=torch.int64), torch.arange(4000))
    torch.manual_seed(0)
    latents, labels, at, noise = draw(batch, model, 0.1, 1.0, torch.device("cpu"))
    assert (labels == model.num_classes).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (labels == 0).sum() + (labels == model.num_classes).sum() == 4000
    assert latents.std().item() == pytest.approx(1, abs=0.02)  # log-variance 0
    assert at.shape == (4000, 3) and at.min() >= 0 and at.max() < 1
    assert noise.shape == (4000, 21, 3)
    torch.manual_seed(0)
    assert torch.equal(draw(batch, model, 0.1, 1.0, torch.device("cpu"))[3], noise)


def test_a_step_that_is_not_finite_stops_and_leaves_the_weights(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path), data=DataConfig(path="none"), model=tiny_config(), precision="fp32")
    model = create_model(config.model).train()
    optimizer = make_optimizer(model, config.optim)
    before = [p.detach().clone() for p in model.parameters()]
    moments = torch.full((2, 6, 4, 4), float("nan"))
    batch = Batch(moments, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    with pytest.raises(UserError, match=r"loss is nan .* at step 9; losses by scale: \{1: nan.*samples: \[0, 1\]"):
        train_step(model, optimizer, batch, 9, config, 1.0, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_gradients_are_clipped_to_the_recipes_norm(tmp_path):
    config = TrainConfig(
        run_dir=str(tmp_path),
        data=DataConfig(path="none"),
        model=tiny_config(),
        optim=OptimConfig(max_grad_norm=0.01),
        precision="fp32",
    )
    model = create_model(config.model).train()
    batch = Batch(torch.randn(2, 6, 4, 4), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    _, norm = train_step(model, make_optimizer(model, config.optim), batch, 1, config, 1.0, torch.device("cpu"))
    clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 0.01 and clipped.item() == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_keeps_weights_and_loss_in_float32_and_stays_near_float32(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        config = TrainConfig(
            run_dir=str(tmp_path), data=DataConfig(path="none"), model=tiny_config(), precision=precision
        )
        torch.manual_seed(0)
        model = create_model(config.model).train()
        batch = Batch(torch.randn(2, 6, 4, 4), torch.zeros(2, dtype=torch.int64), torch.arange(2))
        losses[precision], _ = train_step(
            model, make_optimizer(model, config.optim), batch, 1, config, 1.0, torch.device("cpu")
        )
        assert losses[precision].dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert not torch.equal(losses["bf16"], losses["fp32"])
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.03, atol=0.03)


@pytest.mark.slow
def test_a_run_logs_to_wandb_offline(shards, tmp_path):
    main(training(shards, tmp_path, epochs=2, wandb=WandbConfig(mode="offline")))
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_micro_batches_add_up_to_the_whole_batch(tmp_path):
    results = {}
    for micro in (None, 2):
        paths = {"run_dir": str(tmp_path), "data": DataConfig(path="none")}
        config = TrainConfig(**paths, model=tiny_config(), precision="fp32", batch_size=6, micro_batch_size=micro)
        torch.manual_seed(0)
        model = create_model(config.model).train()
        batch = Batch(torch.randn(6, 6, 4, 4), torch.zeros(6, dtype=torch.int64), torch.arange(6))
        losses, norm = train_step(
            model, make_optimizer(model, config.optim), batch, 1, config, 1.0, torch.device("cpu")
        )
        results[micro] = (losses, norm, model.flow.output_projection.weight.grad)
    for whole, parts in zip(results[None], results[2], strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_another_vae_is_refused_by_name_where_none_is_loaded(shards, tmp_path):
    with pytest.raises(UserError, match=r"was made with VAE demo, but vae.name=mar; set vae.name=demo"):
        main(training(shards, tmp_path / "run", vae=VAEConfig(name="mar")))


def test_an_unstable_run_may_go_on_with_another_learning_rate(shards, finished, capsys):
    main(training(shards, finished, optim=OptimConfig(lr=1e-4, warmup_epochs=1)), dry_run=True)
    assert "optim.lr was 0.001, now 0.0001" in capsys.readouterr().out
