"""How fast a state goes to a disk and comes back, against plain files, torch DCP and Orbax.

Processes hold the rows of every array, as many each; "other layout" reads them cut by columns.
Programs take turns, in another order each round; every file is fsynced (all four do it by
themselves) and dropped from the page cache before it is read. Plain files are 4 MiB calls of
`pwrite` and `preadv` from and into memory that is there: `plain + crc`, our equal, makes the same
CRC-32 of every block as we do (zlib's, or `isal`'s where that is installed), and `plain` none. DCP
makes the CRC-32 of its archives when it writes; Orbax (tensorstore) has CRC-32C, holds all arrays
in one process, and makes the memory that it reads into.

`stall` is taken from a training loop of a decoder (AdamW, float32) that saves behind its steps:
`held up` are the seconds in `save` and those for which the next update waits for the copy, `lost`
is what the steps until the checkpoint is there take more than steps without one, both over what
the same save takes when it is waited for. Where every core computes, `lost` is the processor time
of the save; `--ranks 1` leaves a core idle. `host memory` is how much more than before a rank has
at most while it saves from transposed tensors and loads another layout.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.cpu_step import batch_of
from megatree.io.checkpoint import Piece, Saver, load, save
from megatree.io.checkpoint.checksum import crc32
from megatree.io.world import World
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.runtime import pieces
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.optimizers import adamw
from megatree.runtime.processes import background_world, current_world, launch
from megatree.runtime.step import train_step

CALL = 4 << 20  # bytes of a call
COLUMNS = 2048


class Program(Protocol):
    """Saves the rows that this rank holds, and loads them, or its columns."""

    name: str

    def save(self, path: str) -> None:
        """Write a directory and wait for the disk."""
        ...

    def load(self, path: str, *, other: bool) -> None:
        """Read it, as rows or as columns."""
        ...


class State:
    """This rank's part of the arrays: as it is saved, and memory for what is loaded."""

    def __init__(self, world: World, num_bytes: int, arrays: int) -> None:
        self.world, self.names = world, [f"layer.{n}" for n in range(arrays)]
        cut = 8 * world.size
        rows = num_bytes // arrays // COLUMNS // 4 // cut * cut
        self.shape = (rows, COLUMNS)
        draw = torch.Generator().manual_seed(world.rank)
        local = (rows // world.size, COLUMNS)
        self.rows = {name: torch.rand(local, generator=draw) for name in self.names}
        # zeroed, so that no program is the one that first touches a page
        columns = (rows, COLUMNS // world.size)
        self.into = {name: torch.empty(local).zero_() for name in self.names}
        self.columns = {name: torch.empty(columns).zero_() for name in self.names}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays on all ranks."""
        return len(self.names) * 4 * self.shape[0] * self.shape[1]

    def pieces(self, data: dict[str, Tensor], *, columns: bool = False) -> list[Piece]:
        """Return this rank's part as pieces over some memory."""
        (rows, width), rank, size = self.shape, self.world.rank, self.world.size
        box = ((rank * rows // size, (rank + 1) * rows // size), (0, width))
        if columns:
            box = ((0, rows), (rank * width // size, (rank + 1) * width // size))
        return [
            Piece(path=name, shape=self.shape, dtype=torch.float32, axes="ffn embed", box=box,
                  data=x)
            for name, x in data.items()
        ]  # fmt: skip


class Ours:
    """megatree's own format."""

    def __init__(self, state: State) -> None:
        self.name, self.state = "megatree", state

    def save(self, path: str) -> None:
        """Write the rows."""
        save(path, self.state.pieces(self.state.rows), world=self.state.world)

    def load(self, path: str, *, other: bool) -> None:
        """Read rows or columns."""
        data = self.state.columns if other else self.state.into
        load(path, self.state.pieces(data, columns=other), world=self.state.world)


class Plain:
    """One file a rank, in calls of 4 MiB."""

    def __init__(self, state: State, *, crc: bool) -> None:
        self.name, self.state, self.crc = "plain + crc" if crc else "plain", state, crc

    def save(self, path: str) -> None:
        """Write the rows."""
        Path(path).mkdir(exist_ok=True)
        file = os.open(f"{path}/{self.state.world.rank}", os.O_WRONLY | os.O_CREAT, 0o666)
        at = 0
        for x in self.state.rows.values():
            for block in blocks(x):
                if self.crc:
                    crc32(block)
                at += os.pwrite(file, block, at)
        os.fsync(file)
        os.close(file)

    def load(self, path: str, *, other: bool) -> None:
        """Read rows or columns."""
        if other:
            raise NotImplementedError
        file = os.open(f"{path}/{self.state.world.rank}", os.O_RDONLY)
        at = 0
        for x in self.state.into.values():
            for block in blocks(x):
                at += os.preadv(file, [block], at)
                if self.crc:
                    crc32(block)
        os.close(file)


def blocks(x: Tensor) -> list[memoryview]:
    """Return the bytes of a tensor in parts of a call."""
    view = x.reshape(-1).view(torch.uint8).numpy().data
    return [view[at : at + CALL] for at in range(0, len(view), CALL)]


class DCP:
    """torch.distributed.checkpoint of DTensors."""

    def __init__(self, state: State) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh("cpu", (state.world.size,))
        self.name = "torch DCP"

        def tree(data: dict[str, Tensor], dim: int) -> dict[str, Any]:
            return {k: DTensor.from_local(x, mesh, [Shard(dim)]) for k, x in data.items()}

        self.rows, self.into = tree(state.rows, 0), tree(state.into, 0)
        self.columns = tree(state.columns, 1)

    def save(self, path: str) -> None:
        """Write the rows."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self.rows, checkpoint_id=path)

    def load(self, path: str, *, other: bool) -> None:
        """Read rows or columns."""
        import torch.distributed.checkpoint as dcp

        dcp.load(self.columns if other else self.into, checkpoint_id=path)


class Orbax:
    """orbax.checkpoint.StandardCheckpointer of JAX arrays over devices of one process."""

    def __init__(self, state: State) -> None:
        self.name, self.state = "orbax", state
        if state.world.rank == 0:
            import jax
            import numpy as np
            from jax.sharding import Mesh, NamedSharding, PartitionSpec

            mesh = Mesh(np.array(jax.devices()[: state.world.size]), ("x",))
            self.cut = {
                other: NamedSharding(mesh, PartitionSpec(*spec))
                for other, spec in {False: ("x", None), True: (None, "x")}.items()
            }
            draw = np.random.default_rng(0)
            self.tree = {
                name: jax.device_put(draw.random(state.shape, np.float32), self.cut[False])
                for name in state.names
            }

    def save(self, path: str) -> None:
        """Write the rows."""
        if self.state.world.rank == 0:
            import orbax.checkpoint as ocp

            with ocp.StandardCheckpointer() as saver:
                saver.save(path, self.tree)

    def load(self, path: str, *, other: bool) -> None:
        """Read rows or columns."""
        if self.state.world.rank == 0:
            import jax
            import orbax.checkpoint as ocp

            like = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.cut[other])
                for name, x in self.tree.items()
            }
            with ocp.StandardCheckpointer() as saver:
                jax.block_until_ready(saver.restore(path, like))


class Spent(NamedTuple):
    """What something took, seconds: until the last rank was done, and of all their processors."""

    wall: float
    cpu: float


def timed(world: World, fn: Callable[[], None]) -> Spent:
    """Measure a call that every rank makes."""
    world.barrier()
    begun, cpu = time.perf_counter(), time.process_time()
    fn()
    told = world.gather((time.perf_counter() - begun, time.process_time() - cpu))
    return Spent(max(wall for wall, _ in told), sum(cpu for _, cpu in told))


def forget(world: World, path: str) -> None:
    """Drop the files of a directory from the page cache."""
    world.barrier()
    for file in Path(path).rglob("*") if world.rank == 0 else ():
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    world.barrier()


def rounds(
    state: State, programs: Sequence[Program], folder: str, count: int
) -> dict[tuple[str, str], list[Spent]]:
    """Return (program, what) -> what each round took."""
    world, seconds = state.world, {}
    for number in range(count):
        for program in [*programs[number % len(programs) :], *programs[: number % len(programs)]]:
            path = f"{folder}/{program.name.replace(' ', '')}-{number}"

            def note(what: str, fn: Callable[[], None], name: str = program.name) -> None:
                seconds.setdefault((name, what), []).append(timed(world, fn))

            note("save", lambda p=program, at=path: p.save(at))
            layouts = {"load": False, "load, other layout": True}
            for what, other in layouts.items():
                forget(world, path)
                try:
                    note(what, lambda p=program, at=path, o=other: p.load(at, other=o))
                except NotImplementedError:
                    seconds.pop((program.name, what), None)
            world.barrier()
            if world.rank == 0:
                shutil.rmtree(path)
            world.barrier()
    return seconds


def stalls(
    device: torch.device, world: World, behind: World, folder: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Return what a training loop loses by saves behind it, each round, in seconds."""
    layout = Layout(Mesh(dp=world.size), Rules(batch="dp"))
    # 12.6 M parameters a layer, 12 bytes of state for each
    layers = max(1, round(options.train_gib * (1 << 30) / 12 / 12.6e6))
    cfg = GPTConfig(
        vocab_size=512, seq_length=64, num_layers=layers, embed=1024, kv_heads=8, head_dim=128,
        ffn=2731,
    )  # fmt: skip
    comm = ProcessComm(layout.mesh, device)
    step = train_step(gpt(cfg, batch_size=world.size), layout, adamw(1e-3), comm=comm)
    batch = [step.local(batch_of(cfg, world.size))]
    states = [step.init()]

    def steps(count: int) -> None:
        for _ in range(count):
            states[0], metrics = step(states[0], batch)
            metrics.loss.item()

    def saved(saver: Saver) -> None:
        pieces.save(path, step, states[0], world, saver=saver)

    nbytes = sum(x.numel() for x in states[0].params.values()) * 12
    waits, saves = Saver(world), Saver(behind, host_bytes=nbytes + (64 << 20))
    path, found = f"{folder}/stall", {"save": [], "step": [], "held up": [], "lost": []}
    steps(1)
    for _ in range(options.rounds + 1):
        found["save"].append(timed(world, lambda: saved(waits)).wall)
        remove(world, path)
        found["step"].append(timed(world, lambda: steps(2)).wall / 2)
        alone = statistics.median(found["step"])
        count = world.broadcast(2 + math.ceil(2 * found["save"][-1] / alone))
        without = timed(world, lambda n=count: steps(n)).wall

        def go(count: int = count) -> None:
            saved(saves)
            steps(count)

        taken = timed(world, go).wall
        saves.wait()
        held = max(world.gather(saves.poll()[-1].stall_s))
        remove(world, path)
        found["held up"].append(held)
        found["lost"].append(taken - without)
    return {"state": nbytes, **found}


def remove(world: World, path: str) -> None:
    """Remove a directory when nobody uses it any more."""
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(path)
    world.barrier()


def host_memory(state: State, folder: str) -> dict[str, int]:
    """Return by how many bytes this rank grew at most, per action."""
    path, grown = f"{folder}/memory", {}
    turned = {name: x.t().contiguous().t() for name, x in state.rows.items()}
    saver = Saver(background_world(), host_bytes=64 << 20)

    def behind() -> None:
        saver.save(f"{path}-behind", state.pieces(state.rows), step=0)
        saver.wait()

    actions: dict[str, Callable[[], None]] = {
        "save, transposed": lambda: save(path, state.pieces(turned), world=state.world),
        "load, other layout": lambda: Ours(state).load(path, other=True),
        "save behind, 64 MiB": behind,
    }
    for name, act in actions.items():
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        timed(state.world, act)
        grown[name] = max(0, status("VmHWM") - before)
    remove(state.world, path)
    remove(state.world, f"{path}-behind")
    return grown


def status(field: str) -> int:
    """Return a size that the kernel tells of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith(f"{field}:"))


def rank_main(device: torch.device, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time everything on this rank; rank 0's result is told."""
    world, behind = current_world(), background_world()
    state = State(world, int(options.gib * (1 << 30)), options.arrays)
    programs: list[Program] = [Ours(state), Plain(state, crc=False), Plain(state, crc=True)]
    programs += [DCP(state), Orbax(state)]
    warm = f"{folder}/warm"
    for program in programs:  # imports, connections, compilation
        program.save(warm)
        world.barrier()
        program.load(warm, other=False)
        remove(world, warm)
    return {
        "bytes": state.nbytes,
        "seconds": rounds(state, programs, folder, options.rounds),
        "stall": stalls(device, world, behind, folder, options),
        "memory": host_memory(state, folder),
    }


def show(where: str, found: dict[str, Any]) -> None:
    """Print a table for people, and a JSON line."""
    gigabytes, seconds = found["bytes"] / 1e9, found["seconds"]
    print(f"{where}: {gigabytes:.2f} GB; GB/s, median (least to most), and per second of processor")
    for what in ("save", "load", "load, other layout"):
        for (name, kind), spent in seconds.items():
            if kind != what:
                continue
            rates = [gigabytes / one.wall for one in spent]
            cpu = statistics.median(gigabytes / one.cpu for one in spent)
            pairs = list(zip(seconds["megatree", what], spent, strict=True))
            faster = statistics.median(theirs.wall / ours.wall for ours, theirs in pairs)
            lighter = statistics.median(theirs.cpu / ours.cpu for ours, theirs in pairs)
            print(
                f"  {what:<19} {name:<12} {statistics.median(rates):5.2f} ({min(rates):.2f} to "
                f"{max(rates):.2f}), {cpu:.2f}; ours is {faster:.2f} and {lighter:.2f} times that"
            )
    stall = found["stall"]
    waited, alone = (statistics.median(stall[what]) for what in ("save", "step"))
    held, lost = (statistics.median(stall[what][1:]) / waited for what in ("held up", "lost"))
    print(
        f"  a save of {stall['state'] / 1e9:.2f} GB behind steps of {alone:.2f} s holds them up "
        f"for {held:.1%} of one that is waited for ({waited:.2f} s), the first for "
        f"{stall['held up'][0] / waited:.1%}; the steps lose {lost:.1%}"
    )
    for name, grown in found["memory"].items():
        print(f"  host memory, {name}: {grown / (1 << 20):.0f} MiB")
    plain = {f"{name}: {what}": seconds for (name, what), seconds in found["seconds"].items()}
    print(json.dumps({"where": where, **found, "seconds": plain}))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the state")
    parser.add_argument("--arrays", type=int, default=32, help="arrays that it is made of")
    parser.add_argument("--train-gib", type=float, default=1.0, help="state of the training loop")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", nargs="*", default=["/dev/shm", tempfile.gettempdir()])
    options = parser.parse_args(argv)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.ranks}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    for where in options.dir:
        with tempfile.TemporaryDirectory(dir=where) as folder:
            show(where, launch(rank_main, options.ranks, folder, options, threads=1))


if __name__ == "__main__":
    main()
