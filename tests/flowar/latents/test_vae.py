import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE

from flowar.base.errors import UserError
from flowar.evaluation.demo_images import load_splits, to_model_range
from flowar.latents.ldm import ldm_shape
from flowar.latents.schema import LatentScale
from flowar.latents.vae import DEMO_VAE, MAR_CONFIG, from_uint8, load_vae, mar_autoencoder, sample_posterior, to_uint8
from tests.conftest import DATA, load_vectors


@pytest.fixture(scope="module")
def mar_weights():
    """The original MAR-VAE's weights, drawn as the vectors' README says."""
    state = {}
    for line in (DATA / "mar_vae_keys.txt").read_text().splitlines():
        key, shape = line.split()
        shape = tuple(int(size) for size in shape.split("x"))
        values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
        if key.endswith(".bias"):
            values *= 0.02
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        else:
            values /= np.sqrt(np.prod(shape[1:]))
        state[key] = torch.from_numpy(values)
    return state


@pytest.fixture(scope="module")
def mar(mar_weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("mar") / "kl16.ckpt"
    torch.save({"model": mar_weights}, file)
    return load_vae("mar", file)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_mar_vae_agrees_with_the_original(mar):
    vectors = load_vectors("mar_vae")
    with torch.no_grad():
        assert relative_error(mar.encode(vectors["image"]), vectors["moments"]) < 1e-4
        assert relative_error(mar.decode(vectors["z"] * mar.latent_multiplier), vectors["decoded"]) < 1e-4
    assert (mar.latent_multiplier, mar.latent_channels, mar.stride) == (0.2325, 16, 16)


def test_mar_weights_with_a_missing_key_are_refused(mar_weights, tmp_path):
    broken = {key: value for key, value in mar_weights.items() if key != "decoder.conv_in.bias"}
    with pytest.raises(RuntimeError, match="decoder.conv_in.bias"):
        mar_autoencoder(broken)
    torch.save({"model": broken}, tmp_path / "kl16.ckpt")
    with pytest.raises(UserError, match=r"is not MAR's kl16.ckpt: .*decoder.conv_in.bias"):
        load_vae("mar", tmp_path / "kl16.ckpt")


def test_missing_weights_name_the_file_to_get(tmp_path):
    with pytest.raises(UserError, match="needs the file kl16.ckpt"):
        load_vae("mar")
    with pytest.raises(UserError, match="needs the file kl16.ckpt, got vae.weights=/none"):
        load_vae("mar", "/none")
    with pytest.raises(UserError, match="is for vae.name=mar or ldm only"):
        load_vae("demo", "/none")
    with pytest.raises(
        UserError, match=r"can't load vae.name=.*copy config.json and diffusion_pytorch_model.safetensors"
    ):
        load_vae(str(tmp_path))


def test_demo_vae_rebuilds_held_out_digits():
    vae = load_vae("demo")
    images = to_model_range(load_splits()["held_out"][0][:64])
    with torch.no_grad():
        mean, _ = vae.encode(images).chunk(2, dim=1)
        rebuilt = vae.decode(mean * vae.latent_multiplier)
    psnr = 10 * torch.log10(4 / (rebuilt - images).square().mean())
    assert psnr > 28
    assert sum(file.stat().st_size for file in DEMO_VAE.iterdir()) <= 2_000_000


def test_moments_are_those_of_diffusers_and_decode_undoes_the_multiplier():
    vae, plain = load_vae("demo"), AutoencoderKL.from_pretrained(DEMO_VAE, low_cpu_mem_usage=False)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        moments = vae.encode(images)
        assert torch.equal(moments, plain.encode(images).latent_dist.parameters)
        latents = sample_posterior(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]), vae.latent_multiplier)
        expected = plain.decode(plain.encode(images).latent_dist.mean).sample
        torch.testing.assert_close(vae.decode(latents), expected, rtol=1e-4, atol=1e-5)


def small_sd_vae(folder, **changes):
    """Save an autoencoder of Stable Diffusion's shape, narrower and with random weights, in diffusers' layout."""
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    }
    AutoencoderKL(**(settings | changes)).save_pretrained(folder)
    return folder


def small_dc_ae(folder):
    """Save an autoencoder of DC-AE f32c32's shape, narrower and with random weights, in diffusers' layout."""
    torch.manual_seed(0)
    depths = (1, 1, 1, 1, 1, 1)
    widths = (16, 16, 32, 32, 64, 64)
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    AutoencoderDC(
        latent_channels=32,
        attention_head_dim=16,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=depths,
        decoder_layers_per_block=depths,
        scaling_factor=0.3189,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shift", [None, 0.5])
def test_sd_vaes_encode_and_decode_as_diffusers_alone_does(tmp_path, shift):
    vae = load_vae(str(small_sd_vae(tmp_path, shift_factor=shift)))
    plain = AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        posterior = plain.encode(images).latent_dist
        moments = vae.encode(images)
        mean, log_variance = moments.chunk(2, dim=1)
        torch.testing.assert_close(mean, posterior.mean - (shift or 0))
        torch.testing.assert_close(log_variance, posterior.logvar)
        noise = torch.randn_like(mean)
        latents = sample_posterior(moments, noise, vae.latent_multiplier)
        torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise - (shift or 0)) * 0.18215)
        expected = plain.decode(posterior.mean + posterior.std * noise).sample
        torch.testing.assert_close(vae.decode(latents), expected, rtol=1e-4, atol=1e-5)
    assert (vae.stride, vae.latent_channels, vae.latent_shift) == (8, 4, shift or 0)


def test_dc_ae_encodes_and_decodes_as_diffusers_alone_does_and_its_noise_counts_for_nothing(tmp_path):
    vae = load_vae(str(small_dc_ae(tmp_path)))
    plain = AutoencoderDC.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        encoded = plain.encode(images).latent
        moments = vae.encode(images)
        assert moments.shape == (2, 64, 2, 2)
        latents = sample_posterior(moments, torch.randn_like(encoded), vae.latent_multiplier)
        torch.testing.assert_close(latents, encoded * 0.3189, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vae.decode(latents), plain.decode(encoded).sample, rtol=1e-4, atol=1e-5)
    assert (vae.stride, vae.latent_channels) == (32, 32)


def small_rae(folder):
    """Save a representation autoencoder, small and with random weights, in diffusers' layout."""
    torch.manual_seed(0)
    AutoencoderRAE(
        encoder_type="mae",
        encoder_hidden_size=64,
        encoder_patch_size=16,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        patch_size=16,
        encoder_input_size=64,
        latents_mean=torch.full((64, 1, 1), 0.5),
        latents_std=torch.full((64, 1, 1), 2.0),
    ).save_pretrained(folder)
    return folder


def test_a_frozen_encoder_with_its_decoder_encodes_and_decodes_as_diffusers_alone_does(tmp_path):
    vae = load_vae(str(small_rae(tmp_path)))
    plain = AutoencoderRAE.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        encoded = plain.encode((images + 1) / 2).latent
        mean, _ = vae.encode(images).chunk(2, dim=1)
        torch.testing.assert_close(mean, encoded)
        torch.testing.assert_close(vae.decode(encoded), plain.decode(encoded).sample * 2 - 1)
    assert (vae.stride, vae.latent_channels, vae.image_size, mean.shape[-1]) == (16, 64, 64, 4)


@pytest.mark.parametrize("key", ["state_dict", None])
def test_any_autoencoder_in_the_layout_of_latent_diffusion_is_read_with_its_own_shape(mar_weights, tmp_path, key):
    """VA-VAE's file: MAR's layout with 32 channels, and a projection that only its training needed."""
    wider = dict(mar_weights)
    for name, dims in {
        "encoder.conv_out": (0,),
        "quant_conv": (0, 1),
        "post_quant_conv": (0, 1),
        "decoder.conv_in": (1,),
    }.items():
        for dim in dims:
            wider[f"{name}.weight"] = torch.cat([wider[f"{name}.weight"]] * 2, dim)
        if 0 in dims:
            wider[f"{name}.bias"] = torch.cat([wider[f"{name}.bias"]] * 2)
    content = wider | {"linear_proj.weight": torch.zeros(1024, 32, 1, 1)}
    torch.save({key: content, "global_step": 7} if key else content, tmp_path / "vavae.pt")
    vae = load_vae("ldm", tmp_path / "vavae.pt")
    assert (vae.stride, vae.latent_channels, vae.latent_multiplier) == (16, 32, 1.0)
    with torch.no_grad():
        assert vae.decode(torch.zeros(1, 32, 2, 2)).shape == (1, 3, 32, 32)


def test_the_shape_that_is_read_from_mars_weights_is_mars(mar_weights):
    assert ldm_shape(mar_weights) | {"scaling_factor": 0.2325} == MAR_CONFIG | {
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }


def test_a_file_of_something_else_is_not_an_ldm_autoencoder(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"vae.weights=.*a.pt can't be used as vae.name=ldm: it has no autoencoder"):
        load_vae("ldm", tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"vae.name=ldm needs a file of weights, got vae.weights=None"):
        load_vae("ldm")


def test_pixels_come_back_as_they_are():
    vae, images = load_vae("pixels"), torch.rand(2, 3, 8, 8) * 2 - 1
    latents = sample_posterior(vae.encode(images), torch.randn(2, 3, 8, 8), vae.latent_multiplier)
    torch.testing.assert_close(vae.decode(latents), images, atol=1e-5, rtol=0)
    assert (vae.stride, vae.latent_channels) == (1, 3)


def test_the_mean_and_std_of_each_channel_bring_latents_to_unit_std_and_back():
    vae = load_vae("pixels")
    images = torch.randn(8, 3, 32, 32) * torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1) + torch.tensor(
        [0.3, 0.0, -0.3]
    ).view(3, 1, 1)
    vae.latent_scale = LatentScale((10.0, 5.0, 1 / 0.3), (0.3, 0.0, -0.3))
    latents = sample_posterior(vae.encode(images), torch.zeros(8, 3, 32, 32), vae.latent_scale)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(3), atol=0.05, rtol=0)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=0.05, rtol=0)
    torch.testing.assert_close(vae.decode(latents), images)


@pytest.mark.parametrize("make", [small_sd_vae, small_dc_ae, small_rae, lambda folder: "pixels"])
def test_a_dataset_can_be_prepared_with_any_of_them(make, image_folder, tmp_path):
    from data_prep import check, encode
    from flowar.config.data import CheckConfig, PrepareConfig, VAEConfig

    vae = VAEConfig(name=str(make(tmp_path / "vae")))
    encode.main(
        PrepareConfig(images=str(image_folder), out_dir=str(tmp_path / "out"), vae=vae, image_size=64, num_workers=0)
    )
    check.main(CheckConfig(path=str(tmp_path / "out"), num_images=8))


def test_another_kind_of_autoencoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(
        UserError, match=r"is a VQModel, but one of AutoencoderKL, AutoencoderDC, AutoencoderRAE is needed"
    ):
        load_vae(str(tmp_path))


@pytest.mark.slow
def test_weights_that_are_neither_here_nor_at_the_hub_are_named_with_what_to_do(tmp_path, image_folder):
    words = [f"images={image_folder}", f"out_dir={tmp_path / 'out'}", "vae.name=sd-vae-ft-ema"]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "flowar", "prepare", *words], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 1 and "can't load vae.name=sd-vae-ft-ema: " in found.stderr
    needed = "copy config.json and diffusion_pytorch_model.safetensors from huggingface.co/stabilityai/sd-vae-ft-ema"
    assert needed in found.stderr.splitlines()[-1]


def test_posterior_samples_have_the_moments_mean_and_std():
    mean, log_variance = torch.full((1, 2, 64, 64), 3.0), torch.full((1, 2, 64, 64), -2.0)
    latents = sample_posterior(torch.cat([mean, log_variance], dim=1), torch.randn(1, 2, 64, 64), 0.5)
    assert latents.mean().item() == pytest.approx(1.5, abs=0.02)
    assert latents.std().item() == pytest.approx(0.5 * np.exp(-1), rel=0.03)


def test_pixels_survive_the_round_trip_and_are_rounded_and_clipped():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(pixels)), pixels)
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.003, 1.0, 2.0])).tolist() == [0, 0, 128, 128, 255, 255]


def test_the_hash_tells_weights_apart_but_not_where_they_lie(tmp_path):
    vae = load_vae("demo")
    vae.autoencoder.save_pretrained(tmp_path)
    copied = load_vae(str(tmp_path))
    assert copied.weights_sha256 == vae.weights_sha256
    changed = load_vae("demo")
    with torch.no_grad():
        next(changed.autoencoder.parameters()).view(-1)[0] += 1e-3
    assert changed.weights_sha256 != vae.weights_sha256
