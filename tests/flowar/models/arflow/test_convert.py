"""The authors' checkpoints of ARFlow: told by their names, refused by name, converted from a file."""

import argparse

import pytest
import torch

from flowar import export
from flowar.base.errors import UserError
from flowar.config.training import ConvertConfig
from flowar.models.build import convert_released, released_time_grid
from flowar.models.folders import load_model
from tests.conftest import load_vectors, released_state


def released(prefix="A"):
    vectors = {name[2:]: tensor for name, tensor in load_vectors("arflow_golden").items() if name[0] == prefix}
    return {name: tensor.float() for name, tensor in released_state(vectors).items()}


def test_released_checkpoints_are_told_by_their_names():
    state = released()
    model = convert_released({"model": {"x": 1}, "ema": state, "opt": {}})
    config = model.config
    assert (config.family, config.heads, config.patch_size, config.num_classes, config.latent_size, config.depth) == (
        "arflow", 2, 2, 10, 8, 2,
    )  # fmt: skip
    bare = {name: tensor for name, tensor in state.items() if not name.endswith("k_proj.weight")}
    attacks = {
        r"missing blocks\.0\.attn\.k_proj\.weight": bare,
        "unknown other": state | {"other": torch.ones(1)},
        "not finite": state | {"x_embedder.proj.bias": torch.full((128,), float("nan"))},
        "is a int, but a tensor": state | {"x_embedder.proj.bias": 1},
        "fixed sine-cosine table": state | {"pos_embed": state["pos_embed"] + 1},
        "square number": state | {"pos_embed": torch.ones(1, 15, 128)},
        "without a gap": {name.replace("blocks.0.", "blocks.7."): tensor for name, tensor in state.items()},
        "3 dimensions above 0 are needed": state | {"pos_embed": torch.ones(16)},
        "1 shapes differ": state | {"x_embedder.proj.bias": torch.ones(1)},
        "nor is it a released ARFlow": {"a": torch.ones(1)},
    }
    for message, broken in attacks.items():
        with pytest.raises(UserError, match=message):
            convert_released(broken)
    with pytest.raises(UserError, match="ar_heads=3 is a setting of FlowAR"):
        convert_released(state, ar_heads=3)
    with pytest.raises(UserError, match="family=arflov is unknown; did you mean arflow"):
        released_time_grid(9, "arflov")


def test_a_checkpoint_of_the_authors_trainer_with_its_options_becomes_a_model_folder(tmp_path):
    file = tmp_path / "0400000.pt"
    options = argparse.Namespace(model="ARFlow-XL/2", global_batch_size=8)
    torch.save({"model": released("B"), "ema": released(), "opt": {"state": {}}, "args": options}, file)
    export.convert_checkpoint(ConvertConfig(checkpoint=str(file), out_dir=str(tmp_path / "model")))
    loaded, expected = load_model(tmp_path / "model"), convert_released(released())
    assert loaded.config == expected.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
