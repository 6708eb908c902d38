"""VAEs that are damaged or somebody else's: refused by name; no weight is drawn at random, and no code runs."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowar.base.errors import UserError
from flowar.latents import vae
from flowar.latents.vae import DEMO_VAE, load_vae
from tests.conftest import flip_bit

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit_config(**values):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


def edit_weights(change):
    def edit(folder):
        state = load_file(folder / WEIGHTS)
        change(state, min(state))
        save_file(state, folder / WEIGHTS)

    return edit


ATTACKS = {
    "a weight is missing": edit_weights(lambda state, first: state.pop(first)),
    "a weight has another shape": edit_weights(lambda state, first: state.update({first: state[first][:1].clone()})),
    "truncated weights": lambda folder: os.truncate(folder / WEIGHTS, 1000),
    "a list as its config": lambda folder: (folder / "config.json").write_text("[]"),
    "half a config": lambda folder: (folder / "config.json").write_text('{"a'),
    "a deep config": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "a scale that is text": edit_config(scaling_factor="x"),
    "a scale of nought": edit_config(scaling_factor=0),
    "a scale that is nan": edit_config(scaling_factor=float("nan")),
    "a shift that is text": edit_config(shift_factor="x"),
    "channels that are text": edit_config(latent_channels="1"),
    "no blocks": edit_config(block_out_channels=None),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_vae_is_refused(tmp_path, attack):
    folder = shutil.copytree(DEMO_VAE, tmp_path / "vae")
    ATTACKS[attack](folder)
    with pytest.raises(UserError, match=r"vae.name=.*vae"):
        load_vae(str(folder))


@pytest.mark.parametrize("content", [[1], {"model": 1}, {}])
def test_another_checkpoint_than_mars_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "kl16.ckpt")
    with pytest.raises(UserError, match=r"vae.weights=.*kl16.ckpt is not MAR's kl16.ckpt"):
        load_vae("mar", tmp_path / "kl16.ckpt")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_changed_byte_of_mars_checkpoint_is_refused(tmp_path, monkeypatch, share):
    file = tmp_path / "kl16.ckpt"
    monkeypatch.setattr(vae, "mar_autoencoder", lambda state: state)  # the real one has 260 MB
    torch.save({"model": {"a": torch.zeros(10_000)}}, file)
    flip_bit(file, int(share * file.stat().st_size))
    with pytest.raises(UserError, match=r"vae.weights=.*kl16.ckpt .* doesn't have its checksum; download it again"):
        load_vae("mar", file)


def test_mars_checkpoint_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    torch.save({"model": {}}, tmp_path / "kl16.ckpt")
    monkeypatch.setattr("zipfile.ZipFile", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"kl16.ckpt can't be read: Permission denied; ask its owner"):
        load_vae("mar", tmp_path / "kl16.ckpt")


def refuse(*_):
    raise PermissionError(errno.EACCES, "Permission denied")


class Trap:
    """Code that runs when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("form", ["mar", "diffusers"])
def test_code_in_a_vaes_weights_is_not_run(tmp_path, form):
    if form == "mar":
        torch.save({"model": Trap(tmp_path / "sprung")}, tmp_path / "kl16.ckpt")
        given = ("mar", tmp_path / "kl16.ckpt")
    else:  # weights that diffusers reads where there are no safetensors
        folder = shutil.copytree(DEMO_VAE, tmp_path / "vae", ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save({"x": Trap(tmp_path / "sprung")}, folder / "diffusion_pytorch_model.bin")
        given = (str(folder), None)
    with pytest.raises(UserError, match="is not MAR's|can't load"):
        load_vae(*given)
    assert not (tmp_path / "sprung").exists()
