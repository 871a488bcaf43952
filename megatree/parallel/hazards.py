"""What would silently go wrong in a trace, each refused by name."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatree.parallel.errors import ShardingError, StrayValueError
from megatree.parallel.sources import inside_autograd_function, user_line
from megatree.parallel.typed import TypedTensor, map_structure

if TYPE_CHECKING:
    from megatree.parallel.tracer import Tracer

_PROPERTIES = "shape dtype device ndim layout is_leaf requires_grad is_cuda is_meta itemsize nbytes"
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
    *(
        getattr(Tensor, name)
        for name in [
            "dim",
            "size",
            "numel",
            "nelement",
            "is_floating_point",
            "is_complex",
            "is_contiguous",
            "__len__",
        ]
    ),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
_READS = {
    getattr(Tensor, name)
    for name in [
        "item",
        "tolist",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__array__",
        "__contains__",
        "__iter__",
        "__complex__",
        "__long__",
    ]
} | {
    torch.equal,
    torch.allclose,
    torch.is_nonzero,
    Tensor.equal,
    Tensor.allclose,
    Tensor.is_nonzero,
}


def snapshot() -> dict[str, Any]:
    """Return the ambient contexts that would not be in a graph."""
    return {
        "no_grad": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "sdpa_kernel": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
    }


_FIXES = {
    "no_grad": "Use F.stop_gradient on the value",
    "autocast": "Cast with F.cast, or give parameters a dtype",
    "sdpa_kernel": "Choose the kernel with F.attention(..., kernel=...)",
}


def is_metadata(func: Callable[..., Any]) -> bool:
    """Whether a call only asks for shape, dtype and such, which are those of the whole value."""
    return func in _METADATA


def check(
    tracer: "Tracer",
    name: str,
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
    operands: list[TypedTensor],
) -> None:
    """Refuse a call that a trace cannot represent.

    Raises:
        ShardingError: the message names the line, the hazard and the fix.
    """
    for x in operands:
        refuse_stray(tracer, name, x)
    if not tracer.open or any(x.tracer is not tracer for x in operands):
        raise ShardingError(
            f"{user_line()}: {name}: a typed tensor is used outside the trace it belongs to "
            f"(a body "
            "that closes over it, or code after the trace). Pass it as an operand."
        )
    now = snapshot()
    if now != tracer.contexts:
        if inside_autograd_function():
            raise ShardingError(
                f"{user_line()}: {name}: a torch.autograd.Function is applied to a typed "
                f"tensor{_type_of(operands)}; its "
                'own backward would be lost. Declare the function that applies it with @op("...").'
            )
        changed = next(k for k in now if now[k] != tracer.contexts[k])
        raise ShardingError(
            f"{user_line()}: {name}: a context of {changed} is active, which a lowered "
            f"program does "
            f"not keep. {_FIXES[changed]}."
        )
    if isinstance(func, torch._ops.OpOverload):
        raise ShardingError(
            f"{user_line()}: {name}: a torch.func transform (grad, vmap, jvp) is applied to a "
            f"typed tensor{_type_of(operands)}. Apply it to what is lowered, or inside an "
            "op or a local_map."
        )
    if func in _READS:
        raise ShardingError(
            f"{user_line()}: {name}: a value{_type_of(operands)} flows into Python here, where "
            "every rank has only its part. Use torch.where or a mask; data-dependent code belongs "
            "in a local_map."
        )
    raw = getattr(func, "__name__", "")
    if raw == "__set__":
        raise ShardingError(
            f"{user_line()}: {name}: an attribute of a typed tensor is written, which a lowered "
            "program does not keep. Return a new value."
        )
    in_place = raw.startswith("__i") and raw not in (
        "__invert__",
        "__index__",
        "__iter__",
        "__int__",
    )
    if in_place or raw == "__setitem__" or (raw.endswith("_") and not raw.endswith("__")):
        raise ShardingError(
            f"{user_line()}: {raw}: an in-place write to a typed tensor{_type_of(operands)}. "
            "Write the out-of-place form (x = x + y, torch.where)."
        )
    for option in ("out", "inplace"):
        if kwargs.get(option) is not None and kwargs[option] is not False:
            raise ShardingError(
                f"{user_line()}: {name}: {option}= is an in-place write. Use the result."
            )
    if operands and _moves_device(raw, args, kwargs):
        raise ShardingError(
            f"{user_line()}: {name}: moves a typed tensor{_type_of(operands)} to a device. Lowered "
            "programs run on the rank's device; drop the device argument."
        )
    _refuse_plain(name, args, kwargs, operands)


def _type_of(operands: list[TypedTensor]) -> str:
    return f" ({operands[0].type_})" if operands else ""


def refuse_stray(tracer: "Tracer", name: str, x: TypedTensor) -> None:
    """Refuse a value that a segment of a chain has kept from another segment.

    Raises:
        StrayValueError: a cut may lie between the two, and only the carry crosses it.
    """
    if x.tracer is tracer or not (tracer.open and tracer.unit and x.tracer.unit):
        return
    raise StrayValueError(
        f"{tracer.unit}: {name} at {user_line()} uses a value of {x.tracer.unit} (made at "
        f"{x.node.meta['source']}) that is not in the carry; only the carry crosses a cut. Return "
        "it in the carry of every segment in between, or compute it in the chain's consts.",
        x.tracer.unit,
    )


def _moves_device(raw: str, args: Any, kwargs: Any) -> bool:
    return (
        raw in ("cpu", "cuda", "pin_memory")
        or any(isinstance(a, torch.device) for a in [*args, *kwargs.values()])
        or (raw == "to" and any(isinstance(a, str) for a in args))
        or isinstance(kwargs.get("device"), str | int)
    )


def _refuse_plain(name: str, args: Any, kwargs: Any, operands: list[TypedTensor]) -> None:
    def visit(x: Any) -> Any:
        if isinstance(x, Tensor) and not isinstance(x, TypedTensor):
            raise ShardingError(
                f"{user_line()}: {name}: mixes a plain tensor {list(x.shape)} with a typed one "
                f"({operands[0].type_}); whether it is whole or a shard cannot be known. "
                f"Pass it as "
                "an input, or make it inside the function (torch.arange, torch.tensor)."
            )
        return x

    if operands:
        map_structure(visit, (args, kwargs))
