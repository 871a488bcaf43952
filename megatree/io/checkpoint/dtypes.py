"""Element types a checkpoint can hold, by the names it writes."""

from types import MappingProxyType

import torch

# Written little-endian. Packed types (float4_e2m1fn_x2) count packed bytes as elements, as torch
# does. A name this torch lacks is absent here, and a checkpoint that uses it is refused by name.
_NAMES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
    "complex64",
    "complex128",
)
DTYPES = MappingProxyType({name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)})


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
