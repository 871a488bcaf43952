"""What lies some places later in a sequence."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from megatree.functional.op import op


@op("... t! -> ... t!")
def ahead(x: Shaped[Tensor, "*n t"], *, by: int, fill: float) -> Shaped[Tensor, "*n t"]:
    """Move the last dim forward: element i becomes element i + by, and `fill` beyond the end.

    Args:
        x: [..., t].
        by: places, at least 0.
        fill: what the last `by` elements become.

    >>> ahead(torch.tensor([3, 1, 4, 1, 5]), by=2, fill=-100).tolist()
    [4, 1, 5, -100, -100]
    """
    end = torch.full_like(x[..., :by], fill)
    return torch.cat([x[..., by:], end], dim=-1)
