"""Shares of a profile are by hand, from events that were made up."""

from typing import Any

import pytest

from megatree.runtime.op_kinds import OPTIMIZER_MARK, WORK, Kind, kind_of_kernel, kind_of_op
from megatree.runtime.time_table import WINDOW, Event, Row, TimeTable, read_trace, time_table

KERNELS: dict[str, Kind] = {
    "nvjet_tst_192x192_64x4_1x2_h_bz_coopB_NNT": "GEMM",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "GEMM",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "GEMM",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "GEMM",
    "triton_tem_fused_mm_3": "GEMM",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6": "attention",
    "cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16>": "attention",
    "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": "attention",
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90": "attention",
    "_adamw": "optimizer",
    "_statistics": "loss",
    "_gradient": "loss",
    "void at::native::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>": "loss",
    "triton_red_fused__log_softmax_nll_loss_forward_2": "loss",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "Memcpy DtoD (Device -> Device)": "copy",
    "Memset (Device)": "copy",
    "triton_red_fused__fused_rms_norm_add_0": "norm/elementwise",
    "triton_poi_fused__scaled_dot_product_cudnn_attention_transpose_1": "norm/elementwise",
    "triton_poi_fused_mul_silu_split_4": "norm/elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>":
        "norm/elementwise",
}  # fmt: skip

OPS: dict[str, Kind | None] = {
    "aten::mm": "GEMM",
    "aten::addmm": "GEMM",
    "aten::bmm": "GEMM",
    "aten::addmv_": "GEMM",
    "aten::linear": "GEMM",
    "aten::_grouped_mm": "GEMM",
    "aten::mul": "norm/elementwise",
    "aten::mm_like_name": "norm/elementwise",
    "aten::scaled_dot_product_attention": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "aten::nll_loss_backward": "loss",
    "aten::_log_softmax": "loss",
    "aten::copy_": "copy",
    "aten::_fused_rms_norm": "norm/elementwise",
    "## Call CompiledFxGraph fnx3p3df7ko ##": "norm/elementwise",
    "_c10d_functional::wait_tensor": "communication",
    "gloo:all_reduce": "communication",
    "autograd::engine::evaluate_function: MmBackward0": None,
    "CompiledFunctionBackward": None,
}


@pytest.mark.parametrize(("name", "kind"), KERNELS.items())
def test_kernels_are_known_by_name(name: str, kind: Kind) -> None:
    assert kind_of_kernel(name) == kind


@pytest.mark.parametrize(("name", "kind"), OPS.items())
def test_ops_of_the_host_are_known_by_name(name: str, kind: Kind | None) -> None:
    assert kind_of_op(name) == kind


def event(kind: Kind | None, start: float, end: float, track: str = "a", **more: Any) -> Event:
    return Event(kind=kind, track=track, start=start, end=end, **more)


def ms(table: TimeTable) -> dict[str, float]:
    return {row.kind: row.ms for row in table.rows}


def test_shares_sum_to_one_and_idle_is_what_no_event_covers() -> None:
    events = [
        event("GEMM", 500, 2000),  # begins before the window
        event("attention", 2500, 3000),
        event("copy", 9500, 12000),  # ends after it
    ]
    table = time_table(events, start=1000, end=11000, num_steps=2)
    assert table.step_ms == 5.0
    assert ms(table) == {"idle": 3.5, "copy": 0.75, "GEMM": 0.5, "attention": 0.25}
    assert sum(row.share for row in table.rows) == pytest.approx(1.0, abs=1e-12)


def test_time_within_an_op_is_counted_once() -> None:
    """A linear holds a transpose and a product; autograd's node holds all and does nothing."""
    events = [
        event(None, 0, 10000),
        event("GEMM", 1000, 6000),
        event("norm/elementwise", 2000, 3000),
        event("GEMM", 3000, 5000),
        event("norm/elementwise", 7000, 7500),
    ]
    table = time_table(events, start=0, end=10000)
    assert ms(table) == {"idle": 4.5, "GEMM": 4.0, "norm/elementwise": 1.5}


def test_what_attention_holds_is_attention_and_the_optimizers_gaps_are_idle() -> None:
    events = [
        event("attention", 0, 1000),
        event("GEMM", 200, 400),
        event("optimizer", 2000, 4000, marks=True),
        event("norm/elementwise", 2500, 3000),
        event("copy", 3000, 3100),
    ]
    table = time_table(events, start=0, end=4000)
    assert ms(table) == {"idle": 2.4, "attention": 1.0, "optimizer": 0.6}


def test_a_kernel_that_follows_at_once_is_not_within_the_one_before() -> None:
    """Times are rounded: a product was counted as the attention that ended 1 ns into it."""
    events = [event("attention", 0, 1000.001), event("GEMM", 1000, 2000)]
    found = ms(time_table(events, start=0, end=2000))
    assert found["GEMM"] == pytest.approx(1.0, abs=1e-5)


def test_communication_is_what_compute_does_not_hide() -> None:
    events = [
        event("GEMM", 0, 3000),
        event("communication", 2000, 5000, track="b"),
        event("communication", 4000, 6000, track="c"),
    ]
    rows = {row.kind: row for row in time_table(events, start=0, end=10000).rows}
    assert (rows["communication"].ms, rows["communication"].hidden_ms) == (3.0, 1.0)
    assert (rows["GEMM"].ms, rows["GEMM"].hidden_ms, rows["idle"].ms) == (3.0, 0.0, 4.0)


def test_a_ceiling_stands_beside_its_kind_even_where_no_time_went() -> None:
    limits = {"GEMM": 2e-3, "loss": 1e-3}
    table = time_table([event("GEMM", 0, 3000)], start=0, end=4000, ceilings=limits)
    assert table.rows == (
        Row(kind="GEMM", ms=3.0, share=0.75, ceiling_ms=2.0),
        Row(kind="idle", ms=1.0, share=0.25),
        Row(kind="loss", ms=0.0, share=0.0, ceiling_ms=1.0),
    )


def test_every_kind_of_work_has_a_place_where_several_run() -> None:
    assert {*KERNELS.values()} == {*WORK}


def trace(*events: tuple[str, str, float, float]) -> dict[str, Any]:
    window = ("user_annotation", WINDOW, 0.0, 10000.0)
    return {
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 1, "tid": 0},
            *(
                {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 7}
                for cat, name, ts, dur in (window, *events)
            ),
        ]
    }


def test_on_a_gpu_kernels_count_and_the_host_does_not() -> None:
    made = trace(
        ("cpu_op", "aten::mm", 0.0, 9000.0),
        ("kernel", "nvjet_tst_128", 1000.0, 2000.0),
        ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 4000.0, 500.0),
        ("gpu_user_annotation", OPTIMIZER_MARK, 5000.0, 1000.0),
        ("kernel", "void at::native::vectorized_elementwise_kernel<4>", 5000.0, 700.0),
        ("gpu_user_annotation", WINDOW, 0.0, 9900.0),
    )
    events, (start, end) = read_trace(made, device="cuda")
    found = ms(time_table(events, start=start, end=end))
    assert found == {"idle": 6.8, "GEMM": 2.0, "optimizer": 0.7, "copy": 0.5}


def test_on_a_cpu_messages_run_beside_the_ops_that_follow_them() -> None:
    """A message ends when it has arrived, within an op that has nothing to do with it."""
    made = trace(
        ("user_annotation", "gloo:all_reduce", 1000.0, 4000.0),
        ("cpu_op", "aten::mm", 3000.0, 3000.0),
        ("user_annotation", "somebody's range", 0.0, 9000.0),
    )
    events, (start, end) = read_trace(made, device="cpu")
    rows = {row.kind: row for row in time_table(events, start=start, end=end).rows}
    assert (rows["GEMM"].ms, rows["communication"].ms, rows["idle"].ms) == (3.0, 2.0, 5.0)
    assert rows["communication"].hidden_ms == 2.0
