"""Which activations the backward computes again, as a value that a layout carries."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatree.parallel.errors import ShardingError

FAMILIES = {
    "activation": ("silu", "swiglu", "gelu", "gelu_tanh", "squared_relu", "relu", "tanh"),
    "attention": ("attention", "attention_blocks"),
    "dropout": ("dropout",),
    "norm": ("rms_norm", "layer_norm"),
    "rope": ("rope",),
}
"""Name in `Remat.ops` -> the ops it stands for."""

POLICIES = ("none", "selective", "full")
METHODS = ("uniform", "block")

Entry = tuple[str, int | None, int]
"""(unit, layer index within its kind or None, layer number)."""


@dataclass(frozen=True, kw_only=True)
class Remat:
    """What the layers of stacks keep for their backward, and what that computes again.

    Recomputation repeats the same operations on the same values (random ones are keyed), so
    losses and gradients are those of a run without it, bit for bit. Segments outside stacks keep
    all they need.

    Args:
        policy: "none" keeps everything. "selective" drops what the named ops save, and their
            results, and runs these ops again; no product and no collective is repeated. "full"
            keeps the carry that enters a group of layers and runs the group again.
        ops: with "selective": families ("attention", "norm", "activation", "rope", "dropout") or
            names of ops, as `Program.explain` prints them.
        regather: with "selective", whether what an all-gather gave is dropped and gathered again
            (sequence parallelism keeps shards then), and ops that gather by themselves count.
        method: with "full": "uniform" groups the layers of a stage by `layers`; "block" runs the
            first `layers` of a stage again, one by one, and keeps the others whole.
        layers: see `method`.
        offload: whether what layers keep goes to host memory and comes back, a layer ahead, in
            the backward.
        keep_weights: whether parameters that storage cuts stay gathered from the forward to the
            backward (Storage(params=...)); by default they are gathered again.

    Raises:
        ShardingError: an unknown name, or an option of another policy.

    Reference: Chen et al. 2016, arXiv:1604.06174 (full); Korthikanti et al. 2022,
    arXiv:2205.05198, section 5 (selective).
    """

    policy: str = "none"
    ops: tuple[str, ...] = ("attention", "norm", "activation")
    regather: bool = False
    method: str = "uniform"
    layers: int = 1
    offload: bool = False
    keep_weights: bool = False

    def __post_init__(self) -> None:
        for what, known in (("policy", POLICIES), ("method", METHODS)):
            if (value := getattr(self, what)) not in known:
                raise ShardingError(f"remat: {what}={value!r} is none of {', '.join(known)}.")
        if self.layers < 1:
            raise ShardingError(f"remat: layers={self.layers}. Give 1 or more layers per group.")
        if self.policy != "full" and (self.method, self.layers) != ("uniform", 1):
            raise ShardingError(
                f"remat: method={self.method!r}, layers={self.layers} say how whole layers are "
                f"grouped, and policy is {self.policy!r}. Use policy='full' or leave them out."
            )
        if self.policy != "selective" and self.regather:
            raise ShardingError(
                f"remat: regather says what single ops keep, and policy is {self.policy!r}. "
                "Use policy='selective' or leave it out."
            )
        if self.policy == "full" and self.keep_weights:
            raise ShardingError(
                "remat: policy='full' loads a layer's weights again with the layer. Leave "
                "keep_weights out."
            )

    def __bool__(self) -> bool:
        return self != Remat()

    def __str__(self) -> str:
        if self.policy == "full":
            how = {"uniform": "groups of", "block": "first"}[self.method]
            words = [f"full ({how} {self.layers})"]
        elif self.policy == "selective":
            words = [f"selective ({' '.join(self.ops)}{' gathers' if self.regather else ''})"]
        else:
            words = ["none"]
        words += ["offload"] if self.offload else []
        return ", ".join([*words, *(["weights stay"] if self.keep_weights else [])])

    @property
    def op_names(self) -> frozenset[str]:
        """The ops that "selective" runs again."""
        return frozenset(op for name in self.ops for op in FAMILIES.get(name, (name,)))

    def check_ops(self, known: set[str]) -> None:
        """Refuse a name that is neither a family nor an op of the model's stacks."""
        unknown = sorted({*self.ops} - {*FAMILIES} - known)
        if unknown and self.policy == "selective":
            raise ShardingError(
                f"remat: ops {unknown} are in no layer. Use {', '.join(sorted(FAMILIES))}, or one "
                f"of {', '.join(sorted(known))}."
            )

    def groups(self, entries: Sequence[Entry]) -> list[tuple[list[Entry], bool]]:
        """Cut the entries of a stage into what runs together; True for what runs again."""
        out: list[tuple[list[Entry], bool]] = []
        num_again = 0
        for entry in entries:
            again = self.policy == "full" and entry[1] is not None
            if again and self.method == "block":
                again = num_again < self.layers
                num_again += again
            if again and out and self._joins(entry, *out[-1]):
                out[-1][0].append(entry)
            else:
                out.append(([entry], again))
        return out

    def _joins(self, entry: Entry, group: list[Entry], again: bool) -> bool:
        """Whether a layer that runs again does so with those before it."""
        alike = again and _stack(group[-1]) == _stack(entry)
        return alike and self.method == "uniform" and len(group) < self.layers


def _stack(entry: Entry) -> str:
    return entry[0].rpartition(".")[0]
