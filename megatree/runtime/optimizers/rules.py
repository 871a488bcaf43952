"""Which leaf gets which multipliers: rules by patterns of paths."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, kw_only=True)
class LeafRule:
    """How a leaf differs from the others.

    Args:
        lr: times the learning rate.
        decay: times the weight decay.
        matrix: whether Muon orthogonalises its updates.
        columns_are_inputs: of a matrix, whether products contract its last dim.
    """

    lr: float = 1.0
    decay: float = 1.0
    matrix: bool = False
    columns_are_inputs: bool = True

    def __str__(self) -> str:
        kind = "matrix" if self.columns_are_inputs else "matrix of outputs"
        parts = [f"lr {self.lr!r}", f"decay {self.decay!r}", kind if self.matrix else ""]
        return " ".join(part for part in parts if part)


def decay_matrices(path: str, num_dims: int) -> LeafRule:
    """Decay leaves of two dims or more, not norms and biases."""
    return LeafRule(decay=1.0 if num_dims >= 2 else 0.0)


@dataclass(frozen=True)
class ByPath:
    """A rule for every leaf: `rules(path, num_dims)`; made by `by_path`."""

    patterns: tuple[tuple[str, LeafRule], ...]
    default: Callable[[str, int], LeafRule]

    def __call__(self, path: str, num_dims: int) -> LeafRule:
        """Return the rule of a leaf."""
        for pattern, rule in self.patterns:
            if fnmatchcase(path, pattern):
                return rule
        return self.default(path, num_dims)

    def check(self, paths: Iterable[str]) -> None:
        """Refuse patterns that match no leaf.

        Raises:
            ValueError: names the patterns (at most 8).
        """
        known = list(paths)
        idle = [p for p, _ in self.patterns if not any(fnmatchcase(path, p) for path in known)]
        if idle:
            raise ValueError(
                f"by_path: {len(idle)} of {len(self.patterns)} patterns match none of "
                f"{len(known)} leaves: {', '.join(map(repr, idle[:8]))}. Correct them by the "
                f"leaves' paths ({', '.join(known[:4])}, ...), or leave them out."
            )


def by_path(
    patterns: Mapping[str, LeafRule], default: Callable[[str, int], LeafRule] = decay_matrices
) -> ByPath:
    """Return (path, number of dims) -> rule: that of the first pattern that matches.

    A pattern is matched against the whole path; "*" stands for any characters, dots included. Its
    rule is the whole rule: LeafRule(lr=0.1) decays biases too.

    Args:
        patterns: pattern -> rule, in order of precedence.
        default: the rule of other leaves.

    >>> rules = by_path({"embed.*": LeafRule(lr=0.1), "blocks.*.w?": LeafRule(matrix=True)})
    >>> rules("blocks.dense.wq", 4)
    LeafRule(lr=1.0, decay=1.0, matrix=True, columns_are_inputs=True)
    >>> rules("blocks.dense.norm1.scale", 1).decay
    0.0
    """
    return ByPath(tuple(patterns.items()), default)
