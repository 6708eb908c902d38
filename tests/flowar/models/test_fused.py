"""Hand-written gradients against autograd's, in float64, and the compiled form against the eager one."""

import pytest
import torch
import torch.nn.functional as F

from flowar.models.flowar.scales import rotary_turns
from flowar.models.fused import NORM_EPS, gated_gelu, gated_sum, rotate, rotate_queries_keys, scaled_norm

TURNS = rotary_turns((2,), 8).double()
EPS = torch.tensor(NORM_EPS, dtype=torch.float64)


def plain_rotate(heads):
    cosine, sine = TURNS[:, None].unbind(-1)
    even, odd = heads[..., ::2], heads[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2).transpose(1, 2)


def plain_norm(tokens, scale, shift):
    normed = F.rms_norm(tokens, tokens.shape[-1:], None, NORM_EPS) * scale
    return normed if shift is None else normed + shift


CASES = {  # function, formula, shapes
    "norm, per token": (lambda x, g, s: scaled_norm(x, g, s, EPS), plain_norm, [(2, 4, 6)] * 3),
    "norm, per sample": (lambda x, g, s: scaled_norm(x, g, s, EPS), plain_norm, [(2, 4, 6), (2, 1, 6), (2, 1, 6)]),
    "norm, one for all": (lambda x, g, s: scaled_norm(x, g, s, EPS), plain_norm, [(2, 4, 6), (1, 1, 6), (1, 1, 6)]),
    "norm, weight": (lambda x, g: scaled_norm(x, g, None, EPS), lambda x, g: plain_norm(x, g, None), [(2, 4, 6), (6,)]),
    "sum, per token": (gated_sum, lambda x, g, u: x + g * u, [(2, 4, 6)] * 3),
    "sum, per sample": (gated_sum, lambda x, g, u: x + g * u, [(2, 4, 6), (2, 1, 6), (2, 4, 6)]),
    "gelu": (gated_gelu, lambda g, v: F.gelu(g) * v, [(2, 4, 6)] * 2),
    "rotation": (lambda x: rotate(x, TURNS), plain_rotate, [(2, 4, 3, 8)]),
    "queries and keys": (
        lambda x: torch.stack(rotate_queries_keys(x, TURNS)),
        lambda x: torch.stack([plain_rotate(x[:, :, 0]), plain_rotate(x[:, :, 1]), x[:, :, 2].transpose(1, 2)]),
        [(2, 4, 3, 3, 8)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formula(case):
    function, formula, shapes = CASES[case]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    output, expected = function(*inputs), formula(*inputs)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((output * weights).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), inputs))


def test_the_compiled_rotation_is_the_eager_one():
    heads = torch.randn(2, 4, 3, 8, requires_grad=True)
    turns = TURNS.float()
    eager = rotate(heads, turns)
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)(heads, turns)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.square().sum(), heads), torch.autograd.grad(eager.square().sum(), heads)
    )
