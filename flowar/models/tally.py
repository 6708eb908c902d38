"""Counters of what is computed inside them: operations, bytes, FLOPs, memory. Read next: costs.py."""

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, empty_strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Tally(TorchDispatchMode):
    """Counts what is computed inside it: operations that are no views, their bytes, FLOPs, and reads of the device.

    A view is what shares memory with an argument and doesn't write to it, as its schema says (`alias_info` without
    `is_write`). It moves nothing, so it isn't counted. Shapes of tensors without memory follow from Python code, which
    is slow: each is worked out once and kept.
    """

    known: ClassVar[dict[Any, Any]] = {}

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[str] = Counter()  # by name
        self.bytes = 0  # of the inputs and outputs of these
        self.flops = 0  # of matrix products, a multiply-add is 2

    @property
    def reads(self) -> int:
        """How often a number went from the device to Python, which waits for all that the device has to do."""
        return self.operations["aten._local_scalar_dense.default"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returned = func._schema.returns
        if any(one.alias_info is not None and not one.alias_info.is_write for one in returned):
            return func(*args, **kwargs)
        writes = func._schema.is_mutable or any(one.alias_info for one in returned)
        result = func(*args, **kwargs) if writes else self.compute(func, args, kwargs)
        self.operations[str(func)] += 1
        self.bytes += sum(tensor.nbytes for tensor in tensors_in((args, kwargs, result)))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return result

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation gives; on tensors without memory, what it gave for such shapes before."""
        key = (func, described(args), described(kwargs))
        if key not in self.known:
            result = func(*args, **kwargs)
            parts = (result,) if isinstance(result, Tensor) else result
            if not isinstance(parts, list | tuple) or not all(isinstance(p, Tensor) and p.is_meta for p in parts):
                return result
            self.known[key] = (type(result), [(part.shape, part.stride(), part.dtype) for part in parts])
        kind, shapes = self.known[key]
        made = [empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in shapes]
        return kind(made) if kind in (list, tuple) else made[0]


class PeakMemory(TorchDispatchMode):
    """Follows the memory of tensors that are made inside it, on any device; `peak` is the most at once, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, num_bytes: int) -> None:
        """Note that a tensor's memory is free again."""
        self.live -= num_bytes


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def described(value: Any) -> Any:
    """Return what tells arguments apart, for a dictionary: of tensors only their shape and kind."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, list | tuple):
        return tuple(described(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, described(part)) for name, part in value.items())
    return (type(value), value)
