"""Floating-point operations of a lowered program, from the types of its nodes."""

import math

from torch import fx

from megatree.functional.local_map import LocalMap
from megatree.functional.signature import Signature
from megatree.parallel.bodies import run_body
from megatree.parallel.program import Program
from megatree.parallel.types import ShardType

ATTENTION = ("attention", "attention_blocks")


def forward_flops(program: Program, *, local: bool) -> int:
    """Count the FLOPs of one forward run: products, attention, and what bodies say of theirs
    (experts: those of the choices); elementwise work is not counted.

    A product costs 2 FLOPs per element of its label space. Causal attention counts half of its
    two products, 2 b h t s k in all. The backward costs twice the forward.

    Args:
        program: a lowered program.
        local: of one rank; else of the whole mesh.
    """
    sizes = program.mesh_sizes if local else {}
    return sum(node_flops(node, sizes, local=local) for node in program.graph.nodes)


def node_flops(node: fx.Node, sizes: dict[str, int], *, local: bool) -> int:
    """Count the FLOPs of one node; see `forward_flops`."""
    sig: Signature | None = node.meta.get("product")
    operands: list[ShardType] = [n.meta["type"] for n in node.all_input_nodes]

    def shape(ty: ShardType) -> tuple[int, ...]:
        return ty.local_shape(sizes) if local else ty.shape

    if sig is not None:
        extent: dict[str, int] = {}
        for labels, ty in zip(sig.operands, operands, strict=False):
            extent.update({x: n for x, n in zip(labels, shape(ty), strict=True) if x is not None})
        return 2 * math.prod(extent.values())
    if node.target is run_body:
        spec = node.args[0]
        assert isinstance(spec, LocalMap)
        return spec.flops([shape(ty) for ty in operands]) if spec.flops else 0
    if node.meta.get("op") == "linear_cross_entropy":
        x, table = (shape(ty) for ty in operands[:2])
        return 2 * math.prod(x) * table[0]
    if node.meta.get("op") in ATTENTION:
        q, _, v = (shape(ty) for ty in operands[:3])
        # A rank's queries see all sources, those of other ranks (of a cut sequence) too.
        pairs = math.prod(q[:-1]) * operands[1].shape[1]
        causal = node.kwargs.get("causal", True)
        return 2 * pairs * (q[-1] + v[-1]) // (2 if causal else 1)
    return 0


def attention_flops(program: Program, *, local: bool) -> int:
    """Count the FLOPs of attention in one forward run; see `forward_flops`."""
    sizes = program.mesh_sizes if local else {}
    nodes = [node for node in program.graph.nodes if node.meta.get("op") in ATTENTION]
    return sum(node_flops(node, sizes, local=local) for node in nodes)


def narrowest_product(program: Program) -> int | None:
    """Return the smallest extent (rows, columns or depth) of a product on one rank."""
    extents = []
    for node in program.graph.nodes:
        sig: Signature | None = node.meta.get("product")
        if sig is None or len(sig.operands) != 2:
            continue
        types = [n.meta["type"] for n in node.all_input_nodes]
        left, right = (
            dict(zip(labels, ty.local_shape(program.mesh_sizes), strict=True))
            for labels, ty in zip(sig.operands, types, strict=True)
        )
        inner = math.prod(n for label, n in left.items() if label in sig.sums)
        rows = math.prod(n for label, n in left.items() if label not in right)
        columns = math.prod(n for label, n in right.items() if label not in left)
        extents.append(min(inner, rows, columns))
    return min(extents, default=None)
