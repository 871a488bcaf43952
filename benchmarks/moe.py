"""A mixture of experts on one GPU, forward and backward, beside layers written by hand, products
alone and Hugging Face, in one run on one card.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatree.functional as F
from benchmarks import moe_control, moe_dispatch
from megatree.functional.param import Array, Param
from megatree.parallel.comm import OneDevice
from megatree.parallel.layout import Layout
from megatree.parallel.lower import lower

CONTROL = "grouped, compiled"
LIMIT = 1.0
"""Largest ratio of our best time to the control's."""
SAME = 0.15
"""Largest distance of results: routers in bfloat16 and in float32 choose otherwise where scores are
all but equal, 1% of tokens."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a layer.

    Args:
        tokens, embed, ffn, experts, top_k: of one microbatch; `ffn` of each expert.
        ways: what is timed, by name.
    """

    tokens: int
    embed: int
    ffn: int
    experts: int
    top_k: int
    ways: tuple[str, ...]

    @property
    def flops(self) -> int:
        """FLOPs of the experts' products, forward and backward."""
        return 3 * 3 * 2 * self.tokens * self.top_k * self.embed * self.ffn


OURS = ("megatree", "megatree, compiled")
SHAPES: Mapping[str, Shape] = {
    "8-top-2": Shape(
        tokens=16384,
        embed=2048,
        ffn=5632,
        experts=8,
        top_k=2,
        ways=(
            *OURS,
            "grouped",
            CONTROL,
            "loop",
            "balanced, compiled",
            "dense, compiled",
            "hugging face",
            "hugging face, grouped",
        ),
    ),
    "64-top-6": Shape(
        tokens=16384,
        embed=2048,
        ffn=1408,
        experts=64,
        top_k=6,
        ways=(*OURS, CONTROL, "balanced, compiled", "dense, compiled"),
    ),
}
"""Name -> shape."""

Call = Callable[[], list[Tensor]]
"""Forward and backward: the result, then the gradients of the tokens and of the router."""


def our_layer(w: Any, x: Tensor, top_k: int) -> Tensor:
    """Route in float32, bring tokens to experts and back: what a block of `moe` does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(F.cast(x, wide), F.cast(w["router"], wide))
    gates, choice = F.route(logits, k=top_k)
    return F.experts(x, gates, choice, [w["w_gate"], w["w_up"], w["w_down"]])


def lowered(shape: Shape, x: Tensor) -> tuple[list[str], Callable[..., tuple[Tensor, ...]]]:
    """Lower our layer for one device; return the names of its inputs, and its function."""
    expert = Param("experts expert_ffn embed")
    params = {
        "router": Param("choices embed"),
        **dict.fromkeys(("w_gate", "w_up", "w_down"), expert),
    }
    sizes = {
        "batch": 1,
        "seq_moe": shape.tokens,
        "embed": shape.embed,
        "experts": shape.experts,
        "choices": shape.experts,
        "expert_ffn": shape.ffn,
    }
    tokens = Array("batch seq_moe embed", x.dtype, grad=True)

    def layer(w: Any, x: Tensor) -> Tensor:
        return our_layer(w, x, shape.top_k)

    program = lower(layer, Layout(), params, tokens, sizes=sizes, dtype=x.dtype)
    return list(program.types), program.bind(OneDevice(x.device))


def values(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw tokens and weights, and lay those out that others want otherwise."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 0.02) -> Tensor:
        out = torch.empty(*size, device=device).normal_(0, std, generator=draw)
        return out.to(dtype).requires_grad_()

    inner = (shape.experts, shape.ffn, shape.embed)
    out = {
        "x": normal(shape.tokens, shape.embed, std=1.0),
        "grad": normal(shape.tokens, shape.embed, std=1.0).detach(),
        "w.router": normal(shape.experts, shape.embed),
        **{f"w.{name}": normal(*inner) for name in ("w_gate", "w_up", "w_down")},
    }
    into = torch.cat([out["w.w_gate"].detach(), out["w.w_up"].detach()], 1)
    out["into"] = into.transpose(1, 2).contiguous().requires_grad_()
    return out


def call_of(way: str, shape: Shape, has: Mapping[str, Tensor]) -> Call:
    """Return what is timed under a name."""
    name, _, how = way.partition(", ")
    transform = partial(torch.compile, dynamic=False) if how == "compiled" else lambda fn: fn
    grad = has["grad"]
    if name == "megatree":
        names, fn = lowered(shape, has["x"])
        fn = transform(fn)
        inputs = [has[n].unsqueeze(0) if n == "x" else has[n] for n in names]
        leaves = [has[n] for n in ("x", "w.router", "w.w_gate", "w.w_up", "w.w_down")]
        run: Callable[[], Tensor] = lambda: fn(*inputs)[0].squeeze(0)  # noqa: E731
    elif name == "hugging face":
        block = hugging_face(shape, has, "grouped_mm" if how else "eager")
        x = has["x"].unsqueeze(0)
        leaves = [has["x"], block.gate.weight, *block.experts.parameters()]
        run = lambda: block(x).squeeze(0)  # noqa: E731
    else:
        layer = transform(moe_control.LAYERS[name])
        leaves = [has[n] for n in ("x", "w.router", "into", "w.w_down")]
        run = lambda: layer(*leaves, shape.top_k)  # noqa: E731
    routed = name not in ("balanced", "dense")
    wanted = leaves if routed else [leaves[0], *leaves[2:]]

    def call() -> list[Tensor]:
        y = run()
        x_grad, router, *_ = torch.autograd.grad(y, wanted, grad)
        return [y.detach(), x_grad, router] if routed else []

    return call


def hugging_face(shape: Shape, has: Mapping[str, Tensor], way: str) -> Any:
    """Return `MixtralSparseMoeBlock` with the same weights, its experts computed in one way."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    cfg = MixtralConfig(
        hidden_size=shape.embed,
        intermediate_size=shape.ffn,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    cfg._experts_implementation = way
    x = has["x"]
    with torch.device(x.device):
        block = MixtralSparseMoeBlock(cfg).to(x.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(has["w.router"])
        block.experts.gate_up_proj.copy_(has["into"].transpose(1, 2))
        block.experts.down_proj.copy_(has["w.w_down"].transpose(1, 2))
    return block


def timed(call: Call, device: torch.device, steps: int) -> list[float]:
    """Return milliseconds of calls, by events on a GPU."""
    if device.type != "cuda":
        out = []
        for _ in range(steps):
            start = time.perf_counter()
            call()
            out.append((time.perf_counter() - start) * 1e3)
        return out
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    call()  # fills the queue: the first event is not recorded on an idle GPU
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def measure(
    name: str, shape: Shape, device: torch.device, *, steps: int = 10, rounds: int = 3
) -> list[dict[str, Any]]:
    """Time all ways in turns; one that fails says so in its row and the others go on."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    has = values(shape, device, dtype)
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    expected: list[Tensor] = []
    for way in shape.ways:
        start = time.perf_counter()
        row: dict[str, Any] = {"benchmark": "moe", "shape": name, "row": way}
        rows[way] = row
        try:
            calls[way] = call_of(way, shape, has)
            found = [t.float() for t in calls[way]()]
            row["first_s"] = round(time.perf_counter() - start, 2)
            if found:  # the result and the gradients of tokens and router
                expected = expected or [t.float() for t in call_of("grouped", shape, has)()]
                pairs = list(zip(found, expected, strict=True))
                row["distance"] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
            for _ in range(3):
                calls[way]()
        except Exception as error:  # one way must not lose the others
            calls.pop(way, None)
            row["error"] = f"{type(error).__name__}: {error}"[:600]
        print(f"  {name}: {way}: {row.get('error', 'ready')}", flush=True)
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(rounds):
        for way, call in calls.items():  # in turns: a card that slows down slows all
            times[way] += timed(call, device, steps)
    for way, ms in times.items():
        median = statistics.median(ms)
        rows[way] |= {"ms": median, "least_ms": min(ms), "tflops": shape.flops / median / 1e9}
    control = rows.get(CONTROL, {}).get("ms")
    products = rows.get("dense, compiled", {}).get("ms")
    for row in rows.values():
        if "ms" in row and control:
            row["of_control"] = row["ms"] / control
        if "ms" in row and products:
            row["of_products"] = products / row["ms"]
    return list(rows.values())


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table, then a JSON line per row."""
    print(f"{'':32} {'ms':>9} {'least':>9} {'TFLOP/s':>8} {'of control':>10} {'products':>9}")
    for row in rows:
        head = f"{row['shape']}: {row['row']}"
        if "ms" not in row:
            print(f"{head:32} failed: {row.get('error', '')[:120]}")
            continue
        ratio, share = row.get("of_control"), row.get("of_products")
        print(
            f"{head:32} {row['ms']:9.3f} {row['least_ms']:9.3f} {row['tflops']:8.1f} "
            f"{'' if ratio is None else f'{ratio:.3f}':>10} "
            f"{'' if share is None else f'{share:.1%}':>9}"
        )
    for row in rows:
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))


def tiny(shape: Shape) -> Shape:
    """Return a shape with the same ways that a CPU runs at once."""
    small = {"tokens": 48, "embed": 16, "ffn": 24, "experts": 4, "top_k": 2}
    ways = tuple(way for way in shape.ways if not way.endswith(("compiled", "face, grouped")))
    return replace(shape, ways=ways, **small)


def check(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong: other results than by hand, or slower than the control."""
    wrong = [
        f"{row['shape']}: {row['row']}: distance {row['distance']:.3f} (at most {SAME})"
        for row in rows
        if not row.get("distance", 0.0) <= SAME
    ]
    for name in {row["shape"] for row in rows}:
        ours = [r for r in rows if r["shape"] == name and r["row"] in OURS and "of_control" in r]
        if ours and (best := min(row["of_control"] for row in ours)) > LIMIT:
            wrong.append(f"{name}: {best:.3f} of the control (at most {LIMIT})")
    return wrong


def card(device: torch.device) -> str:
    """Return the name of what computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def main() -> None:
    """Measure, and fail where results differ or the control is faster."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--ways", default="", help="names apart by ';', instead of all")
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=None, help="JSON lines are added to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    for name in args.shapes:
        shape = tiny(SHAPES[name]) if args.tiny else SHAPES[name]
        if args.ways:
            shape = replace(shape, ways=tuple(args.ways.split(";")))
        found = measure(name, shape, device, steps=args.steps, rounds=args.rounds)
        for row in found:
            row |= {"card": card(device), "torch": torch.__version__, "tiny": args.tiny}
            row |= {"date": time.strftime("%Y-%m-%d"), "commit": args.commit}
        show(found)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
        rows += found
    if device.type == "cpu":
        moe_dispatch.keep_memory()
        sizes = [1024, 2048] if args.tiny else [1 << n for n in range(12, 17)]
        moe_dispatch.report(sizes, runs=3)
        return
    wrong = check(rows)
    assert not wrong, "; ".join(wrong)


if __name__ == "__main__":
    main()
