"""Scale-causal attention as one unmasked call per scale, against one call with a dense mask, in one run.

python -m benchmarks.attention [--threads N]      times of a forward and backward pass, medians of alternating runs
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flowar.models.attention import Pattern, attend
from flowar.models.flowar.scales import causal_segments, num_tokens, small_mask

SCALES = (1, 2, 4, 8, 16)

BATCH, HEADS, HEAD_WIDTH = 4, 16, 64  # FlowAR-L

RUNS = 15


def dense_mask() -> Tensor:
    """Return the L x L mask that the segments replace."""
    tokens = num_tokens(SCALES)
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for queries, keys in causal_segments(SCALES, range(len(SCALES))):
        mask[queries, keys] = True
    return mask


def timed(function: Callable[..., Tensor], qkv: Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    qkv.grad = None
    start = time.perf_counter()
    function(*qkv.unbind(0)).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Print the medians and the ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    qkv = torch.randn(3, BATCH, HEADS, num_tokens(SCALES), HEAD_WIDTH, requires_grad=True)
    segments, mask = causal_segments(SCALES, range(len(SCALES))), dense_mask()
    pattern = Pattern(segments, small_mask(segments))

    def by_segments(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, pattern, dropout=0.0, kernel="sdpa")

    def by_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    ours, theirs = [], []
    for run in range(RUNS + 1):
        pair = timed(by_segments, qkv), timed(by_mask, qkv)
        if run:  # the first warms up
            ours.append(pair[0])
            theirs.append(pair[1])
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    scores = sum((q.stop - q.start) * k.stop for q, k in segments)
    print(f"{torch.get_num_threads()} threads, {RUNS} runs, torch {torch.__version__}")
    print(f"segments   {statistics.median(ours) * 1e3:8.1f} ms, {scores:,} scores per head")
    print(f"dense mask {statistics.median(theirs) * 1e3:8.1f} ms, {mask.numel():,} scores per head")
    print(f"segments / dense mask: {ratio:.2f}")


if __name__ == "__main__":
    main()
