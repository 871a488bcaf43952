"""How close is equal: relative L2 distances per leaf, by dtype, each with its reason."""

from collections.abc import Mapping

import torch
from torch import Tensor

RELATIVE: Mapping[torch.dtype, float] = {
    # Sums of some 1e3 terms in another order: about 1e3 * 2^-53 = 1e-13 at worst.
    torch.float64: 1e-12,
    # The same sums, 2^-24 each, that average out: 1e-6 seen, a wrong term is 1e-2 and more.
    torch.float32: 1e-5,
    # Every activation is rounded to 2^-9 = 2e-3, and roundings differ once sums are cut.
    torch.bfloat16: 2e-2,
}
"""dtype -> relative L2 distance that a leaf may have where a cross-rank sum is on its path.

Without such a sum, after a refactor and after a resume, results are bit-equal: `torch.equal`.
"""

VANISHES = 1e-10
"""A gradient this much smaller than the largest leaf's is rounding: its true value is 0.

The gradient of a key bias is such a leaf (softmax does not see what all scores share). It is
compared with the largest leaf instead.
"""


def distance(got: Tensor, expected: Tensor, *, scale: float | None = None) -> float:
    """Return the L2 norm of the difference over that of what is expected, or over `scale`."""
    assert got.shape == expected.shape, f"{list(got.shape)}, expected {list(expected.shape)}"
    difference = (got.detach().double() - expected.detach().double()).norm().item()
    norm = expected.detach().double().norm().item() if scale is None else scale
    return difference / norm if norm else difference


def assert_leaves_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype = torch.float64
) -> None:
    """Fail, naming at most 8 leaves, unless every leaf is as close as its dtype asks."""
    assert list(got) == list(expected)
    norms = {name: leaf.detach().double().norm().item() for name, leaf in expected.items()}
    largest = max(norms.values())
    assert largest > 0, "every expected leaf is 0: nothing is compared"
    wrong = []
    for name, leaf in expected.items():
        scale = largest if norms[name] < VANISHES * largest else None
        error = distance(got[name], leaf, scale=scale)
        if not error <= RELATIVE[dtype]:
            wrong.append(f"{name}: off by {error:.3g}")
    assert not wrong, f"{len(wrong)} of {len(norms)} leaves: " + "; ".join(wrong[:8])
