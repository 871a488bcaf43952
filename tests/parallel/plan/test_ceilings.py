"""Ceilings of llama-1b on an H100 are what was measured of its parts one by one."""

from dataclasses import replace

import pytest
import torch

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.plan import H100_SXM, plan
from megatree.parallel.plan.ceilings import LOGIT_PASSES, ceilings, device_of
from megatree.parallel.precision import Precision
from megatree.recipes.presets import llama_1b

LLAMA_1B = llama_1b().model
MEASURED = {
    "GEMM": 244.0,  # kernel time of a step, 242 to 246
    "attention": 52.3,  # its FLOPs at 500 TFLOP/s, forward and backward
    "norm/elementwise": 34.7,  # one fused pass per stage
    "loss": 2.1,
    "optimizer": 9.0,  # one pass, 28 bytes per parameter
}
"""Milliseconds on one card, 8 sequences a step, bfloat16 with float32 masters and moments."""


def found(
    cfg: GPTConfig = LLAMA_1B, layout: Layout | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, float]:
    model, layout = gpt(cfg, batch_size=8, dtype=dtype), layout or Layout()
    made = plan(model, layout, precision=Precision(grads=torch.bfloat16))
    return ceilings(made, lower_model(model, layout), H100_SXM, dtype)


def test_they_are_the_measured_times_of_llama_1b() -> None:
    got = found()
    assert got.keys() == MEASURED.keys()
    for kind, expected in MEASURED.items():
        assert got[kind] * 1e3 == pytest.approx(expected, rel=0.07), kind
    assert sum(got.values()) * 1e3 == pytest.approx(355, rel=0.04)  # the floor of the whole step


@pytest.mark.parametrize("fused", [True, False])
def test_logits_are_counted_once_however_the_loss_is_written(fused: bool) -> None:
    got = found(replace(LLAMA_1B, fused_loss=fused))["loss"]
    logits = 8 * 4096 * 32768 * 2  # bytes
    assert got == pytest.approx(LOGIT_PASSES * logits / H100_SXM.memory_bandwidth, rel=1e-12)


def test_ranks_share_the_work_and_communicate() -> None:
    cut = Layout(Mesh(tp=2), Rules(kv_heads="tp", ffn="tp", vocab="tp"))
    plain = replace(LLAMA_1B, fused_loss=False)
    one, two = found(plain), found(plain, layout=cut)
    for kind in ("GEMM", "attention", "loss"):
        assert two[kind] == pytest.approx(one[kind] / 2, rel=1e-6), kind
    assert "communication" not in one
    # Four sums of the residual stream per layer, two more at the ends.
    stream = 8 * 4096 * 2048 * 2 / H100_SXM.node_bandwidth
    assert two["communication"] == pytest.approx((16 * 4 + 2) * stream, rel=0.05)


def test_rates_are_those_of_half_precision() -> None:
    assert found(dtype=torch.float32).keys() == {"norm/elementwise", "loss", "optimizer"}


def test_a_device_is_known_by_its_name() -> None:
    assert device_of("NVIDIA H100 80GB HBM3") is H100_SXM
    assert device_of("NVIDIA H100 PCIe") is None
    assert device_of("Some other card") is None
