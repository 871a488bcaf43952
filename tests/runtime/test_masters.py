"""Float32 masters on one side alone: what is known of a parameter is never lost without a word."""

import re
from pathlib import Path

import pytest
import torch

from megatree.io.world import World
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout
from megatree.parallel.precision import Precision
from megatree.runtime import pieces
from megatree.runtime.masters import Sides, how
from megatree.runtime.optimizers import adamw, with_ema
from megatree.runtime.step import TrainState, TrainStep, train_step

ONE = World.single()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = {
    "vocab_size": 20, "seq_length": 4, "num_layers": 2, "embed": 8, "kv_heads": 2, "head_dim": 4,
    "ffn": 12,
}  # fmt: skip


def make(dtype: torch.dtype, *, master: bool = True, ema: bool = False, **sizes: int) -> TrainStep:
    cfg = GPTConfig(**{**SIZES, **sizes})  # type: ignore[arg-type]
    optimizer = adamw(1e-2, moments=F32)
    return train_step(
        gpt(cfg, batch_size=2, dtype=dtype),
        Layout(),
        with_ema(optimizer, 0.9) if ema else optimizer,
        precision=Precision(master=master),
    )


def saved(path: Path, step: TrainStep) -> TrainState:
    """Save a state in which masters know more than parameters, and nothing is zero."""
    state = step.init(5)
    for buffers in state.opt.values():
        for number, buffer in enumerate(buffers.values()):
            buffer.fill_(float(number + 1))
    for buffer in state.master.values():
        buffer.mul_(1 + 2.0**-12)  # so little that the parameters do not tell
    state.step = 7
    pieces.save(str(path), step, state, ONE)
    return state


def leaves(step: TrainStep, state: TrainState) -> dict[str, torch.Tensor]:
    """Return all leaves, layers together."""
    out: dict[str, list[torch.Tensor]] = {}
    for piece in pieces.state_pieces(step, state, step.gradients.weights.shards()):
        out.setdefault(piece.path, []).append(piece.tensor)
    return {path: torch.cat([x.reshape(-1) for x in parts]) for path, parts in out.items()}


def under(found: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    start = f"{prefix}."
    return {k.removeprefix(start): x for k, x in found.items() if k.startswith(start)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) == 12
    for path, x in found.items():
        assert x.dtype == expected[path].dtype
        assert torch.equal(x, expected[path]), path


def cast(tree: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {path: x.to(dtype) for path, x in tree.items()}


SIDES = {
    # stored parameter, stored master, parameter, master
    (BF16, F32, BF16, F32): "plain",
    (F16, F32, BF16, F32): "narrow",
    (BF16, None, BF16, F32): "widen",
    (F32, None, BF16, F32): "round",
    (F16, None, BF16, F32): "plain",
    (BF16, F32, F32, None): "masters",
    (BF16, F32, BF16, None): "drop",
    (BF16, F32, F16, None): "plain",
    (F32, None, F32, None): "plain",
    (None, None, F32, None): "plain",
}


def test_the_table_of_rules() -> None:
    for (stored, stored_master, run, run_master), expected in SIDES.items():
        got = how(Sides(param=stored, master=stored_master), Sides(param=run, master=run_master))
        assert got == expected, (stored, stored_master, run, run_master)


def test_with_masters_into_a_wide_run(tmp_path: Path) -> None:
    first = make(BF16)
    before = leaves(first, saved(tmp_path / "c", first))
    step = make(F32)
    loaded = pieces.load_state(str(tmp_path / "c"), step, ONE)
    after = leaves(step, loaded.state)
    assert_same(under(after, "params"), under(before, "opt.master"))
    assert_same(under(after, "opt.m"), under(before, "opt.m"))
    assert loaded.masters == "12 parameters are the masters of the checkpoint"
    assert loaded.state.step == 7


def test_with_masters_into_a_run_without_is_refused_or_asked_for(tmp_path: Path) -> None:
    first = make(BF16)
    before = leaves(first, saved(tmp_path / "c", first))
    step = make(BF16, master=False)
    with pytest.raises(ValueError, match="are float32 masters") as caught:
        pieces.load(str(tmp_path / "c"), step, ONE)
    lines = str(caught.value).splitlines()
    assert (
        lines[0] == f"{tmp_path / 'c'}: 12 leaves are float32 masters that this run keeps no "
        "copies of."
    )
    assert lines[1].startswith("  opt.master.")
    assert lines[9:] == [
        "  and 4 more",
        "Run with master copies, or go on from the rounded parameters: "
        'checkpoint.masters "drop", in Python load_state(masters="drop").',
    ]
    loaded = pieces.load_state(str(tmp_path / "c"), step, ONE, masters="drop")
    after = leaves(step, loaded.state)
    assert_same(under(after, "params"), under(before, "params"))
    assert loaded.masters == "12 parameters lose the masters of the checkpoint, as asked"


def test_without_masters_into_a_run_with(tmp_path: Path) -> None:
    first = make(BF16, master=False)
    before = leaves(first, saved(tmp_path / "c", first))
    step = make(BF16)
    loaded = pieces.load_state(str(tmp_path / "c"), step, ONE)
    after = leaves(step, loaded.state)
    assert_same(under(after, "params"), under(before, "params"))
    assert_same(under(after, "opt.master"), cast(under(before, "params"), F32))
    assert "have masters that begin as the stored parameters" in loaded.masters


def test_wide_into_a_run_with_masters(tmp_path: Path) -> None:
    first = make(F32)
    before = leaves(first, saved(tmp_path / "c", first))
    step = make(BF16)
    loaded = pieces.load_state(str(tmp_path / "c"), step, ONE)
    after = leaves(step, loaded.state)
    assert_same(under(after, "opt.master"), under(before, "params"))
    assert_same(under(after, "params"), cast(under(before, "params"), BF16))


def test_another_narrow_dtype_is_rounded_from_the_masters(tmp_path: Path) -> None:
    first = make(BF16)
    before = leaves(first, saved(tmp_path / "c", first))
    step = make(F16)
    after = leaves(step, pieces.load(str(tmp_path / "c"), step, ONE)[0])
    assert_same(under(after, "opt.master"), under(before, "opt.master"))
    assert_same(under(after, "params"), cast(under(before, "opt.master"), F16))


@pytest.mark.parametrize(("there", "here"), [(F32, BF16), (BF16, F32)])
def test_another_dtype_without_masters_on_either_side_is_refused(
    tmp_path: Path, there: torch.dtype, here: torch.dtype
) -> None:
    saved(tmp_path / "c", make(there, master=False))
    with pytest.raises(ValueError, match="12 leaves do not match the target") as caught:
        pieces.load(str(tmp_path / "c"), make(here, master=False), ONE)
    names = (str(there).removeprefix("torch."), str(here).removeprefix("torch."))
    assert re.search(
        r"dtype {} in the checkpoint, {} in the target".format(*names), str(caught.value)
    )


# -- weights alone ---------------------------------------------------------------------------------


def test_weights_alone_start_everything_else_afresh(tmp_path: Path) -> None:
    """With masters on both sides the new ones begin as the old ones, not as rounded parameters."""
    first = make(BF16)
    before = leaves(first, saved(tmp_path / "c", first))
    step = make(BF16, ema=True)
    loaded = pieces.load_weights(str(tmp_path / "c"), step, ONE)
    after = leaves(step, loaded.state)
    assert_same(under(after, "params"), under(before, "params"))
    assert_same(under(after, "opt.master"), under(before, "opt.master"))
    assert not any(x.any() for x in under(after, "opt.m").values())
    averages = next(name for name in loaded.state.opt if name not in ("m", "v"))
    assert_same(under(after, f"opt.{averages}"), under(before, "opt.master"))
    assert (loaded.state.step, loaded.state.skipped) == (0, 0)


def test_weights_of_a_run_with_masters_without(tmp_path: Path) -> None:
    """What is asked for is the parameters, so no rule is broken."""
    first = make(BF16)
    before = leaves(first, saved(tmp_path / "c", first))
    step = make(BF16, master=False)
    after = leaves(step, pieces.load_weights(str(tmp_path / "c"), step, ONE).state)
    assert_same(under(after, "params"), under(before, "params"))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_parameters_that_are_skipped_begin_anew(tmp_path: Path, dtype: torch.dtype) -> None:
    """A head of another size; everything else is strict as ever."""
    first = make(dtype)
    before = under(leaves(first, saved(tmp_path / "c", first)), "params")
    step = make(dtype, vocab_size=30)
    with pytest.raises(ValueError, match="do not match the target"):
        pieces.load_weights(str(tmp_path / "c"), step, ONE)
    odd = [
        path
        for path, x in under(leaves(step, step.init()), "params").items()
        if x.shape != before[path].shape
    ]
    assert 1 <= len(odd) <= 2
    with pytest.raises(ValueError, match=r"params\.\S+: shape"):
        pieces.load_weights(str(tmp_path / "c"), step, ONE, skip=["blocks.*"])
    loaded = pieces.load_weights(str(tmp_path / "c"), step, ONE, skip=odd)
    found = leaves(step, loaded.state)
    anew = leaves(step, step.init())
    for path, x in under(found, "params").items():
        assert torch.equal(x, anew[f"params.{path}"] if path in odd else before[path]), path
    expected = {f"params.{path}" for path in odd}
    if dtype == BF16:
        expected |= {f"opt.master.{path}" for path in odd}
    assert set(loaded.skipped) == expected


def test_a_run_goes_on_with_some_leaves_anew(tmp_path: Path) -> None:
    """Their moments begin anew with them."""
    first = make(F32)
    before = leaves(first, saved(tmp_path / "c", first))
    step = make(F32)
    loaded = pieces.load_state(str(tmp_path / "c"), step, ONE, skip=["head*"])
    other = make(F32)
    after, anew = leaves(step, loaded.state), leaves(other, other.init())
    heads = [path for path in before if ".head" in path]
    assert len(heads) == 6
    for path, x in after.items():
        assert torch.equal(x, (anew if path in heads else before)[path]), path
    assert set(loaded.skipped) == set(heads)
    assert loaded.state.step == 7


def test_the_table_is_in_its_docstring() -> None:
    assert all(f'"{kind}"' in str(how.__doc__) for kind in set(SIDES.values()))
