"""Single changed bytes of references and of a run's records; the other files have such a test beside their attacks."""

# ruff: noqa: F811 - fixtures of another file

import dataclasses
import random
import shutil

import pytest
import torch

from flowar.base.errors import UserError
from flowar.base.records import read_record
from flowar.config.load import load_described
from flowar.config.training import TrainConfig
from flowar.evaluation.references import prepare_reference
from flowar.latents.schema import read_passport
from flowar.training.owner import OWNER_CURE, OWNER_FILE
from flowar.training.report import read_metrics
from tests.attacks.test_features import STORE, extractor, measuring, root  # noqa: F401
from tests.conftest import MORE


def read_reference(folder, root, extractor):
    config = measuring(root, reference=folder)
    found = prepare_reference(config, extractor, folder / "out").read()
    assert found.features is not None
    statistics = {name: [own.mu.tolist(), own.sigma.tolist()] for name, own in found.statistics.items()}
    return [statistics, {name: tensor.tolist() for name, tensor in found.features.layers.items()}]


KINDS = {
    "reference": dict.fromkeys((f"{STORE}/features.json", f"{STORE}/*.npz", f"{STORE}/features_*"), read_reference),
    "run": {  # the checkpoints have a test of their own
        "config.yaml": lambda folder, *_: dataclasses.asdict(load_described(TrainConfig, folder / "config.yaml")),
        "metrics.jsonl": lambda folder, *_: read_metrics(folder),
        "owner.json": lambda folder, *_: read_record(folder / OWNER_FILE, OWNER_CURE),
        "dataset.json": lambda folder, *_: dataclasses.asdict(read_passport(folder)),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [10, pytest.param(200, marks=MORE)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_single_changed_byte_passes_in_silence(root, trained, extractor, tmp_path, kind, number):
    """In each kind of file so many; either it is refused by a UserError, or all that is read of it is the same."""
    folder = tmp_path / "copy"
    shutil.copytree(trained if kind == "run" else root / "ref_real", folder)
    torch.manual_seed(0)
    refused, made = 0, 0
    rng = random.Random(0)
    for pattern, read in KINDS[kind].items():
        expected = read(folder, root, extractor)
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
