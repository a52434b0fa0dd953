"""What a piece of code does with tensors on a CPU, as a program that does it again.

A kernel leaves little of the interpreter in the caches, so that what Python and autograd do between
two of them takes ten times as long as in a loop of its own. A program is only the operations: those
of torch below autograd, and the functions of pygan that run kernels (:mod:`pygan.ops.recorded`).

    recorder = Recorder(inputs)
    with recorder:
        outputs = code(*inputs)
    program = recorder.program(outputs)     # unless recorder.reason says why it cannot be
    outputs = program.run(other_inputs)

Tensors that the code did not make itself, parameters and buffers, are held as they are, and changed
in place as the code changed them. Python is not repeated: numbers it counted, branches it took.
Whoever records sees to it that those, and the places of what is held, stay as they were.

Memory that the code asked for and let go lies in one region, each piece over those that are not
read any more, so that kernels are given addresses that are known before. The region is taken where
maps are (:mod:`pygan.ops.map_memory`) for as long as the program runs; should it lie elsewhere than
in the runs before, the addresses are made anew.
"""

from __future__ import annotations

import collections
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pygan.ops import map_memory, native, recorded
from pygan.ops.placement import Piece, places

aten = torch.ops.aten

# What reads values, or an address, where no recorder sees what becomes of them.
_READS = {
    *(Tensor.numpy, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__array__),
    *(Tensor.__dlpack__, Tensor.storage, Tensor.share_memory_),
}
_PLAIN = (Tensor, torch.nn.Parameter)
_MOVES = ("aten::set_", "aten::resize_")  # a tensor to another place
_VARIES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# What makes memory and leaves in it what is there.
_MAKES = {
    *(map_memory.empty.__wrapped__, map_memory.empty_like.__wrapped__),  # type: ignore[attr-defined]
    *(aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default),
    aten.new_empty.default,
}
_RUN: Callable[..., None] = native.run.__wrapped__  # type: ignore[attr-defined]
# What fills memory with one number, and what counts.
_FILLS = (aten.zeros.default, aten.zeros_like.default, aten.ones_like.default)
_COUNTS = (aten.add_.Tensor, aten.add_.Scalar)
_LITTLE = 1 << 16  # bytes
_PLACES = 4  # of the region, whose addresses are kept


@dataclass(frozen=True)
class _Value:
    """A tensor that the program makes or is given, by its number."""

    number: int


class _Operation(NamedTuple):
    """A function, torch's or one of :mod:`pygan.ops.recorded`, and what it is called with."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int | None, ...]  # numbers of what is new, in the order of its leaves
    sizes: tuple[int, ...] = ()  # bytes of the results

    def values(self) -> list[int]:
        """What it reads."""
        return [x.number for x in tree_leaves((self.args, self.kwargs)) if _is_value(x)]

    def made(self) -> Iterator[int]:
        return (number for number in self.results if number is not None)

    @property
    def of_torch(self) -> bool:
        return isinstance(self.function, torch._ops.OpOverload)

    @property
    def is_view(self) -> bool:
        return self.function is _seen_from or (self.of_torch and bool(self.function.is_view))

    @property
    def changes(self) -> bool:
        """Whether it does more than make its results."""
        if self.is_view or self.function in _MAKES:
            return False
        function = self.function
        return not self.of_torch or (
            function._schema.is_mutable or torch.Tag.nondeterministic_seeded in function.tags
        )


def _is_value(x: Any) -> bool:
    return type(x) is _Value


def _reads_back(function: Any, args: Any) -> bool:
    """Whether what follows may depend on values that torch's ``function`` reads."""
    if function is aten.index.Tensor:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return any(tag in function.tags for tag in _VARIES)


def _leaves(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class _Geometry(NamedTuple):
    """How a tensor lies over its memory."""

    size: torch.Size
    stride: tuple[int, ...]
    start: int
    kind: tuple[Any, ...]

    @classmethod
    def of(cls, x: Tensor) -> _Geometry:
        kind = (x.dtype, x.is_conj(), x.is_neg())
        return cls(x.shape, x.stride(), int(x.storage_offset()), kind)


class _Storage:
    """Memory that lies under values. As long as a weak reference is held, no other has its address
    in torch."""

    def __init__(self, x: Tensor, given: bool) -> None:
        storage = x.untyped_storage()
        self.address, self._alive = storage._cdata, StorageWeakRef(storage)
        self.size, self.given = storage.nbytes(), given
        self.values: dict[_Geometry, int] = {}

    def geometry(self, number: int) -> _Geometry:
        return next(geometry for geometry, value in self.values.items() if value == number)


def _seen_from(base: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    return base.as_strided(size, stride, int(base.storage_offset()) + offset)


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
        self._under: list[_Storage] = []  # each value
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

    def _storage(self, x: Tensor) -> _Storage | None:
        return self._storages.get(x.untyped_storage()._cdata)

    def _new(self, x: Tensor, *, given: bool = False) -> int:
        """The number of a value that has none."""
        storage = self._storage(x)
        if storage is None:
            storage = _Storage(x, given)
            self._storages[storage.address] = storage
        number = len(self._under)
        self._under.append(storage)
        storage.values.setdefault(_Geometry.of(x), number)
        return number

    def _known(self, x: Tensor) -> int | None:
        """The number of a value as it is."""
        storage = self._storage(x)
        return None if storage is None else storage.values.get(_Geometry.of(x))

    def _named(self, x: Any) -> Any:
        """An argument as the program holds it: what is not made by it stays what it is."""
        if not isinstance(x, Tensor):
            return x
        if type(x) not in _PLAIN:
            self.refuse(f"there is a {type(x).__name__}, which is no plain tensor")
            return x
        if (number := self._known(x)) is not None:
            return _Value(number)
        storage = self._storage(x)
        if storage is None:
            return x
        # Autograd keeps a tensor of its own for what is saved, and views that no operation made.
        (first, base), here = next(iter(storage.values.items())), _Geometry.of(x)
        if storage.given or first.kind != here.kind:
            self.refuse("memory of an input, or of another type, is read where no operation is")
            return x
        args = (_Value(base), here.size, here.stride, here.start - first.start)
        number = self._new(x)
        self._operations.append(_Operation(_seen_from, args, {}, (number,)))
        return _Value(number)

    def _note(self, function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        args = tuple(tree_map(self._named, x) for x in args)
        kwargs = {name: tree_map(self._named, x) for name, x in kwargs.items()}
        if function is aten.lift_fresh.default:
            # What Python made of numbers may be changed in place from now on, in every run anew.
            function, args = aten.clone.default, (args[0].detach().clone(),)
        operation = _Operation(function, args, kwargs, ())
        if operation.is_view and not operation.values():
            return  # a view of what is held as it is
        numbers = [self._new(x) if self._known(x) is None else None for x in _leaves(result)]
        if any(number is not None for number in numbers):
            sizes = tuple(x.numel() * x.itemsize for x in _leaves(result))
            operation = operation._replace(results=tuple(numbers), sizes=sizes)
        elif not operation.changes:
            return  # the same once more
        self._operations.append(operation)

    def program(self, results: Sequence[Tensor]) -> Program:
        """What was done, to get ``results``."""
        named = [*map(self._named, results)]
        if not all(map(_is_value, named)):
            self.refuse("a result comes from where no operation is")
        numbers = [x.number for x in named if _is_value(x)]
        return Program(self._operations, self._under, self._given, numbers)


class _Memory(NamedTuple):
    """Of a value, in the region."""

    geometry: _Geometry
    piece: Piece  # moments are operations
    offset: int = 0

    @property
    def span(self) -> tuple[int, int]:
        return self.offset, self.piece.size

    def over(self, buffer: Any) -> Tensor:
        """A tensor over other memory of this size."""
        size, stride, start, (dtype, *_) = self.geometry
        flat = torch.frombuffer(buffer, dtype=dtype, count=self.piece.size // dtype.itemsize)
        return flat.as_strided_(size, stride, start)  # in place: no view of another tensor


class _Bound(NamedTuple):
    """An operation with all that is known of it before a run."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    nested: bool | None  # whether values lie deeper than among the arguments; None without any
    results: tuple[int | None, ...]
    last: tuple[int, ...] = ()  # values that nobody reads any more


class Program:
    """Operations on numbered values."""

    def __init__(
        self,
        operations: Sequence[_Operation],
        under: Sequence[_Storage],
        given: Sequence[int],
        results: Sequence[int],
    ) -> None:
        self._count, self._given, self._results = len(under), given, results
        self._operations = _gathered(_needed(operations, results))
        self._memory, self._size = _memory(self._operations, under, results)
        # Results that lie there are handed out, with their memory.
        lies = {under[number].address: memory for number, memory in self._memory.items()}
        kept = {}
        for number in results:
            if (memory := lies.get(under[number].address)) is not None:
                kept[number] = memory._replace(geometry=under[number].geometry(number))
        self._kept = sorted(kept.items(), key=lambda item: item[1].offset)
        scratch = (x for o in self._operations for x in o.args if type(x) is native.Scratch)
        self._scratch = max((x.size for x in scratch), default=0)
        self._bound: dict[tuple[int, int], list[_Bound]] = {}

    def __len__(self) -> int:
        """Operations in a run."""
        return len(next(iter(self._bound.values()), self._operations))

    @torch.no_grad()
    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results of the same operations on other inputs."""
        region = map_memory.Region(self._size)
        place = (region.address, native.scratch(self._scratch))
        bound = self._bound.get(place)
        if bound is None:
            while len(self._bound) >= _PLACES:
                del self._bound[next(iter(self._bound))]
            bound = self._bound[place] = self._bind(place[0])
        values: list[Any] = [None] * self._count
        for number, x in zip(self._given, inputs, strict=True):
            values[number] = x

        def value(x: Any) -> Any:
            return values[x.number] if type(x) is _Value else x

        result: Any
        for function, args, kwargs, nested, results, last in bound:
            if nested is None:
                result = function(*args, **kwargs)
            elif nested:
                filled, named = tree_map(value, (args, kwargs))
                result = function(*filled, **named)
            else:
                result = function(
                    *[values[x.number] if type(x) is _Value else x for x in args], **kwargs
                )
            if results:
                made = (result,) if type(result) is Tensor else _leaves(result)
                for i, x in zip(results, made, strict=True):
                    if i is not None:
                        values[i] = x
                del made, x
            for i in last:
                values[i] = None
            del result
        buffers = region.part([memory.span for _, memory in self._kept])
        for (i, memory), buffer in zip(self._kept, buffers, strict=True):
            values[i] = memory.over(buffer)
        return [values[i] for i in self._results]

    def _bind(self, start: int) -> list[_Bound]:
        """The operations where the region lies at the address ``start``."""
        static: dict[int, Tensor] = {}
        for number, memory in self._memory.items():
            # Not its owner: the region is.
            array = ctypes.c_char * memory.piece.size
            static[number] = memory.over(array.from_address(start + memory.offset))

        def known(x: Any) -> Any:
            return static.get(x.number, x) if type(x) is _Value else x

        found: list[_Bound] = []
        for operation in self._operations:
            if any(number in static for number in operation.made()):
                continue
            args, kwargs = tree_map(known, (operation.args, operation.kwargs))
            values = sum(map(_is_value, tree_leaves((args, kwargs))))
            function, results = operation.function, operation.results
            if operation.is_view and not values:
                made = zip(results, _leaves(function(*args, **kwargs)), strict=True)
                static |= {number: x for number, x in made if number is not None}
                continue
            if function is _RUN and not values:
                function, args = args[0], native.addresses(args[1:])
            nested = values > sum(map(_is_value, args)) if values else None
            found.append(_Bound(function, tuple(args), kwargs, nested, results))
        return _with_last_readers(found, self._results)


def _with_last_readers(operations: Sequence[_Bound], results: Sequence[int]) -> list[_Bound]:
    left = set(results)
    found = []
    for operation in reversed(operations):
        leaves = tree_leaves((operation.args, operation.kwargs))
        numbers = {x.number for x in leaves if _is_value(x)}
        numbers |= {number for number in operation.results if number is not None}
        found.append(operation._replace(last=tuple(sorted(numbers - left))))
        left |= numbers
    return found[::-1]


def _needed(operations: Sequence[_Operation], results: Sequence[int]) -> list[_Operation]:
    """Without those that change nothing and whose results nobody reads."""
    read = set(results)
    kept = []
    for operation in reversed(operations):
        if operation.changes or not read.isdisjoint(operation.made()):
            read.update(operation.values())
            kept.append(operation)
    return kept[::-1]


def _gathered(operations: Sequence[_Operation]) -> list[_Operation]:
    """Those that may come first do: in a row they take a microsecond each, behind a kernel a
    hundred. They read nothing that is made here, and what of memory they make is little."""
    readers = collections.Counter(
        address for operation in operations for address in _addresses(operation)
    )

    def may_come_first(operation: _Operation) -> bool:
        if not operation.of_torch or operation.is_view or operation.values():
            return False
        if operation.function in _FILLS:
            return all(size <= _LITTLE for size in operation.sizes)
        # It changes what nobody else looks at: the count of a batch norm's batches.
        alone = all(readers[address] == 1 for address in _addresses(operation))
        return alone and operation.function in _COUNTS

    first = [operation for operation in operations if may_come_first(operation)]
    return first + [operation for operation in operations if not may_come_first(operation)]


def _addresses(operation: _Operation) -> list[int]:
    """Of the memory of what is held as it is."""
    return [x.untyped_storage()._cdata for x in _leaves((operation.args, operation.kwargs))]


def _memory(
    operations: Sequence[_Operation], under: Sequence[_Storage], results: Sequence[int]
) -> tuple[dict[int, _Memory], int]:
    """What lies in the region, and its size: memory that is made for what is written later, and of
    results only what the maps' own memory would hold as well. Little ones that somebody keeps would
    else leave no room for the next region."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, operation in enumerate(operations):
        for number in (*operation.values(), *operation.made()):
            last[under[number].address] = i
            first.setdefault(under[number].address, i)
    handed_out = collections.Counter(under[number].address for number in set(results))
    last |= dict.fromkeys(handed_out, len(operations))
    found: dict[int, _Memory] = {}
    for operation in operations:
        if operation.function not in _MAKES:
            continue
        (number,) = operation.made()
        storage = under[number]
        geometry, of = next(iter(storage.values.items()))
        plain = geometry.kind[1:] == (False, False) and geometry.start == 0 and storage.size > 0
        if storage.address in handed_out:
            alone = handed_out[storage.address] == 1
            plain &= alone and storage.size >= map_memory.SMALLEST
        if of == number and plain:
            span = (first[storage.address], last[storage.address])
            found[number] = _Memory(geometry, Piece(storage.size, *span))
    offsets, size = places([memory.piece for memory in found.values()])
    placed = zip(found.items(), offsets, strict=True)
    return {number: each._replace(offset=offset) for (number, each), offset in placed}, size
