import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowar.base.errors import UserError
from flowar.config.training import ConvertConfig
from flowar.export import convert_checkpoint
from flowar.models.build import convert_released, create_model, released_time_grid
from flowar.models.flowar.family import HubFlowAR
from flowar.models.flowar.generate import sample_latents
from flowar.models.flowar.loss import training_loss
from flowar.models.folders import load_model, save_model
from tests.conftest import load_vectors, randomise, released_state, tiny_config


@pytest.fixture(scope="module")
def released():
    return released_state(load_vectors("flowar_cross_attn"))


def test_converted_checkpoint_gives_the_same_outputs_bit_for_bit(released, tmp_path):
    torch.save(released, tmp_path / "FlowAR-tiny.pth")
    convert_checkpoint(ConvertConfig(checkpoint=str(tmp_path / "FlowAR-tiny.pth"), out_dir=str(tmp_path / "model")))
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"README.md", "model.safetensors", "config.json"}
    before, after = convert_released(released), load_model(tmp_path / "model")
    assert after.config == before.config
    latents, labels = torch.randn(2, 16, 16, 16), torch.tensor([3, 1000])
    time, noise = torch.rand(2, 5), torch.randn(2, 341, 16)
    assert torch.equal(
        training_loss(before, latents, labels, time, noise), training_loss(after, latents, labels, time, noise)
    )
    settings = {"time_grid": released_time_grid(4), "guidance": 2.0, "noise": noise}
    assert torch.equal(sample_latents(before, labels, **settings), sample_latents(after, labels, **settings))


def test_convert_does_not_overwrite_a_model(released, tmp_path):
    torch.save(released, tmp_path / "a.pth")
    config = ConvertConfig(checkpoint=str(tmp_path / "a.pth"), out_dir=str(tmp_path / "model"))
    convert_checkpoint(config)
    with pytest.raises(UserError, match="already exists; give another out_dir"):
        convert_checkpoint(config)


def test_averaged_weights_of_the_authors_trainer_are_preferred(released):
    raw = {name: tensor + 1 for name, tensor in released.items()}
    model = convert_released({"model": raw, "model_ema": released, "epoch": 3})
    assert torch.equal(model.ar.input_projection.bias, released["z_proj.bias"])
    assert torch.equal(convert_released({"model": raw}).ar.input_projection.bias, raw["z_proj.bias"])


def test_missing_and_unknown_keys_are_named(released):
    broken = dict(released)
    del broken["decoder_blocks.0.mlp.fc1_g.weight"]
    broken["decoder_blocks.0.mlp.fc9.weight"] = torch.zeros(1)
    expected = r"missing decoder_blocks\.0\.mlp\.fc1_g\.weight; unknown decoder_blocks\.0\.mlp\.fc9\.weight"
    with pytest.raises(UserError, match=expected):
        convert_released(broken)
    for needed in ("class_emb.weight", "encoder_pos_embed_learned", "flownet.input_proj.weight"):
        with pytest.raises(UserError, match=f"missing {needed}"):
            convert_released({name: tensor for name, tensor in released.items() if name != needed})
    with pytest.raises(UserError, match="missing encoder_pos_embed_learned; its keys are a, b"):
        convert_released({"a": torch.zeros(1), "b": torch.zeros(1)})


def test_heads_come_from_the_rotary_frequencies_or_are_asked_for(released):
    assert convert_released(released).config.ar_heads == 4
    bare = {name: tensor for name, tensor in released.items() if not name.endswith("rope.freqs") and name != "mask"}
    with pytest.raises(UserError, match=r"give ar_heads"):
        convert_released(bare)
    assert convert_released(bare, ar_heads=4).config.ar_heads == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a checkpoint", "is not a readable PyTorch checkpoint"), (None, "does not exist; download")],
)
def test_unreadable_checkpoints_are_one_clear_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert_checkpoint(ConvertConfig(checkpoint=str(tmp_path / "a.pth"), out_dir=str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    torch.save({"model": Trap()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="is not a readable PyTorch checkpoint"):
        convert_checkpoint(ConvertConfig(checkpoint=str(tmp_path / "a.pth"), out_dir=str(tmp_path / "model")))
    assert not (tmp_path / "sprung").exists()


def test_hub_mixin_saves_and_loads_the_same_folder(tmp_path):
    model = randomise(create_model(tiny_config()))
    model.save_pretrained(tmp_path / "hub")
    for loaded in (HubFlowAR.from_pretrained(tmp_path / "hub"), load_model(tmp_path / "hub")):
        assert loaded.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    save_model(model.config, model.state_dict(), tmp_path / "own")
    assert HubFlowAR.from_pretrained(tmp_path / "own").config == model.config


def test_create_model_takes_names_configs_and_overrides():
    model = create_model("flowar-demo", num_classes=3, ar_depth=2)
    assert (model.config.num_classes, model.config.ar_depth) == (3, 2)
    assert not model.training
    assert create_model(tiny_config()).config == tiny_config()
    with pytest.raises(UserError, match="did you mean flowar-s"):
        create_model("flowar_s")
    with pytest.raises(UserError, match="num_class is not a setting; did you mean num_classes"):
        create_model("flowar-demo", num_class=3)


def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json and no model.safetensors"):
        load_model(tmp_path)
    model = create_model(tiny_config())
    save_model(model.config, model.state_dict(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in state.items() if name != "ar.input_norm.weight"},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"missing ar\.input_norm\.weight"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="is damaged"):
        load_model(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    model = create_model(tiny_config())
    save_model(model.config, model.state_dict(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(tiny_config(num_classes=7))))
    with pytest.raises(UserError, match=r"ar\.class_embedding\.weight is \(6, 32\), needs \(8, 32\)"):
        load_model(tmp_path)


def test_an_interrupted_conversion_is_done_again(released, tmp_path):
    torch.save(released, tmp_path / "a.pth")
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "model.safetensors").write_bytes(b"half")
    convert_checkpoint(ConvertConfig(checkpoint=str(tmp_path / "a.pth"), out_dir=str(tmp_path / "model")))
    assert load_model(tmp_path / "model").config.ar_heads == 4
    assert not (tmp_path / "model.partial").exists()
