"""The diffusers pipeline: the same latents as the sampler's, bit for bit, however it is loaded."""

import dataclasses
import json
import shutil

import diffusers
import pytest
import torch

from flowar import FlowARPipeline, load_model, load_vae, pipeline, released_time_grid, sample_latents
from flowar.base.errors import UserError
from flowar.models.build import create_model
from flowar.models.folders import save_model
from tests.conftest import arflow_training, randomise, training

LABELS = [0, 1, 1]


def save_untrained(config, shards, folder):
    """Write a model folder with random weights, and the passport of its dataset."""
    model = randomise(create_model(config))
    save_model(model.config, model.state_dict(), folder)
    shutil.copy(shards / "dataset.json", folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    return save_untrained(training(shards, folder).model, shards, folder)


@pytest.fixture(scope="module")
def saved(model_folder):
    """A folder that the pipeline wrote."""
    folder = model_folder.parent / "saved"
    FlowARPipeline.from_pretrained(model_folder).save_pretrained(folder)
    return folder


def draw(pipe, **settings):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    return pipe(LABELS, num_inference_steps=4, guidance_scale=2.0, generator=generator, **settings).images


@pytest.fixture(scope="module")
def expected(model_folder):
    """What the sampler gives for the same noise."""
    return sample_latents(
        load_model(model_folder), torch.tensor(LABELS), time_grid=released_time_grid(4), guidance=2.0,
        guidance_interval=(0.0, 0.9), generator=torch.Generator().manual_seed(7),
    )  # fmt: skip


def test_latents_are_those_of_the_sampler_from_a_model_folder_and_from_a_saved_pipeline(model_folder, saved, expected):
    for folder in (model_folder, saved):
        assert torch.equal(draw(FlowARPipeline.from_pretrained(folder), output_type="latent"), expected)


def test_diffusers_itself_loads_what_it_saved(saved, expected):
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved, custom_pipeline=pipeline.__file__, trust_remote_code=True)
    assert torch.equal(draw(pipe, output_type="latent"), expected)
    assert set(pipe.components) == {"model", "tokenizer"} and pipe.to("cpu").device == torch.device("cpu")


def test_images_are_the_decoded_latents_in_every_form(saved, expected):
    pipe = FlowARPipeline.from_pretrained(saved)
    pixels = draw(pipe, output_type="pt")
    with torch.no_grad():
        decoded = load_vae("demo").decode(expected)
    torch.testing.assert_close(pixels, (decoded / 2 + 0.5).clamp(0, 1))
    pictures = draw(pipe)
    assert len(pictures) == len(LABELS) and pictures[0].size == (pixels.shape[3], pixels.shape[2])
    assert draw(pipe, output_type="np").shape == (len(LABELS), *pixels.shape[2:], 3)


def test_classes_go_by_name_and_each_scale_is_told(saved, expected):
    pipe = FlowARPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    told = []
    generator = torch.Generator().manual_seed(7)
    found = pipe(
        ["dark", "light", "1"], num_inference_steps=4, guidance_scale=2.0, generator=generator, output_type="latent",
        callback_on_step_end=lambda pipe, stage, side, tensors: told.append((stage, side, tensors["latents"])),
    ).images  # fmt: skip
    assert torch.equal(found, expected) and torch.equal(told[-1][2], expected)
    scales, patch = pipe.model.model.config.scales, pipe.model.model.config.patch_size
    assert [(stage, side) for stage, side, _ in told] == [(i, side * patch) for i, side in enumerate(scales)]


def test_the_other_family_draws_the_same_way(shards, tmp_path):
    folder = save_untrained(arflow_training(shards, tmp_path).model, shards, tmp_path / "model")
    FlowARPipeline.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    model, settings = load_model(folder), {"guidance": 2.0, "guidance_interval": (0.0, 0.9)}
    expected = sample_latents(
        model, torch.tensor(LABELS), time_grid=released_time_grid(4, "arflow"),
        generator=torch.Generator().manual_seed(7), **settings,
    )  # fmt: skip
    assert torch.equal(draw(FlowARPipeline.from_pretrained(tmp_path / "saved"), output_type="latent"), expected)


def test_what_does_not_fit_is_refused_by_name_and_runs_no_code(saved, shards, tmp_path):
    pipe = FlowARPipeline.from_pretrained(saved)
    for arguments, message in (
        ({"class_labels": 9}, "class_labels holds 9; the model has classes 0 to 1"),
        ({"class_labels": "cat"}, "classes=cat is no"),
        ({"class_labels": 0, "output_type": "gif"}, "output_type='gif' is unknown; choose one of pil"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(**arguments)
    index = json.loads((saved / "model_index.json").read_text())
    shutil.copytree(saved, tmp_path / "hostile")
    (tmp_path / "hostile" / "model_index.json").write_text(json.dumps(index | {"model": ["os", "system"]}))
    with pytest.raises(UserError, match="names other components"):
        FlowARPipeline.from_pretrained(tmp_path / "hostile")
    config = dataclasses.replace(training(shards, tmp_path).model, latent_channels=3)
    with pytest.raises(UserError, match="makes latents of 3 channels, but VAE demo decodes 1"):
        FlowARPipeline.from_pretrained(save_untrained(config, shards, tmp_path / "other"))
