"""Model folders that were damaged, swapped, or made by somebody else."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowar.base.errors import UserError
from flowar.evaluation.judge import load_judge
from flowar.models.build import create_model
from flowar.models.folders import load_model, save_model, save_model_whole
from tests.conftest import ALL, flip_bit, randomise, save_untrained_judge, tiny_config


@pytest.fixture
def model_folder(tmp_path):
    save_model(tiny_config(), randomise(create_model(tiny_config())).state_dict(), tmp_path / "model")
    return tmp_path / "model"


def test_no_changed_byte_of_a_model_passes_in_silence(model_folder, tmp_path):
    """Each is refused by name, or the model is the same."""
    expected, refused = load_model(model_folder).state_dict(), 0
    generator = random.Random(0)
    for number in range(200 if ALL else 30):
        file = model_folder / ("model.safetensors", "config.json")[number % 2]
        written = file.read_bytes()
        head = len(written) if number % 4 else 2000  # half of them in the head of the tensors' file
        changed = bytearray(written)
        changed[generator.randrange(min(head, len(written)))] ^= 1 << generator.randrange(8)
        file.write_bytes(changed)
        try:
            found = load_model(model_folder)
        except UserError as error:
            refused += 1
            assert str(file) in str(error) or str(model_folder) in str(error)
        else:
            assert found.config == tiny_config()
            assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.items())
        file.write_bytes(written)
    assert refused > 20


def test_the_weights_of_another_model_are_refused(model_folder, tmp_path):
    other = tiny_config(ar_width=64)
    save_model(other, randomise(create_model(other)).state_dict(), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", model_folder)
    with pytest.raises(UserError, match=r"model.safetensors"):
        load_model(model_folder)


def test_a_model_without_hashes_is_accepted(model_folder):
    """Version 0.1 and others write none."""
    state = load_file(model_folder / "model.safetensors")
    save_file(state, model_folder / "model.safetensors")
    config = json.loads((model_folder / "config.json").read_text())
    del config["xxh3"]
    (model_folder / "config.json").write_text(json.dumps(config))
    found = load_model(model_folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_numbers_of_another_type_are_refused(model_folder):
    file = model_folder / "model.safetensors"
    whole = load_file(file)
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load_model(model_folder)
    save_file({name: tensor.view(torch.int32) for name, tensor in whole.items()}, file)  # without hashes
    with pytest.raises(UserError, match="holds no weights: .* is torch.int32"):
        load_model(model_folder)


@pytest.mark.parametrize("hashes", ["5", "null", "[]", "[1]", "{"])
def test_hashes_that_are_none_are_named(model_folder, hashes):
    file = model_folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"xxh3": hashes})
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load_model(model_folder)


def test_nothing_of_an_interrupted_export_goes_into_the_next(tmp_path):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "dataset.json").write_text("{}")
    save_model_whole(tiny_config(), create_model(tiny_config()).state_dict(), tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}


@pytest.fixture
def judge_file(tmp_path):
    save_untrained_judge(tmp_path / "judge.safetensors")
    return tmp_path / "judge.safetensors"


def keep_one(file):
    state = load_file(file)
    save_file({name: state[name] for name in sorted(state)[:1]}, file)


JUDGE_ATTACKS = {
    "half of it": lambda file: os.truncate(file, file.stat().st_size // 2),
    "nothing": lambda file: os.truncate(file, 0),
    "a bit of a weight": lambda file: flip_bit(file, file.stat().st_size - 1000),
    "one weight": keep_one,
    "what is said of it": lambda file: save_file(load_file(file), file),
    "another file": lambda file: file.write_text("a judge"),
}


@pytest.mark.parametrize("attack", JUDGE_ATTACKS)
def test_a_damaged_judge_is_refused(judge_file, attack):
    JUDGE_ATTACKS[attack](judge_file)
    with pytest.raises(UserError, match=rf"{judge_file} is .*; remove it and run the same command again, which trains"):
        load_judge(judge_file)


def test_no_bit_of_what_is_said_of_a_judge_can_change_unseen(judge_file):
    _, expected = load_judge(judge_file)
    header = int.from_bytes(judge_file.read_bytes()[:8], "little")
    for place in range(8, 8 + header, 37):
        flip_bit(judge_file, place)
        try:
            assert load_judge(judge_file)[1] == expected
        except UserError as error:
            assert "remove it and run the same command again" in str(error)
        flip_bit(judge_file, place)
