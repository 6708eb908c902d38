"""Single changed bytes of references and of a run's records; the other files have such a test beside their attacks."""

# ruff: noqa: F811 - fixtures of another file

import dataclasses
import random
import shutil

import pytest
import torch

from flowar import train
from flowar.base.errors import UserError
from flowar.base.records import read_record
from flowar.config.load import load_described
from flowar.config.training import TrainConfig
from flowar.evaluation.references import prepare_reference
from flowar.latents.schema import read_passport
from flowar.training.owner import OWNER_CURE, OWNER_FILE
from flowar.training.report import read_metrics
from tests.attacks.test_features import STORE, extractor, measuring, root  # noqa: F401
from tests.conftest import MORE, training


@pytest.fixture(scope="module")
def run_dir(shards, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("bytes") / "run"
    train.main(training(shards, run_dir, epochs=2))
    return run_dir


def read_reference(folder, root, extractor):
    config = measuring(root, reference=folder)
    found = prepare_reference(config, extractor, folder / "out").read()
    assert found.features is not None
    statistics = {name: [own.mu.tolist(), own.sigma.tolist()] for name, own in found.statistics.items()}
    return [statistics, {name: tensor.tolist() for name, tensor in found.features.layers.items()}]


def read_run(folder, root, extractor):
    """What is read of a run beside its checkpoints, which have a test of their own."""
    settings = dataclasses.asdict(load_described(TrainConfig, folder / "config.yaml"))
    owner = read_record(folder / OWNER_FILE, OWNER_CURE)
    return [owner, read_metrics(folder), settings, dataclasses.asdict(read_passport(folder))]


KINDS = {
    "reference": (read_reference, "ref_real", [f"{STORE}/features.json", f"{STORE}/*.npz", f"{STORE}/features_*"]),
    "run": (read_run, None, ["config.yaml", "metrics.jsonl", "owner.json", "dataset.json"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [10, pytest.param(200, marks=MORE)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_single_changed_byte_passes_in_silence(root, run_dir, extractor, tmp_path, kind, number):
    """In each kind of file so many; either it is refused by a UserError, or all that is read is the same."""
    read, name, patterns = KINDS[kind]
    folder = tmp_path / "copy"
    shutil.copytree(run_dir if name is None else root / name, folder)
    torch.manual_seed(0)
    expected, refused, made = read(folder, root, extractor), 0, 0
    rng = random.Random(0)
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        assert files, pattern
        for _ in range(number):
            file = rng.choice(files)
            written = file.read_bytes()
            changed = bytearray(written)
            place = rng.randrange(len(changed))
            changed[place] ^= 1 << rng.randrange(8)
            file.write_bytes(changed)
            made += 1
            try:
                found = read(folder, root, extractor)
            except UserError as error:
                refused += 1
                assert str(folder) in str(error)
            else:
                assert found == expected, (file.name, place)
            file.write_bytes(written)
    assert refused > made / 2
