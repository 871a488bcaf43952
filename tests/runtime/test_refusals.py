"""Only errors that a user can mend lose their traceback."""

from collections.abc import Callable

import pytest

from megatree.io.world import World
from megatree.parallel.mesh import Mesh
from megatree.runtime.refusals import refusal


def unpack_in_the_package() -> None:
    World.single().agree(lambda: dict([(1, 2, 3)]))  # type: ignore[list-item]


def raise_here() -> None:
    raise ValueError("not from the package")


def open_nothing() -> None:
    open("/nonexistent/file")  # noqa: SIM115


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (lambda: Mesh(tp=0), "Mesh: axis 'tp' has size 0. Give at least 1."),
        (lambda: World.single().agree(lambda: Mesh(tp=0)), "Mesh: axis 'tp' has size 0."),
        (open_nothing, "[Errno 2] No such file or directory: '/nonexistent/file'"),
        (raise_here, None),
        (unpack_in_the_package, None),
        (lambda: int("x"), None),
        (lambda: {}["x"], None),
    ],
)
def test_which_errors_are_told_in_a_sentence(fails: Callable[[], object], told: str | None) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (any: what is told of it is compared)
        fails()
    found = refusal(caught.value)
    assert found is None if told is None else (found or "").startswith(told)


def test_a_strict_zip_inside_the_package_is_a_bug() -> None:
    """Its ValueError has a frame of the package last, but nobody wrote its message for a user."""
    from megatree.parallel.layout import spec_box

    with pytest.raises(ValueError, match="zip") as caught:
        spec_box(((),), (1, 2), {}, {})
    assert refusal(caught.value) is None
