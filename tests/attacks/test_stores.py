"""Features, packed forms, sweeps and numbers whose files were exchanged, emptied or lost between two commands."""

import shutil

import pytest

from flowar import evaluate
from flowar.base.records import read_record
from tests.attacks.measured import measuring


@pytest.fixture(scope="module")
def root(measurable):
    """The objects that are measured."""
    return measurable


def test_features_that_were_drawn_anew_at_the_same_place_are_measured_anew(root, tmp_path):
    found = []
    for seed in (0, 1):
        shutil.copytree(root / f"seed{seed}", tmp_path / "samples")
        evaluate.main(measuring(root, samples=tmp_path / "samples", out_dir=tmp_path / "out"))
        found.append(read_record(tmp_path / "out" / "metrics.json", "")["metrics"]["fid"]["value"])
        shutil.rmtree(tmp_path / "samples")
    assert found[0] != found[1]
