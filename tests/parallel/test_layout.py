"""Rules and layouts: specs of arrays, boxes, and the refusals that name the fix."""

import pytest
import torch

from megatree.functional.param import Array, Param
from megatree.parallel.assemble import points
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules, cut
from megatree.parallel.lower import lower
from megatree.parallel.mesh import Mesh

MESH = Mesh(dp=2, cp=2, tp=2)


def test_rules_are_values() -> None:
    rules = Rules(seq=("cp", "tp"), batch="dp", ffn=None)
    assert rules == Rules(batch=("dp",), ffn=(), seq=("cp", "tp"))
    assert str(rules) == "batch -> dp, ffn -> whole, seq -> cp tp"
    assert rules.updated(batch=None, vocab="tp") == Rules(seq=("cp", "tp"), vocab="tp", ffn=None,
                                                          batch=None)  # fmt: skip


def test_a_spec_names_mesh_axes_outer_to_inner() -> None:
    layout = Layout(MESH, Rules(batch="dp", seq=("tp", "cp")))
    assert layout.spec(("batch", "seq", "embed"), (4, 8, 3), "x") == (("dp",), ("tp", "cp"), ())


def test_axes_of_size_one_cut_nothing() -> None:
    layout = Layout(Mesh(tp=1), Rules(batch="dp", ffn="tp"))
    assert layout.spec(("batch", "ffn"), (3, 5), "x") == ((), ())


@pytest.mark.parametrize("axes", [("cp", "tp"), ("tp", "cp")])
def test_boxes_cover_every_element_once(axes: tuple[str, ...]) -> None:
    layout = Layout(MESH, Rules(batch="dp", seq=axes))
    leaf, shape = Array("batch seq"), (4, 8)
    seen = torch.zeros(shape)
    for at in points(MESH.sizes):
        (a, b), (c, d) = layout.box(leaf, shape, at, "x")
        seen[a:b, c:d] += 1
    assert seen.unique().tolist() == [1.0]
    first = {"dp": 0, "cp": 0, "tp": 1}
    piece = cut(
        torch.arange(32).view(shape), layout.spec(leaf.names, shape, "x"), MESH.sizes, first
    )
    assert piece[0].tolist() == ([2, 3] if axes == ("cp", "tp") else [4, 5])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Layout(MESH, Rules(ffn=("tp", "tp"))),
            r"rules: 'ffn' -> \('tp', 'tp'\) uses a mesh axis twice \(tp tp\)\. "
            r"Name each mesh axis once\.",
        ),
        (
            lambda: Layout(MESH, Rules(ffn="model")),
            r"rules: 'ffn' -> \('model',\): mesh axis 'model': the mesh has dp, cp, tp",
        ),
        (
            lambda: Layout(MESH, Rules(batch="tp", ffn="tp")).spec(("batch", "ffn"), (4, 4), "h"),
            r"h: mesh axis 'tp' cuts dim 0 \('batch'\) and dim 1 \('ffn'\)\. "
            r"Map one of the two to other mesh axes in rules\.",
        ),
        (
            lambda: Layout(Mesh(tp=4), Rules(kv_heads="tp")).spec(
                ("head_dim", "kv_heads"), (8, 2), "blocks.k"
            ),
            r"blocks\.k: dim 1 \('kv_heads', size 2\) does not divide over mesh \('tp',\) "
            r"\(size 4\)\. Pad 'kv_heads' to 4, or map it to fewer mesh axes in rules\.",
        ),
        (
            lambda: Layout(MESH, Rules(vocabulary="tp")).check_names({"vocab", "embed"}),
            r"rules: nothing in the program has an axis 'vocabulary' \(did you mean 'vocab'\?\)\. "
            r"Remove the rule or use one of embed, vocab\.",
        ),
        (
            lambda: lower(lambda x: x, Layout(), Array("batch", shape=(2, 3))),
            r"x: declared 'batch', which names 1 axes; the array has 2 dims \(2, 3\)\. "
            r"Give one name per dim\.",
        ),
        (
            lambda: lower(lambda x: x, Layout(), torch.zeros(2)),
            r"x: Tensor is no declaration\. Give a Param, an Array or a ShardType\.",
        ),
        (
            lambda: lower(lambda x: x, Layout(), Param("vocab embed"), sizes={"vocab": 3}),
            r"x: axes 'vocab embed' have no size for 'embed'\. Add it to sizes \(known: vocab\)\.",
        ),
    ],
)
def test_a_wrong_layout_says_what_to_do(make, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        make()
    if "no size" not in text:
        assert isinstance(caught.value, ShardingError)
