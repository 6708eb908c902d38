import dataclasses

import pytest
import torch
from omegaconf import OmegaConf

from flowar import suggest
from flowar.base.errors import UserError
from flowar.config.data import DataConfig
from flowar.config.load import load_config
from flowar.config.models import MODEL_VARIANTS, suggested_shape
from flowar.config.suggesting import SuggestConfig
from flowar.config.training import TrainConfig
from flowar.latents.batches import check_fits
from flowar.latents.schema import read_passport


@pytest.fixture
def config(shards):
    return SuggestConfig(data=DataConfig(path=str(shards)), device="cpu")


def test_its_file_trains_on_the_dataset_unchanged(config, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suggest, "measure_step", lambda *_: 0.5)  # the length must not depend on this machine
    file = tmp_path / "own.yaml"
    suggest.main(dataclasses.replace(config, file=str(file), run_dir=str(tmp_path / "run")))
    training = load_config(TrainConfig, file)
    check_fits(read_passport(shards), training.model, str(shards))
    assert (training.model.variant, training.vae.name) == ("flowar-xxs", "demo")
    assert training.count_steps(24) in (1200, 1201)  # 400 epochs of 24 images would be more than 15 minutes
    assert all("#" in line for line in file.read_text().splitlines() if ":" in line and not line.endswith(":"))
    assert f"flowar train {file}" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists; give a new name"):
        suggest.main(dataclasses.replace(config, file=str(file)))


def test_a_step_is_measured_by_training(config, shards):
    values = {each.key: each.value for each in suggest.suggest(config, read_passport(shards), torch.device("cpu"))}
    assert values["epochs"] > 0 and values["optim.warmup_epochs"] < values["epochs"]


@pytest.mark.parametrize(
    ("latent_size", "channels", "coarse", "shape"),
    [
        (8, 4, True, {"patch_size": 2, "scales": [1, 2, 4]}),
        (32, 3, True, {"patch_size": 8, "scales": [1, 2, 4], "flow_width": 256, "flow_heads": 4}),  # pixels
        (64, 4, True, {"patch_size": 8, "scales": [1, 2, 4, 8], "flow_width": 384, "flow_heads": 6}),
        (16, 16, False, {"patch_size": 1, "scales": [1, 2, 4, 8, 16]}),
        (32, 4, False, {"patch_size": 2, "scales": [1, 2, 4, 8, 16]}),
        (7, 4, True, {"patch_size": 1, "scales": [1, 2, 4, 7]}),
    ],
)
def test_scales_and_width_follow_from_the_latents(latent_size, channels, coarse, shape):
    assert suggested_shape(MODEL_VARIANTS["flowar-xxs"], latent_size, channels, coarse=coarse) == shape


@pytest.mark.parametrize(("images", "variant"), [(5_000, "flowar-xs"), (200_000, "flowar-s"), (1_281_167, "flowar-l")])
def test_more_images_take_a_larger_model_on_a_gpu(config, shards, images, variant):
    passport = dataclasses.replace(read_passport(shards), num_images=images)
    assert suggest.choose_variant(config, passport, is_gpu=True)[0] == variant


def test_uneven_channels_are_normalised_one_by_one(shards):
    passport = dataclasses.replace(
        read_passport(shards),
        latent_mean=[0.0, 0.0],
        latent_std=[1.0, 1.0],
        latent_multiplier=1.0,
        measured_multiplier=1.0,
    )
    assert suggest.choose_normalization(passport)[0] == "vae"
    for change in ({"latent_std": [1.0, 2.0]}, {"latent_mean": [0.0, 1.0]}, {"latent_multiplier": 0.5}):
        assert suggest.choose_normalization(dataclasses.replace(passport, **change))[0] == "channel"


def test_an_unknown_variant_is_named(config):
    with pytest.raises(UserError, match="variant=flowar-xl is not a FlowAR; did you mean flowar-"):
        suggest.main(dataclasses.replace(config, variant="flowar-xl"))


@pytest.mark.parametrize("value", ["a: b #c", "${oc.env:HOME}", "null", "x", 5e-05, [1, 2], True, 0.5])
def test_every_value_is_read_back_as_it_is(value, tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text(f"value: {suggest.write_value(value)}  # why\n")
    assert OmegaConf.to_container(OmegaConf.load(file), resolve=True) == {"value": value}
