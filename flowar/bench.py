"""`flowar bench`: how operations are counted; measuring comes next."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Tally(TorchDispatchMode):
    """Counts what is computed inside it: operations that are no views, their bytes, FLOPs, and reads of the device.

    A view is what its schema says shares memory with an argument and doesn't write to it: `alias_info` without
    `is_write`. It moves nothing, so it isn't counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[str] = Counter()  # by name
        self.bytes = 0  # of the inputs and outputs of these
        self.flops = 0  # of matrix products, a multiply-add is 2
        self.views = 0

    @property
    def reads(self) -> int:
        """How often a number went from the device to Python, which waits for all that the device has to do."""
        return self.operations["aten._local_scalar_dense.default"]

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation gives."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.compute(func, args, kwargs or {})
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.views += 1
            return result
        self.operations[str(func)] += 1
        self.bytes += sum(tensor.nbytes for tensor in tensors_in((args, kwargs, result)))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))
