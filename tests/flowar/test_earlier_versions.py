"""What version 0.1 wrote is still read: tests/data/v0.1."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from data_prep import check
from flowar import evaluate, sample, train
from flowar.config.data import CheckConfig, ExtractorConfig, VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.config.load import load_config
from flowar.config.measuring import EvaluateConfig
from flowar.config.training import TrainConfig
from flowar.latents.vae import from_uint8
from flowar.models.folders import load_model
from tests.conftest import DATA

DEMO_EXTRACTOR = "demo-classifier"  # the old name of the demo's judge

TOLERANCE = 2e-6  # of weights after ten steps on another kind of CPU


@pytest.fixture
def made(tmp_path):
    """A copy of the files of version 0.1."""
    with tarfile.open(DATA / "v0.1" / "made_by_0.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_run_resumes_to_rounding(made):
    """Not to the same bits, as the model's arithmetic has another order than in 0.1. The run has no dropout."""
    train.main(
        load_config(
            TrainConfig, made / "run" / "config.yaml", (f"run_dir={made / 'run'}", f"data.path={made / 'shards'}")
        )
    )
    expected = load_file(made / "end.safetensors")
    for weights in ("raw", "decay_0.9", "std_0.1"):
        for name, tensor in load_model(made / "run", weights).state_dict().items():
            torch.testing.assert_close(tensor, expected[f"{weights}.{name}"], rtol=0, atol=TOLERANCE)


def test_a_model_folder_holds_the_checkpoints_average(made):
    exported, average = load_model(made / "model"), load_model(made / "run", "decay_0.9")
    assert exported.config == average.config and exported.config.family == "flowar"
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), average.parameters(), strict=True))


def test_a_dataset_is_what_its_passport_says(made, capsys):
    check.main(CheckConfig(path=str(made / "shards"), num_images=0))
    assert "is what was written" in capsys.readouterr().out


def drawing(made, folder, **changes):
    settings = {"num_steps": 4, "guidance": 1.5, "batch_size": 8, "chunk_batches": 1, "num_images": 24}
    vae = VAEConfig(name="demo")
    return SampleConfig(model=str(made / "model"), out_dir=str(made / folder), vae=vae, **(settings | changes))


def test_samples_are_recognised_completed_and_enlarged(made, capsys):
    files = sorted((made / "samples" / "images").iterdir())
    before = {file.name: np.asarray(Image.open(file)).astype(int) for file in files}
    stamps = {file: file.stat().st_mtime_ns for file in files}
    sample.main(drawing(made, "samples"))
    assert "0 still to draw" in capsys.readouterr().out
    files[3].unlink()
    sample.main(drawing(made, "samples", num_images=28))
    after = {file.name: np.asarray(Image.open(file)).astype(int) for file in (made / "samples" / "images").iterdir()}
    assert len(after) == 28 and all(np.abs(after[name] - pixels).max() <= 1 for name, pixels in before.items())
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items() if file != files[3])


class JudgeOf01(nn.Module):
    """The network of the demo of version 0.1."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        )  # fmt: skip
        self.features = nn.Linear(128 * 4 * 4, 64)
        self.logits = nn.Linear(64, 10)
        self.eval()


class FeaturesOf01(FeatureExtractorBase):
    """Its features, by a network that is not one of torch-fidelity's."""

    def __init__(self, name, features_list, feature_extractor_weights_path, **_):
        super().__init__(name, features_list)
        self.classifier = JudgeOf01()
        self.classifier.load_state_dict(load_file(feature_extractor_weights_path))
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    def forward(self, images):
        grey = from_uint8(images).mean(dim=1, keepdim=True)
        return (self.classifier.features(self.classifier.convolutions(grey).flatten(1)),)


@pytest.mark.parametrize("folder", ["samples", "features"])
def test_samples_and_kept_features_are_evaluated(made, folder):
    judge = JudgeOf01()
    with torch.no_grad():
        for parameter in judge.parameters():  # the values that computed the features
            numbers = torch.arange(parameter.numel())
            parameter.copy_((((numbers * 7919) % 1000 - 500) / 5000).view_as(parameter))
    save_file(judge.state_dict(), made / "judge.safetensors")
    if DEMO_EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(DEMO_EXTRACTOR, FeaturesOf01)
    extractor = ExtractorConfig(name=DEMO_EXTRACTOR, weights=str(made / "judge.safetensors"))
    settings = {"reference": str(made / "images"), "extractor": extractor, "interval_groups": 0}
    evaluate.main(EvaluateConfig(samples=str(made / folder), out_dir=str(made / "out"), **settings))
    record = json.loads((made / "out" / "metrics.json").read_text())
    assert record["num_samples"] == 24 and record["metrics"]["fid"]["value"] >= 0
    stores = list((made / "out" / "features").iterdir())
    assert len(stores) == (2 if folder == "samples" else 1)  # kept features are not computed again
