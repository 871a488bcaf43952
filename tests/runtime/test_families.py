"""What Qwen, Mistral and Llama 3 add to a block is itself under layouts too: loss and gradients."""

import pytest

from megatree.models.gpt_config import GPTConfig
from megatree.parallel.context import Ring
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from tests.runtime.one_device import assert_like_one_device, reference

CFG = GPTConfig(
    vocab_size=50, vocab_pad=8, seq_length=8, num_layers=2, embed=16, head_dim=4, ffn=16,
    kv_heads=4, group=2, qkv_bias=True, qk_norm=True, window=3,
    rope_scaling=(8.0, 1.0, 4.0, 64.0),
)  # fmt: skip
TENSOR = {"kv_heads": "tp", "ffn": "tp", "vocab": "tp"}
LAYOUTS = {
    "tp2 sp": Layout(Mesh(tp=2), Rules(**TENSOR, seq_res="tp")),
    "dp2 tp4": Layout(Mesh(dp=2, tp=4), Rules(**TENSOR, batch="dp")),
    "cp2": Layout(Mesh(cp=2), Rules(seq="cp", seq_res="cp")),
    "cp2 ring": Layout(Mesh(cp=2), Rules(seq="cp", seq_res="cp", lower={"attention": Ring()})),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_biased_normalised_windowed_scaled_attention_is_itself(name: str) -> None:
    assert_like_one_device(reference(CFG), LAYOUTS[name])
