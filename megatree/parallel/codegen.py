"""From a graph over local tensors to a plain Python function, bound to one rank's comm."""

import itertools
import linecache
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from megatree.parallel.bodies import run_body
from megatree.parallel.comm import BodyComm, RankComm, Transition, move, run_steps
from megatree.parallel.nodes import move_args
from megatree.parallel.scoped import NEEDS_COMM, scoped_op
from megatree.parallel.transitions import plan_move

_SIMPLE = (int, float, bool, str, type(None))
_serial = itertools.count()


def generate(graph: fx.Graph, comm: RankComm) -> Callable[..., Any]:
    """Write and compile the function of a graph: flat local tensors in, a flat tuple out.

    Values are deleted after their last use, so that memory is what hand-written code would take.
    """
    names: dict[fx.Node, str] = {}
    scope: dict[str, Any] = {}
    lines: list[str] = []
    last_use = _last_uses(graph)

    def constant(value: Any) -> str:
        name = f"c{len(scope)}"
        scope[name] = value
        return name

    def spell(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, tuple | list):
            inner = ", ".join(map(spell, value))
            if isinstance(value, list):
                return f"[{inner}]"
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, slice):
            return f"slice({spell(value.start)}, {spell(value.stop)}, {spell(value.step)})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {spell(v)}" for k, v in value.items()) + "}"
        if (
            isinstance(value, _SIMPLE)
            and value == value
            and value not in (float("inf"), -float("inf"))
        ):
            return repr(value)
        return constant(value)

    inputs: list[str] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"x{len(inputs)}"
            inputs.append(names[node])
        elif node.op == "output":
            lines.append(f"return {spell(tuple(node.args[0]))}")
        else:
            names[node] = f"v{len(names)}"
            lines.append(f"{names[node]} = {_call(node, comm, names, spell, constant)}")
            lines += [f"del {names[n]}" for n in last_use.get(node, ()) if n in names]
    name = f"<megatree program {next(_serial)}>"
    source = f"def program({', '.join(inputs)}):\n" + "".join(f"    {line}\n" for line in lines)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), scope)
    program = scope["program"]
    program.source = source
    return program


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return node -> the values that nobody needs after it."""
    out: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for value in node.all_input_nodes:
            if value not in seen:
                seen.add(value)
                if node.op == "call_function" and value.op == "call_function":
                    out.setdefault(node, []).append(value)
    return out


def _call(node: fx.Node, comm: RankComm, names: Any, spell: Any, constant: Any) -> str:
    if node.target is operator.getitem and isinstance(node.args[1], int):
        return f"{spell(node.args[0])}[{node.args[1]}]"
    comm = comm.at(node.meta.get("source", ""))
    if node.target is move:
        x, src, dst = move_args(node)
        steps, dual = plan_move(src, dst), plan_move(dst.dual, src.dual)
        if not steps and (not dual or not src.grad):
            return spell(x)
        return f"{constant(bound_move(comm, steps, dual, src.grad))}({spell(x)})"
    target: Any = node.target
    operands: Any = node.args
    first = [constant(comm)] if target in NEEDS_COMM else []
    if target in (scoped_op, run_body):  # called directly, with a comm made once
        target, table, *operands = operands
        target = target.fn if node.target is run_body else target
        first = [constant(BodyComm(comm, table))]
    args = first + [spell(a) for a in operands]
    args += [f"{key}={spell(value)}" for key, value in node.kwargs.items()]
    return f"{constant(target)}({', '.join(args)})"


def bound_move(comm: RankComm, steps: Any, dual: Any, grad: bool) -> Callable[[Tensor], Tensor]:
    """Return a transition as a function of the local tensor alone."""
    if not grad:
        return lambda x: run_steps(comm, x, steps)
    return lambda x: Transition.apply(x, comm, steps, dual)
