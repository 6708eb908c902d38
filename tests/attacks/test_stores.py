"""Features, packed forms, sweeps and numbers whose files were exchanged, emptied or lost between two commands."""

import shutil

import pytest

from flowar import evaluate
from flowar.base.errors import UserError
from flowar.base.records import read_record
from flowar.check import check_samples
from flowar.sampling.packing import is_packed, pack_images
from tests.attacks.measured import NUM, measuring
from tests.conftest import flip_bit


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


@pytest.mark.parametrize("kind", ["npz", "tar"])
def test_packed_files_that_were_emptied_or_lost_are_named_and_packed_again(root, tmp_path, kind):
    out_dir = shutil.copytree(root / "images", tmp_path / "images")
    files = sorted((out_dir / "images").glob("*.png"))
    target = pack_images(kind, files, [0] * NUM, out_dir)
    assert not list(check_samples(out_dir))
    file = target if target.is_file() else next(target.glob("*.tar"))
    content = file.read_bytes()
    flip_bit(file, -5)
    (problem,) = check_samples(out_dir)
    assert f"{file} does not have the hash in" in problem and f"delete {target} and run" in problem
    for damage in (lambda: file.write_bytes(b""), file.unlink):
        damage()
        assert len(list(check_samples(out_dir))) == 1 and not is_packed(kind, NUM, out_dir)
        pack_images(kind, files, [0] * NUM, out_dir)
        assert file.read_bytes() == content and not list(check_samples(out_dir))


@pytest.mark.parametrize("text", ['{"npz": []}', '{"npz": {"num_images": 20}}'])
def test_a_record_that_names_no_packed_files_is_named(tmp_path, text):
    (tmp_path / "packed.json").write_text(text)
    with pytest.raises(UserError, match="packed.json is damaged .its npz does not name packed files.; delete it and"):
        is_packed("npz", NUM, tmp_path)
