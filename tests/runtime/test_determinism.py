"""The mode has an end, refuses kernels without an order, and asks of the environment."""

from typing import Any

import pytest
import torch

from megatree.functional import attention
from megatree.functional.chain import Chain
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout
from megatree.parallel.model import lower_model
from megatree.runtime.determinism import check_kernels, deterministic


def modes() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_the_mode_ends() -> None:
    before = modes()
    environ = {"NCCL_ALGO": "Ring"}
    with deterministic(device="cuda", environ=environ):
        assert modes() == (True, True, False)
        assert environ == {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert modes() == before
    assert environ == {"NCCL_ALGO": "Ring"}
    with pytest.raises(RuntimeError, match="stop"), deterministic():
        raise RuntimeError("stop")
    assert modes() == before


def test_off_is_off() -> None:
    before, environ = modes(), {"NCCL_ALGO": "NVLS"}
    with deterministic(False, device="cuda", environ=environ):
        assert modes() == before
    assert environ == {"NCCL_ALGO": "NVLS"}


@pytest.mark.parametrize("name", ["NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG"])
def test_an_environment_that_says_otherwise_is_refused(name: str) -> None:
    before, environ = modes(), {name: "NVLS"}
    with (
        pytest.raises(ValueError, match=rf"deterministic: {name} is 'NVLS' here, under which sums"),
        deterministic(device="cuda", environ=environ),
    ):
        pass
    assert modes() == before
    with deterministic(device="cpu", environ=environ):
        assert environ == {name: "NVLS"}, "a CPU asks nothing of it"


def test_an_operator_without_an_order_fails() -> None:
    with deterministic(), pytest.raises(RuntimeError, match="does not have a deterministic"):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)


def tiny(**kinds: Any) -> Chain:
    cfg = GPTConfig(
        vocab_size=32, seq_length=8, num_layers=2, embed=16, kv_heads=2, head_dim=8, ffn=24
    )
    return gpt(cfg, batch_size=4, **kinds)


def test_kernels_of_a_model() -> None:
    program = lower_model(tiny(), Layout())
    check_kernels(program)
    check_kernels(program, compiled=True, device="cpu")
    with pytest.raises(ValueError, match=r"deterministic: torch.compile chooses kernels by timing"):
        check_kernels(program, compiled=True, device="cuda")


def test_a_kernel_without_an_order_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatree.models.gpt as module

    source = next(name for name in dir(module) if name == "F")
    real = getattr(module, source)

    class Chosen:
        def __getattr__(self, name: str) -> Any:
            if name != "attention":
                return getattr(real, name)
            return lambda *args, **kwargs: attention(*args, **{**kwargs, "kernel": "cudnn"})

    monkeypatch.setattr(module, source, Chosen())
    with pytest.raises(
        ValueError, match=r"deterministic: \S+\.py:\d+: attention kernel 'cudnn': cuDNN's backward"
    ):
        check_kernels(lower_model(tiny(), Layout()))
