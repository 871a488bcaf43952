"""Trees of arrays: leaf paths as users read them ("blocks.wq"), over optree."""

from collections.abc import Callable
from typing import Any

import optree


def path_name(path: tuple[Any, ...]) -> str:
    """Spell an optree path ("blocks", 0, "wq") as "blocks.0.wq"."""
    return ".".join(str(part) for part in path)


def leaves_of(tree: Any) -> list[Any]:
    """Return the leaves of a tree of anything, dict keys sorted."""
    return optree.tree_leaves(tree)


def flatten_with_paths(tree: Any) -> tuple[list[Any], list[Any], optree.PyTreeSpec]:
    """Return the paths, leaves and structure of a tree of anything."""
    return optree.tree_flatten_with_path(tree)


def flatten_with_names(tree: Any) -> tuple[list[str], list[Any], optree.PyTreeSpec]:
    """Return the names, leaves and structure of a tree, in one order (dict keys sorted)."""
    paths, leaves, spec = optree.tree_flatten_with_path(tree)
    return [path_name(path) for path in paths], leaves, spec


def map_with_names(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map `fn(name, leaf, *leaves of rest)` over trees of one structure."""
    names, leaves, spec = flatten_with_names(tree)
    others = [spec.flatten_up_to(other) for other in rest]
    return spec.unflatten(
        [fn(name, leaf, *more) for name, leaf, *more in zip(names, leaves, *others, strict=True)]
    )
