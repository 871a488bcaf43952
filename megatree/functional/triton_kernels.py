"""Whether our Triton kernels run on a tensor."""

from importlib.util import find_spec

from torch import Tensor

_INSTALLED = find_spec("triton") is not None


def has_kernels(x: Tensor) -> bool:
    """Whether kernels written in Triton take this tensor: on a GPU, no wider than float32."""
    return _INSTALLED and x.is_cuda and x.dtype.itemsize <= 4
