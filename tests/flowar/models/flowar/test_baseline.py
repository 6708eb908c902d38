"""The plain baseline against the authors' test vectors, and the model against the baseline."""

import pytest
import torch

from flowar.config.drawing import DrawConfig
from flowar.models.build import convert_released, create_model, family_of
from flowar.models.family import weigh
from flowar.models.flowar import baseline
from flowar.models.flowar.released import RELEASED_SCALES, convert
from tests.conftest import load_vectors, randomise, released_state, tiny_config

BLOCKS = ["attn_mlp", "attn_cross_mlp"]
TOLERANCE, SAMPLE_TOLERANCE = 2e-6, 1e-5  # relative L2, as against the authors


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def no_noise(shape):
    raise AssertionError(f"Euler's method asked for noise of {shape}")


def gradients(model, forward_losses, latents, labels, draws):
    """Return the loss, and its gradients by name."""
    model.zero_grad()
    family = family_of(model.config)
    loss = weigh(forward_losses(model, model.config, latents, labels, draws), family.loss_terms(model.config).values())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["flowar_attn_mlp", "flowar_cross_attn"])
def test_the_baseline_computes_what_the_authors_code_does(name):
    vectors = load_vectors(name)
    state = released_state(vectors)
    config, _ = convert(state)
    model = baseline.create(config)
    model.load_state_dict(state)  # strictly: mask and rotary frequencies are there too
    draws = {"time": vectors["train.time"].T, "noise": vectors["train.noise"]}
    loss, found = gradients(model, baseline.losses, vectors["latents"], vectors["labels"], draws)
    assert relative_error(loss, vectors["train.loss"]) < TOLERANCE
    for key, value in vectors.items():
        if key.startswith("train.grad_norm."):
            assert relative_error(found[key.removeprefix("train.grad_norm.")].norm(), value) < TOLERANCE, key
    how = DrawConfig(num_steps=12, guidance=1.5, guidance_interval=(0.0, 1.0))
    *_, latents = baseline.generate(model, vectors["labels"], vectors["sample.s12.noise"], how, no_noise)
    assert relative_error(latents, vectors["sample.s12.latents"]) < SAMPLE_TOLERANCE


@pytest.fixture(scope="module", params=BLOCKS)
def pair(request):
    """The baseline and the model with the same random weights."""
    config = tiny_config(
        scales=RELEASED_SCALES, latent_channels=4, flow_block=request.param, flow_width=64, flow_heads=1
    )
    plain = randomise(baseline.create(config)).eval()
    return plain, convert_released(plain.state_dict())


@pytest.fixture
def batch(pair):
    config = pair[0].config
    generator = torch.Generator().manual_seed(1)
    draws = [family_of(config).draw(config, generator) for _ in range(2)]
    latents = torch.randn(2, *config.latent_shape, generator=generator)
    return (
        latents,
        torch.tensor([3, config.num_classes]),
        {name: torch.stack([each[name] for each in draws]) for name in draws[0]},
    )


def test_the_model_has_the_baselines_loss_and_gradients(pair, batch):
    plain, model = pair
    family = family_of(model.config)
    expected_loss, expected = gradients(plain, baseline.losses, *batch)
    loss, found = gradients(model, family.losses, *batch)
    assert relative_error(loss, expected_loss) < TOLERANCE
    _, expected = convert(plain.state_dict() | expected)  # gradients under the model's names
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("guidance", [1.0, 2.4])
def test_the_model_draws_the_baselines_latents(pair, batch, guidance):
    plain, model = pair
    how = DrawConfig(num_steps=6, guidance=guidance, guidance_interval=(0.0, 0.9))
    labels = torch.tensor([0, 4])
    expected = baseline.generate(plain, labels, batch[2]["noise"], how, no_noise)
    found = family_of(model.config).generate(model, labels, batch[2]["noise"], how, no_noise)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < SAMPLE_TOLERANCE


def test_a_fresh_model_loads_what_a_baseline_has():
    plain = baseline.create(tiny_config(scales=RELEASED_SCALES, flow_width=64, flow_heads=1))
    model = convert_released(plain.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert create_model(model.config).state_dict().keys() == model.state_dict().keys()
