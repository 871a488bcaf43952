"""On one GPU: optimizers make the CPU's updates, wait for nothing, and ignore how buffers lie."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatree.runtime.optimizers import (
    GroupRule,
    Matrix,
    Optimizer,
    adamw,
    clip_value,
    lion,
    muon,
    sgd,
    with_ema,
)
from megatree.runtime.rounding import stochastic_round
from tests.tolerances import RELATIVE, distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

ROWS, SIZE = 2, 301
MATRIX = Matrix(start=7, shape=(16, 8), gather=lambda x: x, cut=lambda x: x)
GROUPS = {"w": GroupRule(matrices=(MATRIX,)), "b": GroupRule(lr=0.5, decay=0.0)}
OPTIMIZERS = {
    "adamw": adamw(1e-2),
    "adamw bf16": adamw(1e-2, moments=torch.bfloat16),
    "sgd": sgd(1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "lion": lion(1e-2),
    "muon": with_ema(muon(1e-2, others=adamw(1e-2)), 0.9),
}
every = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


@pytest.fixture
def waits_for_nothing() -> Iterator[None]:
    """Make it an error to wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def draw(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64).to(dtype)
        for name in GROUPS
    }


def run(
    optimizer: Optimizer, device: str, dtype: torch.dtype, cut: int = 0
) -> dict[str, dict[str, Tensor]]:
    """Return all buffers after ten steps, on the CPU; `cut` makes two groups of every "b"."""

    def placed(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = {name: b.to(device) for name, b in buffers.items()}
        if cut:
            b = whole.pop("b")
            whole |= {"b0": b[:, :cut].clone(), "b1": b[:, cut:].clone()}
        return whole

    groups = {**GROUPS, "b0": GROUPS["b"], "b1": GROUPS["b"]}
    params = placed(draw(0, dtype))
    state = optimizer.init(params, groups)
    scale = torch.tensor(0.3, device=device)
    for step in range(10):
        grads = placed(draw(step + 1, dtype))
        optimizer.update(params, grads, state, step=step, groups=groups, scale=scale)
    found = {}
    for entry, buffers in {"params": params, **state}.items():
        found[entry] = {name: b.cpu() for name, b in buffers.items() if name[0] != "b"}
        parts = [b.cpu() for name, b in buffers.items() if name[0] == "b"]
        if parts:
            found[entry]["b"] = torch.cat(parts, dim=1)
    return found


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_are_those_of_the_cpu(optimizer: Optimizer, dtype: torch.dtype) -> None:
    got, expected = run(optimizer, "cuda", dtype), run(optimizer, "cpu", dtype)
    for entry, buffers in expected.items():
        for name, buffer in buffers.items():
            assert distance(got[entry][name], buffer) < RELATIVE[buffer.dtype], (entry, name)


@every
@pytest.mark.parametrize("cut", [1, 3, 64, 150])
def test_updates_do_not_depend_on_how_buffers_are_cut(optimizer: Optimizer, cut: int) -> None:
    whole, parts = (run(optimizer, "cuda", torch.float32, c) for c in (0, cut))
    for entry, buffers in whole.items():
        for name, buffer in buffers.items():
            assert torch.equal(parts[entry][name], buffer), (entry, name)


@every
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.usefixtures("waits_for_nothing")
def test_an_overflow_leaves_every_bit_and_is_not_waited_for(optimizer: Optimizer) -> None:
    params = {
        name: b.pin_memory().cuda(non_blocking=True) for name, b in draw(0, torch.float32).items()
    }
    state = optimizer.init(params, GROUPS)
    before = {
        key: {n: b.clone() for n, b in of.items()} for key, of in {"p": params, **state}.items()
    }
    flag = torch.ones((), device="cuda")
    grads = {name: torch.full_like(b, float("nan")) for name, b in params.items()}
    clip_value(grads, flag)
    optimizer.update(params, grads, state, step=0, groups=GROUPS, scale=flag, found_inf=flag)
    torch.cuda.set_sync_debug_mode("default")
    for key, of in {"p": params, **state}.items():
        for name, buffer in of.items():
            assert torch.equal(buffer, before[key][name]), (key, name)


def test_stochastic_rounding_draws_what_the_cpu_draws() -> None:
    x = draw(0, torch.float32)["w"]
    for dtype in (torch.bfloat16, torch.float16):
        got = stochastic_round(x.cuda(), dtype, 5).cpu()
        assert torch.equal(got, stochastic_round(x, dtype, 5))
