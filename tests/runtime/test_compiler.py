"""Compiled mode without a compiler is refused before anything is built."""

import sys
from pathlib import Path

import pytest

from megatree.runtime.compiler import check_compiler

CPU_COMPILER = "clang++" if sys.platform == "darwin" else "g++"


def program(folder: Path, name: str) -> None:
    """Put something on the path that could be run."""
    file = folder / name
    file.write_text("#!/bin/sh\n", encoding="utf-8")
    file.chmod(0o755)


@pytest.mark.parametrize(
    ("device", "text"),
    [
        (
            "cpu",
            f"compile: torch.compile builds C++ on cpu, and no C++ compiler ({CPU_COMPILER}, or "
            f"$CXX) is on the PATH. Install {CPU_COMPILER}, or set compile to False.",
        ),
        (
            "cuda",
            "compile: torch.compile builds C on cuda, and no C compiler (gcc or clang, or $CC) is "
            "on the PATH. Install gcc, or set compile to False.",
        ),
    ],
)
def test_an_empty_path_is_refused_in_a_sentence(tmp_path: Path, device: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"^compile: ") as told:
        check_compiler(device, {"PATH": str(tmp_path)})
    assert str(told.value) == text


@pytest.mark.parametrize(("device", "name"), [("cpu", CPU_COMPILER), ("cuda", "clang")])
def test_a_compiler_on_the_path_is_enough(tmp_path: Path, device: str, name: str) -> None:
    program(tmp_path, name)
    check_compiler(device, {"PATH": str(tmp_path)})


def test_a_compiler_that_is_named_is_the_one_that_is_taken(tmp_path: Path) -> None:
    program(tmp_path, "my-c++")
    check_compiler("cpu", {"PATH": "", "CXX": f"{tmp_path / 'my-c++'} -O2"})
    program(tmp_path, CPU_COMPILER)
    with pytest.raises(ValueError, match=r"\$CXX names 'gone', which is not on the PATH"):
        check_compiler("cpu", {"PATH": str(tmp_path), "CXX": "gone"})


@pytest.mark.skipif(sys.platform == "darwin", reason="clang++ is what is looked for there")
def test_one_that_has_to_be_named_is_named(tmp_path: Path) -> None:
    program(tmp_path, "clang++")
    with pytest.raises(ValueError, match=r"Install g\+\+, or set CXX=clang\+\+, or set compile"):
        check_compiler("cpu", {"PATH": str(tmp_path)})
