"""An op of one's own: a function, a signature, and every placement checked.

The signature says what each dim is: `k!` must be whole (the function looks along it), the others
are free, and the op is linear in its second operand, so a pending sum may pass there. That line
is all the engine needs to shard the op, its gradients included. `rulecheck` runs every placement
of the operands that the rule allows and compares values and gradients with one device: a wrong
signature cannot pass, as the second half shows.
"""

import torch

import megatree as mt


@mt.op("k!, ... k! -> ... k!", linear=[[1]])
def gated_rotation(gate, x):
    """Mix every element with its opposite along the last dim, by a gate."""
    return torch.tanh(gate) * x + torch.sigmoid(gate) * x.flip(-1)


@mt.op("k, ... k -> ... k", linear=[[1]])  # wrong: flip needs the last dim whole
def wrongly_free(gate, x):
    """The same function under a signature that allows to cut what it looks along."""
    return torch.tanh(gate) * x + torch.sigmoid(gate) * x.flip(-1)


def model(w, x):
    """Use the op between two products, the second of which leaves a pending sum over tp."""
    h = torch.einsum("bd,fdk->bfk", x, w["into"])
    h = gated_rotation(w["gate"], h)
    return mt.shard(torch.einsum("bfk,fdk->bd", h, w["out"]), "batch embed")


def main() -> None:
    """Check the rule, see a wrong one fail, and run the op under a layout."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    found = mt.rulecheck(gated_rotation, random(6), random(4, 6))
    print(f"{len(found.legal)} placements are legal and exact, {len(found.refused)} are refused")
    try:
        mt.rulecheck(wrongly_free, random(6), random(4, 6))
    except RuntimeError as error:
        print(f"the wrong signature is found out: {error}")
    w = {"into": random(8, 6, 4), "gate": random(4), "out": random(8, 6, 4)}
    axes = {"into": mt.Param("ffn embed k"), "gate": mt.Param("k"), "out": mt.Param("ffn embed k")}
    layout = mt.Layout(mt.Mesh(dp=2, tp=2), mt.Rules(batch="dp", ffn="tp"))
    print(mt.verify(model, layout, w, random(4, 6), axes=(axes, "batch embed")))


if __name__ == "__main__":
    main()
