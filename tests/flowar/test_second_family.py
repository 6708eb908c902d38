"""Another family of models works with the unchanged verbs, as they only use the surface of models/family.py."""

import dataclasses
import json
import shutil

import pytest
import torch

from flowar import evaluate, export, info, replay, sample, train
from flowar.base.run_folder import find_latest, list_checkpoints
from flowar.config.data import DataConfig, ExtractorConfig, VAEConfig
from flowar.config.drawing import InfoConfig, SampleConfig
from flowar.config.measuring import EvaluateConfig
from flowar.config.training import ExportConfig, ParallelConfig, PlanConfig, PreviewConfig, ReplayConfig, TrainConfig
from flowar.evaluation.extractors import OWN
from flowar.models.folders import load_model
from flowar.planning.machines import find_machine
from flowar.planning.steps import PlannedStep, time_step
from flowar.training.report import read_metrics
from tests.conftest import MORE, save_untrained_judge, training
from tests.flowar.ranks import run_ranks
from tests.flowar.training.test_guard import images_of_step, poison
from tests.linear_family import Linear, LinearConfig

ENGINES = {
    "fsdp": ParallelConfig(engine="fsdp", checkpoint_every_blocks=1),
    "zero2": ParallelConfig(engine="deepspeed", zero_stage=2),
}


def linear_training(shards, run_dir, **changes) -> TrainConfig:
    """A run of 30 steps."""
    recipe = training(shards, run_dir)
    model = LinearConfig(latent_channels=recipe.model.latent_channels, num_classes=2, side=recipe.model.latent_size)
    return dataclasses.replace(recipe, model=model, **changes)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """An undisturbed run, with previews."""
    run_dir = tmp_path_factory.mktemp("linear") / "run"
    preview = PreviewConfig(every_steps=30, num_images=4, num_steps=2)
    train.main(linear_training(shards, run_dir, preview=preview))
    return run_dir


def test_it_trains_and_logs_the_terms_of_its_loss(finished):
    records = read_metrics(finished)
    assert records[-1]["step"] == 30 and records[-1]["loss"] == records[-1]["loss/velocity"] < records[0]["loss"]
    assert isinstance(load_model(finished), Linear)
    assert json.loads((find_latest(finished) / "config.json").read_text())["family"] == "linear"
    assert (finished / "previews" / "step_00000030.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("fsdp", "zero2"), pytest.param("zero2", "fsdp", marks=MORE)])
def test_engines_train_the_same_model_and_resume_each_others_checkpoints(shards, finished, tmp_path, first, second):
    config = linear_training(shards, tmp_path / "run", keep_checkpoints=9)
    run_ranks(dataclasses.replace(config, parallel=ENGINES[first]), 2, tmp_path / "log")
    assert_same_weights(tmp_path / "run", finished)
    for folder in list_checkpoints(tmp_path / "run")[3:]:
        shutil.rmtree(folder)
    assert find_latest(tmp_path / "run").name == "step_00000012"
    run_ranks(dataclasses.replace(config, parallel=ENGINES[second]), 2, tmp_path / "log")
    assert "resuming from" in (tmp_path / "log").read_text()
    assert find_latest(tmp_path / "run").name == "step_00000030"
    assert_same_weights(tmp_path / "run", finished)


def assert_same_weights(run_dir, needed):
    for weights in ("raw", "decay_0.9"):
        found, expected = load_model(run_dir, weights), load_model(needed, weights)
        for a, b in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_it_is_exported_drawn_and_measured(finished, image_folder, tmp_path, capsys):
    export.export(ExportConfig(model=str(finished), out_dir=str(tmp_path / "model")))
    save_untrained_judge(tmp_path / "judge.safetensors", ("dark", "light"))
    drawing = SampleConfig(
        model=str(tmp_path / "model"), out_dir=str(tmp_path / "samples"), vae=VAEConfig(name="demo"), num_images=24,
        batch_size=8, num_steps=2, guidance=1.0,
    )  # fmt: skip
    sample.main(drawing)
    sample.main(dataclasses.replace(drawing, preview=True))
    assert (tmp_path / "samples" / "preview" / "growth.png").exists()
    judge = ExtractorConfig(name=OWN, weights=str(tmp_path / "judge.safetensors"))
    measuring = {"samples": str(tmp_path / "samples"), "reference": str(tmp_path / "samples" / "images")}
    evaluate.main(EvaluateConfig(extractor=judge, interval_groups=0, **measuring))
    record = json.loads((tmp_path / "samples" / "evaluation" / "metrics.json").read_text())
    assert record["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-6)


def test_its_bad_steps_are_kept_and_replayed(shards, tmp_path, capsys):
    path = poison(shards, tmp_path / "bad", [images_of_step(5)[0]])
    train.main(linear_training(shards, tmp_path / "run", data=DataConfig(path=str(path), num_workers=0)))
    bundle = min((tmp_path / "run" / "anomalies").iterdir())
    replay.main(ReplayConfig(bundle=str(bundle)))
    found = capsys.readouterr().out
    assert "loss: velocity" in found and "layers.0" in found and "layers.1" in found


def test_it_is_planned_and_counted(capsys):
    model = LinearConfig(latent_channels=1, num_classes=2)
    info.main(InfoConfig(model=model, num_steps=4, guidance=1.0))
    assert "layers" in capsys.readouterr().out
    spread, whole = (
        PlannedStep.of(PlanConfig(model=model, parallel=ParallelConfig(engine=engine)), 64, 8)
        for engine in ("fsdp", "ddp")
    )
    assert spread.memory.weights < whole.memory.weights and spread.memory.activations > 0
    assert time_step(spread, find_machine("H100", 8, 45)).total > 0
