"""``torch.compile(module, backend="pygan")``: TorchDynamo's graphs by pygan's kernels.

>>> G = torch.compile(G, backend="pygan")       # or backend=pygan.compile_backend
>>> D = torch.compile(D, backend="pygan", options={"then": "inductor"})

In a graph, every convolution and norm that pygan may take gets its map through an entrance, behind
which :mod:`pygan.known_operations` runs it with what follows, as in a network that was fused. The
graph stays one of torch's functions, above autograd: gradients of gradients work, and buffers
change in the order of the code. A graph that holds nothing for pygan runs as it is.

Source: the backends' contract in https://docs.pytorch.org/docs/stable/torch.compiler_custom_backends.html
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.overrides import handle_torch_function, has_torch_function_unary

from pygan.errors import UserError
from pygan.known_operations import (
    ACTIVATIONS,
    STRIDED,
    conv_activation_taken,
    may_enter,
    works_in_place,
)
from pygan.ops.binary_cross_entropy import binary_cross_entropy
from pygan.ops.norm_act import activate
from pygan.ops.strided_conv import DIRECT_CHANNELS
from pygan.pending import HANDLERS, Readers, entered, format_of, plain, taken_in

MODES = (None, "default")
THEN = ("eager", "inductor")

_CONVOLUTIONS = (F.conv2d, F.conv_transpose2d)
_NORMS = (F.batch_norm, F.instance_norm)
_LAYERS = (*_CONVOLUTIONS, *_NORMS, F.interpolate)
# Calls that give a tensor without computing one.
_VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "permute"),
    *("transpose", "t", "detach", "contiguous", "size", "getitem", "getattr", "chunk", "split"),
}


def compile_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """A backend of ``torch.compile``; installed, it also goes by the name ``"pygan"``.

    Args:
        gm: a graph of torch's functions, whose inputs are all that it reads, parameters as well.
        example_inputs: fake tensors and symbolic sizes in the order of the graph's inputs.
        mode: None or "default".
        options: ``{"then": "inductor"}`` compiles what pygan leaves by torch's inductor. Inside
            such parts torch refuses gradients of gradients, and random numbers are inductor's.

    Returns:
        A function of the graph's inputs with plain tensors as its results; ``gm.forward`` itself
        where pygan has nothing better. Binary cross-entropies are those of
        :func:`pygan.functional.binary_cross_entropy`, unless inductor compiles them. On other
        devices than a CPU, in other types than float32 and bfloat16 and where ``PYGAN_IMPL`` is
        set, torch runs the operations.

    Raises:
        UserError: another mode, option or value of one. TorchDynamo shows its sentence inside a
            ``BackendCompilerFailed``.
    """
    then = _checked(mode, options)
    if then == "eager":
        for node in gm.graph.find_nodes(op="call_function", target=F.binary_cross_entropy):
            node.target = binary_cross_entropy
    _take_activations(gm.graph)
    taken = _open(gm.graph)
    if not taken:
        if then == "inductor":
            from torch._dynamo.backends.registry import lookup_backend

            return lookup_backend("inductor")(gm, list(example_inputs))
        return _forward_of(gm)
    if then == "inductor":
        dynamic = any(isinstance(x, torch.SymInt) for x in example_inputs) or None
        gm = _with_inductor(gm, taken, dynamic)
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(plain, output.args),)
    return _forward_of(gm)


def _forward_of(gm: fx.GraphModule) -> Callable[..., Any]:
    gm.recompile()
    # Until its code is read, the forward of a lazy module compiles and calls another one.
    assert gm.code
    return gm.forward


def _checked(mode: str | None, options: dict[str, Any] | None) -> str:
    if mode not in MODES:
        raise UserError(
            f"mode={mode!r} is one of backend='inductor'; the backend pygan has only 'default', "
            "leave mode out"
        )
    given = dict(options or {})
    then = given.pop("then", "eager")
    if given or then not in THEN:
        raise UserError(
            f"options={options!r} is not known to the backend pygan; it takes "
            "{'then': 'eager'} and {'then': 'inductor'}"
        )
    return str(then)


def conv_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, negative_slope: float
) -> Tensor:
    """A 4x4 convolution of stride 2 of a map with few channels, and a ReLU or LeakyReLU."""
    arguments = (x, weight, bias, activation, negative_slope)
    if has_torch_function_unary(x):
        return handle_torch_function(conv_activation, (x,), *arguments)
    return activate(F.conv2d(x, weight, bias, 2, 1), activation, negative_slope)


HANDLERS[conv_activation] = conv_activation_taken


def _function(node: fx.Node) -> Any:
    """What is called, as ``__torch_function__`` names it."""
    if node.op == "call_method":
        return getattr(Tensor, str(node.target), None)
    return node.target if node.op == "call_function" else None


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _may_be_map(node: Any) -> bool:
    """Whether it is of a type and on a device that pygan's kernels take."""
    value = _value(node)
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.dtype in (torch.float32, torch.bfloat16)
    )


def _take_activations(graph: fx.Graph) -> None:
    """Joins what is known to have no other reader: a convolution and its activation."""
    for node in list(graph.nodes):
        if _function(node) not in _CONVOLUTIONS or not node.args or not _may_be_map(node.args[0]):
            continue
        reader = node.next
        # Nothing between the two, such as a change of the grad mode.
        if list(node.users) != [reader] or reader.args[:1] != (node,):
            continue
        name, _ = ACTIVATIONS.get(_function(reader), ("", False))
        if name == "tanh":
            # What a convolution puts out is nobody else's, and no gradient needs it.
            reader.op, reader.target = "call_function", torch.tanh_
        elif name in ("relu", "leaky_relu") and _is_direct(node):
            slope = reader.kwargs.get("negative_slope", (*reader.args[1:2], 0.01)[0])
            if name == "relu":
                slope = 0.0
            if not isinstance(slope, int | float):
                continue
            weight, bias = node.args[1], (*node.args[2:3], None)[0]
            with graph.inserting_before(node):
                joined = graph.call_function(
                    conv_activation, (node.args[0], weight, bias, name, float(slope))
                )
            joined.meta = dict(reader.meta)
            reader.replace_all_uses_with(joined)
            graph.erase_node(reader)
            graph.erase_node(node)


def _is_direct(node: fx.Node) -> bool:
    """Whether its kernels run an activation as well."""
    if node.target is not F.conv2d or node.kwargs or _value(node.args[1]) is None:
        return False
    given = (1, 0, 1, 1)  # stride, padding, dilation, groups
    given = (*node.args[3:], *given[max(len(node.args) - 3, 0) :])  # type: ignore[assignment]
    pairs = tuple((v, v) if isinstance(v, int) else v for v in given[:3])
    _, channels, *taps = _value(node.args[1]).shape
    few = isinstance(channels, int) and channels <= DIRECT_CHANNELS
    return few and (tuple(taps), *map(tuple, pairs), given[3]) == STRIDED


def _is_taken(node: fx.Node) -> bool:
    """Whether a chain of operations that pygan knows may begin here."""
    function = _function(node)
    if function not in (*_LAYERS, conv_activation) or not node.args:
        return False
    x = node.args[0]
    if not _may_be_map(x):
        return False
    if function in _NORMS:
        # Worth it only where an operation takes the activation along.
        return _value(x).dim() > 1 and any(_function(user) in HANDLERS for user in node.users)
    return bool(_value(x).dim() == 4)


def _changed(node: fx.Node) -> Iterator[Any]:
    """Storages that a call changes in place."""
    function = _function(node)
    if node.op == "call_function" or node.op == "call_method":
        name = getattr(function, "__name__", str(node.target))
        in_place = works_in_place(function, node.args, node.kwargs)
        in_place |= name.endswith("_") and not name.endswith("__")
        in_place |= getattr(function, "__module__", "") == "_operator" and (
            name.startswith("i") or name == "setitem"
        )
        changed = [*node.args[:1]] if in_place else []
        for operand in (*changed, node.kwargs.get("out")):
            if (storage := _storage(operand)) is not None:
                yield storage


def _storage(node: Any) -> Any:
    value = _value(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _entrance(readers: Readers) -> Callable[[Tensor], Tensor]:
    def enter(x: Tensor) -> Tensor:
        if not may_enter(x):
            return x
        if x.dim() == 4 and torch.is_inference_mode_enabled():
            return x
        format = format_of(x)
        return x if format is None else entered(x, format, readers)

    return enter


def _taking_in(readers: Readers) -> Callable[[Tensor], Tensor]:
    def take_in(x: Tensor) -> Tensor:
        if not may_enter(x):
            return x
        format = format_of(x)
        return x if format is None else taken_in(x, format, readers)

    return take_in


def _open(graph: fx.Graph) -> set[fx.Node]:
    """Puts entrances into the graph; all nodes that deal with what came through one."""
    nodes = list(graph.nodes)
    layers = [node for node in nodes if _is_taken(node)]
    if not layers:
        return set()
    last_change = {storage: at for at, node in enumerate(nodes) for storage in _changed(node)}
    places = {node: at for at, node in enumerate(nodes)}
    taken: set[fx.Node] = set()
    for node in layers:
        # Who reads what a layer puts out may do so after its input was overwritten.
        overwritten = last_change.get(_storage(node.args[0]), -1) > places[node]
        with graph.inserting_before(node):
            way = plain if overwritten else _entrance(Readers())
            door = graph.call_function(way, (node.args[0],))
        node.args = (door, *node.args[1:])
        taken |= {door} if overwritten else {door, node}
    for node in graph.find_nodes(op="placeholder"):
        if not _is_network_input(node) or _storage(node) in last_change:
            continue
        readers = list(node.users)
        with graph.inserting_before(min(readers, key=list(graph.nodes).index)):
            door = graph.call_function(_taking_in(Readers()), (node,))
        for reader in readers:
            reader.replace_input_with(node, door)
        taken.add(door)
    for node in graph.nodes:
        known = node.target in HANDLERS if node.op == "call_function" else False
        known |= node.op == "call_method" and _function(node) in HANDLERS
        known |= getattr(node.target, "__module__", "") == "_operator"
        if known and taken.intersection(node.all_input_nodes):
            taken.add(node)
    return taken


def _is_network_input(node: fx.Node) -> bool:
    """Whether it is a map that an operation reads which pygan knows."""
    value = _value(node)
    return (
        _may_be_map(node)
        and not isinstance(value, nn.Parameter)
        and value.dim() == 4
        and value.shape[2:].numel() != 1
        and any(user.args[:1] == (node,) for user in node.users)
    )


def _with_inductor(gm: fx.GraphModule, taken: set[fx.Node], dynamic: bool | None) -> fx.GraphModule:
    """The graph in parts, in the order of the code, of which inductor compiles the others."""
    sides: list[tuple[bool, fx.Node]] = []
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "output"):
            other = node not in taken and not _is_bookkeeping(node)
            if sides and _is_counter(node):
                other = sides[-1][0]
            sides.append((other, node))
    number: dict[fx.Node, int] = {}
    compiled: set[int] = set()
    current = 0
    for other, run in itertools.groupby(sides, lambda side: side[0]):
        nodes = [node for _, node in run]
        # One operation alone is not worth a call of what inductor makes of it.
        other &= sum(not _is_view(node) for node in nodes) > 1
        if other or current in compiled:
            current += 1
        if other:
            compiled.add(current)
        number |= dict.fromkeys(nodes, current)
    split = split_module(gm, gm, number.__getitem__, keep_original_order=True)
    for i in compiled:
        split.add_submodule(f"submod_{i}", _Compiled(split.get_submodule(f"submod_{i}"), dynamic))
    return split


def _is_bookkeeping(node: fx.Node) -> bool:
    """Whether it changes how later nodes run."""
    module = getattr(node.target, "__module__", None) or ""
    return "autocast" in module or getattr(node.target, "__name__", "") == "_set_grad_enabled"


def _is_counter(node: fx.Node) -> bool:
    """Whether it is one of a batch norm, which belongs to any part."""
    return node.target == "add_" and node.all_input_nodes[0].op == "placeholder"


def _is_view(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", node.target) in _VIEWS


class _Compiled(nn.Module):
    """A part that inductor compiles when it is first run."""

    def __init__(self, part: nn.Module, dynamic: bool | None) -> None:
        super().__init__()
        self._run = torch.compile(part, backend="inductor", dynamic=dynamic)

    def forward(self, *inputs: Any) -> Any:
        return self._run(*plain(inputs))
