import pytest
import torch

from flowar.models.flowar.loss import interpolate, per_token, scale_losses, scale_weights, training_loss
from flowar.models.flowar.model import FlowAR
from flowar.models.flowar.scales import pack
from tests.conftest import randomise, tiny_config

SCALES = (1, 2, 4)


def test_the_path_starts_at_the_data_and_ends_at_the_noise():
    tokens, noise = torch.randn(2, 2, 5, 3).unbind(0)
    assert torch.equal(interpolate(tokens, noise, torch.zeros(2, 5)), tokens)
    assert torch.equal(interpolate(tokens, noise, torch.ones(2, 5)), noise)
    torch.testing.assert_close(interpolate(tokens, noise, torch.full((2, 5), 0.5)), (tokens + noise) / 2)


def test_a_perfect_velocity_has_no_loss_and_none_at_all_has_that_of_its_target():
    latents, labels, time, noise = (
        torch.randn(2, 3, 4, 4),
        torch.tensor([0, 1]),
        torch.rand(2, 3),
        torch.randn(2, 21, 3),
    )
    target = noise - pack(latents, SCALES, 1)
    arguments = {"time": time, "noise": noise}
    perfect = scale_losses(lambda *_: target, tiny_config(), latents, labels, **arguments)
    torch.testing.assert_close(perfect, torch.zeros(3))
    nothing = scale_losses(lambda *_: torch.zeros_like(target), tiny_config(), latents, labels, **arguments)
    torch.testing.assert_close(nothing, torch.stack([part.square().mean() for part in target.split([1, 4, 16], dim=1)]))


def test_the_model_sees_every_scale_at_its_own_time():
    latents, labels, noise = torch.randn(2, 3, 4, 4), torch.tensor([0, 1]), torch.randn(2, 21, 3)
    time = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
    seen = {}

    def velocity(inputs, labels, noisy, time):
        seen["noisy"] = noisy
        return noisy

    scale_losses(velocity, tiny_config(), latents, labels, time=time, noise=noise)
    tokens = pack(latents, SCALES, 1)
    assert torch.equal(seen["noisy"][0, 0], tokens[0, 0])
    assert torch.equal(seen["noisy"][0, 5:], noise[0, 5:])
    assert torch.equal(seen["noisy"][1, 1:5], tokens[1, 1:5])


def test_scales_weigh_by_their_share_of_the_finest_one():
    assert scale_weights((1, 2, 4, 8, 16)) == (1 / 256, 4 / 256, 16 / 256, 64 / 256, 1)


def test_per_token_repeats_each_scale():
    assert per_token(torch.tensor([[1.0, 2.0]]), (1, 2)).tolist() == [[1, 2, 2, 2, 2]]


def test_training_loss_draws_what_is_not_given_and_refuses_other_shapes():
    model = randomise(FlowAR(tiny_config())).eval()
    latents, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 5])
    assert training_loss(model, latents, labels).isfinite()
    torch.manual_seed(1)
    first = training_loss(model, latents, labels)
    torch.manual_seed(1)
    assert torch.equal(first, training_loss(model, latents, labels))
    with pytest.raises(ValueError, match=r"latents has shape \(2, 3, 8, 8\).*\(2, 3, 4, 4\)"):
        training_loss(model, torch.randn(2, 3, 8, 8), labels)
    with pytest.raises(ValueError, match=r"noise has shape"):
        training_loss(model, latents, labels, noise=torch.randn(2, 20, 3))
