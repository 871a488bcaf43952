"""Text from a checkpoint: its own config and tokenizer, on any mesh."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatree.io.checkpoint import latest
from megatree.recipes.build import layout_of, model_of
from megatree.recipes.config import MeshConfig, RunConfig
from megatree.recipes.data import end_of_document, load_tokenizer
from megatree.recipes.job import rank_comm, saved_config
from megatree.runtime.generate import greedy, load_generator, padded_length, sampling
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
    eod = end_of_document(cfg.data, tokenizer)
    rows = [tokenizer.encode(prompt).ids or [eod] for prompt in prompts]
    longest = max(map(len, rows)) + how.max_tokens
    seq = padded_length(longest, layout, cfg.model.seq_length)
    model = model_of(cfg).for_evaluation().up_to("head")
    generator = load_generator(
        path,
        model.with_sizes(batch=len(rows), seq=seq, seq_res=seq),
        layout,
        comm=rank_comm(layout.mesh, world, device),
        world=world,
    )
    choose = sampling(temperature=how.temperature, seed=how.seed) if how.temperature else greedy
    made = generator(rows, how.max_tokens, choose, end=eod)
    # Decoded as one text: the bytes of a character may be in both halves.
    whole = [tokenizer.decode(row + new) for row, new in zip(rows, made, strict=True)]
    return [text[len(tokenizer.decode(row)) :] for text, row in zip(whole, rows, strict=True)]


def _check_mesh(mesh: MeshConfig, cfg: RunConfig, num_prompts: int) -> None:
    if mesh.pp > 1:
        raise ValueError(
            f"mesh.pp: {mesh.pp}, but generation knows no pipeline. "
            "Set mesh.pp to 1, and mesh.tp to as many ranks as the model needs."
        )
    parts = math.prod(mesh.sizes[axis] for axis in cfg.rules.get("batch", ()))
    if num_prompts % parts:
        raise ValueError(
            f"mesh: {num_prompts} prompts do not divide over {parts} ranks ({mesh}). "
            f"Give {-(-num_prompts // parts) * parts} prompts, or set mesh.dp to 1."
        )


def _find(checkpoint: str) -> tuple[str, RunConfig]:
    path = Path(checkpoint)
    if not (path / "manifest.msgpack").is_file():
        found = latest(path)
        if found is None:
            raise ValueError(
                f"{checkpoint}: no checkpoint and no folder of checkpoints. "
                "Give the checkpoint.dir of a run, or a step_NNNNNNNN in it."
            )
        path = found
    return str(path), saved_config(path)
