"""A device's work as a list of operations with their FLOPs and bytes. Read next: fusion.py, trace.py."""

from typing import Any, Literal, NamedTuple

from torch.utils.flop_counter import sdpa_flop_count

ATTENTION = "_scaled_dot_product"  # prefix of torch's attention operations
ATTENTION_BACKWARD = 2.5  # times the FLOPs of the forward pass: five products instead of two

Kernel = Literal["matmul", "attention", "other"]


class Operation(NamedTuple):
    """One kernel, or one operation of eager torch."""

    kind: Kernel
    is_half: bool  # of 16-bit tensors
    is_fused: bool  # made by the compiler
    flops: int  # of matrix products, a multiply-add is 2
    moved: int  # bytes that it reads and writes


def attention_flops(name: str, query: Any, key: Any, value: Any) -> int:
    """Return the FLOPs of an attention operation from its shapes (B, H, N, d)."""
    return int(sdpa_flop_count(query, key, value) * (ATTENTION_BACKWARD if "backward" in name else 1))


def at_batch(sizes: tuple[int, int], ends: tuple[list[Operation], list[Operation]], size: int) -> list[Operation]:
    """Return the operations at a batch size by interpolating two others, as FLOPs and bytes are linear in it.

    Raises:
        ValueError: if the two lists have different operations.
    """
    (first, second), (low, high) = ends, sizes
    if [each[:3] for each in first] != [each[:3] for each in second]:
        raise ValueError(f"batches of {low} and {high} take different operations, {len(first)} and {len(second)}")
    return [
        a._replace(flops=straight(sizes, (a.flops, b.flops), size), moved=straight(sizes, (a.moved, b.moved), size))
        for a, b in zip(first, second, strict=True)
    ]


def straight(at: tuple[int, int], values: tuple[int, int], where: int) -> int:
    """Return the value at `where` of the straight line through two points."""
    return values[0] + (values[1] - values[0]) * (where - at[0]) // (at[1] - at[0])
