"""Checkpoints of the authors that are damaged or are something else: refused by name when they are converted."""

import pickle
import random

import pytest
import torch

from flowar import export
from flowar.base.errors import UserError
from flowar.config.training import ConvertConfig
from flowar.models.folders import load_model
from tests.attacks.test_checkpoints import Trap
from tests.conftest import MORE, flip_bit, load_vectors, released_state

NUM_CHANGES = 500


@pytest.fixture(scope="module")
def state():
    return released_state(load_vectors("flowar_attn_mlp"))


def convert(source, target, ar_heads=None):
    export.convert_checkpoint(ConvertConfig(checkpoint=str(source), out_dir=str(target), ar_heads=ar_heads))


def change(**values):
    return lambda state: state | {key.replace("__", "."): value for key, value in values.items()}


def drop(*names):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


FREQUENCIES, PROJECTION = "encoder_blocks.0.attn.rope.freqs", "flownet.input_proj.weight"
ATTACKS = {
    "a list": lambda state: [1, 2],
    "a tensor": lambda state: torch.ones(3),
    "nothing": lambda state: {},
    "no tensors": lambda state: dict.fromkeys(state, 1),
    "a number among them": change(z_proj__weight=1),
    "nested": lambda state: {"state_dict": state},
    "twice in its wrapper": lambda state: {"model": {"model": state}},
    "numbered": lambda state: dict(enumerate(state.values())),
    "a key missing": drop(PROJECTION),
    "another key missing": drop("z_proj.bias"),
    "one more key": change(more=torch.ones(1)),
    "no block 0": drop("flownet.res_blocks.0.mlp.fc1_g.weight"),
    "a block far away": change(**{"encoder_blocks.999999999999.x": torch.ones(1)}),
    "a scalar": change(**{PROJECTION: torch.tensor(1.0)}),
    "a vector for a matrix": change(class_emb__weight=torch.ones(7)),
    "an empty matrix": change(class_emb__weight=torch.ones(0, 0)),
    "another shape": change(z_proj__bias=torch.ones(1)),
    "other positions": change(encoder_pos_embed_learned=torch.ones(1, 5, 32)),
    "flat positions": change(encoder_pos_embed_learned=torch.ones(341)),
    "no frequencies": drop(FREQUENCIES),
    "empty frequencies": change(**{FREQUENCIES: torch.ones(0)}),
    "scalar frequencies": change(**{FREQUENCIES: torch.tensor(1.0)}),
    "too many frequencies": change(**{FREQUENCIES: torch.ones(10_000)}),
    "whole numbers": lambda state: {name: tensor.long() for name, tensor in state.items()},
    "sparse": change(z_proj__weight=torch.eye(3).to_sparse()),
    "without memory": change(z_proj__weight=torch.empty(3, 3, device="meta")),
    "not finite": lambda state: state | {"z_proj.bias": state["z_proj.bias"] / 0},
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_odd_checkpoint_is_refused_by_name(state, tmp_path, attack):
    torch.save(ATTACKS[attack](state), tmp_path / "FlowAR.pth")
    with pytest.raises(UserError, match="FlowAR.pth") as refused:
        convert(tmp_path / "FlowAR.pth", tmp_path / "model")
    assert "\n" not in str(refused.value) and not (tmp_path / "model").exists()


FILES = {
    "empty": b"",
    "text": b"<html>not found</html>",
    "a pickle of nothing": b".",
    "an empty stack": b"\x80\x02e.",
    "half a zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, name):
    (tmp_path / "FlowAR.pth").write_bytes(FILES[name])
    with pytest.raises(UserError, match="FlowAR.pth is not a readable PyTorch checkpoint"):
        convert(tmp_path / "FlowAR.pth", tmp_path / "model")


def test_code_in_a_checkpoint_is_not_run(state, tmp_path):
    torch.save(state | {"z_proj.bias": Trap(tmp_path / "sprung")}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for name in ("new.pth", "old.pth"):
        with pytest.raises(UserError, match=f"{name} is not a readable PyTorch checkpoint"):
            convert(tmp_path / name, tmp_path / "model")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("number", [60, pytest.param(NUM_CHANGES, marks=MORE)])
def test_no_flipped_bit_of_a_checkpoint_passes_in_silence(state, tmp_path, number):
    file, rng, refused = tmp_path / "FlowAR.pth", random.Random(0), 0
    torch.save(state, file)
    whole = file.read_bytes()
    convert(file, tmp_path / "needed")
    needed = load_model(tmp_path / "needed").state_dict()
    for count in range(number):
        file.write_bytes(whole)
        flip_bit(file, rng.randrange(len(whole)))
        try:
            convert(file, tmp_path / f"{count}")
        except UserError:
            refused += 1
        else:
            found = load_model(tmp_path / f"{count}").state_dict()
            assert all(torch.equal(found[name], needed[name]) for name in needed)
    assert refused > number / 2


def test_a_folder_is_told_what_to_do_with_it(trained, state, tmp_path):
    checkpoint = next((trained / "checkpoints").iterdir())
    for source in (trained, checkpoint):
        with pytest.raises(UserError, match=f"belongs to a training run; .*`flowar export {source} {tmp_path}/model`"):
            convert(source, tmp_path / "model")
    torch.save(state, tmp_path / "FlowAR.pth")
    convert(tmp_path / "FlowAR.pth", tmp_path / "model")
    with pytest.raises(UserError, match="is already a model folder"):
        convert(tmp_path / "model", tmp_path / "other")
