"""Names and layouts that Hugging Face gives the leaves of `moe`, as data."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from megatree.models.names import LLAMA, Source

_LAYER = "model.layers.{layer}"
_DENSE = ("w_gate", "w_up", "w_down")
_STACKED = re.compile(r"(.*mlp\.experts\.)(gate_up_proj|down_proj)")

_SHARED = tuple(
    Source(
        leaf=source.leaf.replace("blocks.dense.", "blocks.moe."),
        name=source.name,
        axes=source.axes,
    )
    for source in LLAMA
    if source.leaf.split(".")[-1] not in _DENSE
)

MIXTRAL = (
    *_SHARED,
    Source(leaf="blocks.moe.router", name=f"{_LAYER}.mlp.gate.weight", axes="choices embed"),
    *(
        Source(
            leaf=f"blocks.moe.{leaf}",
            name=f"{_LAYER}.mlp.experts.gate_up_proj",
            axes="experts (part:2 expert_ffn) embed",
            at=("part", part),
        )
        for part, leaf in enumerate(("w_gate", "w_up"))
    ),
    Source(
        leaf="blocks.moe.w_down",
        name=f"{_LAYER}.mlp.experts.down_proj",
        axes="experts embed expert_ffn",
    ),
)
"""`MixtralForCausalLM` as transformers 5 holds it; in its files experts lie one by one."""

QWEN3_MOE = (
    *MIXTRAL,
    *(
        Source(
            leaf=f"blocks.moe.norm_{x}",
            name=f"{_LAYER}.self_attn.{x}_norm.weight",
            axes="head_dim",
        )
        for x in ("q", "k")
    ),
)
"""`Qwen3MoeForCausalLM` with `decoder_sparse_step` 1 and no `mlp_only_layers`."""

MIXTRAL_FILES = {"mlp.gate.": "block_sparse_moe.gate.", "mlp.experts.": "block_sparse_moe.experts."}
"""Part of a name in `MIXTRAL` -> how Mixtral's files have it."""

MIXTRAL_PARTS = ("w1", "w3", "w2")
"""What Mixtral's files call gate, up and down of an expert."""

QWEN3_MOE_PARTS = ("gate_proj", "up_proj", "down_proj")
"""What Qwen3's files call gate, up and down of an expert."""


def to_files(
    tensors: Mapping[str, Tensor], parts: tuple[str, str, str], renamed: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the tensors of files, an expert's apart, from those of `to_foreign`.

    Args:
        tensors: by name of `MIXTRAL` or `QWEN3_MOE`.
        parts: what gate, up and down of an expert are called.
        renamed: part of a name -> what it is in files.
    """
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if (found := _STACKED.fullmatch(name)) is None:
            out[_renamed(name, renamed)] = value
            continue
        prefix = _renamed(found[1], renamed)
        for expert, matrix in enumerate(value):
            if found[2] == "down_proj":
                out[f"{prefix}{expert}.{parts[2]}.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                out[f"{prefix}{expert}.{parts[0]}.weight"] = gate
                out[f"{prefix}{expert}.{parts[1]}.weight"] = up
    return out


def from_files(
    tensors: Mapping[str, Tensor], parts: tuple[str, str, str], renamed: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the tensors for `from_foreign`, those of a layer's experts stacked, from files.

    Raises:
        ValueError: an expert of a layer is missing, or a part of one.
    """
    back = {there: here for here, there in renamed.items()}
    out: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    pattern = re.compile(rf"(.*mlp\.experts\.)(\d+)\.({'|'.join(parts)})\.weight")
    for name, value in tensors.items():
        here = _renamed(name, back)
        if (found := pattern.fullmatch(here)) is None:
            out[here] = value
        else:
            experts.setdefault(found[1], {})[int(found[2]), found[3]] = value
    for prefix, held in experts.items():
        num_experts = 1 + max(expert for expert, _ in held)
        wanted = [(expert, part) for expert in range(num_experts) for part in parts]
        if missing := [key for key in wanted if key not in held]:
            expert, part = missing[0]
            raise ValueError(
                f"{prefix}{expert}.{part}.weight: is missing, one of {len(missing)} of "
                f"{num_experts} experts. Give all files of the folder."
            )
        gate, up, down = (
            torch.stack([held[expert, part] for expert in range(num_experts)]) for part in parts
        )
        out[f"{prefix}gate_up_proj"] = torch.cat([gate, up], dim=1)
        out[f"{prefix}down_proj"] = down
    return out


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    for here, there in renamed.items():
        name = name.replace(here, there)
    return name
