"""A pipeline schedule of one's own: rows of text, drawn, checked and timed before any process runs.

Two ranks hold four stages in a V: rank 0 the first and the last, rank 1 the two in between, which
exchange no message. Backwards are split: B computes the gradient of a stage's input, W that of its
weights, whenever the rank has time. A mistake is an error that shows the grid and marks the cell.
"""

import torch

import megatree as mt
from megatree.parallel.schedule import Costs, draw, from_csv, rank_programs, timeline, validate

SCHEDULE = from_csv(
    """
    # rank 0: stages 0 and 3
    F0.0, F0.1, F0.2, F3.0, B3.0, F3.1, B3.1, W3.0, B0.0, F3.2, B3.2, B0.1, W3.1, B0.2, W0.0, W0.1, W0.2, W3.2
    # rank 1: stages 1 and 2
    F1.0, F2.0, F1.1, F2.1, F1.2, B2.0, B1.0, F2.2, B2.1, B1.1, W2.0, B2.2, B1.2, W1.0, W2.1, W1.1, W2.2, W1.2
    """  # noqa: E501 a row is a rank
)
WRONG = "F0.0, B0.0, F0.1, B0.1\nF1.0, F1.1, B1.0, B1.1"

CONFIG = mt.GPTConfig(
    vocab_size=64, seq_length=8, num_layers=4, embed=16, kv_heads=2, head_dim=8, ffn=32, tied=True
)


def train(device, layout):
    """Make one update on three microbatches on this rank; return the loss and gradient norm."""
    comm = mt.ProcessComm(layout.mesh, device)
    step = mt.train_step(mt.gpt(CONFIG, batch_size=2), layout, mt.adamw(1e-3), comm=comm)
    tokens = torch.arange(2 * 9).reshape(2, 9) % 64
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": torch.ones(2, 8)}
    _, metrics = step(step.init(seed=0), [batch] * 3)
    return metrics.loss.item(), metrics.grad_norm.item()


def main() -> None:
    """Check and draw the schedule, with stages of unequal cost too, and see a deadlock refused."""
    validate(SCHEDULE, max_live=6)
    print(draw(timeline(SCHEDULE)))
    print("\nWith a last stage (the vocabulary's) of twice the time, and messages that take time:")
    slow = [1.0, 1.0, 1.0, 2.0]
    print(timeline(SCHEDULE, Costs(forward=slow, input_grad=slow, weight_grad=slow, transfer=0.2)))
    print("\nThe start of what rank 1 runs, with its messages:")
    print(*rank_programs(SCHEDULE)[1][:8])
    print("\nA schedule that cannot run:")
    try:
        validate(from_csv(WRONG))
    except ValueError as refused:
        print(refused)
    pipeline = mt.Layout(mt.Mesh(pp=2), schedule=SCHEDULE)
    print(f"\nTwo ranks: {mt.launch(train, 2, pipeline)}, one: {mt.launch(train, 1, mt.Layout())}")


if __name__ == "__main__":
    main()
