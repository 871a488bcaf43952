"""Which numbers a step stores, adds up and sends: a policy as a value."""

from dataclasses import dataclass
from typing import Literal

import torch

from megatree.parallel.loss_scale import LossScale


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What a training step keeps in which dtype; the model's own dtype is that of its products.

    Args:
        grads: dtype in which gradients are added up; None for float32 or better.
        reduce: dtype in which they travel; None for that of `grads`.
        master: whether parameters narrower than float32 have a float32 copy that updates work on.
        rounding: how an update without a master copy is rounded to the parameters' dtype.
        main_grads: whether narrow gradients are copied to float32 before the norm and the update.
        loss_scale: multiplies the loss of a float16 model; None for no scale.
        skip_nonfinite: whether a step whose gradients are not finite is counted as skipped, so
            that the optimizer's step count stands still too; implied by a loss scale. It makes the
            host wait for the norm.

    Raises:
        ValueError: stochastic rounding beside master copies.
    """

    grads: torch.dtype | None = None
    reduce: torch.dtype | None = None
    master: bool = True
    rounding: Literal["nearest", "stochastic"] = "nearest"
    main_grads: bool = False
    loss_scale: LossScale | None = None
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.master and self.rounding == "stochastic":
            raise ValueError(
                "precision: stochastic rounding is for parameters without a master copy. Set "
                "master=False, or rounding='nearest'."
            )

    def is_narrow(self, dtype: torch.dtype) -> bool:
        """Whether a dtype holds fewer bits than float32."""
        return torch.promote_types(dtype, torch.float32) != dtype

    def sums(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which gradients of parameters of a dtype are added up."""
        return self.grads or torch.promote_types(dtype, torch.float32)

    def widens(self, dtype: torch.dtype) -> bool:
        """Whether gradients of parameters of a dtype are added up in a wider one.

        A gradient in the parameters' dtype would be rounded before it is added, once per
        microbatch: so products with such parameters add theirs themselves (see
        `GradientSums.add_product`).
        """
        sums = self.sums(dtype)
        return sums != dtype and torch.promote_types(dtype, sums) == sums

    def check_microbatches(self, num_microbatches: int) -> None:
        """Refuse to add up many microbatches in a narrow dtype.

        Raises:
            ValueError: small terms would vanish in the sum.
        """
        if num_microbatches > 1 and self.grads is not None and self.is_narrow(self.grads):
            raise ValueError(
                f"precision.grads: {self.grads} sums of {num_microbatches} microbatches lose the "
                "small terms. Use grads=torch.float32, or one microbatch per step."
            )
