"""The process that renders chat templates: sandboxed Jinja with little memory and no files.

It is run by path and imports nothing of the package. Each line on stdin is a JSON request, each
line on stdout its answer; whoever started it enforces the time limit by ending it.
"""

import datetime
import json
import resource
import secrets
import sys
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

NONCE = secrets.token_hex(8)
OPEN, CLOSE = f"\x02{NONCE}\x02", f"\x03{NONCE}\x03"


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (Jinja reads a class attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn the block into a call that puts marks around its text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """Return the text of the block between marks."""
        return f"{OPEN}{caller()}{CLOSE}"


class RefusalError(Exception):
    """What a template, or its result, is refused for."""


def environment() -> ImmutableSandboxedEnvironment:
    """Return an environment with what published templates use, and no more."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    env.filters["tojson"] = tojson
    return env


def raise_exception(message: str) -> None:
    """Let a template refuse its messages."""
    raise RefusalError(f"it refuses the conversation: {message}")


def strftime_now(form: str) -> str:
    """Return the local time in a form of the template's choice."""
    return datetime.datetime.now().strftime(form)


def pieces(
    render: Callable[[list[Any], bool], str], request: dict[str, Any]
) -> list[tuple[str, bool]]:
    """Return the text of a conversation in pieces, each with whether the assistant wrote it."""
    messages = request["messages"]
    if request["whole"]:
        return [(render(messages, request["prompt"]), False)]
    text = render(messages, False)
    if OPEN in text:
        return marked_pieces(text)
    if not any(message["role"] == "assistant" for message in messages):
        return [(text, False)]
    return prefix_pieces(render, messages, text, request["last_only"])


def marked_pieces(text: str) -> list[tuple[str, bool]]:
    """Split a text at the marks of `{% generation %}`."""
    out = []
    for part in text.split(OPEN):
        written, closed, after = part.partition(CLOSE)
        out += [(written, True), (after, False)] if closed else [(part, False)]
    return out


def prefix_pieces(
    render: Callable[[list[Any], bool], str], messages: list[Any], text: str, last_only: bool
) -> list[tuple[str, bool]]:
    """Split a text where a rendering of fewer messages ends.

    What the assistant wrote is what its message adds to a rendering that asks for an answer.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    out, at = [], 0
    for i in turns[-1:] if last_only else turns:
        before = render(messages[:i], True)
        after = text if i == len(messages) - 1 else render(messages[: i + 1], False)
        if not (text.startswith(after) and after.startswith(before) and at <= len(before)):
            raise RefusalError(
                f"its text up to message {i} changes with what follows, so that the assistant's "
                "part cannot be found. Put {% generation %} around that part in the template, or "
                "learn the last message only"
            )
        out += [(text[at : len(before)], False), (after[len(before) :], True)]
        at = len(after)
    return [*out, (text[at:], False)]


def answer(
    template: jinja2.Template, variables: dict[str, Any], request: dict[str, Any]
) -> dict[str, Any]:
    """Return the answer to one request."""

    def render(messages: list[Any], prompt: bool) -> str:
        return template.render(
            **variables,
            **request["variables"],
            messages=messages,
            add_generation_prompt=prompt,
        )

    try:
        return {"pieces": [piece for piece in pieces(render, request) if piece[0]]}
    except RefusalError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it takes more memory than it may"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer requests until stdin ends; the first line holds the template and the limits."""
    start = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (start["memory_bytes"], start["memory_bytes"]))
    try:
        template = environment().from_string(
            start["template"],
            globals={"raise_exception": raise_exception, "strftime_now": strftime_now},
        )
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}"})
        return
    tell({"pieces": []})
    for line in sys.stdin:
        tell(answer(template, start["variables"], json.loads(line)))


def tell(value: dict[str, Any]) -> None:
    """Write one answer."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
