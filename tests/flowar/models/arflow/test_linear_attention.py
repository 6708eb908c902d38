"""Linear attention over images: the chunked form is the recurrent one, and both are the closed form."""

import pytest
import torch

from flowar.models.arflow.linear_attention import attend_across_images, read_factors, sequence_memories, step_memory

BATCH, IMAGES, HEADS, TOKENS, WIDTH = 2, 5, 3, 4, 6


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gates(*shape):
    return -torch.rand(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("is_first", [True, False])
def test_chunked_form_equals_recurrent_form(is_first):
    added, log_decay = draw(BATCH, IMAGES, HEADS, WIDTH, WIDTH), gates(BATCH, IMAGES, HEADS)
    memory = None if is_first else draw(BATCH, HEADS, WIDTH, WIDTH)
    memories = sequence_memories(added, log_decay, memory)
    for image in range(IMAGES):
        before, memory = step_memory(added[:, image], log_decay[:, image], memory)
        torch.testing.assert_close(memories[:, image], torch.zeros_like(memory) if before is None else before)
        torch.testing.assert_close(memories[:, image + 1], memory)


def test_newest_image_enters_the_memory_undecayed():
    added, log_decay = draw(1, 3, 1, WIDTH, WIDTH), gates(1, 3, 1)
    memories = sequence_memories(added, log_decay, None)
    torch.testing.assert_close(memories[:, 1], added[:, 0])
    torch.testing.assert_close(memories[0, 2, 0], added[0, 1, 0] + log_decay[0, 1, 0].exp() * added[0, 0, 0])


def test_strong_decay_over_long_sequences_stays_finite():
    added = draw(1, 200, 1, WIDTH, WIDTH).float().requires_grad_()
    log_decay = torch.full((1, 200, 1), -5.0, requires_grad=True)
    sequence_memories(added, log_decay, None).sum().backward()
    assert added.grad.isfinite().all() and log_decay.grad.isfinite().all()


@pytest.mark.parametrize("read_decay", ["running", "own"])
def test_sequence_equals_steps(read_decay):
    query, key, value = (draw(BATCH, IMAGES, HEADS, TOKENS, WIDTH) for _ in range(3))
    log_gate, memory = gates(BATCH, IMAGES, HEADS, TOKENS), None
    whole, last = attend_across_images(query, key, value, log_gate, None, read_decay)
    for image in range(IMAGES):
        part = (tensor[:, image, None] for tensor in (query, key, value, log_gate))
        attended, memory = attend_across_images(*part, memory, read_decay)
        torch.testing.assert_close(whole[:, image, None], attended)
    torch.testing.assert_close(last, memory)


def test_read_decay_runs_over_an_image_or_is_each_tokens_own():
    log_gate = gates(1, 2, 1, TOKENS)
    running, own = read_factors(log_gate, "running"), read_factors(log_gate, "own")
    torch.testing.assert_close(own, log_gate.exp())
    torch.testing.assert_close(running, own.cumprod(dim=-1))
