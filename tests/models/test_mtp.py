"""Multi-token prediction against the layers of transformers and a loss written out by hand."""

from dataclasses import replace
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from megatree.functional.chain import Chain
from megatree.functional.documents import positions_of
from megatree.functional.tree import flatten_with_names
from megatree.models.decoder import decoder
from megatree.models.gpt import gpt
from megatree.models.gpt_config import GPTConfig
from megatree.models.names import from_foreign, to_foreign
from tests.models.test_moe_against_hf import (
    AS_IT_IS,
    BATCH,
    CASES,
    SEQ,
    VOCAB,
    as_in_files,
    in_memory,
    weights,
)
from tests.tolerances import distance

DEEPSEEK, DEPTHS, LAYERS = CASES["deepseek"], 2, 2
DENSE = GPTConfig(
    vocab_size=VOCAB, seq_length=SEQ, num_layers=1, embed=16, kv_heads=2, head_dim=8, ffn=16, mtp=2,
    mtp_weight=0.5,
)  # fmt: skip


def batch_of(seed: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=draw)
    kept = (torch.rand((BATCH, SEQ), generator=draw) < 0.7).float()
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "weights": kept}


def theirs() -> tuple[DeepseekV3ForCausalLM, MtpModel]:
    net = DEEPSEEK.hugging_face()
    assert isinstance(net, DeepseekV3ForCausalLM)
    further = MtpModel(net, DEPTHS).double()
    further.set_attn_implementation("eager")
    further.set_experts_implementation("eager")
    return net, further


def in_their_module(name: str) -> str:
    """Return the name in their module of a tensor whose layer lies behind the decoder's."""
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    own = ("enorm", "hnorm", "eh_proj")
    rest = rest.replace("shared_head.norm", "post_norm")
    inside = "" if rest.startswith((*own, "post_norm")) else "mtp_block."
    return f"layers.{int(number) - LAYERS}.{inside}{rest}"


def further_name(name: str) -> bool:
    return name.startswith(tuple(f"model.layers.{LAYERS + d}." for d in range(DEPTHS)))


def loss_by_hand(net: Any, further: Any, batch: dict[str, Tensor], weight: float) -> Tensor:
    """Add, token by token, what every depth loses, as section 2.2 of DeepSeek-V3 says."""
    tokens, labels, kept = (batch[x] for x in ("tokens", "labels", "weights"))
    hidden = net.model(input_ids=tokens).last_hidden_state
    logits = net.lm_head(hidden)
    places = torch.arange(SEQ)[None]
    causal = torch.full((SEQ, SEQ), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
    rope = further.rotary_emb(hidden, places)
    parts = [_mean(logits, labels, kept, 0)]
    for depth in range(1, DEPTHS + 1):
        # Tokens beyond the end are never predicted from, and causality hides them.
        ahead = torch.cat([tokens[:, depth:], tokens.new_zeros(BATCH, depth)], 1)
        hidden = further.layers[depth - 1](
            net.model.embed_tokens(ahead), hidden, rope, causal, places, None
        )
        parts.append(_mean(net.lm_head(hidden), labels, kept, depth) * weight / DEPTHS)
    return torch.stack(parts).sum()


def _mean(logits: Tensor, labels: Tensor, kept: Tensor, depth: int) -> Tensor:
    total, count = logits.new_zeros(()), 0.0
    for row in range(BATCH):
        for at in range(SEQ - depth):
            weight = float(kept[row, at + depth])
            total = total - weight * logits[row, at].log_softmax(-1)[labels[row, at + depth]]
            count += weight
    return total / count


def value(model: Chain, params: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the sum of all terms, each over its weight."""
    _, outs = model.apply(params, batch)
    pairs = [outs["head"]["terms"]["loss"], *(out["terms"]["mtp"] for out in outs["mtp"].values())]
    return torch.stack([(total / weight).sum() for total, weight in pairs]).sum()


def test_loss_and_all_gradients_are_those_written_by_hand() -> None:
    model = decoder(
        replace(DEEPSEEK.model().cfg, mtp=DEPTHS, mtp_weight=0.4),
        batch_size=BATCH,
        dtype=torch.float64,
    )
    params, batch = weights(model), batch_of()
    foreign = to_foreign(DEEPSEEK.sources, params, model)
    net, further = theirs()
    net.load_state_dict(in_memory({k: v for k, v in foreign.items() if not further_name(k)}))
    own = in_memory({in_their_module(k): v for k, v in foreign.items() if further_name(k)})
    missing, extra = further.load_state_dict(own, strict=False)
    assert not extra
    assert not [x for x in missing if not x.startswith(("embed_tokens", "shared_head"))]
    expected = loss_by_hand(net, further, batch, 0.4)
    expected.backward()
    leaves = optree.tree_map(lambda x: x.clone().requires_grad_(), params)
    got = value(model, leaves, batch)
    got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=AS_IT_IS)
    held = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    held |= {**dict(further.named_parameters()), **dict(further.named_buffers())}
    grads = {key: torch.zeros_like(x) if x.grad is None else x.grad for key, x in held.items()}
    named = {key: in_their_module(key) if further_name(key) else key for key in foreign}
    found = as_in_files(grads, dict.fromkeys(named.values()))
    theirs_by_ours = {key: found[name] for key, name in named.items()}
    names, wanted, _ = flatten_with_names(from_foreign(DEEPSEEK.sources, theirs_by_ours, model))
    wrong = {
        path: error
        for path, leaf, b in zip(names, optree.tree_leaves(leaves), wanted, strict=True)
        if not (error := distance(torch.zeros_like(b) if leaf.grad is None else leaf.grad, b))
        < 2 * AS_IT_IS
    }
    assert not wrong
    assert sum(name.startswith("mtp.depth2.") for name in names) > 20


def test_the_decoder_alone_does_not_see_what_is_behind_it() -> None:
    """Where the chain ends with logits, they are those of a model without mtp."""
    model = decoder(DENSE, batch_size=BATCH, dtype=torch.float64)
    params: Any = weights(model)
    alone = gpt(replace(DENSE, mtp=None), batch_size=BATCH, dtype=torch.float64)
    expected, _ = alone.up_to("head").apply(params, batch_of())
    logits, outs = model.up_to("head").apply(params, batch_of())
    assert torch.equal(logits, expected)
    assert not outs
    _, outs = model.apply(params, batch_of())
    wanted = alone.apply(params, batch_of())[1]["loss"]["terms"]["loss"]
    assert torch.equal(torch.stack(outs["head"]["terms"]["loss"]), torch.stack(wanted))


def test_no_document_predicts_the_next() -> None:
    """Packed rows lose what their documents lose alone, and as many predictions count."""
    packed = batch_of() | {"weights": torch.ones(BATCH, SEQ)}
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * BATCH)
    model = decoder(DENSE, batch_size=BATCH, dtype=torch.float64, entries=("segments", "positions"))
    params: Any = weights(model)
    ids = {"segments": segments, "positions": positions_of(segments)}
    _, outs = model.apply(params, packed | ids)
    apart = decoder(DENSE, batch_size=BATCH, dtype=torch.float64)
    parts = []
    for cut in (slice(0, 3), slice(3, 8)):
        _, one = apart.apply(params, {k: v[:, cut] for k, v in packed.items()})
        parts.append([one["mtp"][kind]["terms"]["mtp"] for kind in ("depth1", "depth2")])
    for depth, kind in enumerate(("depth1", "depth2")):
        total, weight = outs["mtp"][kind]["terms"]["mtp"]
        assert weight.item() == BATCH * (SEQ - 2 * (depth + 1))
        assert weight == sum(part[depth][1] for part in parts)
        torch.testing.assert_close(total, parts[0][depth][0] + parts[1][depth][0])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mtp": 0}, r"mtp is 0 with mtp_weight 0\.5\. Give positive numbers, or mtp=None\."),
        ({"mtp_weight": -0.1}, r"mtp is 2 with mtp_weight -0\.1\."),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(DENSE, **fields)


def test_a_depth_beyond_every_sequence_is_refused() -> None:
    decoder(replace(DENSE, mtp=SEQ - 1), batch_size=1)
    with pytest.raises(ValueError, match=r"mtp is 8, and sequences have 8 tokens: .* at most 7"):
        decoder(replace(DENSE, mtp=SEQ), batch_size=1)


def test_a_builder_without_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"gpt: mtp is 2, .* Build it by `decoder`\."):
        gpt(DENSE, batch_size=1)
