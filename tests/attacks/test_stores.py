"""Features, packed forms, sweeps and numbers whose files were exchanged, emptied or lost between two commands."""

import shutil

import numpy as np
import pytest
import torch

from flowar import evaluate, sweep, train
from flowar.base.errors import UserError
from flowar.base.leases import CLAIMS_FOLDER, Leases
from flowar.base.records import read_record
from flowar.check import check_samples
from flowar.config.training import EMAConfig
from flowar.evaluation.image_sets import open_images
from flowar.models.folders import export_model, load_model
from flowar.sampling.packing import is_packed, pack_images
from tests.attacks.measured import NUM, measuring, sweeping
from tests.conftest import flip_bit, training


@pytest.fixture(scope="module")
def root(measurable):
    """The objects that are measured."""
    return measurable


def test_features_that_were_drawn_anew_at_the_same_place_are_measured_anew(root, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "write_evaluation_page", lambda *_: None)  # takes longer than the numbers
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


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run with checkpoints of steps 1, 2 and 3, and kept averages of step 2."""
    run = tmp_path_factory.mktemp("runs") / "run"
    averages = EMAConfig(decays=(0.9,), stds=(0.05, 0.1), keep_every_steps=2)
    train.main(training(shards, run, epochs=1, save_every_steps=1, keep_checkpoints=3, ema=averages))
    return run


def test_a_sweep_of_a_run_that_trains_compares_weights_of_one_step(root, run, tmp_path, monkeypatch):
    trained = shutil.copytree(run, tmp_path / "run")
    (trained / "checkpoints" / "step_00000003").rename(tmp_path / "later")

    def export_and_train_on(*arguments):
        export_model(*arguments)
        if (tmp_path / "later").exists():
            (tmp_path / "later").rename(trained / "checkpoints" / "step_00000003")

    monkeypatch.setattr(sweep, "export_model", export_and_train_on)
    config = sweeping(root, tmp_path / "swept", model=str(trained), weights=("ema", "raw"))
    (tmp_path / "swept").mkdir()
    with Leases(tmp_path / "swept" / CLAIMS_FOLDER, 60) as leases:
        sweep.keep_models(config, leases)
    for name in ("ema", "raw"):
        found = load_model(tmp_path / "swept" / "models" / name).state_dict()
        needed = load_model(run / "checkpoints" / "step_00000002", name).state_dict()
        assert all(torch.equal(found[key], needed[key]) for key in needed)


def test_a_sweep_takes_checkpoint_and_kept_averages_of_one_step(root, run, tmp_path):
    config = sweeping(root, tmp_path, model=str(run), ema_stds=(0.07,))
    assert sweep.choose_checkpoint(config) == (run / "checkpoints" / "step_00000002", 2)


def test_a_sweep_whose_checkpoint_is_gone_says_so(root, run, tmp_path):
    trained = shutil.copytree(run, tmp_path / "run")
    config = sweeping(root, tmp_path, model=str(trained))
    checkpoint, _ = sweep.choose_checkpoint(config)
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="step_00000003 was deleted, .*ema was not copied yet; give another out_dir"):
        sweep.choose_checkpoint(config)


def test_a_damaged_checkpoint_does_not_stop_the_numbers_of_its_samples(root, run, tmp_path, monkeypatch):
    damaged, notes = shutil.copytree(run, tmp_path / "run"), []
    flip_bit(next((damaged / "checkpoints" / "step_00000003").glob("*.distcp")), 50_000)
    flip_bit(damaged / "checkpoints" / "step_00000003" / "config.json", 20)
    assert not evaluate.check_run(measuring(root), damaged, 3, notes)
    assert len(notes) == 1 and f"not added to {damaged}: checkpoint " in notes[0] and "is damaged" in notes[0]
    with pytest.raises(UserError, match="is damaged: .*; leave out run_dir and step to measure without"):
        evaluate.check_run(measuring(root, run_dir=str(damaged), step=3), damaged, 3, [])

    def delete(checkpoint):
        shutil.rmtree(checkpoint)
        raise FileNotFoundError(checkpoint)

    monkeypatch.setattr(evaluate, "read_progress", delete)
    assert not evaluate.check_run(measuring(root), damaged, 2, notes)
    assert notes[1] == f"not added to {damaged}: the run has just deleted its checkpoint of step 2"


def test_changed_bytes_of_a_stored_npz_are_not_measured(tmp_path):
    images = np.zeros((NUM, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images)
    assert len(open_images(tmp_path / "a.npz", "samples")) == NUM
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[10_000:30_000] = bytes([7]) * 20_000
    (tmp_path / "b.npz").write_bytes(content)
    with pytest.raises(UserError, match="b.npz is not an .npz .*: Bad CRC-32 for file 'arr_0.npy'; copy or make"):
        open_images(tmp_path / "b.npz", "samples")
