"""A process that forks the ranks of a job for test_rank_kills.py to kill; it imports torch once.

Reads lines `directory first_step ranks host_bytes` from stdin and answers on stdout, unbuffered:
`pids N,N`, then `saved N` when rank 0 knows that a step is complete, then `ended RANK:STATUS` for
each. The ranks save step after step until they are killed, or until a peer is gone.
"""

import itertools
import os
import pickle
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from megatree.io.checkpoint import Piece, Saver, step_name
from megatree.io.world import World

BLOCK = 1 << 14
ROWS = 240  # divides over 1 to 6 ranks


def world_over(rank: int, size: int, peers: list[socket.socket]) -> World:
    """Return a world in which rank 0 is connected to each other rank; a dead peer is an OSError."""

    def send(peer: socket.socket, value: Any) -> None:
        raw = pickle.dumps(value)
        peer.sendall(struct.pack("<Q", len(raw)) + raw)

    def receive(peer: socket.socket) -> Any:
        (count,) = struct.unpack("<Q", exactly(peer, 8))
        return pickle.loads(exactly(peer, count))

    def exactly(peer: socket.socket, count: int) -> bytes:
        raw = b""
        while len(raw) < count:
            part = peer.recv(count - len(raw))
            if not part:
                raise OSError("a peer is gone")
            raw += part
        return raw

    def gather(value: Any) -> list[Any]:
        if rank:
            send(peers[0], value)
            return receive(peers[0])
        everyone = [value, *map(receive, peers)]
        for peer in peers:
            send(peer, everyone)
        return everyone

    return World(
        rank=rank,
        size=size,
        barrier=lambda: (gather(None), None)[1],
        gather=gather,
        broadcast=lambda value: gather(value if rank == 0 else None)[0],
    )


def state(rank: int, size: int) -> list[Piece]:
    """Return a replica that all share, and a part of a leaf that is cut; about 1 MB in all."""
    rows = ROWS // size
    cut = Piece(
        path="cut",
        shape=(ROWS, 512),
        dtype=torch.float32,
        axes="ffn embed",
        box=((rank * rows, (rank + 1) * rows), (0, 512)),
        data=torch.empty(512, rows).t(),
    )
    return [Piece.whole("all", torch.empty(ROWS, 512), "ffn embed"), cut]


def save_for_ever(world: World, directory: Path, first: int, host_bytes: int) -> None:
    saver = Saver(world, host_bytes=host_bytes, block_bytes=BLOCK)
    held = state(world.rank, world.size)
    for step in itertools.count(first):
        for piece in held:  # while the last copy is still being written
            piece.tensor.fill_(float(step))
        saver.save(directory / step_name(step), held, step=step, extra={"step": step})
        for done in saver.poll():
            if world.rank == 0:
                os.write(1, f"saved {done.step}\n".encode())


def fork(directory: Path, first: int, size: int, host_bytes: int) -> list[int]:
    pairs = [socket.socketpair() for _ in range(size - 1)]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            mine = [pair[0] for pair in pairs] if rank == 0 else [pairs[rank - 1][1]]
            for pair in pairs:
                for end in pair:
                    if end not in mine:
                        end.close()  # or the end of a peer would not be seen
            try:
                world = world_over(rank, size, mine)
                save_for_ever(world, directory, first, host_bytes)
            except OSError:
                os._exit(1)  # a peer is gone
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(2)
        pids.append(pid)
    for pair in pairs:
        for end in pair:
            end.close()
    return pids


def serve() -> None:
    for line in sys.stdin:
        directory, first, size, host_bytes = line.split()
        pids = fork(Path(directory), int(first), int(size), int(host_bytes))
        os.write(1, f"pids {','.join(map(str, pids))}\n".encode())
        for rank, pid in enumerate(pids):
            os.write(1, f"ended {rank}:{os.waitpid(pid, 0)[1]}\n".encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
