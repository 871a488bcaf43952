"""Text from a checkpoint: its own config and tokenizer, on any mesh."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatree.io.checkpoint import latest
from megatree.io.checkpoint.manifest import MANIFEST_FILE
from megatree.io.checkpoint.place import place_of
from megatree.recipes.build import layout_of, model_of
from megatree.recipes.config import MeshConfig, RunConfig
from megatree.recipes.job import rank_comm, saved_config
from megatree.recipes.vocabulary import load_tokenizer
from megatree.runtime.generate import SEQUENCE, greedy, load_generator, padded_length, sampling
from megatree.runtime.processes import current_world


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a text goes on.

    Args:
        max_tokens: tokens to add.
        temperature: 0 takes the likeliest token.
        seed: of the draws.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: {self.max_tokens}. Give at least 1.")
        if self.temperature < 0.0:
            raise ValueError(f"temperature: {self.temperature}. Give 0 or more.")


def sample(
    device: torch.device,
    checkpoint: str,
    mesh: MeshConfig,
    prompts: Sequence[str],
    how: Sampling,
) -> list[str]:
    """Continue every prompt; every rank calls it.

    Args:
        device: of this rank.
        checkpoint: one, or a folder of them.
        mesh: the ranks; the rules are those of the run.
        prompts: texts; an empty one begins a document.
        how: length and choice.

    Returns:
        The continuations.

    Raises:
        ValueError: there is no checkpoint, the texts are too long for the model, or the mesh is
            not one for generation.
    """
    world = current_world()
    path, cfg = world.broadcast(world.on_first(lambda: _find(checkpoint)))
    _check_mesh(mesh, cfg, len(prompts))
    layout = layout_of(mesh, cfg.rules)
    tokenizer = load_tokenizer(cfg.data)
    eod = tokenizer.special.need("eod")
    rows = [tokenizer.encode(prompt) or [eod] for prompt in prompts]
    longest = max(map(len, rows)) + how.max_tokens
    seq = padded_length(longest, layout, cfg.model.seq_length)
    model = model_of(cfg, entries=()).for_evaluation().up_to("head")
    generator = load_generator(
        path,
        model.with_sizes(batch=len(rows), **{a: seq for a in SEQUENCE if a in model.sizes}),
        layout,
        comm=rank_comm(layout.mesh, world, device),
        world=world,
    )
    choose = sampling(temperature=how.temperature, seed=how.seed) if how.temperature else greedy
    made = generator(rows, how.max_tokens, choose, end=eod)
    # Decoded as one text: the bytes of a character may be in both halves.
    # A padded or larger vocabulary of the model has ids that no text has.
    spelled = [[token for token in new if token < tokenizer.vocab_size] for new in made]
    whole = [tokenizer.decode(row + new) for row, new in zip(rows, spelled, strict=True)]
    return [text[len(tokenizer.decode(row)) :] for text, row in zip(whole, rows, strict=True)]


def _check_mesh(mesh: MeshConfig, cfg: RunConfig, num_prompts: int) -> None:
    parts = math.prod(mesh.sizes.get(axis, 1) for axis in cfg.rules.get("batch", ()))
    if num_prompts % parts:
        raise ValueError(
            f"mesh: {num_prompts} prompts do not divide over {parts} ranks ({mesh}). "
            f"Give {-(-num_prompts // parts) * parts} prompts, or set mesh.dp to 1."
        )


def _find(checkpoint: str) -> tuple[str, RunConfig]:
    path = place_of(checkpoint)
    if not path.holds(MANIFEST_FILE):
        found = latest(path)
        if found is None:
            raise ValueError(
                f"{checkpoint}: no checkpoint and no folder of checkpoints. "
                "Give the checkpoint.dir of a run, or a step_NNNNNNNN in it."
            )
        path = found
    return str(path), saved_config(path)
