"""What the attacks on features, numbers and sweeps share."""

import dataclasses
import functools
import multiprocessing.forkserver

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import encode
from flowar import evaluate, train
from flowar.config.measuring import ReferenceConfig
from flowar.evaluation.extractors import Extractor
from flowar.evaluation.store import FeatureSink
from flowar.latents.vae import load_vae
from flowar.models.build import create_model
from flowar.models.folders import save_model
from flowar.sampling import job
from flowar.sampling.images import ImageSink
from flowar.sampling.job import open_job
from flowar.sampling.worker import draw_job
from tests.attacks.measured import NUM, drawing, judge
from tests.conftest import randomise, save_untrained_judge, training
from tests.processes import fork_context


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """The server that processes are forked from: it imports for seconds, while tests that need none are running."""
    fork_context()
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session", autouse=True)
def one_vae():
    """The demo's VAE is read once, as a hundred commands need it; tests/attacks/test_vaes.py is about reading one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "load_vae", functools.cache(load_vae))
        patch.setattr(job, "load_vae", encode.load_vae)
        yield


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory):
    """A run of 6 steps with the checkpoints of steps 2, 4 and 6, for those who read it or copy it."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train.main(training(shards, run_dir, epochs=2, save_every_steps=2, keep_checkpoints=9))
    return run_dir


@pytest.fixture(scope="session")
def measurable(tmp_path_factory):
    """A model, an untrained judge, real images, features of samples of seeds 0 and 1, and two references."""
    root = tmp_path_factory.mktemp("features")
    model = randomise(create_model("flowar-demo", ar_depth=2, flow_depth=1))
    save_model(model.config, model.state_dict(), root / "model")
    save_untrained_judge(root / "judge.safetensors", ("dark", "light", *"23456789"))
    random = np.random.default_rng(0)
    for name in ("real", "others"):
        (root / name).mkdir()
        for number in range(NUM):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
        settings = {"images": str(root / name), "out_dir": str(root / f"ref_{name}"), "extractor": judge(root)}
        evaluate.make_reference(ReferenceConfig(**settings))
    opened, extractor = open_job(drawing(root, root / "seed0")), Extractor(judge(root), torch.device("cpu"))
    for seed in (0, 1):
        config = drawing(root, root / f"seed{seed}", seed=seed)
        own = dataclasses.replace(opened, config=config)
        draw_job(own, FeatureSink(own, extractor))
    own = dataclasses.replace(opened, config=drawing(root, root / "images"))
    draw_job(own, ImageSink(own))
    return root
