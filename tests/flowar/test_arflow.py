"""ARFlow trains on sequences of images through the same trainer and checkpoints as FlowAR.

The tests of engines and kills cover both families: test_train.py, training/test_engines.py.
"""

import dataclasses
import shutil

import pytest
import torch

from flowar import replay, train
from flowar.base.errors import UserError
from flowar.base.run_folder import find_latest, list_checkpoints
from flowar.config.data import DataConfig
from flowar.config.training import ParallelConfig, PreviewConfig, ReplayConfig
from flowar.models.folders import load_model
from flowar.training.report import read_metrics
from tests.conftest import arflow_training
from tests.flowar.training.test_guard import poison


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("arflow") / "run"
    preview = PreviewConfig(every_steps=30, num_images=4, num_steps=2, solver="euler-maruyama")
    train.main(arflow_training(shards, run_dir, keep_checkpoints=9, preview=preview))
    return run_dir


def test_it_learns_and_resumes_to_the_same_bits(shards, finished, tmp_path):
    records = read_metrics(finished)
    assert records[-1]["step"] == 30 and records[-1]["loss"] < 0.98 * records[0]["loss"]
    assert (finished / "previews" / "step_00000030.png").exists()
    shutil.copytree(finished, tmp_path / "run")
    for folder in list_checkpoints(tmp_path / "run")[3:]:
        shutil.rmtree(folder)
    assert find_latest(tmp_path / "run").name == "step_00000012"
    recomputed = ParallelConfig(checkpoint_every_blocks=1)
    train.main(arflow_training(shards, tmp_path / "run", keep_checkpoints=9, parallel=recomputed))
    assert find_latest(tmp_path / "run").name == "step_00000030"
    for weights in ("raw", "decay_0.9"):
        found, expected = load_model(tmp_path / "run", weights).state_dict(), load_model(finished, weights).state_dict()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_bad_step_is_kept_with_all_images_and_replayed(shards, tmp_path, capsys):
    """A third of all images is bad, so that every step has one of them."""
    path = poison(shards, tmp_path / "bad", list(range(8)))
    config = arflow_training(shards, tmp_path / "run", data=DataConfig(path=str(path), num_workers=0), epochs=0.5)
    train.main(config)
    bundle = min((tmp_path / "run" / "anomalies").iterdir())
    replay.main(ReplayConfig(bundle=str(bundle), micro_batch_size=2))
    assert "loss: velocity" in capsys.readouterr().out


def test_a_class_with_fewer_images_than_a_sequence_has_is_refused(shards, tmp_path):
    config = arflow_training(shards, tmp_path / "run")
    model = dataclasses.replace(config.model, images_per_sample=99)
    with pytest.raises(
        UserError, match=r"class \d has \d+ images, and a sample is model.images_per_sample=99 different"
    ):
        train.main(dataclasses.replace(config, model=model))
