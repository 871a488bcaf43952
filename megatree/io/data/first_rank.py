"""One rank works while the others wait, and all hear within a second how it ended."""

import threading
import time
from collections.abc import Callable

from megatree.io.world import World

_HEARTBEAT_S = 1.0


def on_first_rank(
    world: World, what: str, work: Callable[[], object], *, deadline_s: float
) -> None:
    """Run `work` on rank 0 in a thread; the ranks meet every second until it ends.

    No rank stays in one collective for longer than a heartbeat, so a slow build is never mistaken
    for a hang, and a failure on rank 0 is raised everywhere at once.

    Args:
        world: the ranks; every one calls this.
        what: is being made, for the messages.
        work: what rank 0 does.
        deadline_s: seconds after which all ranks give up.

    Raises:
        TimeoutError: the work took longer; the text says what was waited for.
        Exception: what `work` raised on rank 0; elsewhere an OSError or ValueError with its text.
    """
    if world.size == 1:
        work()
        return
    failure: list[Exception] = []
    thread = None
    if world.rank == 0:

        def run() -> None:
            try:
                work()
            except Exception as error:
                failure.append(error)

        thread = threading.Thread(target=run, name=f"build {what}", daemon=True)
        thread.start()
    start = time.monotonic()
    while True:
        told = ""
        if thread is not None:
            thread.join(_HEARTBEAT_S)
            if not thread.is_alive():
                told = f"failed: {failure[0]}" if failure else "done"
            elif time.monotonic() - start > deadline_s:
                told = "late"
        is_os = bool(failure) and isinstance(failure[0], OSError)
        told, is_os = world.broadcast((told, is_os))
        if told == "done":
            return
        if told == "late":
            raise TimeoutError(
                f"{what}: rank 0 has been building it for {deadline_s:.0f} seconds and is not "
                "done. Build it before the job (megatree data index), or raise the deadline."
            )
        if told:
            if failure:
                raise failure[0]
            raise (OSError if is_os else ValueError)(f"rank 0: {told.removeprefix('failed: ')}")
