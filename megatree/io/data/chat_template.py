"""A chat template turns messages into text; it runs in a process of its own, within limits."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

_WORKER = Path(__file__).with_name("chat_worker.py")
_START_S = 30.0
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH")  # what Python may need to start; no secrets
Piece = tuple[str, bool]
"""Text, and whether the assistant wrote it."""


class ChatTemplate:
    """Render conversations with a Jinja template that need not be trusted.

    The template sees no attribute of Python objects, no file and no network, and is ended when it
    takes too long or too much memory; the next conversation gets a fresh process.

    Args:
        source: the template, as in a Hugging Face `tokenizer_config.json`.
        variables: more names that the template sees, such as bos_token and eos_token.
        learn: which messages of the assistant are learned.
        time_limit_s: seconds for one conversation.
        memory_bytes: most memory of the process.

    Raises:
        ValueError: the template is no Jinja.
    """

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, Any] | None = None,
        learn: Literal["all", "last"] = "all",
        time_limit_s: float = 5.0,
        memory_bytes: int = 1 << 30,
    ) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._start = {
            "template": source,
            "variables": dict(variables or {}),
            "memory_bytes": memory_bytes,
        }
        self._last_only = learn == "last"
        self._time_limit_s = time_limit_s
        self._unread = b""
        self._open()

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], *, variables: Mapping[str, Any] | None = None
    ) -> list[Piece]:
        """Return a conversation as pieces of text, each with whether the assistant wrote it.

        The assistant's part is what stands in `{% generation %}` blocks, or, in a template
        without them, what its message adds to a rendering that ends before it.

        Raises:
            ValueError: the template fails, refuses the messages, or passes a limit.
        """
        return self._ask(messages, variables, whole=False, prompt=False)

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a conversation as one text; with `prompt` it ends where an answer begins.

        Raises:
            ValueError: the template fails, refuses the messages, or passes a limit.
        """
        return "".join(
            piece for piece, _ in self._ask(messages, variables, whole=True, prompt=prompt)
        )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> "ChatTemplate":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None,
        *,
        whole: bool,
        prompt: bool,
    ) -> list[Piece]:
        if self._process is None:
            self._open()
        request = {
            "messages": [dict(message) for message in messages],
            "variables": dict(variables or {}),
            "last_only": self._last_only,
            "whole": whole,
            "prompt": prompt,
        }
        told = self._exchange(request, self._time_limit_s)
        return [(text, learned) for text, learned in told]

    def _open(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        self._unread = b""
        try:
            self._exchange(self._start, _START_S)
        except BaseException:
            self.close()
            raise

    def _exchange(self, request: Mapping[str, Any], limit_s: float) -> list[Any]:
        """Send a line, wait for a line; end the process if that takes too long or fails."""
        process = self._process
        assert process is not None, "the process runs between requests"
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + limit_s
        try:
            _send(process.stdin.fileno(), json.dumps(request).encode() + b"\n", deadline)
            line = self._receive(process.stdout.fileno(), deadline)
        except (TimeoutError, BrokenPipeError, EOFError) as error:
            self.close()
            what = (
                f"runs for more than {limit_s:g} seconds"
                if isinstance(error, TimeoutError)
                else f"ends its process (limit {self._start['memory_bytes']} bytes of memory)"
            )
            raise ValueError(
                f"chat template: {what}. Simplify it, or raise the limit if it can be trusted."
            ) from error
        told = json.loads(line)
        if "error" in told:
            raise ValueError(f"chat template: {told['error']}. Correct the template or the data.")
        return told["pieces"]

    def _receive(self, descriptor: int, deadline: float) -> bytes:
        while b"\n" not in self._unread:
            _wait(descriptor, select.POLLIN, deadline)
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise EOFError
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def find_template(path: Path | None) -> str:
    """Return the template in a file or in a tokenizer's folder.

    Args:
        path: a Jinja file, a JSON file with "chat_template", a folder with chat_template.jinja or
            tokenizer_config.json, or another file of such a folder.

    Raises:
        ValueError: there is none, or several by name.
    """
    if path is None:
        raise ValueError("chat template: none is named. Give a Jinja file as --template.")
    places = [path]
    if path.is_dir() or path.name == "tokenizer.json":
        folder = path if path.is_dir() else path.parent
        places = [folder / "chat_template.jinja", folder / "tokenizer_config.json"]
    for place in (place for place in places if place.is_file()):
        text = place.read_text(encoding="utf-8")
        if place.suffix != ".json":
            return text
        try:
            told = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{place}: it is no JSON ({error}). Give a Jinja file.") from error
        found = told.get("chat_template") if isinstance(told, dict) else None
        if isinstance(found, str):
            return found
        if found is not None:
            raise ValueError(
                f"{place}: chat_template is {type(found).__name__}, not one text. "
                "Save the one you want as a Jinja file, and name that as --template."
            )
    raise ValueError(
        f"{path}: holds no chat template (looked in {', '.join(map(str, places))}). "
        "Give a Jinja file as --template."
    )


def _send(descriptor: int, data: bytes, deadline: float) -> None:
    os.set_blocking(descriptor, False)
    left = memoryview(data)
    while left:
        _wait(descriptor, select.POLLOUT, deadline)
        left = left[os.write(descriptor, left) :]


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
