"""Each checkpoint of a training run is measured by its own job, on a real Slurm."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cluster import follow
from cluster.commands import submit_command as submit
from cluster.status import find_jobs
from flowar import train
from flowar.base.errors import UserError
from flowar.base.hashes import hash_weights
from flowar.config.data import ExtractorConfig, VAEConfig
from flowar.config.drawing import SamplingConfig
from flowar.config.jobs import FollowConfig, FollowedConfig
from flowar.config.load import describe_config
from flowar.evaluation.extractors import OWN
from flowar.models.folders import load_model
from tests.conftest import read_evaluations, save_untrained_judge, training


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    """A finished run of 30 steps with checkpoints after 24, 28 and 30, real images and an untrained classifier."""
    root = tmp_path_factory.mktemp("trained")
    random = np.random.default_rng(0)
    (root / "real").mkdir()
    for index in range(20):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "real" / f"{index}.png")
    save_untrained_judge(root / "judge.safetensors", ("dark", "light"))
    train.main(dataclasses.replace(training(shards, root / "run"), keep_checkpoints=3))
    return root


@pytest.fixture
def followed(trained, tmp_path):
    """A copy of the run, and how to follow it."""
    root = shutil.copytree(trained, tmp_path / "trained")
    judge = ExtractorConfig(name=OWN, weights=str(root / "judge.safetensors"))
    drawing = SamplingConfig(
        vae=VAEConfig(name="demo"), batch_size=8, chunk_batches=1, num_steps=2, features_only=True, extractor=judge
    )
    evaluation = FollowedConfig(reference=str(root / "real"), sample=drawing, extractor=judge, interval_groups=0)
    config = FollowConfig(
        evaluate=evaluation, num_images=20, milestone_every_steps=14, milestone_images=24, every_steps=10, poll_s=1
    )
    file = root / "follow.yaml"
    file.write_text(describe_config(config))
    return root / "run", file, config


@pytest.mark.slow
def test_each_checkpoint_is_measured_at_its_step_by_its_own_job(slurm, followed, capsys):
    run_dir, file, _ = followed
    command = ["evaluate", str(file), "--follow", str(run_dir), "--cluster", str(slurm.cluster_file), "cluster.nodes=1"]
    submit([*command, "cluster.tasks_per_node=2", "--once", "--dry-run"])
    printed = capsys.readouterr().out
    assert "step_00000028 with 24 images" in printed and "step_00000030 with 20 images" in printed
    submit([*command, "cluster.tasks_per_node=2", "--once"])
    weights = load_model(run_dir).state_dict()
    folders = [run_dir / "evaluations" / f"step_{step:08d}" for step in (28, 30)]
    for folder in folders:
        for job in find_jobs(folder):
            slurm.wait_until_finished(job)
    records = read_evaluations(run_dir)
    assert [(record["step"], record["num_samples"]) for record in records] == [(28, 24), (30, 20)]
    assert all(record["fid"] > 0 for record in records)
    sampling = json.loads((folders[1] / "evaluation" / "metrics.json").read_text())["sampling"]
    assert sampling["weights_sha256"] == hash_weights(weights)
    submit([*command, "--once"])  # nothing is due; the copies of the weights are deleted
    assert [len(find_jobs(folder)) for folder in folders] == [1, 1]
    assert not [folder for folder in folders if (folder / "model").exists()]


def test_what_is_due_follows_from_the_folders(followed):
    run_dir, _, config = followed
    due = follow.due_checkpoints(run_dir, config)
    assert [folder.name for folder in due] == ["step_00000028", "step_00000030"]
    assert [follow.num_images(config, step) for step in (28, 30)] == [24, 20]
    everything = dataclasses.replace(config, every_steps=0)
    assert follow.due_checkpoints(run_dir, everything)[0].name == "step_00000024"
    assert not follow.is_over(run_dir)  # no job of it is known


def test_bad_input_is_one_clear_error(followed, tmp_path):
    _, file, _ = followed
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("scheduler: local\n")
    with pytest.raises(UserError, match="got 2 config files"):
        submit(["evaluate", str(file), "b.yaml", "--follow", str(tmp_path), "--cluster", str(cluster)])
    with pytest.raises(UserError, match="--follow .*/none does not exist"):
        submit(["evaluate", str(file), "--follow", str(tmp_path / "none"), "--cluster", str(cluster)])
    with pytest.raises(UserError, match="--follow works with `flowar submit evaluate`, not with train"):
        submit(["train", str(file), "--follow", str(tmp_path), "--cluster", str(cluster)])
    with pytest.raises(UserError, match="evaluate.reference is required"):
        submit(["evaluate", "--follow", str(tmp_path), "--cluster", str(cluster)])
