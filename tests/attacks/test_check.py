"""`flowar check` says of every kind of folder whether it is whole."""

# ruff: noqa: F811 - fixtures of another file

import shutil

import pytest

from data_prep import check
from flowar.base.errors import UserError
from flowar.config.data import CheckConfig
from flowar.models.build import create_model
from flowar.models.folders import save_model
from tests.attacks.test_features import STORE, root  # noqa: F401
from tests.conftest import flip_bit, tiny_config


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory):
    """A whole run and a whole model."""
    root = tmp_path_factory.mktemp("checked")
    shutil.copytree(trained, root / "run")
    save_model(tiny_config(), create_model(tiny_config()).state_dict(), root / "model")
    return root


def run_check(folder):
    check.main(CheckConfig(path=str(folder)))


@pytest.mark.parametrize("kind", ["run", "model", "run/checkpoints/step_00000004"])
def test_a_whole_folder_is_whole(folders, capsys, kind):
    run_check(folders / kind)
    printed = capsys.readouterr().out
    assert f"{folders / kind} is what was written" in printed and "WRONG" not in printed


@pytest.mark.parametrize(
    ("kind", "file", "place"),
    [
        ("run", "checkpoints/step_00000004/__0_0.distcp", 50_000),
        ("run", "checkpoints/step_00000006/state.json", 30),
        ("run", "dataset.json", 100),
        ("run", "owner.json", 20),
        ("model", "model.safetensors", 20_000),
        ("model", "config.json", 20),
        ("run", "config.yaml", 20),
        ("run", "metrics.jsonl", 20),
    ],
)
def test_one_bit_in_each_kind_of_file_is_named(folders, tmp_path, capsys, kind, file, place):
    shutil.copytree(folders / kind, tmp_path / kind)
    flip_bit(tmp_path / kind / file, place)
    with pytest.raises(UserError, match="has 1 problems, the first"):
        run_check(tmp_path / kind)
    printed = capsys.readouterr().out
    assert "WRONG: " in printed and str((tmp_path / kind / file).parent) in printed.split("WRONG: ")[1]


def test_a_folder_of_somebody_else_is_no_folder_of_ours(tmp_path):
    with pytest.raises(UserError, match="holds nothing that flowar can check; give a dataset, a VAE, a training run"):
        run_check(tmp_path)


@pytest.mark.parametrize("kind", ["images", "seed0", "ref_real", f"seed0/{STORE}"])
def test_whole_samples_features_and_references_are_whole(root, capsys, kind):
    run_check(root / kind)
    assert f"{root / kind} is what was written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "file", "place"),
    [
        ("images", "samples.json", 30),
        ("images", "images/000007_class0007.png", 300),
        ("images", "images.xxh64", 3),
        ("seed0", "samples.json", 30),
        ("seed0", f"{STORE}/features_*", 700),
        ("ref_real", f"{STORE}/features.json", 30),
        ("ref_real", f"{STORE}/*.npz", 100),
    ],
)
def test_one_bit_of_samples_features_and_references_is_named(root, tmp_path, capsys, kind, file, place):
    shutil.copytree(root / kind, tmp_path / kind)
    flip_bit(next((tmp_path / kind).glob(file)), place)
    with pytest.raises(UserError, match="problems, the first"):
        run_check(tmp_path / kind)
    assert str(tmp_path / kind) in capsys.readouterr().out.split("WRONG: ")[1]
