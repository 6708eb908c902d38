"""A chain of jobs on a real Slurm gives the same as running the verbs one after the other."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from cluster.commands import submit_command as submit
from cluster.status import find_jobs
from cluster.submit import plan_pipeline
from data_prep import encode
from flowar import evaluate, sample
from flowar.base.errors import UserError
from flowar.config.data import PrepareConfig, VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.config.jobs import PipelineConfig
from flowar.config.load import describe_config
from flowar.config.measuring import EvaluateConfig, ExtractorConfig
from flowar.config.training import ParallelConfig
from flowar.evaluation.extractors import OWN
from flowar.training.report import read_metrics
from tests.conftest import save_untrained_judge, training
from tests.flowar.ranks import run_ranks
from tests.flowar.training.test_engines import LOSS_TOLERANCE

NUM_IMAGES, ARRAY = 32, 2


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Forty pictures of 32 pixels of two classes, and an untrained classifier."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, brightness in (("dark", 60), ("light", 200)):
        (root / "images" / name).mkdir(parents=True)
        for index in range(20):
            pixels = (brightness + random.normal(0, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{index}.png")
    save_untrained_judge(root / "classifier.safetensors", ("dark", "light"))
    return root


def pipeline(images, shards, root):
    """The same four steps, below `root`."""
    vae = VAEConfig(name="demo")
    train = dataclasses.replace(
        training(shards, root / "run"), epochs=2, log_every_steps=1, parallel=ParallelConfig(timeout_s=20)
    )
    model = dataclasses.replace(train.model, dropout=0.0)
    data = dataclasses.replace(train.data, path=str(root / "data"))
    return PipelineConfig(
        run_dir=str(root / "chain"),
        prepare=PrepareConfig(
            images=str(images / "images"), out_dir=str(root / "data"), vae=vae, image_size=32, num_workers=0
        ),
        train=dataclasses.replace(train, model=model, data=data),
        sample=SampleConfig(
            model=str(root / "run"), out_dir=str(root / "samples"), vae=vae, num_images=NUM_IMAGES, batch_size=8,
            chunk_batches=1, num_steps=4,
        ),
        evaluate=EvaluateConfig(
            samples=str(root / "samples"), reference=str(images / "images"),
            extractor=ExtractorConfig(name=OWN, weights=str(images / "classifier.safetensors")),
        ),
        cluster={"prepare": {"nodes": 1}, "sample": {"nodes": 1, "array": ARRAY}, "evaluate": {"nodes": 1}},
    )  # fmt: skip


@pytest.mark.slow
def test_a_pipeline_with_a_sampling_array_gives_the_metrics_of_a_local_run(slurm, images, shards, tmp_path):
    local, chain = pipeline(images, shards, tmp_path / "local"), pipeline(images, shards, tmp_path / "chain")
    file = tmp_path / "pipeline.yaml"
    file.write_text(describe_config(chain))
    submit(["pipeline", str(file), "--cluster", str(slurm.cluster_file)])

    encode.main(local.prepare)
    run_ranks(local.train, 1, tmp_path / "log")
    sample.main(local.sample)
    evaluate.main(local.evaluate)

    jobs = find_jobs(tmp_path / "chain" / "chain")
    assert [job.verb for job in jobs] == ["prepare", "train", "sample", "evaluate"] and len(jobs[2].ids) == ARRAY
    for job in jobs:
        slurm.wait_until_finished(job)
    for mine, theirs in zip(read_metrics(chain.train.run_dir), read_metrics(local.train.run_dir), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=LOSS_TOLERANCE)
    names = [
        sorted(file.name for file in (tmp_path / which / "samples" / "images").iterdir())
        for which in ("local", "chain")
    ]
    assert names[0] == names[1] and len(names[0]) == NUM_IMAGES
    found, needed = (
        json.loads((tmp_path / which / "samples" / "evaluation" / "metrics.json").read_text())["metrics"]
        for which in ("chain", "local")
    )
    for key, metric in needed.items():
        assert found[key]["value"] == pytest.approx(metric["value"], rel=1e-3, abs=1e-3), key


def test_interpolations_variants_and_steps_of_a_pipeline(tmp_path):
    file = tmp_path / "chain.yaml"
    file.write_text(
        "run_dir: runs/chain\n"
        "train: {run_dir: runs/x, data: {path: /data/x}, model: {variant: flowar-s}}\n"
        'sample: {model: "${train.run_dir}", out_dir: runs/x/samples}\n'
    )
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("gpus_per_node: 8\n")
    folder, (train, sampling) = plan_pipeline(
        [str(file), "cluster.sample.array=4", "cluster.sample.nodes=2"], str(cluster)
    )
    assert train.config.model.ar_width == 768 and train.cluster.nodes == 1
    assert str(folder) == "runs/chain" and str(sampling.jobs) == "runs/x/samples/jobs"
    assert sampling.config.model == "runs/x" and (sampling.cluster.array, sampling.cluster.nodes) == (4, 2)
    assert sampling.cluster.gpus_per_node == sampling.cluster.tasks == 8
    with pytest.raises(UserError, match=r"cluster.sampel is not a step of the pipeline"):
        plan_pipeline([str(file), "cluster.sampel.array=4"], str(cluster))
    with pytest.raises(UserError, match="has no step"):
        plan_pipeline(["run_dir=runs/chain"], str(cluster))
