"""A trainer of one page from the public names: four processes, tensor and data parallel.

Every process runs `worker`: it lowers the model for the layout, allocates its shards (the first
weights are those of one device), reads its rows of the text, and steps. Before that the run is
planned, and its first loss simulated, in this process. One process gives the same losses, which is
checked at the end: that the layout does not show in results is the point of the library.
"""

import torch

import megatree as mt
from megatree.io.data import GPTOptions, Stream, encode_documents, gpt_dataset, load_demo

CONFIG = mt.GPTConfig(
    vocab_size=512, seq_length=64, num_layers=2, embed=64, kv_heads=2, group=2, head_dim=16, ffn=128
)
RULES = mt.Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
LAYOUTS = (mt.Layout(mt.Mesh(dp=2, tp=2), RULES), mt.Layout())
STEPS, BATCH = 10, 8
MODEL = mt.gpt(CONFIG, batch_size=BATCH, dtype=torch.float64)


def batch_of(number):
    text = load_demo()
    ids, rows = encode_documents(text.texts[:4], text.tokenizer), GPTOptions(seq=CONFIG.seq_length)
    samples = gpt_dataset(ids, (0, len(ids)), rows, num_samples=None)
    batch = Stream(dataset=samples, seed=0).batch(number * BATCH, BATCH)
    return {name: torch.as_tensor(x) for name, x in batch.items()}


def loss(params, batch):
    total, weight = MODEL.apply(params, batch)[1]["loss"]["terms"]["loss"]
    return mt.shard(total, "") / mt.shard(weight, "").double()


def worker(device, layout):
    """Train for some steps on one rank of a mesh; return the losses."""
    step = mt.train_step(MODEL, layout, mt.adamw(3e-3), comm=mt.ProcessComm(layout.mesh, device))
    state, losses = step.init(seed=0), []
    for number in range(STEPS):
        state, metrics = step(state, [step.local(batch_of(number))])
        losses.append(metrics.loss.item())
    print(f"a rank of ({layout.mesh}): losses {losses[0]:.4f} to {losses[-1]:.4f}")
    return losses


def main() -> None:
    """Plan and simulate, then train on four processes and on one, and compare."""
    print(mt.plan(MODEL, LAYOUTS[0]))
    params = mt.init(MODEL.params, MODEL.sizes, 0, dtype=torch.float64)
    ran = mt.simulate(loss, LAYOUTS[0], params, batch_of(0), axes=(MODEL.params, MODEL.batch))
    four, one = (mt.launch(worker, x.mesh.num_ranks, x, threads=1) for x in LAYOUTS)
    pairs = [(ran.value.item(), one[0]), *zip(four, one, strict=True)]
    worst = max(abs(a - b) / b for a, b in pairs)
    print(f"largest relative difference of a loss from that of one device: {worst:.1e}")
    assert worst < 1e-10


if __name__ == "__main__":
    main()
