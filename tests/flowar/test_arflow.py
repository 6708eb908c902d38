"""ARFlow trains on sequences of images through the same trainer, engines and checkpoints as FlowAR."""

import dataclasses
import shutil

import pytest
import torch

from flowar import train
from flowar.base.errors import UserError
from flowar.base.run_folder import find_latest, list_checkpoints
from flowar.config.models import ARFlowConfig
from flowar.config.training import PreviewConfig
from flowar.models.folders import load_model
from flowar.training.report import read_metrics
from tests.conftest import training
from tests.flowar.ranks import run_ranks
from tests.flowar.test_second_family import ENGINES


def arflow_training(shards, run_dir, **changes):
    """A run of 30 steps, on sequences of 3 images."""
    recipe = training(shards, run_dir)
    model = ARFlowConfig(
        variant="custom", latent_channels=recipe.model.latent_channels, latent_size=recipe.model.latent_size,
        num_classes=2, patch_size=2, depth=2, width=32, heads=2, images_per_sample=3,
        guided_channels=None,
    )  # fmt: skip
    return dataclasses.replace(recipe, model=model, **changes)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("arflow") / "run"
    preview = PreviewConfig(every_steps=30, num_images=4, num_steps=2, solver="euler-maruyama")
    train.main(arflow_training(shards, run_dir, keep_checkpoints=9, preview=preview))
    return run_dir


def assert_near(run_dir, needed, atol):
    for weights in ("raw", "decay_0.9"):
        found, expected = load_model(run_dir, weights).state_dict(), load_model(needed, weights).state_dict()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)


def test_it_learns_and_resumes_to_the_same_bits(shards, finished, tmp_path):
    records = read_metrics(finished)
    assert records[-1]["step"] == 30 and records[-1]["loss"] < 0.98 * records[0]["loss"]
    assert (finished / "previews" / "step_00000030.png").exists()
    shutil.copytree(finished, tmp_path / "run")
    for folder in list_checkpoints(tmp_path / "run")[3:]:
        shutil.rmtree(folder)
    assert find_latest(tmp_path / "run").name == "step_00000012"
    train.main(arflow_training(shards, tmp_path / "run", keep_checkpoints=9, preview=PreviewConfig(every_steps=0)))
    assert find_latest(tmp_path / "run").name == "step_00000030"
    assert_near(tmp_path / "run", finished, atol=0)


@pytest.mark.slow
def test_engines_train_the_same_model_and_resume_each_others_checkpoints(shards, finished, tmp_path):
    config = arflow_training(shards, tmp_path / "run", keep_checkpoints=9)
    run_ranks(dataclasses.replace(config, parallel=ENGINES["fsdp"]), 2, tmp_path / "log")
    assert_near(tmp_path / "run", finished, atol=2e-5)
    for folder in list_checkpoints(tmp_path / "run")[3:]:
        shutil.rmtree(folder)
    run_ranks(dataclasses.replace(config, parallel=ENGINES["zero2"]), 2, tmp_path / "log")
    assert "resuming from" in (tmp_path / "log").read_text()
    assert_near(tmp_path / "run", finished, atol=2e-5)


def test_a_class_with_fewer_images_than_a_sequence_has_is_refused(shards, tmp_path):
    config = arflow_training(shards, tmp_path / "run")
    model = dataclasses.replace(config.model, images_per_sample=99)
    with pytest.raises(
        UserError, match=r"class \d has \d+ images, and a sample is model.images_per_sample=99 different"
    ):
        train.main(dataclasses.replace(config, model=model))
