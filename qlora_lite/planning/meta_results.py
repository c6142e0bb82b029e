"""Results of operators on meta tensors, remembered.

torch finds the shape of most results in Python, 50 to 100 microseconds an operator, and a plan asks for the same ones
in every block and every candidate. Here an operator that makes new tensors runs once for each combination of shapes,
strides, types and other arguments; after that its results are made from what is known of them. One that writes into
its first argument, or into one that is named for its result, gives that back. Views, whatever else returns memory that
it was given, and what makes or changes real tensors (small tables, an optimizer's count of steps) always run.

Places of tokens follow from the lengths of rows: what is counted with ``arange``, and what is made of nothing else, can
have its values beside it, so that transformers' own attention can be told whether several rows are concatenated.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from qlora_lite.errors import first_line

_COUNTED = (torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step)
_EXPAND = torch.ops.aten.expand.default
_READ = torch.ops.aten._local_scalar_dense.default


class _Like(NamedTuple):
    """What makes a tensor without memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


_MAKES, _FIRST_ARGUMENT, _UNSEEN = "makes", "first argument", "unseen"
_REPEATED = 4  # times that places are given where text, time, height and width have their own (Qwen3.5)
MAX_KNOWN = 1 << 16  # results; a plan with its alternatives makes some hundreds


class NeedsValuesError(RuntimeError):
    """An operator cannot run on tensors without values; the message names it and gives torch's reason."""


class MetaResults:
    """Run operators; ``MetaResults()(func, args, kwargs)`` equals ``func(*args, **kwargs)`` on meta tensors.

    Args:
        with_values: keep those of places of tokens, which takes time with every operator.
    """

    def __init__(self, with_values: bool = False):
        self._with_values = with_values
        self._kinds: dict[object, str | None] = {}  # by operator
        self._known: dict[tuple, object] = {}
        self._values = WeakIdKeyDictionary()  # by the meta tensor that has them

    def __call__(self, func, args: tuple, kwargs: dict):
        """Return the operator's result.

        Args:
            func: an ``OpOverload``, as a dispatch mode is given it.

        Raises:
            NeedsValuesError: it cannot run on meta tensors.
        """
        if not self._with_values:
            return self._result(func, args, kwargs)
        if func is _READ and args[0] in self._values:
            return self._values[args[0]].item()
        result = self._result(func, args, kwargs)
        self._keep_values(func, args, kwargs, result)
        return result

    def _keep_values(self, func, args: tuple, kwargs: dict, result) -> None:
        """Compute the values of a result that follows from counted places alone; a much larger one is left."""
        counted = func in _COUNTED
        first = next((value for value in args if isinstance(value, torch.Tensor)), None)
        if not (counted or func._schema.is_mutable or first is None or first in self._values):
            return
        given = list(_tensors((args, tuple(kwargs.values()))))
        known = [tensor for tensor in given if tensor in self._values]
        if known and func._schema.is_mutable:
            self._values.clear()  # of views too
            return
        if not isinstance(result, torch.Tensor) or not result.is_meta:
            return
        most = sum(map(torch.numel, given)) * (_REPEATED if func is _EXPAND else 1)
        if counted or (given and len(known) == len(given) and result.numel() <= most):
            named = {key: self._real(value) for key, value in kwargs.items() if key != "device"}
            self._values[result] = func(*self._real(args), **named)

    def _real(self, value):
        if isinstance(value, torch.Tensor):
            return self._values[value]
        return [*map(self._real, value)] if isinstance(value, tuple | list) else value

    def _result(self, func, args: tuple, kwargs: dict):
        kind = self._kinds.get(func, _UNSEEN)
        if kind is _UNSEEN:
            kind = self._kinds[func] = _kind(func)
        if kind is None:
            return _run(func, args, kwargs)
        key = (func, *_key(args), *_key(kwargs.items()))
        known = self._known.get(key)
        if known is None:
            shape = None if kind is _MAKES else _written(kind, args, kwargs).shape
            result = _run(func, args, kwargs)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            if shape is None and _is_new(result, args):
                self._known[key] = _likes(result)
            elif shape is not None and result.is_meta and result.shape == shape:  # else it was resized
                self._known[key] = kind
            return result
        return _written(kind, args, kwargs) if known is kind else _made(known)


def _run(func, args: tuple, kwargs: dict):
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:  # torch has several wordings, and NotImplementedError is one of its subclasses
        raise NeedsValuesError(f"{func} cannot run without values ({first_line(error)})") from error


def _written(kind: str, args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if kind is _FIRST_ARGUMENT else kwargs[kind]


def _kind(func) -> str | None:
    """Return ``_MAKES`` for an operator with new results; for one that changes the values of an argument and returns it
    ``_FIRST_ARGUMENT``, or the name of that argument."""
    returns = func._schema.returns
    if not func._schema.is_mutable:
        makes = all(str(r.type) == "Tensor" and r.alias_info is None for r in returns)
        return _MAKES if returns and makes else None
    arguments = func._schema.arguments
    written = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if len(returns) != 1 or len(written) != 1 or returns[0].alias_info is None or torch.Tag.inplace_view in func.tags:
        return None
    if written[0].kwarg_only:
        return written[0].name
    return _FIRST_ARGUMENT if written == [arguments[0]] else None


def _key(values: Iterable) -> list:
    """Return what tells an operator's arguments apart, each tensor by its form, flat for speed."""
    key: list = []
    for value in values:
        if isinstance(value, torch.Tensor):
            key += value.shape, value.stride(), value.dtype, value.device
        elif isinstance(value, tuple | list):
            key += len(value), *_key(value)
        else:
            key += type(value), value  # 1, 1.0 and True are equal and promote differently
    return key


def _likes(result):
    if isinstance(result, torch.Tensor):
        return _Like(result.shape, result.stride(), result.dtype)
    return result if result is None else tuple(map(_likes, result))


def _made(known):
    if isinstance(known, _Like):
        return torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
    return known if known is None else tuple(map(_made, known))


def _is_new(result, args: tuple) -> bool:
    """Return whether all of a result is on the meta device and none is a view (``_unsafe_view`` does not declare
    its)."""
    given = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
    return all(tensor.is_meta and tensor.untyped_storage()._cdata not in given for tensor in _tensors(result))


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
