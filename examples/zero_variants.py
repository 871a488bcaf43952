"""Four storages of one model: the same losses, in less and less memory per rank.

Data parallelism on four processes keeps every weight, gradient and moment four times. `Storage`
names the mesh axes that cut them between uses: optimizer state alone (ZeRO-1), gradients too
(ZeRO-2), weights too (ZeRO-3). The step is the same; what is cut travels where it is needed, and
the bytes that each rank holds are measured as the storages of its buffers.
"""

import torch

import megatree as mt

CONFIG = mt.GPTConfig(
    vocab_size=64, seq_length=16, num_layers=4, embed=32, kv_heads=4, head_dim=8, ffn=64
)
STORAGES = {
    "plain": mt.Storage(),
    "zero-1": mt.Storage(opt="dp"),
    "zero-2": mt.Storage(grads="dp", opt="dp"),
    "zero-3": mt.Storage(params="dp", grads="dp", opt="dp"),
}
LAYOUTS = {
    name: mt.Layout(mt.Mesh(dp=4), mt.Rules(batch="dp"), storage=storage)
    for name, storage in STORAGES.items()
}
MODEL = mt.gpt(CONFIG, batch_size=8)


def worker(device, layout):
    """Train for a few steps; return the losses, and the bytes this rank holds per parameter."""
    step = mt.train_step(MODEL, layout, mt.adamw(1e-2), comm=mt.ProcessComm(layout.mesh, device))
    state, losses = step.init(seed=0), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        tokens, labels = torch.randint(0, 64, (2, 8, 16), generator=generator)
        batch = {"tokens": tokens, "labels": labels, "weights": torch.ones(8, 16)}
        state, metrics = step(state, [step.local(batch)])
        losses.append(metrics.loss.item())
    tables = [state.params, step.gradients.sums.stored, state.master, *state.opt.values()]
    storages = {x.untyped_storage() for table in tables for x in table.values()}
    return losses, sum(x.nbytes() for x in storages) / MODEL.num_params


def main() -> None:
    """Run every storage on four processes; all losses are those of plain data parallelism."""
    runs = {name: mt.launch(worker, 4, layout, threads=1) for name, layout in LAYOUTS.items()}
    for name, (losses, held) in runs.items():
        planned = mt.plan(MODEL, LAYOUTS[name]).stages[0]
        peak = (planned.parameter_bytes + planned.gradient_bytes + planned.optimizer_bytes) / 1024
        print(f"{name:7} {held:5.2f} bytes a parameter, {peak:6.1f} KiB planned, {losses[-1]:.6f}")
        torch.testing.assert_close(losses, runs["plain"][0], rtol=1e-5, atol=0)


if __name__ == "__main__":
    main()
