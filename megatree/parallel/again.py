"""Calls that drop what autograd would save, and run again in the backward to make it."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class Keep:
    """How a tensor waits for the backward: here as it is.

    Only the innermost of nested `saved_tensors_hooks` sees a tensor, so what is to be done to it
    at several levels is composed of these by hand.
    """

    def pack(self, x: Tensor) -> Any:
        """Return what to hold instead of a tensor."""
        return x

    def unpack(self, kept: Any) -> Tensor:
        """Return the tensor."""
        return kept

    def hooks(self) -> saved_tensors_hooks:
        """Return a context in which autograd keeps tensors this way."""
        return saved_tensors_hooks(self.pack, self.unpack)


class _Saved(NamedTuple):
    """The n-th tensor that autograd saved during a call."""

    call: "Again"
    number: int

    def read(self) -> Tensor:
        if self.number not in self.call.made:
            self.call.again()
        return self.call.keep_made.unpack(self.call.made.pop(self.number))


class _Result:
    """A view of the n-th result of a call, saved by a later operation."""

    def __init__(self, call: "Again", number: int, x: Tensor) -> None:
        self.call, self.number = call, number
        self.view = tuple(x.shape), x.stride(), x.storage_offset()
        call.num_views[number] = call.num_views.get(number, 0) + 1

    def read(self) -> Tensor:
        call, number = self.call, self.number
        if number not in call.results:
            call.again()
        whole = call.results[number]
        call.num_views[number] -= 1
        if call.num_views[number] <= 0:
            del call.results[number]
        return whole.as_strided(*self.view)


class _Enough(Exception):  # noqa: N818 (no error)
    """All that was saved in the first run is made again."""


class Again:
    """One call of a function of tensors, that runs a second time in the backward.

    What autograd saves during the call is dropped. The first time that a backward asks for any of
    it, the call runs again on the inputs, which are kept, up to the last thing it saves. The graph
    that is differentiated remains the first run's, so the collectives of its backward run once.

    Args:
        fn: a function of tensors that always does the same.
        keep: how the inputs wait.
        keep_made: how what is made again waits for its use.
        second: what runs in the backward, if it is not `fn` itself.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        keep: Keep,
        keep_made: Keep,
        second: Callable[..., Any] | None = None,
    ) -> None:
        self.first, self.second = fn, second or fn
        self.keep, self.keep_made = keep, keep_made
        self.num_saved = 0
        self.made: dict[int, Any] = {}
        self.results: dict[int, Tensor] = {}
        self.num_views: dict[int, int] = {}
        """Of the results that later operations saved: the saved views that are still unread."""

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the first time."""
        self.inputs = [(self.keep.pack(x.detach()), x.requires_grad) for x in inputs]
        with saved_tensors_hooks(self._count, _Saved.read):
            out = self.first(*inputs)
        del self.first
        return out

    def _count(self, x: Tensor) -> _Saved:
        self.num_saved += 1
        return _Saved(self, self.num_saved - 1)

    def again(self) -> None:
        """Run once more: all that was saved is in `made` then, and needed results in `results`."""
        made: dict[int, Any] = {}

        def note(x: Tensor) -> None:
            # Nothing of this graph is differentiated; an output that it saved would never go.
            assert len(made) < self.num_saved, "the second run saves more than the first"
            made[len(made)] = self.keep_made.pack(x.detach())
            if len(made) == self.num_saved and not self.num_views:
                raise _Enough

        inputs = [self.keep.unpack(x).detach().requires_grad_(grad) for x, grad in self.inputs]
        out: Any = ()
        drop = saved_tensors_hooks(note, lambda x: x)
        with contextlib.suppress(_Enough), torch.enable_grad(), drop:
            out = self.second(*inputs)
        assert len(made) == self.num_saved, (
            f"the second run saves {len(made)} tensors, the first {self.num_saved}"
        )
        self.made = made
        self.results = {n: out[n].detach() for n, left in self.num_views.items() if left > 0}


class Results(Keep):
    """Keeps what calls give as a note to make it again, everything else in another way."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self._made: dict[int, tuple[StorageWeakRef, Again, int]] = {}

    def add(self, call: Again, inputs: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
        """Take note of a call's results."""
        own = {x.untyped_storage()._cdata for x in inputs}
        for number, x in enumerate(results):
            storage = x.untyped_storage()
            if storage._cdata not in own:
                # While this reference lives, no other storage gets the same address.
                self._made[storage._cdata] = StorageWeakRef(storage), call, number

    def close(self) -> None:
        """Forget the calls, which hold this; what is packed can be unpacked still."""
        self._made.clear()

    def pack(self, x: Tensor) -> Any:
        """Return a note for a view of a call's result."""
        found = self._made.get(x.untyped_storage()._cdata)
        return self.keep.pack(x) if found is None else _Result(found[1], found[2], x)

    def unpack(self, kept: Any) -> Tensor:
        """Return the tensor, made again if need be."""
        return kept.read() if isinstance(kept, _Result) else self.keep.unpack(kept)
