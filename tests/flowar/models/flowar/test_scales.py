import pytest
import torch

from flowar.models.flowar.scales import (
    causal_segments,
    downsample,
    local_segments,
    next_input,
    num_tokens,
    pack,
    patchify,
    token_offsets,
    token_range,
    training_inputs,
    unpatchify,
)

SCALES = (1, 2, 4, 8, 16)


def test_offsets_of_the_released_scales():
    assert token_offsets(SCALES) == (0, 1, 5, 21, 85, 341)
    assert num_tokens(SCALES) == 341
    assert token_range(SCALES, range(3, 5)) == slice(21, 341)


@pytest.mark.parametrize(("side", "patch_size"), [(4, 1), (3, 2), (5, 3)])
def test_patches_go_back_to_the_same_map(side, patch_size):
    token_map = torch.randn(2, 3, side * patch_size, side * patch_size)
    tokens = patchify(token_map, patch_size)
    assert tokens.shape == (2, side * side, 3 * patch_size**2)
    assert torch.equal(unpatchify(tokens, side, patch_size), token_map)


def test_a_token_holds_its_patch_channel_by_channel():
    token_map = torch.arange(2 * 4 * 4).float().view(1, 2, 4, 4)
    second = patchify(token_map, 2)[0, 1]  # upper right patch
    assert second.tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


@pytest.mark.parametrize("patch_size", [1, 2])
def test_packed_scales_unpack_to_the_pyramid(patch_size):
    latents = torch.randn(2, 3, 8 * patch_size, 8 * patch_size)
    scales = (1, 2, 8)
    per_scale = pack(latents, scales, patch_size).split([side * side for side in scales], dim=1)
    token_maps = [unpatchify(tokens, side, patch_size) for tokens, side in zip(per_scale, scales, strict=True)]
    for side, token_map in zip(scales, token_maps, strict=True):
        assert torch.equal(token_map, downsample(latents, side * patch_size))
    assert torch.equal(token_maps[-1], latents)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_downsampling_averages_areas(patch_size):
    latents = torch.randn(1, 1, 16, 16)
    expected = latents.view(1, 1, 4, 4, 4, 4).mean(dim=(3, 5))
    torch.testing.assert_close(downsample(latents, 4), expected)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_inputs_of_training_and_generation_agree(patch_size):
    scales = (1, 2, 4)
    latents = torch.randn(2, 3, 4 * patch_size, 4 * patch_size)
    inputs = training_inputs(latents, scales, patch_size)
    assert inputs.shape == (2, num_tokens(scales) - 1, 3 * patch_size**2)
    by_hand = [
        next_input(downsample(latents, coarser * patch_size), side, scales, patch_size)
        for coarser, side in ((1, 2), (2, 4))
    ]
    assert torch.equal(inputs, torch.cat(by_hand, dim=1))


def test_a_constant_map_gives_constant_inputs():
    inputs = training_inputs(torch.full((1, 2, 16, 16), 0.7), SCALES, 1)
    torch.testing.assert_close(inputs, torch.full_like(inputs, 0.7))


def test_a_single_scale_has_no_inputs():
    assert training_inputs(torch.randn(2, 3, 4, 4), (4,), 1).shape == (2, 0, 3)


@pytest.mark.parametrize("first", [0, 2])
def test_causal_segments_are_the_scale_causal_mask(first):
    scales = (1, 2, 4)
    scale_of = torch.cat([torch.full((side * side,), index) for index, side in enumerate(scales)])
    allowed = scale_of[:, None] >= scale_of[None, :]
    start = token_offsets(scales)[first]
    drawn = torch.zeros(len(scale_of) - start, len(scale_of), dtype=torch.bool)
    for queries, keys in causal_segments(scales, range(first, 3)):
        drawn[queries, keys] = True
    assert torch.equal(drawn, allowed[start:])


def test_local_segments_stay_inside_their_scale():
    assert local_segments((1, 2, 4), range(1, 3)) == [(slice(0, 4), slice(0, 4)), (slice(4, 20), slice(4, 20))]
