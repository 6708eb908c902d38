"""Tiny real objects that the tests share: a model, images of two classes, their shards, the authors' vectors."""

import json
import os
import random

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # these tests are about a CPU: bits, and processes without a GPU each
os.environ["OMP_NUM_THREADS"] = "1"  # more would give other bits, and would wait for each other on a busy machine

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from flowar.config.data import DataConfig, VAEConfig
from flowar.config.models import ARFlowConfig, FlowARConfig
from flowar.config.training import EMAConfig, OptimConfig, PreviewConfig, TrainConfig
from flowar.latents.schema import read_passport
from tests.browser import Browser, find_browser

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
# One more case of what another case tests already: `FLOWAR_TEST_ALL=1 make test` runs these too.
ALL = bool(os.environ.get("FLOWAR_TEST_ALL"))
MORE = pytest.mark.skipif(not ALL, reason="one more case; FLOWAR_TEST_ALL=1 runs it")
KILLS_ASKED = int(
    os.environ.get("FLOWAR_TEST_KILLS", "20" if ALL else "0")
)  # in a test with SIGKILL; 0: its own number
SLOW_S = 5


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Fail a test that takes too long to be unmarked, where FLOWAR_TEST_TIERS=1 says that the machine is idle.

    On a busy one seconds say nothing of a test, and CPU time counts no forked process, so it is off by default.
    """
    report = yield
    is_late = call.when == "call" and call.duration > SLOW_S and "slow" not in item.keywords
    if os.environ.get("FLOWAR_TEST_TIERS") and is_late and report.passed:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} took {call.duration:.1f} s, more than {SLOW_S}: mark it slow or make it quick"
    return report


def load_vectors(name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one of the authors' test vectors."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping


def released_state(vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the authors' state dict among the vectors."""
    return {name.removeprefix("state."): tensor for name, tensor in vectors.items() if name.startswith("state.")}


def tiny_config(**changes: object) -> FlowARConfig:
    """Return a model small enough for any test."""
    settings = {
        "variant": "custom",
        "scales": (1, 2, 4),
        "latent_channels": 3,
        "num_classes": 5,
        "ar_depth": 4,
        "ar_width": 32,
        "ar_heads": 2,
        "flow_depth": 2,
        "flow_width": 32,
        "flow_heads": 2,
        "flow_block": "attn_mlp",
        "dropout": 0.0,
    }
    return FlowARConfig(**(settings | changes))


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a random value, so that no zero bias and no weight of one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1) * 0.5)
    return model


def save_untrained_judge(file: Path, class_names: Sequence[str] = "0123456789") -> None:
    """Write a judge with random weights: a feature extractor as good as any."""
    from flowar.evaluation.judge import AboutJudge, Judge, save_judge

    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge(len(class_names)).eval()
    about = AboutJudge(
        class_names=list(class_names), side=32, accuracy=0.1, num_held_out=10,
        num_images=90, images="nowhere", identity="none", flip=False, seed=0,
    )  # fmt: skip
    save_judge(judge, about, file)


def training(shards: Path, run_dir: Path, **changes: object) -> TrainConfig:
    """Return a run of 30 steps on the fixture's shards."""
    passport = read_passport(shards)
    model = tiny_config(
        scales=(1, 2, passport.latent_size),
        latent_channels=passport.latent_channels,
        num_classes=2,
        ar_depth=2,
        flow_depth=1,
        dropout=0.1,
    )
    settings = {
        "model": model,
        "vae": VAEConfig(name="demo"),
        "data": DataConfig(path=str(shards), num_workers=0),
        "optim": OptimConfig(lr=1e-3, warmup_epochs=1),
        "epochs": 10,
        "batch_size": 8,  # 30 steps
        "ema": EMAConfig(decays=(0.9,)),
        "precision": "fp32",
        "log_every_steps": 5,
        "save_every_steps": 4,
        "preview": PreviewConfig(every_steps=0),
        "peak_tflops": 1.0,  # else it would be measured at each start
    }
    return TrainConfig(run_dir=str(run_dir), **(settings | changes))


def arflow_training(shards: Path, run_dir: Path, **changes: object) -> TrainConfig:
    """Return a run of 30 steps as `training`, of an ARFlow, on sequences of 3 images.

    Gradients are clipped by value, at what about every tenth exceeds: all engines have to do that alike.
    """
    passport = read_passport(shards)
    model = ARFlowConfig(
        variant="custom", latent_channels=passport.latent_channels, latent_size=passport.latent_size, num_classes=2,
        patch_size=2, depth=2, width=32, heads=2, images_per_sample=3, guided_channels=None,
    )  # fmt: skip
    optim = OptimConfig(lr=1e-3, warmup_epochs=1, max_grad_norm=None, max_grad_value=1e-3)
    return training(shards, run_dir, **({"model": model, "optim": optim} | changes))


TRAININGS = {"flowar": training, "arflow": arflow_training}  # by family


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 small images of two classes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, brightness in (("dark", 60), ("light", 200)):
        (root / name).mkdir()
        for index in range(12):
            pixels = (brightness + random.normal(0, 20, (40, 36, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A dataset prepared from `image_folder` with the demo VAE: 24 images x 2 views in three shards."""
    from data_prep import encode
    from flowar.config.data import PrepareConfig

    out_dir = tmp_path_factory.mktemp("data") / "shards"
    encode.main(
        PrepareConfig(
            images=str(image_folder),
            out_dir=str(out_dir),
            vae=VAEConfig(name="demo"),
            image_size=32,
            chunk_images=10,
            num_workers=0,
        )
    )
    return out_dir


@pytest.fixture(scope="session")
def bucket() -> Iterator[object]:
    """A client of an S3 server on loopback, with the bucket "data"."""
    import boto3
    import botocore.loaders
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    loader = botocore.loaders.create_loader()
    with pytest.MonkeyPatch.context() as environment:
        # Every file is fetched by a client of its own, and each would parse botocore's megabytes of JSON again.
        environment.setattr("botocore.session.create_loader", lambda *_: loader)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="data")
        yield client
    server.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A Chromium, one for all tests; without one they are skipped, or fail where FLOWAR_TEST_NEEDS_BROWSER=1."""
    executable = find_browser()
    if executable is None:
        if os.environ.get("FLOWAR_TEST_NEEDS_BROWSER"):
            pytest.fail("there is no Chromium here, and FLOWAR_TEST_NEEDS_BROWSER is set: apt-get install chromium")
        pytest.skip("needs Chromium: apt-get install chromium")
    opened = Browser(executable)
    yield opened
    opened.close()


def upload(bucket: object, folder: Path, prefix: str) -> str:
    """Copy a folder into the bucket and return its address."""
    for file in folder.rglob("*"):
        if file.is_file():
            bucket.upload_file(str(file), "data", f"{prefix}/{file.relative_to(folder)}")
    return f"s3://data/{prefix}"


def read_evaluations(run_dir: Path) -> list[dict[str, object]]:
    """Return all metrics of a run's checkpoints, by step."""
    return [json.loads(file.read_text()) for file in sorted((run_dir / "evaluations").glob("step_*.json"))]


def flip_bit(file: Path, place: int) -> None:
    """Change one bit of the byte at `place`."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def change_bytes(files: list[Path], number: int, seed: int = 0) -> Iterator[tuple[Path, int]]:
    """Change one byte of one of the files at a time, so often, and yield where; it is as before afterwards."""
    draw = random.Random(seed)
    for _ in range(number):
        file = draw.choice(files)
        before = file.read_bytes()
        place = draw.randrange(len(before))
        changed = bytearray(before)
        changed[place] = draw.choice([value for value in range(256) if value != before[place]])
        file.write_bytes(changed)
        yield file, place
        file.write_bytes(before)


def written_by_0_1(config: Path) -> str:
    """Return the text of a config.yaml without its hash."""
    return config.read_text().partition("\n")[2].rpartition("# xxh3")[0]
