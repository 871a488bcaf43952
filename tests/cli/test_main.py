"""The command helps at every level, refuses in one sentence with code 2, and starts fast."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatree import __version__
from megatree.cli.main import COMMANDS, main
from megatree.recipes.presets import RECIPES


def answer(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Run the command; return its exit code, stdout and stderr."""
    try:
        code = main(list(argv))
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.parametrize("argv", [["-h"], ["--help"], []])
def test_help_names_every_command(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capfd, *argv)
    assert (code, err) == (0 if argv else 2, "")
    for name, text in COMMANDS.items():
        assert name in out
        assert text.split()[0] in out
    assert "--version" in out


@pytest.mark.parametrize("module", ["megatree", "megatree.cli"])
def test_the_package_runs_as_a_module(module: str) -> None:
    """For `torchrun -m megatree`, and where the script is not on the path."""
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-m", module, "--version"], cwd=root, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"megatree {__version__} ")


@pytest.mark.parametrize("command", ["train", "explain"])
def test_help_names_every_recipe(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capfd, command, "--help")
    assert code == 0
    assert all(name in out for name in RECIPES)
    assert "A Llama of 956 M parameters" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "demo"], ["--train.steps INT", "--optimizer.lr FLOAT", "sequences per step."]),
        (["explain", "llama-7b"], ["--unit STR", "--mesh.tp INT", "(default: 8)"]),
        (["generate"], ["--checkpoint STR", "(required)", "--temperature FLOAT"]),
        (["demo"], ["--steps INT", "--dir STR"]),
    ],
)
def test_help_of_a_command_names_its_options(
    argv: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = answer(capfd, *argv, "--help")
    assert code == 0
    for word in words:
        assert word in out


def test_version_says_ours_and_torchs(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capfd, "--version")
    assert code == 0
    assert out.startswith(f"megatree {__version__} (torch 2.")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["trian"],
            "trian: no command is called so (did you mean 'train'?). "
            f"Use one of {', '.join(COMMANDS)}.",
        ),
        (
            ["train", "lama-1b"],
            "lama-1b: no recipe is called so (did you mean 'llama-1b'?). "
            f"Use one of {', '.join(RECIPES)}.",
        ),
        (
            ["train", "--nproc", "2", "demo"],
            "--nproc: comes before the recipe. Type megatree train RECIPE --nproc ..., with one of "
            f"{', '.join(RECIPES)}.",
        ),
        (
            ["train", "demo", "--nproc", "3"],
            "--nproc: 3 processes, but the mesh (dp=1 tp=2) has 2 ranks. "
            "Leave --nproc out, or set mesh.tp to 3.",
        ),
        (
            ["train", "demo", "--nproc", "4"],
            "--nproc: 4 processes, but the mesh (dp=1 tp=2) has 2 ranks. "
            "Leave --nproc out, or set mesh.dp to 2.",
        ),
        (
            ["train", "demo", "--mesh.tp", "1"],
            "rules.seq_res: cut by tp, which has one rank (dp=1 tp=1); sequence parallelism goes "
            "with tensor parallelism. Leave rules.seq_res empty, or set mesh.tp to 2 or more.",
        ),
        (
            ["explain", "demo", "--unit", "block.dense"],
            "unit: the model has no 'block.dense' (did you mean 'blocks.dense'?). "
            "Use one of embed, blocks.dense, head, loss.",
        ),
        (
            ["train", "gpt2-small", "--checkpoint.dir", ""],
            "checkpoint.dir: empty, but checkpoint.every is 1000. "
            "Name a folder, or set checkpoint.every to 0.",
        ),
        (
            ["generate", "--checkpoint", "no/such", "--prompt", "a"],
            "no/such: no checkpoint and no folder of checkpoints. "
            "Give the checkpoint.dir of a run, or a step_NNNNNNNN in it.",
        ),
        (["generate", "--checkpoint", "x"], "--prompt: none. Give the text to continue."),
        (["demo", "--steps", "1"], "--steps: 1. Give at least 2 (one per mesh), or 0."),
        (["train", "no/such.json"], "[Errno 2] No such file or directory: 'no/such.json'"),
    ],
)
def test_a_refusal_is_one_message_and_code_2(
    argv: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = answer(capfd, *argv)
    # A field that a group refuses by itself is told in the parser's frame.
    flat = " ".join(err.replace("\u2502", " ").split())
    assert message in flat
    assert (code, out) == (2, "")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "demo", "--train.step", "3"], ["options: --train.step,", "--train.steps"]),
        (["train", "demo", "--dtype", "float12"], ["invalid choice 'float12'", "'bfloat16'"]),
        (["train", "demo", "--train.steps", "many"], ["--train.steps", "many"]),
        (["train", "demo", "--optimizer.betas", "0.9"], ["--optimizer.betas", "Expected 2"]),
        (["train", "demo", "--train.steps", "0"], ["train.steps: 0. Give at least 1."]),
        (["generate", "--prompt", "a"], ["--checkpoint"]),
        (["demo", "extra"], ["Unrecognized options: extra"]),
    ],
)
def test_a_wrong_option_is_refused_with_a_hint(
    argv: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = answer(capfd, *argv)
    assert (code, out) == (2, "")
    flat = " ".join(err.replace("\u2502", " ").split())
    for word in words:
        assert word in flat
    assert "Traceback" not in err


def test_heads_that_do_not_divide_have_the_layouts_own_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, _, err = answer(capfd, "explain", "demo", "--mesh.tp", "8")
    assert code == 2
    assert "('kv_heads', size 4) does not divide over mesh ('tp',) (size 8)" in err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: list[str]) -> int:
        return {}["a bug"]

    monkeypatch.setattr("megatree.cli.demo.main", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["demo"])


@pytest.mark.parametrize(
    "argv",
    [[], ["train"], ["train", "demo"], ["explain", "demo"], ["plan", "demo"], ["generate"]],
    ids=" ".join,
)
def test_help_imports_no_torch(argv: list[str]) -> None:
    """Torch alone takes over a second, and help is what a new user types first."""
    code = (
        "import sys\n"
        "from megatree.cli import main\n"
        f"try:\n    main([*{argv}, '--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, stdout=subprocess.DEVNULL)


def test_explain_prints_the_program_and_its_collectives(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capfd, "explain", "demo")
    assert code == 0
    assert "blocks.dense on dp=1 tp=2" in out
    assert "all_gather(tp) dim 1 | psum_scatter(tp) dim 1" in out
    table = out[out.index("Collectives of") :]
    for phase in ("forward", "backward"):
        rows = [line for line in table.splitlines() if line.strip().startswith(phase)]
        assert sum("all_gather" in row for row in rows) == 2
        assert sum("psum_scatter" in row for row in rows) == 2


def test_explain_says_that_one_device_has_no_collectives(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capfd, "explain", "gpt2-small")
    assert code == 0
    assert out[out.index("Collectives of") :].split()[-1] == "none"
