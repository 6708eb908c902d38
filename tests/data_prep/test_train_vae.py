import dataclasses
import json
import shutil
import signal

import pytest
import torch

from data_prep import check, encode, train_vae
from data_prep.autoencoder import build_autoencoder, whiten
from data_prep.sources import open_source
from data_prep.training_images import read_centres, split_held_out
from flowar.base.errors import EXIT_AGAIN, UserError
from flowar.base.run_folder import CHECKPOINTS, list_checkpoints
from flowar.config.data import CheckConfig, PrepareConfig, VAEConfig
from flowar.config.tokenizing import TrainVAEConfig
from flowar.latents.schema import read_passport
from flowar.latents.vae import load_vae
from flowar.training.report import read_metrics
from tests import processes


def settings(image_folder, out_dir, **changes):
    """Return a training of a few quick steps, each of which is saved."""
    tiny = {"image_size": 16, "stride": 2, "channels": 2, "width": 8, "steps": 6, "batch_size": 4, "num_workers": 0}
    often = {"log_every_steps": 1, "save_every_steps": 1}
    return TrainVAEConfig(images=str(image_folder), out_dir=str(out_dir), **(tiny | often | changes))


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    config = settings(image_folder, tmp_path_factory.mktemp("vaes") / "vae")
    processes.run_ranks(train_vae.main, config, world_size=1, log=tmp_path_factory.mktemp("log") / "log")
    return config


def weights_of(out_dir):
    return load_vae(str(out_dir)).autoencoder.state_dict()


def test_what_it_writes_is_a_vae_whose_latents_are_white(trained, image_folder, tmp_path):
    source = open_source(str(image_folder))
    images = read_centres(source, trained, range(len(source)))
    with torch.no_grad():
        mean, log_variance = load_vae(trained.out_dir).encode(images).chunk(2, dim=1)
    std = (mean.var(dim=(0, 2, 3), unbiased=False) + log_variance.exp().mean(dim=(0, 2, 3))).sqrt()
    torch.testing.assert_close(mean.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(std, torch.ones(2), atol=1e-4, rtol=0)
    out_dir = tmp_path / "data"
    encode.main(
        PrepareConfig(
            images=str(image_folder),
            out_dir=str(out_dir),
            vae=VAEConfig(name=trained.out_dir),
            image_size=16,
            flip=False,
            num_workers=0,
        )
    )
    assert read_passport(out_dir).measured_multiplier == pytest.approx(1, abs=1e-3)


def test_a_vae_whose_weights_changed_is_refused_and_check_names_it(trained, tmp_path, capsys):
    check_folder = CheckConfig(path=trained.out_dir)
    check.main(check_folder)
    assert f"whole: VAE {trained.out_dir}" in capsys.readouterr().out
    folder = tmp_path / "vae"
    shutil.copytree(trained.out_dir, folder)
    file = folder / train_vae.VAE_WEIGHTS_FILE
    damaged = bytearray(file.read_bytes())
    damaged[-10] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="its weights are not those that .*vae.json was written for"):
        load_vae(str(folder))
    with pytest.raises(UserError, match="has 1 problems, the first: vae.name="):
        check.main(dataclasses.replace(check_folder, path=str(folder)))


def test_the_images_held_out_are_never_trained_on_and_measure_it(trained):
    train, held_out = split_held_out(100)
    assert len(held_out) == 5 and not set(train) & set(held_out) and len(train) == 95
    record = json.loads((train_vae.Path(trained.out_dir) / "vae.json").read_text())
    assert record["held_out_images"] == 1 and record["psnr_db"] > 0 and record["bits_per_pixel"] > 0


def test_white_latents_give_the_same_images(image_folder, tmp_path):
    torch.manual_seed(0)
    autoencoder = build_autoencoder(settings(image_folder, tmp_path)).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = autoencoder.encode(images).latent_dist
        whiten(autoencoder, torch.tensor([0.3, -2.0]), torch.tensor([4.0, 0.1]))
        after = autoencoder.encode(images).latent_dist
        shift, scale = torch.tensor([0.3, -2.0]).view(2, 1, 1), torch.tensor([4.0, 0.1]).view(2, 1, 1)
        torch.testing.assert_close(after.mean, (before.mean - shift) / scale)
        torch.testing.assert_close(after.std, before.std / scale)


def test_killed_and_stopped_at_random_moments_it_ends_with_the_same_bits(trained, image_folder, tmp_path):
    config = settings(image_folder, tmp_path / "vae")
    log = tmp_path / "log"
    deaths = processes.draw_deaths(4, 12, tmp_path / "vae", signals=(signal.SIGKILL, signal.SIGTERM))
    for death in deaths:
        (process,) = processes.start_ranks(train_vae.main, config, world_size=1, log=log, deaths={0: death})
        process.join(processes.PATIENCE_S)
        assert process.exitcode in (-signal.SIGKILL, EXIT_AGAIN, -signal.SIGTERM), log.read_text()[-3000:]
    processes.run_ranks(train_vae.main, config, world_size=1, log=log)
    expected, found = weights_of(trained.out_dir), weights_of(config.out_dir)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [record["step"] for record in read_metrics(tmp_path / "vae" / "training")] == [1, 2, 3, 4, 5, 6]


def test_two_processes_with_a_discriminator_train_the_vae_of_one(image_folder, tmp_path):
    changes = {"gan_weight": 0.1, "gan_start": 0.4, "steps": 4, "crop": "random"}
    configs = [settings(image_folder, tmp_path / name, **changes) for name in ("one", "two")]
    for world_size, config in enumerate(configs, start=1):
        processes.run_ranks(train_vae.main, config, world_size=world_size, log=tmp_path / "log")
    for of_one, of_two in zip(*(read_metrics(f"{config.out_dir}/training") for config in configs), strict=True):
        for key in ("loss", "loss/l1", "loss/kl", "loss/generator", "loss/discriminator"):
            assert of_one[key] == pytest.approx(of_two[key], rel=1e-3, abs=1e-6)
    assert of_one["loss/discriminator"] > 0


def test_more_steps_train_on_and_what_does_not_fit_is_refused(trained, image_folder, tmp_path, capsys):
    out_dir = shutil.copytree(trained.out_dir, tmp_path / "vae")
    config = dataclasses.replace(trained, out_dir=str(out_dir))
    train_vae.main(config)
    assert "is finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds another VAE: kl_weight was 0.003, now 0.5"):
        train_vae.main(dataclasses.replace(config, kl_weight=0.5))
    with pytest.raises(UserError, match=r"steps=3, but out_dir=.* has trained 6"):
        train_vae.main(dataclasses.replace(config, steps=3))
    fewer = shutil.copytree(image_folder, tmp_path / "images")
    next(fewer.rglob("*.png")).unlink()
    with pytest.raises(UserError, match=r"holds another VAE: images was"):
        train_vae.main(dataclasses.replace(config, images=str(fewer)))
    train_vae.main(dataclasses.replace(config, steps=40))
    losses = [record["loss"] for record in read_metrics(out_dir / "training")]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert "bits per pixel" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(image_folder, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="is not empty, but no VAE was trained there; give a new folder"):
        train_vae.main(settings(image_folder, tmp_path))


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_lost(image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    config = settings(images, tmp_path / "vae")
    source = open_source(str(images))
    damaged = images / source.names[int(split_held_out(len(source))[0][0])]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:50])
    with pytest.raises(UserError, match=rf"{damaged.name} in .* can't be read .*; put a readable image in its place"):
        train_vae.main(config)
    assert not (tmp_path / "vae" / "config.json").exists()
    damaged.write_bytes(content)
    train_vae.main(config)
    assert len(list_checkpoints(tmp_path / "vae" / "training", CHECKPOINTS)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 3}, "stride=3 must be a power of 2"),
        ({"stride": 32}, "image_size=16 is not a multiple of stride=32; set image_size=32, or a smaller stride"),
        ({"width": 12}, "width=12 must be a multiple of 8"),
        ({"gan_start": 2}, r"gan_start=2 must lie in \[0, 1\]"),
        ({"lr": 0}, "lr=0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        settings("images", "vae", **changes)


@pytest.mark.parametrize(("image_size", "shape"), [(32, (4, 4, 16)), (128, (8, 8, 64)), (256, (16, 16, 128))])
def test_the_shape_fits_the_size_of_the_images(image_size, shape):
    assert dataclasses.astuple(TrainVAEConfig(images="a", out_dir="b", image_size=image_size).shape) == shape


def test_lpips_without_its_weights_says_what_to_fetch(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"lpips_weight above 0 needs weights .* or set lpips_weight=0"):
        train_vae.main(settings(image_folder, tmp_path / "vae", lpips_weight=1.0))
