"""`megatree generate`: continue a text with a checkpoint."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from megatree.recipes.config import MeshConfig


@dataclass(frozen=True, kw_only=True)
class Generate:
    """What `megatree generate` takes.

    Args:
        checkpoint: a checkpoint, or a folder of them, whose latest is taken.
        prompt: the text to continue; give it several times for several texts.
        max_tokens: tokens to add.
        temperature: 0 takes the likeliest token; above, tokens are drawn, at 1 as the model says.
        seed: of the draws.
        mesh: ranks per mesh axis.
        nproc: processes to start on this machine; 0 for as many as the mesh has ranks.
    """

    checkpoint: str
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    max_tokens: int = 100
    temperature: float = 0.0
    seed: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)
    nproc: int = 0


ABOUT = "Continue a text with a model that `megatree train` has trained, on any mesh."


def main(args: list[str]) -> int:
    """Run the command; return the exit code."""
    options = tyro.cli(Generate, prog="megatree generate", description=ABOUT, args=args)
    from megatree.recipes.sample import Sampling, sample
    from megatree.recipes.start import start

    if not options.prompt:
        raise ValueError("--prompt: none. Give the text to continue.")
    sampling = Sampling(
        max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed
    )
    texts = start(
        sample,
        options.mesh,
        options.checkpoint,
        options.mesh,
        options.prompt,
        sampling,
        nproc=options.nproc,
    )
    for prompt, text in zip(options.prompt, texts or (), strict=True):
        print(f"{prompt}{text}")
    return 0
