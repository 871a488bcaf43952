"""The decoder against Hugging Face with the same weights: logits, loss and all gradients."""

from dataclasses import dataclass, field
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from megatree.functional.chain import Chain
from megatree.functional.param import init
from megatree.functional.tree import flatten_with_names
from megatree.models.gpt import GPTConfig, gpt
from megatree.models.names import GPT2, LLAMA, Source, from_foreign, to_foreign
from tests.tolerances import RELATIVE, VANISHES, distance

VOCAB, SEQ, BATCH = 97, 12, 3
# In a float64 Llama they still compute RMSNorm, rotary angles and softmax in float32.
AS_IT_IS = 1e-6


@dataclass(frozen=True)
class Case:
    family: str
    kv_heads: int
    group: int = 1
    tied: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[Source, ...]:
        return {"llama": LLAMA, "gpt2": GPT2}[self.family]

    def model(self, dtype: torch.dtype) -> Chain:
        styles: dict[str, dict[str, Any]] = {
            "llama": {},
            "gpt2": {
                "norm": "layer",
                "positions": "learned",
                "activation": "gelu_tanh",
                "bias": True,
            },
        }
        cfg = GPTConfig(
            vocab_size=VOCAB, seq_length=SEQ, num_layers=3, embed=24, kv_heads=self.kv_heads,
            group=self.group, head_dim=8 if self.family == "llama" else 24 // self.kv_heads, ffn=40,
            tied=self.tied, vocab_pad=16, init_std=0.1, **styles[self.family], **self.more,
        )  # fmt: skip
        return gpt(cfg, batch_size=BATCH, dtype=dtype)

    def hugging_face(self, model: Chain) -> PreTrainedModel:
        cfg = model.cfg
        common: dict[str, Any] = {
            "vocab_size": VOCAB,
            "tie_word_embeddings": self.tied,
            "use_cache": False,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if self.family == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    n_positions=SEQ,
                    n_embd=cfg.embed,
                    n_layer=cfg.num_layers,
                    n_head=cfg.num_heads,
                    n_inner=cfg.ffn,
                    layer_norm_epsilon=cfg.norm_eps,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    **common,
                )
            )
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=cfg.embed,
                intermediate_size=cfg.ffn,
                num_hidden_layers=cfg.num_layers,
                num_attention_heads=cfg.num_heads,
                num_key_value_heads=cfg.kv_heads,
                head_dim=cfg.head_dim,
                max_position_embeddings=SEQ,
                rms_norm_eps=cfg.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_base},
                **common,
            )
        )


CASES = {
    "llama gqa": Case("llama", kv_heads=2, group=3),
    "llama mqa tied": Case("llama", kv_heads=1, group=4, tied=True),
    "llama mha base": Case("llama", kv_heads=3, more={"rope_base": 500.0, "norm_eps": 1e-3}),
    "gpt2 tied": Case("gpt2", kv_heads=3, tied=True),
    "gpt2 untied": Case("gpt2", kv_heads=4),
}


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :3] = -100
    return {"tokens": tokens[:, :-1], "labels": labels, "weights": torch.ones(BATCH, SEQ)}


def ours(model: Chain, params: Any) -> tuple[Tensor, Tensor, Any]:
    """Return logits, the summed loss and its gradients."""
    leaves, spec = optree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    logits, _ = model.up_to("head").apply(spec.unflatten(leaves), data())
    _, outs = model.apply(spec.unflatten(leaves), data())
    total, weight = outs["loss"]["terms"]["loss"]
    assert weight == BATCH * SEQ
    return logits.detach(), total.detach(), spec.unflatten(torch.autograd.grad(total, leaves))


def theirs(case: Case, model: Chain, params: Any, *, wide: bool) -> tuple[Tensor, Tensor, Any]:
    """Return their logits, loss and gradients, these as a tree of ours."""
    foreign = to_foreign(case.sources, params, model)
    net = case.hugging_face(model)
    net.set_attn_implementation("eager")
    net.type(model.dtype)
    missing, unexpected = net.load_state_dict(foreign, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if case.tied else [], [])
    net.tie_weights()
    if wide:
        widen(net)
    batch = data()
    logits = net(input_ids=batch["tokens"]).logits
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
    )
    total.backward()
    grads = {name: leaf.grad for name, leaf in net.named_parameters() if leaf.grad is not None}
    return logits.detach(), total.detach(), from_foreign(case.sources, grads, model)


def widen(net: PreTrainedModel) -> None:
    """Lift their float32 islands: RMSNorm, rotary angles, and the softmax of eager attention."""
    net.set_attn_implementation("sdpa")
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
            if isinstance(child, LlamaRotaryEmbedding):
                setattr(module, name, WideRotary(child.config))


class WideRotary(torch.nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        parameters: Any = config.rope_parameters
        self.frequencies = 1.0 / parameters["rope_theta"] ** exponents

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.cat([position_ids[..., None].double() * self.frequencies] * 2, dim=-1)
        return angles.cos(), angles.sin()


def weights(model: Chain) -> Any:
    """Return first values, moved so that no norm is all ones, no bias all zeros, no two alike."""
    params = init(model.params, model.sizes, seed=5, dtype=model.dtype)
    moved: Any = optree.tree_map(
        lambda x: x + 0.1 * torch.sin(torch.arange(x.numel(), dtype=model.dtype)).view(x.shape),
        params,
    )
    for name in ("embed", "head"):
        if "table" in moved.get(name, {}):
            moved[name]["table"][VOCAB:] = 0
    return moved


@pytest.mark.parametrize(
    ("dtype", "wide", "rtol"),
    [
        (torch.float64, True, RELATIVE[torch.float64]),
        (torch.float64, False, AS_IT_IS),
        (torch.float32, False, RELATIVE[torch.float32]),
    ],
    ids=["float64 widened", "float64", "float32"],
)
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_equal_hugging_face(
    name: str, dtype: torch.dtype, wide: bool, rtol: float
) -> None:
    """Forward parity alone does not see a weight used twice, or a bias without a gradient."""
    model = CASES[name].model(dtype)
    params = weights(model)
    logits, total, grads = ours(model, params)
    their_logits, their_total, expected = theirs(CASES[name], model, params, wide=wide)
    assert distance(logits[..., :VOCAB], their_logits) < rtol
    assert abs(total - their_total) < rtol * their_total
    names, leaves, spec = flatten_with_names(grads)
    wanted: list[Any] = spec.flatten_up_to(expected)
    largest = max(leaf.norm().item() for leaf in leaves)
    wrong = {}
    for path, got, want in zip(names, leaves, wanted, strict=True):
        vanishes = want.norm() < max(VANISHES, rtol) * largest
        error = distance(got, want, scale=largest if vanishes else None)
        if not error < rtol:
            wrong[path] = error
    assert not wrong


def test_padding_rows_take_no_part() -> None:
    """Rows beyond the vocabulary: no effect on the loss, no gradient."""
    model = CASES["llama gqa"].model(torch.float64)
    params = init(model.params, model.sizes, seed=5, dtype=torch.float64)
    assert params["head"]["table"].shape[0] == 112
    _, total, grads = ours(model, params)
    for segment in ("embed", "head"):
        assert grads[segment]["table"][VOCAB:].count_nonzero() == 0
        params[segment]["table"][VOCAB:] = 100.0
    assert torch.equal(ours(model, params)[1], total)
