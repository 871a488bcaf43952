"""Two ranks on one GPU over gloo: the programs of tp 2 and dp 2 on CUDA tensors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatree.functional.tree import flatten_with_names
from megatree.models.gpt import gpt
from megatree.parallel.comm import Axes, OneDevice, RankComm
from megatree.parallel.layout import Layout, Rules, Storage, cut
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.gradients import value_and_grad
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from tests.gpu.small import BATCH, CONFIG, batch
from tests.ranks import ranks
from tests.runtime.one_device import rank_inputs, reference
from tests.runtime.table import MODELS, layouts
from tests.tolerances import assert_leaves_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


class OneGpuComm(ProcessComm):
    """Ranks that share a GPU: NCCL refuses them, and gloo's functional all-gather of CUDA tensors
    crashes (torch 2.11), where its other one does not.
    """

    def _all_gather(self, x: Tensor, axes: Axes, dim: int) -> Callable[[], Tensor]:
        x = (x if x.dim() else x.reshape(1)).contiguous()
        n, order = self.size(axes), self.orders[axes]
        whole = x.new_empty((n * x.shape[0], *x.shape[1:]))
        # torch 2.13 has renamed it.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, x, group=self.groups[axes][0])
        parts = whole.chunk(n, 0)
        parts = parts if order is None else [parts[i] for i in order[1]]
        return lambda: torch.cat(parts, dim)


def check(model: str, layout: Layout) -> None:
    """Compare the loss and pieces of all gradients, in float64, with one device's on the CPU."""
    ref = reference(MODELS[model])
    comm = OneGpuComm(layout.mesh, "cuda")
    params, batches = rank_inputs(ref, lower_model(ref.model, layout), comm)
    values, grads = value_and_grad(ref.model, layout, comm=comm)(
        params, [{name: x.cuda() for name, x in batch.items()} for batch in batches]
    )
    names, declared, _ = flatten_with_names(ref.model.params)
    got = {"loss": values["loss"], **dict(zip(*flatten_with_names(grads)[:2], strict=True))}
    assert all(x.is_cuda for x in got.values())
    expected = {"loss": ref.loss}
    for path, leaf in zip(names, declared, strict=True):
        spec = layout.spec(leaf.names, tuple(ref.grads[path].shape), path)
        expected[path] = cut(ref.grads[path], spec, layout.sizes, comm.coords)
    assert_leaves_close({name: x.cpu() for name, x in got.items()}, expected)


@ranks(2, timeout_s=180.0)
def test_gradients_of_two_ranks_are_those_of_one_device() -> None:
    check("llama", layouts("llama")["tp2 sp"])
    check("gpt2 tied", layouts("gpt2 tied")["tp2"])
    check("gpt2 dropout", layouts("gpt2 dropout")["dp2"])
    dp2 = layouts("llama")["dp2"]
    check("llama", replace(dp2, storage=Storage(opt="dp")))
    check("llama", replace(dp2, storage=Storage(params="dp", grads="dp", opt="dp")))


STEPS = 5


def losses(layout: Layout, comm: RankComm) -> Tensor:
    """Return the losses of a few steps as GPUs make them: bfloat16, Triton kernels, fused loss."""
    model = gpt(CONFIG, batch_size=BATCH, dtype=torch.bfloat16)
    step = train_step(model, layout, adamw(1e-3), comm=comm)
    state, found = step.init(0), []
    for _ in range(STEPS):
        state, metrics = step(state, [step.local(batch())])
        found.append(metrics.loss.float().cpu())
    return torch.stack(found)


@ranks(2, timeout_s=180.0)
def test_bfloat16_steps_of_two_ranks_follow_those_of_one() -> None:
    """Products of halves are rounded before they are added: losses differ by bfloat16's 2^-9."""
    alone = losses(Layout(), OneDevice("cuda"))
    tp = Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
    for layout in (
        Layout(Mesh(tp=2), tp),
        Layout(Mesh(dp=2), Rules(batch="dp"), storage=Storage(opt="dp")),
    ):
        found = losses(layout, OneGpuComm(layout.mesh, "cuda"))
        assert alone[-1] < alone[0] - 0.1
        torch.testing.assert_close(found, alone, rtol=5e-3, atol=0)
