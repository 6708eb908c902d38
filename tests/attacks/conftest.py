"""What the attacks on features, numbers and sweeps share."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from flowar import evaluate
from flowar.config.measuring import ReferenceConfig
from flowar.evaluation.digits import DigitClassifier, save_classifier
from flowar.evaluation.extractors import Extractor
from flowar.evaluation.store import FeatureSink
from flowar.models.build import create_model
from flowar.models.folders import save_model
from flowar.sampling.images import ImageSink
from flowar.sampling.job import open_job
from flowar.sampling.worker import draw_job
from tests.attacks.measured import NUM, drawing, judge
from tests.conftest import randomise


@pytest.fixture(scope="session")
def measurable(tmp_path_factory):
    """A model, an untrained judge, real images, features of samples of seeds 0 and 1, and two references."""
    root = tmp_path_factory.mktemp("features")
    model = randomise(create_model("flowar-demo", ar_depth=2, flow_depth=1))
    save_model(model.config, model.state_dict(), root / "model")
    torch.manual_seed(0)
    save_classifier(DigitClassifier().eval(), root / "judge.safetensors")
    random = np.random.default_rng(0)
    for name in ("real", "others"):
        (root / name).mkdir()
        for number in range(NUM):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
        settings = {"images": str(root / name), "out_dir": str(root / f"ref_{name}"), "extractor": judge(root)}
        evaluate.make_reference(ReferenceConfig(**settings))
    job, extractor = open_job(drawing(root, root / "seed0")), Extractor(judge(root), torch.device("cpu"))
    for seed in (0, 1):
        config = drawing(root, root / f"seed{seed}", seed=seed)
        own = dataclasses.replace(job, config=config)
        draw_job(own, FeatureSink(own, extractor))
    own = dataclasses.replace(job, config=drawing(root, root / "images"))
    draw_job(own, ImageSink(own))
    return root
