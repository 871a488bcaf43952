"""What numba compiles gives the same numbers as what it replaces."""

from functools import partial

import numpy as np
import pytest

from megatree.io.data import blend_order, build_gpt_index, build_masked_index, loops
from megatree.io.data.blend_order import exhaustive_order
from megatree.io.data.mersenne import shuffled

RANDOM = np.random.default_rng(3)
LENGTHS = RANDOM.integers(0, 60, 4000).astype(np.int32)
SENTENCES = np.sort(RANDOM.choice(4000, 400, replace=False)).astype(np.int64)
WEIGHTS = RANDOM.dirichlet(np.ones(7)).tolist()
CUT = partial(build_masked_index, LENGTHS, SENTENCES, longest=125, min_sentences=2, seed=5)
BUILDERS = {
    "gpt": lambda: build_gpt_index(LENGTHS, (9, 3900), seq=64, num_samples=4000, seed=5).samples,
    "wrapped": lambda: (
        build_gpt_index(LENGTHS, (0, 4000), seq=64, num_samples=None, seed=5, extra=0).samples
    ),
    "bert": lambda: CUT(short_probability=0.1, num_samples=3000),
    "no short runs": lambda: CUT(short_probability=0.0, num_samples=None),
    "blend": lambda: np.stack(blend_order(WEIGHTS, 5000)),
    "equal weights": lambda: np.stack(blend_order([0.2] * 5, 5000)),
    "epochs": lambda: np.stack(exhaustive_order([1000, 30, 1, 500])),
    "shuffle": lambda: shuffled(5000, 1 << 40),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_compiled_loops_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    plain = BUILDERS[name]()
    monkeypatch.setattr(loops, "WORTH_COMPILING", 0)
    calls = []
    real = loops.compiled
    monkeypatch.setattr(loops, "compiled", lambda fn: calls.append(fn) or real(fn))
    fast = BUILDERS[name]()
    assert calls, "the compiled form was not taken"
    np.testing.assert_array_equal(fast, plain)
    assert fast.dtype == plain.dtype


def test_without_numba_the_results_are_there_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = BUILDERS["bert"]()
    monkeypatch.setattr(loops, "WORTH_COMPILING", 0)
    monkeypatch.setattr(loops, "compiled", lambda fn: None)
    np.testing.assert_array_equal(BUILDERS["bert"](), plain)
