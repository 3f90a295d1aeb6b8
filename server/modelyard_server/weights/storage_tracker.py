"""Counts the memory that tensor operations hold, operation by operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from weakref import ref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["StorageTracker", "TooManyOperations"]

_ROUNDED_TO_BYTES: Final = 64
"""What torch's allocator of host memory aligns blocks to."""


class TooManyOperations(Exception):
    """More operations ran than the tracker was to follow."""


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, counts the storages that operations of this thread make.

    A storage counts once however many views there are of it, from the operation that returns it
    until nobody holds it. What operations take as arguments was there before and does not count,
    nor does what a kernel takes and gives back within one operation. Operations that are made of
    others are followed into those.

    Works on real tensors and on fake ones alike. The operations' results are what they are
    without it. Of other threads it sees nothing, and they see nothing of it.

    Args:
        most_operations: how many to follow; None for all.

    Attributes:
        now_bytes: what is held now of what was counted.
        peak_bytes: highest value of it.
    """

    def __init__(self, *, most_operations: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._left = most_operations
        # By address of the storage. An entry leaves when its storage goes, for then the next one
        # may get the same address.
        self._sizes: dict[int, int] = {}
        self._references: dict[int, ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: or the first operation would import torch's compiler, 1.8 s and 70 MB.

        Asked by torch when the class is made.
        """
        return False

    def know(self, tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> None:
        """Says that these were there before, so that they do not count."""
        for tensor in tensors:
            self._enter(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts what it returns. Called by torch."""
        kwargs = kwargs or {}
        if self._left is not None:
            if not self._left:
                raise TooManyOperations
            self._left -= 1
        if _is_composite(func):
            with self:
                result = self._decompose(func, args, kwargs)
            if result is not NotImplemented:
                return result
        self.know(_tensors(args))
        self.know(_tensors(kwargs))
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._enter(tensor, counts=True)
        return result

    def _decompose(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation that is made of others, as these; or answers NotImplemented."""
        return func.decompose(*args, **kwargs)

    def _enter(self, tensor: torch.Tensor, *, counts: bool) -> None:
        if tensor.layout is not torch.strided:
            return  # It has no storage of its own: its parts are tensors and come by themselves.
        storage = tensor.untyped_storage()
        key = storage._cdata
        size_bytes = -(-storage.nbytes() // _ROUNDED_TO_BYTES) * _ROUNDED_TO_BYTES
        known = self._sizes.get(key)
        if known is None:
            self._references[key] = ref(storage, lambda _: self._leave(key))
            self._sizes[key] = known = 0 if counts else -1
        # What was there before stays uncounted, also if it grows.
        if known >= 0 and size_bytes != known:
            self._sizes[key] = size_bytes
            self.now_bytes += size_bytes - known
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _leave(self, key: int) -> None:
        del self._references[key]
        self.now_bytes -= max(0, self._sizes.pop(key))


def _is_composite(func: Any) -> bool:
    """True for an operation that torch writes in terms of others, on every device."""
    # What fake tensors ask of themselves, their device for instance, is in no table of kernels.
    return func.namespace != "prim" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an operation's arguments or results: alone, in lists or as keywords."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
