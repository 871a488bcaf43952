"""What every optimizer promises, whatever its update is."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatree.runtime.optimizers import (
    GroupRule,
    Matrix,
    Optimizer,
    adamw,
    lion,
    muon,
    sgd,
    with_ema,
)
from tests.runtime.optimizers.buffers import (
    GROUPS,
    SHAPES,
    Buffers,
    bits_equal,
    copied,
    drawn,
    steps,
)
from tests.tolerances import assert_leaves_close, distance


def same(x: Tensor) -> Tensor:
    """Return what one device gathers, or cuts."""
    return x


MATRICES = (
    Matrix(start=2, shape=(2, 4), gather=same, cut=same),
    Matrix(start=12, shape=(3, 3), gather=same, cut=same),
)
WITH_MATRICES = {**GROUPS, "matrices": GroupRule(matrices=MATRICES)}

OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "adamw": lambda: adamw(1e-2),
    "adamw bf16": lambda: adamw(1e-2, moments=torch.bfloat16),
    "sgd": lambda: sgd(1e-2, weight_decay=0.1),
    "sgd nesterov": lambda: sgd(1e-2, momentum=0.9, nesterov=True),
    "lion": lambda: lion(1e-2),
    "lion bf16": lambda: lion(1e-2, moments=torch.bfloat16),
    "muon": lambda: muon(1e-2, others=adamw(1e-2)),
    "muon bf16": lambda: muon(
        1e-2, others=lion(1e-2, moments=torch.bfloat16), moments=torch.bfloat16
    ),
    "ema": lambda: with_ema(muon(1e-2, others=adamw(1e-2)), 0.9),
}
every = pytest.mark.parametrize("name", list(OPTIMIZERS))


def entries(params: Buffers, state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return all buffers by name."""
    return {
        **{f"params.{name}": p for name, p in params.items()},
        **{f"{entry}.{name}": b for entry, of in state.items() for name, b in of.items()},
    }


@every
def test_an_overflow_leaves_every_bit(name: str) -> None:
    """Zero times a NaN is a NaN, and minus zero plus zero is zero: masks by products fail here."""
    optimizer = OPTIMIZERS[name]()
    params, state = steps(optimizer, num_steps=2, dtype=torch.float32, groups=WITH_MATRICES)
    for buffer in entries(params, state).values():
        buffer[0, :3] = torch.tensor([-0.0, 1e-40, 3e38]).to(buffer.dtype)
    before = {key: b.clone() for key, b in entries(params, state).items()}
    grads = {key: torch.full(shape, float("nan")) for key, shape in SHAPES.items()}
    grads["matrices"][1] = float("inf")
    optimizer.update(params, grads, state, step=2, groups=WITH_MATRICES, found_inf=torch.ones(()))
    for key, buffer in entries(params, state).items():
        assert bits_equal(buffer, before[key]), key


@every
def test_no_overflow_is_no_flag(name: str) -> None:
    plain = steps(OPTIMIZERS[name](), dtype=torch.float32, groups=WITH_MATRICES)
    flagged = steps(
        OPTIMIZERS[name](), dtype=torch.float32, groups=WITH_MATRICES, found_inf=torch.zeros(())
    )
    for (key, a), b in zip(entries(*plain).items(), entries(*flagged).values(), strict=True):
        assert bits_equal(a, b), key


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_multiplies_the_gradients(name: str, dtype: torch.dtype) -> None:
    halved = steps(
        OPTIMIZERS[name](),
        dtype=torch.float32,
        grad_dtype=dtype,
        groups=WITH_MATRICES,
        change=lambda grads: {key: g * 0.5 for key, g in grads.items()},
    )
    scaled = steps(
        OPTIMIZERS[name](),
        dtype=torch.float32,
        grad_dtype=dtype,
        groups=WITH_MATRICES,
        scale=torch.tensor(0.5),
    )
    for (key, a), b in zip(entries(*scaled).items(), entries(*halved).values(), strict=True):
        assert bits_equal(a, b), key


def strided(buffers: Buffers) -> Buffers:
    """Return equal buffers whose rows are parts of longer rows of NaN."""
    wide = {
        name: torch.full((len(b), 2 * b.shape[1] + 3), float("nan"), dtype=b.dtype)
        for name, b in buffers.items()
    }
    for name, b in buffers.items():
        wide[name][:, 2 : 2 + b.shape[1]] = b
    return {name: wide[name][:, 2 : 2 + b.shape[1]] for name, b in buffers.items()}


@every
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_strides_between_rows_do_not_matter(name: str, grad_dtype: torch.dtype) -> None:
    """The fused kernels of torch take strided tensors and ignore the strides."""
    dense, apart = (
        steps(
            OPTIMIZERS[name](),
            dtype=torch.float32,
            grad_dtype=grad_dtype,
            groups=WITH_MATRICES,
            change=change,
        )
        for change in (lambda grads: grads, strided)
    )
    for (key, a), b in zip(entries(*apart).items(), entries(*dense).values(), strict=True):
        assert bits_equal(a, b), key


@every
def test_rows_can_be_updated_one_at_a_time(name: str) -> None:
    """What a step that stores no masters does: it widens, updates and rounds one row."""
    whole = entries(*steps(OPTIMIZERS[name](), dtype=torch.float32, groups=WITH_MATRICES))
    optimizer = OPTIMIZERS[name]()
    params = drawn(0, torch.float32)
    state = optimizer.init(params, WITH_MATRICES)
    for step in range(10):
        grads = drawn(step + 1, torch.float32)
        for key, (rows, _) in SHAPES.items():
            for row in range(rows):
                part = slice(row, row + 1)
                optimizer.update(
                    {key: params[key][part]},
                    {key: grads[key][part]},
                    {entry: {key: of[key][part]} for entry, of in state.items() if key in of},
                    step=step,
                    groups={key: WITH_MATRICES[key]},
                )
    for key, buffer in entries(params, state).items():
        torch.testing.assert_close(buffer, whole[key], rtol=1e-6, atol=1e-7)


@every
def test_narrow_parameters_are_updated_in_float32_and_rounded_once(name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    params = drawn(0, torch.bfloat16)
    state = optimizer.init(params, WITH_MATRICES)
    reference = {key: p.float() for key, p in params.items()}
    reference_state = optimizer.init(reference, WITH_MATRICES)
    for step in range(3):
        grads = drawn(step + 1, torch.bfloat16)
        optimizer.update(params, copied(grads), state, step=step, groups=WITH_MATRICES)
        optimizer.update(reference, grads, reference_state, step=step, groups=WITH_MATRICES)
        for p, wide in zip(params.values(), reference.values(), strict=True):
            assert distance(p, wide.bfloat16()) < 1e-4
            wide.copy_(p)
    expected = torch.bfloat16 if name.endswith("bf16") else torch.float32
    assert {b.dtype for of in state.values() for b in of.values()} <= {expected}


@every
def test_lr_and_decay_multiply(name: str) -> None:
    """lr=0 must stop a group, decay=0 must change it: a multiplier that is dropped shows here."""
    kept, _ = steps(
        OPTIMIZERS[name](),
        groups={key: GroupRule(lr=0.0, matrices=r.matrices) for key, r in WITH_MATRICES.items()},
    )
    for key, p in drawn(0).items():
        assert torch.equal(kept[key], p)
    decayed, plain = (
        steps(
            OPTIMIZERS[name](),
            groups={
                key: GroupRule(decay=decay, matrices=r.matrices) for key, r in WITH_MATRICES.items()
            },
        )[0]
        for decay in (1.0, 0.0)
    )
    moved = [not torch.equal(decayed[key], plain[key]) for key in SHAPES]
    assert moved == [name != "sgd nesterov"] * 2


@pytest.mark.parametrize("name", ["adamw bf16", "lion bf16", "muon bf16"])
def test_bf16_moments_follow_wide_ones(name: str) -> None:
    narrow = steps(OPTIMIZERS[name](), dtype=torch.float32, groups=WITH_MATRICES)
    make: dict[str, Optimizer] = {
        "adamw bf16": adamw(1e-2),
        "lion bf16": lion(1e-2),
        "muon bf16": muon(1e-2, others=lion(1e-2)),
    }
    wide = steps(make[name], dtype=torch.float32, groups=WITH_MATRICES)
    start = drawn(0, torch.float32)
    for key, p in narrow[0].items():
        apart = (p - wide[0][key]).norm() / (wide[0][key] - start[key]).norm()
        assert apart < 0.1, f"{key}: {apart:.3g} of the way"


def test_the_average_is_that_of_the_parameters() -> None:
    optimizer = with_ema(sgd(0.1), 0.9)
    params = drawn(0)
    state = optimizer.init(params)
    average = copied(params)
    for step in range(10):
        optimizer.update(params, drawn(step + 1), state, step=step, groups=GROUPS)
        average = {key: 0.9 * a + 0.1 * params[key] for key, a in average.items()}
    assert_leaves_close(state["ema"], average)
    plain, _ = steps(sgd(0.1))
    assert_leaves_close(params, plain)


def test_the_average_of_narrow_parameters_is_wide() -> None:
    params = drawn(0, torch.bfloat16)
    state = with_ema(sgd(0.1), lambda step: 0.5).init(params)
    assert state["ema"]["norms"].dtype == torch.float32
    assert state["ema"]["norms"].data_ptr() != params["norms"].data_ptr()


def test_decays_that_bf16_cannot_follow_are_refused() -> None:
    """In bfloat16, 0.999 * v rounds back to v: a second moment would never come down."""
    v = torch.tensor(1.0, dtype=torch.bfloat16)
    assert v * 0.999 == v
    with pytest.raises(
        ValueError, match=r"cannot follow a decay of 0\.999: a change of 0\.001 .* 0\.0039"
    ):
        adamw(1e-3, betas=(0.9, 0.999), moments=torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adamw(-1.0), r"adamw\.lr: -1\.0 is negative"),
        (lambda: adamw(1.0, betas=(0.9, 1.0)), r"adamw\.betas: 1\.0 is not a decay"),
        (lambda: adamw(1.0, moments=torch.float16), r"float16 would overflow or vanish"),
        (lambda: sgd(1.0, nesterov=True), r"sgd\.nesterov: momentum is 0"),
        (lambda: with_ema(sgd(1.0), 1.0), r"with_ema\.decay: 1\.0"),
        (lambda: muon(1.0, others=sgd(1.0), rows_at_once=0), r"rows_at_once: 0"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], Optimizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@every
@given(data=st.data())
@settings(max_examples=10)
def test_an_update_does_not_depend_on_how_buffers_are_cut(name: str, data: st.DataObject) -> None:
    """Sharded storage trains like whole storage, bit by bit, only if kernels do not look at where
    an element lies; those of torch for CPUs round the end of a buffer differently."""
    size = data.draw(st.integers(2, 80))
    cut = data.draw(st.integers(1, size - 1))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(size * 100 + cut)

    def run(parts: list[slice]) -> dict[str, Tensor]:
        generator.manual_seed(7)
        whole = torch.randn(2, size, generator=generator, dtype=dtype)
        params = {str(i): whole[:, part].clone() for i, part in enumerate(parts)}
        groups = {key: GroupRule() for key in params}
        optimizer = OPTIMIZERS[name]()
        state = optimizer.init(params, groups)
        for step in range(3):
            whole = torch.randn(2, size, generator=generator, dtype=dtype)
            grads = {str(i): whole[:, part].clone() for i, part in enumerate(parts)}
            optimizer.update(
                params, grads, state, step=step, groups=groups, scale=torch.tensor(0.3)
            )
        return {
            entry: torch.cat([of[str(i)] for i in range(len(parts))], dim=1)
            for entry, of in {"params": params, **state}.items()
            if of
        }

    once, twice = run([slice(0, size)]), run([slice(0, cut), slice(cut, size)])
    for entry, buffer in once.items():
        assert bits_equal(twice[entry], buffer), entry
