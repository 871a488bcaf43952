"""What is cut for memory alone: axes that storage adds to those that cut a leaf for the maths."""

from dataclasses import dataclass

from megatree.parallel.errors import ShardingError

LEVELS = ("params", "grads", "opt")
"""From what is cut least to what is cut most."""

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Storage:
    """Mesh axes over which parameters, gradients and optimizer state are cut between uses.

    `Storage(opt="dp")` is ZeRO-1, `Storage(grads="dp", opt="dp")` ZeRO-2, all three ZeRO-3 (FSDP).
    With the mesh refined, `Storage(params="inner", grads="inner", opt="inner")` shards inside a
    node and replicates outside; `opt=("inner", "outer")` shards the optimizer's state further.

    Args:
        params: axes that cut parameters between uses.
        grads: axes that cut gradients between microbatches; they begin with those of params.
        opt: axes that cut moments and master weights; they begin with those of grads.

    Raises:
        ShardingError: an axis is named twice, or a level does not begin with the one before.

    Reference: Rajbhandari et al. 2020, "ZeRO", section 5.
    """

    params: Axes
    grads: Axes
    opt: Axes

    def __init__(
        self, params: str | Axes = (), grads: str | Axes = (), opt: str | Axes = ()
    ) -> None:
        for name, axes in zip(LEVELS, (params, grads, opt), strict=True):
            object.__setattr__(self, name, (axes,) if isinstance(axes, str) else tuple(axes))
        for coarse, fine in (("params", "grads"), ("grads", "opt")):
            a, b = getattr(self, coarse), getattr(self, fine)
            if b[: len(a)] != a:
                fixed = (*a, *(axis for axis in b if axis not in a))
                raise ShardingError(
                    f"storage: {fine}={b} does not begin with {coarse}={a}: what is cut for "
                    f"{coarse} is cut for {fine} too. Use {fine}={fixed}."
                )
        if len(set(self.opt)) != len(self.opt):
            raise ShardingError(f"storage: opt={self.opt} names an axis twice. Name each once.")

    def __bool__(self) -> bool:
        return bool(self.opt)

    def __str__(self) -> str:
        cut = {level: " ".join(getattr(self, level)) for level in LEVELS}
        return ", ".join(f"{level} {axes}" for level, axes in cut.items() if axes) or "whole"
