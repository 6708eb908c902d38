import zlib

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from flowar.digits import load_splits, to_model_range
from flowar.errors import UserError
from flowar.vae import DEMO_VAE, from_uint8, load_vae, mar_autoencoder, sample_posterior, to_uint8
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
    with pytest.raises(UserError, match="is for vae.name=mar only"):
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
