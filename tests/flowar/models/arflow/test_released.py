"""Agreement with the authors' code on their test vectors (tests/data/README.md), in relative L2."""

import pytest
import torch

from flowar.models.arflow.generate import GuidedVelocity, released_time_grid, sample_latents
from flowar.models.arflow.linear_attention import attend_across_images
from flowar.models.arflow.loss import training_loss
from flowar.models.arflow.model import ARFlow, position_table
from flowar.models.arflow.released import convert, released_parameter
from flowar.models.state_dicts import load_strictly
from tests.conftest import load_vectors, released_state

TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE, GATE_TOLERANCE = 2e-6, 1e-6, 5e-6, 1e-5
STEPS = 6


@pytest.fixture(scope="module", params=["A", "B"])
def vectors(request):
    prefix = f"{request.param}."
    found = {name.removeprefix(prefix): v for name, v in load_vectors("arflow_golden").items() if name[:2] == prefix}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


@pytest.fixture(scope="module")
def model(vectors):
    config, weights = convert(released_state(vectors))
    model = ARFlow(config).eval()
    load_strictly(model, weights, "the vectors")
    return model


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def heads_of_images(tensor):
    """Return the vectors' (B, H, S N, ...) as (B, S, H, N, ...)."""
    return tensor.unflatten(2, (-1, 16)).transpose(1, 2)


def test_attention_core(vectors):
    given = [heads_of_images(vectors[f"kernel.{name}"]) for name in "qkvg"]
    attended, _ = attend_across_images(*given, None, "running")
    assert relative_error(attended, heads_of_images(vectors["kernel.out"])) < TOLERANCE
    first = [part[:, :1] for part in given]
    attended, memory = attend_across_images(*first, vectors["kernel.state_in"], "running")
    assert relative_error(attended[:, 0], vectors["kernel.step_out"]) < TOLERANCE
    assert relative_error(memory, vectors["kernel.state_out"]) < TOLERANCE


def test_positions(model, vectors):
    assert torch.equal(position_table(4, model.config.width), vectors["state.pos_embed"][0])


def test_velocity_of_a_sequence(model, vectors):
    with torch.no_grad():
        velocity, state = model(vectors["train.xt"], 1 - vectors["train.t"], vectors["train.labels"])
    assert relative_error(-velocity, vectors["train.velocity"]) < TOLERANCE
    for block, memory in enumerate(state.memories):
        assert relative_error(memory, vectors[f"step.state2.block{block}"]) < TOLERANCE


def test_velocity_and_states_image_by_image(model, vectors):
    state, velocities = None, []
    noisy, time, labels = vectors["train.xt"], 1 - vectors["train.t"], vectors["train.labels"]
    for image in range(3):
        with torch.no_grad():
            velocity, state = model(noisy[:, image, None], time[:, image, None], labels, state)
        velocities.append(-velocity)
        for block, memory in enumerate(state.memories if image != 1 else ()):
            assert relative_error(memory, vectors[f"step.state{image}.block{block}"]) < TOLERANCE
    assert relative_error(torch.cat(velocities, dim=1), vectors["step.velocity"]) < TOLERANCE


def test_loss_and_gradients(model, vectors):
    model.zero_grad()
    time = 1 - vectors["train.t"]
    assert torch.equal(vectors["train.u"].sort(dim=1).values, vectors["train.t"])
    loss = training_loss(model, vectors["train.latents"], vectors["train.labels"], time, vectors["train.noise"])
    assert relative_error(loss, vectors["train.loss"].mean()) < LOSS_TOLERANCE
    loss.backward()
    found = {released_parameter(name): p.grad for name, p in model.named_parameters()}
    norms = dict(zip(sorted(found), vectors["train.grad_norms"], strict=True))
    for name, expected in norms.items():
        tolerance = GATE_TOLERANCE if ".gt_proj." in name else GRADIENT_TOLERANCE
        assert relative_error(found[name].double().norm(), expected) < tolerance, name
    prefix = "train.grad."
    whole = {name.removeprefix(prefix): value for name, value in vectors.items() if name.startswith(prefix)}
    assert len(whole) == 6
    for name, expected in whole.items():
        tolerance = GATE_TOLERANCE if ".gt_proj." in name else GRADIENT_TOLERANCE
        assert relative_error(found[name], expected) < tolerance, name


@torch.no_grad()
def test_guided_velocity(model, vectors):
    labels, noisy, time = vectors["guided.labels"][:2], vectors["guided.x"][:2, 0], vectors["guided.t"][0, 0].item()
    assert (vectors["guided.t"] == time).all()
    velocity = GuidedVelocity(model, labels, 1.5, (0.0, 1.0), guided_channels=3)
    assert relative_error(-velocity(noisy, 1 - time), vectors["guided.velocity"][:2, 0]) < TOLERANCE


@pytest.mark.parametrize(("run", "guidance"), [("sample", 1.0), ("sample_cfg", 1.5)])
def test_samples(model, vectors, run, guidance):
    labels = vectors[f"{run}.labels"][:2]
    step_noise = iter(vectors[f"{run}.noise"][:, :2])
    latents = sample_latents(
        model,
        labels,
        time_grid=released_time_grid(STEPS),
        guidance=guidance,
        noise=vectors[f"{run}.init"][:2],
        draw_noise=lambda shape: next(step_noise),
    )
    assert next(step_noise, None) is None
    assert relative_error(latents, vectors[f"{run}.trajectory"][-1, :2]) < TOLERANCE
