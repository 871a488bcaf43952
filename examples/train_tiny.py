"""A trainer of one page from the public names: four processes, tensor and data parallel.

Every process runs `worker`: it lowers the model for the layout, allocates its shards (the first
weights are those of one device), reads its rows of the text, and steps. Rank 0 prints. The same
function on one process gives the same losses, which is checked at the end: that the layout does not
show in results is the point of the library.
"""

import megatree as mt
from megatree.io.data import TokenDataset, encode_documents, load_demo

CONFIG = mt.GPTConfig(
    vocab_size=512, seq_length=64, num_layers=2, embed=64, kv_heads=2, group=2, head_dim=16, ffn=128
)
RULES = mt.Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
STEPS, BATCH = 10, 8


def worker(device, mesh):
    """Train for some steps on one rank of a mesh; return the losses."""
    layout = mt.Layout(mesh, RULES) if mesh.num_ranks > 1 else mt.Layout()
    comm = mt.ProcessComm(mesh, device)
    step = mt.train_step(mt.gpt(CONFIG, batch_size=BATCH), layout, mt.adamw(3e-3), comm=comm)
    state = step.init(seed=0)
    demo = load_demo()
    documents = encode_documents(demo.texts[:4], demo.tokenizer, eod=demo.eod)
    data = TokenDataset(tokens=documents.tokens, seq=CONFIG.seq_length, seed=0)
    losses = []
    for number in range(STEPS):
        batch = data.batch(number * BATCH, BATCH)
        state, metrics = step(state, [step.local(batch)])
        losses.append(metrics.loss.item())
        if mt.world_of_group().rank == 0:
            norm = metrics.grad_norm.item()
            print(f"{mesh}  step {state.step:2}  loss {losses[-1]:.4f}  grad norm {norm:.3f}")
    return losses


def main() -> None:
    """Train on four processes and on one, and compare."""
    four = mt.launch(worker, 4, mt.Mesh(dp=2, tp=2), threads=1)
    one = mt.launch(worker, 1, mt.Mesh(), threads=1)
    worst = max(abs(a - b) for a, b in zip(four, one, strict=True))
    print(f"largest difference of a loss between four ranks and one: {worst:.1e}")
    assert worst < 1e-4


if __name__ == "__main__":
    main()
