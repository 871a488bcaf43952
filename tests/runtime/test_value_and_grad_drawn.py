"""Meshes and rules drawn at random: a legal layout is exact, any other is exact or refused."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from tests.runtime.one_device import assert_like_one_device, reference
from tests.runtime.table import MODELS

MESHES: list[dict[str, Any]] = [
    dict(zip(names, sizes, strict=True))
    for count in (1, 2, 3)
    for names in itertools.permutations(("dp", "tp", "x"), count)
    for sizes in itertools.product((2, 4), repeat=count)
    if math.prod(sizes) <= 8
]
SIZES = {"seq_res": 8, "kv_heads": 4, "group": 2, "ffn": 16, "vocab": 56}
DRAWN = ("llama", "gpt2 tied", "llama tied")


@st.composite
def legal_layouts(draw: st.DrawFn) -> Layout:
    """Draw rules under which no array is cut twice by a mesh axis and every dim divides.

    The batch is beside every other axis in some activation; heads are beside the group; all others
    may share mesh axes: the residual stream, the feed-forward layer and the vocabulary each differ.
    """
    sizes = draw(st.sampled_from(MESHES))
    free = list(draw(st.permutations(list(sizes))))
    rules = {"batch": tuple(free[: draw(st.integers(0, len(free)))])}
    others = [axis for axis in sizes if axis not in rules["batch"]]
    for axis, size in SIZES.items():
        cut: tuple[str, ...] = ()
        for name in draw(st.permutations(others)):
            taken = axis == "group" and name in rules["kv_heads"]
            fits = size % math.prod(sizes[a] for a in (*cut, name)) == 0
            if fits and not taken and draw(st.booleans()):
                cut = (*cut, name)
        rules[axis] = cut
    return Layout(Mesh(**sizes), Rules(**rules))


@st.composite
def any_layouts(draw: st.DrawFn) -> Layout:
    """Draw any rules for any axes of the models."""
    sizes = draw(st.sampled_from(MESHES))
    names = ["batch", "seq", "embed", "head_dim", "max_seq", *SIZES]
    cuts = st.lists(st.sampled_from(list(sizes)), max_size=2, unique=True).map(tuple)
    rules = draw(st.dictionaries(st.sampled_from(names), cuts, max_size=4))
    return Layout(Mesh(**sizes), Rules(**rules))


@settings(max_examples=8)
@given(st.sampled_from(DRAWN), legal_layouts())
def test_legal_layouts_are_exact(model: str, layout: Layout) -> None:
    exact(model, layout)


def exact(model: str, layout: Layout) -> None:
    if MODELS[model].group == 1:
        layout = Layout(layout.mesh, layout.rules.updated(group=None))
    assert_like_one_device(reference(MODELS[model]), layout)


@settings(max_examples=8)
@given(st.sampled_from(DRAWN), any_layouts())
def test_any_layout_is_exact_or_refused(model: str, layout: Layout) -> None:
    """Sees a rule that nobody thought of: it must not lower to something that is wrong."""
    exact_or_refused(model, layout)


def exact_or_refused(model: str, layout: Layout) -> None:
    try:
        lower_model(reference(MODELS[model]).model, layout)
    except ShardingError:
        return
    exact(model, layout)


@pytest.mark.full
@settings(max_examples=150)
@given(st.sampled_from(DRAWN), legal_layouts())
def test_many_legal_layouts_are_exact(model: str, layout: Layout) -> None:
    exact(model, layout)


@pytest.mark.full
@settings(max_examples=300)
@given(st.sampled_from(DRAWN), any_layouts())
def test_any_of_many_layouts_is_exact_or_refused(model: str, layout: Layout) -> None:
    exact_or_refused(model, layout)
