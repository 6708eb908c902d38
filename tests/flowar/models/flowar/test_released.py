"""Agreement with the authors' code on their test vectors (tests/data/README.md), in relative L2."""

import pytest
import torch

from flowar.models.build import convert_released, released_time_grid
from flowar.models.flowar.generate import sample_latents
from flowar.models.flowar.loss import training_loss
from flowar.models.flowar.released import released_name
from flowar.models.flowar.scales import training_inputs
from tests.conftest import load_vectors, released_state

TOLERANCE, SAMPLE_TOLERANCE = 2e-6, 1e-5
RUNS = {"s25": (25, 0.9, 4.3), "s50": (50, 0.7, 2.4), "s12": (12, 1.0, 1.5)}  # steps, guidance_high, guidance


@pytest.fixture(scope="module", params=["flowar_attn_mlp", "flowar_cross_attn"])
def vectors(request):
    return load_vectors(request.param)


@pytest.fixture(scope="module")
def model(vectors):
    return convert_released(released_state(vectors))


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_semantics(model, vectors):
    inputs = training_inputs(vectors["latents"], model.config.scales, 1)
    embedded = model.ar.embed(inputs, vectors["labels"], range(5))
    assert relative_error(embedded, vectors["train.ar_input"]) < TOLERANCE
    semantics, _ = model.ar(inputs, vectors["labels"], range(5))
    assert relative_error(semantics, vectors["train.semantics"]) < TOLERANCE


def test_loss_and_gradients(model, vectors):
    model.zero_grad()
    loss = training_loss(model, vectors["latents"], vectors["labels"], vectors["train.time"].T, vectors["train.noise"])
    assert relative_error(loss, vectors["train.loss"]) < TOLERANCE
    loss.backward()
    found = {released_name(name): p.grad.norm() for name, p in model.named_parameters()}
    prefix = "train.grad_norm."
    expected = {name.removeprefix(prefix): value for name, value in vectors.items() if name.startswith(prefix)}
    assert expected
    for name, value in expected.items():
        assert relative_error(found[name], value) < TOLERANCE, name


def test_velocity(model, vectors):
    semantics = vectors["train.semantics"][:, 21:85]
    with torch.no_grad():
        velocity = model.flow(vectors["velocity.x"], vectors["velocity.t"][:, None], semantics, range(3, 4))
    assert relative_error(velocity, vectors["velocity.out"]) < TOLERANCE


@pytest.mark.parametrize("run", RUNS)
def test_samples(model, vectors, run):
    steps, high, guidance = RUNS[run]
    latents = sample_latents(
        model,
        vectors["labels"],
        time_grid=released_time_grid(steps),
        guidance=guidance,
        guidance_interval=(0.0, high),
        noise=vectors[f"sample.{run}.noise"],
    )
    assert relative_error(latents, vectors[f"sample.{run}.latents"]) < SAMPLE_TOLERANCE
