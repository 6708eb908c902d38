"""Predict the fused kernels that inductor would make of a traced block, and their traffic. Read next: trace.py.

Nothing is compiled. Each matrix product and each attention is its own kernel; the elementwise operations and row
reductions between two of them form one kernel; and a sum over rows is one. benchmarks/compiled.txt has inductor's own
counts, which tests compare.
"""

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import flop_registry

from flowar.planning.operations import ATTENTION, Kernel, Operation, attention_flops

VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "expand", "getitem", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
REDUCTIONS = {"sum", "mean", "amax"}


def name_of_node(node: Node) -> str:
    """Return the name of the operation that a node of a graph calls, without its overload."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema else getattr(node.target, "__name__", str(node.target))


def bytes_of(value: Any) -> int:
    """Return the bytes of a tensor, or of several."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(bytes_of(each) for each in value) if isinstance(value, list | tuple) else 0


def origin(node: Node) -> Node:
    """Return the node whose memory this one is a view of."""
    while node.op == "call_function" and name_of_node(node) in VIEWS:
        node = node.all_input_nodes[0]
    return node


def sums_rows(node: Node) -> bool:
    """Return whether a node reduces other dimensions than the last one."""
    if name_of_node(node) not in REDUCTIONS:
        return False
    first: Any = node.args[0]
    ndim = first.meta["val"].ndim
    dims = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], list | tuple) else range(ndim)
    return any(int(dim) % ndim != ndim - 1 for dim in dims)  # type: ignore[arg-type]


def kernels_of(graph_module: GraphModule) -> list[Operation]:
    """Return the kernels of a graph, each with its reads from other kernels and its writes for them.

    `depth` counts the unfusable kernels (`is_alone`) along the longest path to a node; connected nodes of the same
    depth are fused.
    """
    depth: dict[Node, int] = {}
    kernels: dict[Node, list[Node]] = {}  # by the node that represents them
    home: dict[Node, Node] = {}
    alone: set[Node] = set()
    users: dict[Node, set[Node]] = defaultdict(set)
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and name_of_node(node) in VIEWS:
            continue
        inputs = [origin(each) for each in node.all_input_nodes]
        for each in inputs:
            users[each].add(node)
        if node.op != "call_function":
            depth[node] = 0
            continue
        depth[node] = max((depth[each] + (each in alone) for each in inputs), default=0)
        home[node], kernels[node] = node, [node]
        if is_alone(node):
            alone.add(node)
            continue
        for each in inputs:
            if each in home and each not in alone and depth[each] == depth[node] and home[each] is not home[node]:
                joined = kernels.pop(home[each])
                kernels[home[node]] += joined
                home.update(dict.fromkeys(joined, home[node]))
    return [_kernel(nodes, users) for nodes in kernels.values()]


def is_alone(node: Node) -> bool:
    """Return whether a node is never fused: a matrix product, attention, a sum over rows."""
    name = name_of_node(node)
    return name.startswith(ATTENTION) or _packet(node) in flop_registry or sums_rows(node)


def _packet(node: Node) -> Any:
    return getattr(node.target, "_overloadpacket", None)


def _kernel(nodes: list[Node], users: dict[Node, set[Node]]) -> Operation:
    inside = set(nodes)
    read: dict[Node, set[Node]] = defaultdict(set)  # the views of each tensor that are read
    for node in nodes:
        for each in node.all_input_nodes:
            if origin(each) not in inside:
                read[origin(each)].add(each)
    moved = sum(
        min(bytes_of(whole.meta.get("val")), sum(bytes_of(view.meta.get("val")) for view in views))
        for whole, views in read.items()
    )
    moved += sum(bytes_of(node.meta["val"]) for node in nodes if users[node] - inside)
    first = nodes[0]
    arguments = [each.meta["val"] if isinstance(each, Node) else each for each in first.args]
    shapes = [each.shape for each in arguments if isinstance(each, Tensor)]
    kind: Kernel = "other"
    name, flops = name_of_node(first), 0
    if name.startswith(ATTENTION):
        flops, kind = attention_flops(name, *(shapes[1:4] if "backward" in name else shapes[:3])), "attention"
    elif _packet(first) in flop_registry:
        flops, kind = flop_registry[_packet(first)](*arguments, out_val=first.meta["val"]), "matmul"
    is_half = any(isinstance(each, Tensor) and each.element_size() == 2 for each in arguments)
    return Operation(kind, is_half, True, flops, moved)
