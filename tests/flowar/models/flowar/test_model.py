import importlib.util

import pytest
import torch

from flowar.base.errors import UserError
from flowar.config.models import MODEL_VARIANTS
from flowar.models.flowar.model import FlowAR
from flowar.models.flowar.scales import num_tokens, token_offsets, training_inputs
from flowar.models.layers import set_attention
from tests.conftest import randomise, tiny_config

PARAMETERS_MILLION = {  # counted from the authors' code
    "flowar-s": 171.7,
    "flowar-b": 289.8,
    "flowar-l": 586.9,
    "flowar-h": 1913.3,
    "flowar-h-paper": 2054.9,
}
BLOCKS = ["attn_mlp", "attn_cross_mlp"]


def make(**changes):
    return randomise(FlowAR(tiny_config(**changes))).eval()


@pytest.mark.parametrize(("name", "million"), PARAMETERS_MILLION.items())
def test_parameter_counts_are_those_of_the_authors(name, million):
    with torch.device("meta"):
        model = FlowAR(MODEL_VARIANTS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million, abs=0.1)


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_semantics_ignore_finer_scales(scale):
    model = make()
    end = token_offsets(model.config.scales)[scale + 1]
    inputs = torch.randn(2, num_tokens(model.config.scales) - 1, 3)
    changed = inputs.clone()
    changed[:, end - 1 :] += 1  # the inputs lack the class token
    labels = torch.tensor([0, 4])
    semantics, _ = model.ar(inputs, labels, range(3))
    semantics_changed, _ = model.ar(changed, labels, range(3))
    assert torch.equal(semantics[:, :end], semantics_changed[:, :end])
    if scale < 2:
        assert not torch.allclose(semantics[:, end:], semantics_changed[:, end:])


def test_semantics_see_all_coarser_scales():
    model = make()
    inputs = torch.randn(2, num_tokens(model.config.scales) - 1, 3)
    changed = inputs.clone()
    changed[:, 0] += 1  # a token of the second scale
    labels = torch.tensor([0, 4])
    last = slice(5, None)
    assert not torch.allclose(
        model.ar(inputs, labels, range(3))[0][:, last], model.ar(changed, labels, range(3))[0][:, last]
    )


def test_cached_generation_equals_full_forward():
    model = make()
    latents, labels = torch.randn(2, 3, 4, 4), torch.tensor([1, 5])
    inputs = training_inputs(latents, model.config.scales, 1)
    full, _ = model.ar(inputs, labels, range(3))
    cache, parts = None, []
    offsets = token_offsets(model.config.scales)
    for k in range(3):
        own = inputs[:, offsets[k] - 1 : offsets[k + 1] - 1] if k else inputs[:, :0]
        part, cache = model.ar(own, labels, range(k, k + 1), cache)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), full)


@pytest.mark.parametrize("block", BLOCKS)
def test_flow_of_one_scale_ignores_the_others(block):
    model = make(flow_block=block)
    noisy, semantics, time = torch.randn(2, 21, 3), torch.randn(2, 21, 32), torch.rand(2, 3)
    together = model.flow(noisy, time, semantics, range(3))
    alone = model.flow(noisy[:, 1:5], time[:, 1:2], semantics[:, 1:5], range(1, 2))
    torch.testing.assert_close(together[:, 1:5], alone)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_gets_a_gradient(block):
    model = make(flow_block=block)
    inputs = torch.randn(2, 20, 3)
    model(inputs, torch.tensor([0, 1]), torch.randn(2, 21, 3), torch.rand(2, 3)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize("num_classes", [1, 3, 1000])
def test_any_number_of_classes_works(num_classes):
    model = make(num_classes=num_classes)
    labels = torch.tensor([0, num_classes])  # a class and "no class"
    velocity = model(torch.randn(2, 20, 3), labels, torch.randn(2, 21, 3), torch.rand(2, 3))
    assert velocity.shape == (2, 21, 3)


def test_zero_init_starts_with_no_velocity_and_the_default_does_not():
    arguments = (torch.randn(2, 20, 3), torch.tensor([0, 1]), torch.randn(2, 21, 3), torch.rand(2, 3))
    assert torch.equal(FlowAR(tiny_config(zero_init=True)).eval()(*arguments), torch.zeros(2, 21, 3))
    assert FlowAR(tiny_config()).eval()(*arguments).abs().mean() > 0.1


def test_initial_weights_are_xavier_and_tables_are_narrow():
    torch.manual_seed(0)
    model = FlowAR(tiny_config(ar_width=128, num_classes=1000))
    weight = model.ar.lower_blocks[0].attention.qkv.weight
    assert weight.abs().max() <= (6 / sum(weight.shape)) ** 0.5
    assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.05)
    for table in (model.ar.class_embedding.weight, model.ar.lower_position, model.ar.output_position):
        assert table.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed here")
@pytest.mark.parametrize("block", BLOCKS)
def test_choosing_flash_reaches_every_attention(block):
    model = make(flow_block=block)
    set_attention(model, "flash")
    with pytest.raises(UserError, match="attention=flash needs the flash-attn package"):
        model.ar(torch.randn(2, 20, 3), torch.tensor([0, 1]), range(3))
    with pytest.raises(UserError, match="attention=flash needs the flash-attn package"):
        model.flow(torch.randn(2, 21, 3), torch.rand(2, 3), torch.randn(2, 21, 32), range(3))
    kernels = [module.kernel for module in model.modules() if hasattr(module, "kernel")]
    assert len(kernels) == 4 + 2 * (2 if block == "attn_cross_mlp" else 1) and set(kernels) == {"flash"}
