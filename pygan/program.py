"""What a piece of code does with tensors on a CPU, as a program that does it again.

A kernel leaves little of the interpreter in the caches, so that what Python and autograd do between
two of them takes ten times as long as in a loop of its own. A program is only the operations: those
of torch below autograd, and the functions of pygan that run kernels (:mod:`pygan.ops.recorded`). A
value is let go behind the last operation that reads it, and memory comes from where it came from
when the code ran, so a program takes no more of it than the code.

    recorder = Recorder(inputs)
    with recorder:
        outputs = code(*inputs)
    program = recorder.program(outputs)     # unless recorder.reason says why it cannot be
    outputs = program.run(other_inputs)

Tensors that the code did not make itself, parameters and buffers, are held as they are, and changed
in place as the code changed them. Python is not repeated: numbers it counted, branches it took.
Whoever records sees to it that those stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pygan.ops import recorded

# What reads values, or an address, where no recorder sees what becomes of them.
_READS = {
    *(Tensor.numpy, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__array__),
    *(Tensor.__dlpack__, Tensor.storage, Tensor.share_memory_),
}
_PLAIN = (Tensor, torch.nn.Parameter)
_MOVES = ("aten::set_", "aten::resize_")  # a tensor to another place
_VARIES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass(frozen=True)
class _Value:
    """A tensor that the program makes or is given, by its number."""

    number: int


class _Operation(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int | None, ...]  # numbers of what is new, in the order of its leaves
    nested: bool  # whether values lie deeper than among the arguments
    last: tuple[int, ...] = ()  # values that nobody reads any more

    def values(self) -> Iterator[int]:
        """What it reads."""
        return (x.number for x in tree_leaves((self.args, self.kwargs)) if _is_value(x))


def _is_value(x: Any) -> bool:
    return type(x) is _Value


def _reads_back(function: Any, args: Any) -> bool:
    """Whether what follows may depend on values that torch's ``function`` reads."""
    if function is torch.ops.aten.index.Tensor:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return any(tag in function.tags for tag in _VARIES)


def _leaves(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


_Geometry = tuple[Any, ...]


def _geometry(x: Tensor) -> _Geometry:
    return (x.shape, x.stride(), x.storage_offset(), x.dtype, x.is_conj(), x.is_neg())


class _Storage:
    """Memory that lies under values. As long as a weak reference is held, no other has its address
    in torch."""

    def __init__(self, x: Tensor, given: bool = False) -> None:
        storage = x.untyped_storage()
        self.address, self._alive = storage._cdata, StorageWeakRef(storage)
        self.given = given
        self.values: dict[_Geometry, int] = {}


def _seen_from(base: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    return base.as_strided(size, stride, base.storage_offset() + offset)


class _Reads(TorchFunctionMode):
    """Tells of values that are read where nobody sees it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READS and recorded.now.recorder is not None:
            self._recorder.refuse(f"{func.__name__}() reads a tensor where no recorder sees it")
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Takes note of all that is done with tensors in this thread while it is entered.

    Args:
        inputs: tensors that a program is given anew each time, of the same shapes, dtypes and
            strides.

    Attributes:
        reason: why what was done cannot be done again, None if nothing is against it.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.reason: str | None = None
        self._operations: list[_Operation] = []
        self._storages: dict[int, _Storage] = {}
        self._count = 0
        self._given = [self._new(x, given=True) for x in inputs]
        self._reads = _Reads(self)

    def __enter__(self) -> Recorder:
        self._reads.__enter__()
        super().__enter__()
        recorded.now.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        recorded.now.recorder = None
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def refuse(self, reason: str) -> None:
        """What is done now cannot be done again."""
        self.reason = self.reason or reason

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of :mod:`pygan.ops.recorded`; what it does inside is its own."""
        recorded.now.recorder = None
        try:
            result = function(*args, **kwargs)
            self._note(function, args, kwargs, result)
        finally:
            recorded.now.recorder = self
        return result

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if recorded.now.recorder is None:
            return func(*args, **kwargs)
        if _reads_back(func, args):
            self.refuse(f"{func} reads a value back")
        if func._schema.name in _MOVES:
            self.refuse(f"{func} moves a tensor")
        return self.call(func, args, kwargs)

    def _new(self, x: Tensor, *, given: bool = False) -> int:
        """The number of a value that has none."""
        storage = self._storages.get(x.untyped_storage()._cdata)
        if storage is None:
            storage = _Storage(x, given)
            self._storages[storage.address] = storage
        number, self._count = self._count, self._count + 1
        storage.values.setdefault(_geometry(x), number)
        return number

    def _known(self, x: Tensor) -> int | None:
        """The number of a value as it is."""
        storage = self._storages.get(x.untyped_storage()._cdata)
        return None if storage is None else storage.values.get(_geometry(x))

    def _named(self, x: Any) -> Any:
        """An argument as the program holds it: what is not made by it stays what it is."""
        if not isinstance(x, Tensor):
            return x
        if type(x) not in _PLAIN:
            self.refuse(f"there is a {type(x).__name__}, which is no plain tensor")
            return x
        if (number := self._known(x)) is not None:
            return _Value(number)
        storage = self._storages.get(x.untyped_storage()._cdata)
        if storage is None:
            return x
        # Autograd keeps a tensor of its own for what is saved, and views that no operation made.
        _, _, start, *kind = next(iter(storage.values))
        if storage.given or kind != [x.dtype, x.is_conj(), x.is_neg()]:
            self.refuse("memory of an input, or of another type, is read where no operation is")
            return x
        base = _Value(next(iter(storage.values.values())))
        number = self._new(x)
        where = (x.shape, x.stride(), x.storage_offset() - start)
        self._operations.append(_Operation(_seen_from, (base, *where), {}, (number,), False))
        return _Value(number)

    def _note(self, function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        args = tuple(tree_map(self._named, x) for x in args)
        kwargs = {name: tree_map(self._named, x) for name, x in kwargs.items()}
        values = sum(map(_is_value, tree_leaves((args, kwargs))))
        of_torch = isinstance(function, torch._ops.OpOverload)
        if function is torch.ops.aten.lift_fresh.default:
            # What Python made of numbers may be changed in place from now on, in every run anew.
            function, args = torch.ops.aten.clone.default, (args[0].detach().clone(),)
        elif of_torch and function.is_view and not values:
            return  # a view of what is held as it is
        numbers = [self._new(x) if self._known(x) is None else None for x in _leaves(result)]
        if all(number is None for number in numbers):
            if of_torch and not function._schema.is_mutable:
                return  # the same once more
            numbers = []
        nested = values > sum(map(_is_value, args))
        self._operations.append(_Operation(function, args, kwargs, tuple(numbers), nested))

    def program(self, results: Sequence[Tensor]) -> Program:
        """What was done, to get ``results``."""
        named = [*map(self._named, results)]
        if not all(map(_is_value, named)):
            self.refuse("a result comes from where no operation is")
        return Program(self._operations, self._count, self._given, named)


class Program:
    """Operations on numbered values."""

    def __init__(
        self,
        operations: Sequence[_Operation],
        count: int,
        given: Sequence[int],
        results: Sequence[Any],
    ) -> None:
        self._count, self._given, self._results = count, given, results
        self._operations = _with_last_readers(_needed(operations, results), results)

    def __len__(self) -> int:
        return len(self._operations)

    @torch.no_grad()
    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results of the same operations on other inputs."""
        values: list[Any] = [None] * self._count
        for place, x in zip(self._given, inputs, strict=True):
            values[place] = x

        def value(x: Any) -> Any:
            return values[x.number] if type(x) is _Value else x

        result: Any
        for function, args, kwargs, numbers, nested, last in self._operations:
            if nested:
                filled, named = tree_map(value, (args, kwargs))
                result = function(*filled, **named)
            else:
                result = function(
                    *[values[x.number] if type(x) is _Value else x for x in args], **kwargs
                )
            if numbers:
                made = (result,) if type(result) is Tensor else _leaves(result)
                for number, x in zip(numbers, made, strict=True):
                    if number is not None:
                        values[number] = x
                del made, x
            for place in last:
                values[place] = None
            del result
        return [values[x.number] for x in self._results]


def _needed(operations: Sequence[_Operation], results: Sequence[Any]) -> list[_Operation]:
    """Without those that change nothing and whose results nobody reads."""
    read = {x.number for x in results if _is_value(x)}
    kept = []
    for operation in reversed(operations):
        function = operation.function
        changes = function is not _seen_from and (
            not isinstance(function, torch._ops.OpOverload)
            or function._schema.is_mutable
            or torch.Tag.nondeterministic_seeded in function.tags
        )
        if changes or not read.isdisjoint(operation.results):
            read.update(operation.values())
            kept.append(operation)
    return kept[::-1]


def _with_last_readers(
    operations: Sequence[_Operation], results: Sequence[Any]
) -> list[_Operation]:
    left = {x.number for x in results if _is_value(x)}
    found = []
    for operation in reversed(operations):
        numbers = {*operation.values(), *(n for n in operation.results if n is not None)}
        found.append(operation._replace(last=tuple(sorted(numbers - left))))
        left |= numbers
    return found[::-1]
