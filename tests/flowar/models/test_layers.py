import importlib.util

import pytest
import torch
import torch.nn.functional as F

from flowar.base.errors import UserError
from flowar.models.attention import Pattern, attend
from flowar.models.flowar.scales import (
    causal_segments,
    local_segments,
    num_tokens,
    rotary_angles,
    rotary_turns,
    small_mask,
)
from flowar.models.fused import rotate
from flowar.models.layers import GatedMLP, SelfAttention, TimeEmbedding
from tests.conftest import MORE

SCALES = (1, 2, 4)
TOKENS = num_tokens(SCALES)


def dense_mask(segments, queries, keys):
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for query_slice, key_slice in segments:
        mask[query_slice, key_slice] = True
    return mask


def pattern_of(segments):
    return Pattern(segments, small_mask(segments))


@pytest.mark.parametrize("make_segments", [causal_segments, local_segments])
def test_two_calls_equal_one_masked_call(make_segments):
    segments = make_segments(SCALES, range(3))
    query, key, value = torch.randn(3, 2, 4, TOKENS, 8).unbind(0)
    attended = attend(query, key, value, pattern_of(segments), dropout=0.0, kernel="sdpa")
    by_mask = F.scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(segments, TOKENS, TOKENS))
    torch.testing.assert_close(attended, by_mask)


@pytest.mark.parametrize("make_segments", [causal_segments, local_segments])
def test_attention_with_dropout_is_that_of_torch_by_each_of_two_calls(make_segments):
    segments = make_segments(SCALES, range(3))
    pattern, places = pattern_of(segments), (slice(0, 5), slice(5, TOKENS))
    heads = torch.randn(3, 2, 4, TOKENS, 8, requires_grad=True)
    torch.manual_seed(1)
    attended = attend(*heads.unbind(0), pattern, dropout=0.3, kernel="sdpa")
    attended.square().sum().backward()
    torch.manual_seed(1)
    masks = dense_mask(segments, TOKENS, TOKENS)
    again = heads.detach().clone().requires_grad_()
    query, key, value = again.unbind(0)
    keys = (slice(0, pattern.mask.shape[1]), segments[-1][1])
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, q], key[:, :, k], value[:, :, k], attn_mask=masks[q, k] if k is keys[0] else None, dropout_p=0.3
        )
        for q, k in zip(places, keys, strict=True)
    ]
    expected = torch.cat(parts, dim=2)
    expected.square().sum().backward()
    torch.testing.assert_close(attended, expected)
    torch.testing.assert_close(heads.grad, again.grad)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed here")
def test_asking_for_flash_without_the_package_says_how_to_install_it():
    heads = torch.randn(1, TOKENS, 2, 8)
    with pytest.raises(UserError, match=r"pip install .*flowar\[cuda\].*attention=sdpa"):
        attend(heads, heads, heads, pattern_of(local_segments(SCALES, range(3))), dropout=0.0, kernel="flash")


def test_rotation_keeps_lengths_and_depends_on_relative_position_only():
    turns = rotary_turns((8,), 16).view(8, 8, 8, 2)
    query, key = torch.randn(2, 1, 1, 1, 16).unbind(0)

    def score(query_at, key_at):
        turned_query = rotate(query, turns[query_at][None])
        turned_key = rotate(key, turns[key_at][None])
        return (turned_query * turned_key).sum()

    torch.testing.assert_close(rotate(query, turns[5, 3][None]).norm(), query.norm())
    torch.testing.assert_close(score((2, 3), (4, 4)), score((3, 5), (5, 6)))
    assert not torch.isclose(score((2, 3), (4, 4)), score((2, 3), (4, 5)))


def test_all_scales_span_the_same_square():
    angles = rotary_angles((2, 4), 8)
    coarse, fine = angles[:4].view(2, 2, 4), angles[4:].view(4, 4, 4)
    torch.testing.assert_close(coarse, fine[::2, ::2])


def test_rotation_in_bfloat16_is_computed_in_float32():
    heads = torch.randn(1, TOKENS, 2, 8)
    turns = rotary_turns(SCALES, 8)
    low = heads.bfloat16()
    assert torch.equal(rotate(low, turns), rotate(low.float(), turns).bfloat16())


def test_cached_keys_give_the_same_attention():
    attention = SelfAttention(16, 2, qkv_bias=True).eval()
    tokens, turns = torch.randn(2, TOKENS, 16), rotary_turns(SCALES, 8)
    whole, _ = attention(tokens, turns, pattern_of(causal_segments(SCALES, range(3))))
    cache = torch.full((2, 2, 2, TOKENS, 8), torch.nan).unbind()  # what is not there yet must not be looked at
    with torch.no_grad():
        first, _ = attention(tokens[:, :5], turns[:5], pattern_of(causal_segments(SCALES, range(2))), cache)
        second, _ = attention(tokens[:, 5:], turns[5:], pattern_of(causal_segments(SCALES, range(2, 3))), cache, 5)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=MORE)])
def test_a_padded_mlp_gives_the_same_outputs_and_gradients(compiled):
    torch.manual_seed(0)
    mlp, tokens = GatedMLP(25), torch.randn(2, 3, 25)  # 66 hidden values
    padded = torch.compile(mlp.padded) if compiled else mlp.padded
    results = []
    for more in (0, 62):
        output = padded(tokens, more)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(mlp.parameters()))])
    torch.testing.assert_close(results[1], results[0])


def test_dropout_acts_in_training_only():
    attention = SelfAttention(16, 2, qkv_bias=True, dropout=0.5)
    mlp = GatedMLP(16, dropout=0.5)
    tokens, turns = torch.randn(2, 5, 16), rotary_turns((1, 2), 8)
    pattern = pattern_of(causal_segments((1, 2), range(2)))
    for layer in (lambda x: attention(x, turns, pattern)[0], mlp):
        attention.train(), mlp.train()
        assert not torch.equal(layer(tokens), layer(tokens))
        attention.eval(), mlp.eval()
        assert torch.equal(layer(tokens), layer(tokens))


def test_time_is_embedded_in_whole_thousandths():
    embedding = TimeEmbedding(8)
    at = torch.tensor([0.6801, 0.6809, 0.681])
    first, second, third = embedding(at)
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(embedding(torch.tensor([0.68])), embedding(torch.tensor([0.6799])))


def test_time_stays_float32_under_autocast():
    embedding = TimeEmbedding(8)
    at = torch.rand(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding(at), embedding(at).float())
        inside = embedding(at)
    assert torch.equal(inside, embedding(at))
