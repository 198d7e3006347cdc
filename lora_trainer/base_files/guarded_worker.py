"""The child process of `guarded`: render a chat template or load a tokenizer within limits of time, memory and output.

Runs as a script, with one JSON request on standard input and one JSON answer on standard output. It imports nothing of this
project, and loads jinja2 and tokenizers only after its limits are set.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any


def main() -> None:
    """Answer the request on standard input with an object: the results, or a `problem` and what the library `said`."""
    cpu_s, memory_bytes = (int(argument) for argument in sys.argv[1:3])
    # a second between the limits, so that the parent sees SIGXCPU and not SIGKILL
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = json.load(sys.stdin)
    answer: dict[str, Any] = {}
    for part, work in (("tokenizer", load_tokenizer), ("template", render)):
        if part in request:
            try:
                answer[part] = work(**request[part])
            except MemoryError:
                answer[part] = {"problem": "memory", "said": ""}
            # jinja2 passes on whatever a template's expressions raise, and tokenizers raises a bare Exception; a panic in its
            # Rust code derives from BaseException
            except BaseException as error:
                answer[part] = {"problem": type(error).__name__, "said": str(error)[:1000]}
    json.dump(answer, sys.stdout)


def load_tokenizer(text: str, tokens: Sequence[str], samples: Sequence[str]) -> dict[str, Any]:
    """Load a `tokenizer.json` and encode `samples`. Return its largest id, and the id of each of `tokens` (None if unknown)."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(text)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    for sample in samples:
        tokenizer.encode(sample, add_special_tokens=False)
    return {"largest_id": largest, "ids": [tokenizer.token_to_id(token) for token in tokens]}


def render(
    text: str, variables: Mapping[str, Any], chats: Sequence[tuple[Sequence[Mapping[str, str]], bool]], max_characters: int
) -> dict[str, Any]:
    """Render each of `chats` (messages, and whether to add the generation prompt). Refuse more than `max_characters` in all."""
    template = _environment().from_string(text)
    rendered = []
    left = max_characters
    for messages, add_generation_prompt in chats:
        pieces = []
        for piece in template.generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **variables
        ):
            left -= len(piece)
            if left < 0:
                return {"problem": "output", "said": ""}
            pieces.append(piece)
        rendered.append("".join(pieces))
    return {"rendered": rendered}


def _environment() -> Any:
    """Return the environment of transformers' `apply_chat_template` (transformers/utils/chat_template_utils.py).

    A test compares what both render. Importing transformers for it would take seconds.
    """
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The tag `generation` marks the assistant's text and changes nothing."""

        tags = {"generation"}  # noqa: RUF012  jinja2's own form

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> Any:
            return caller()

    def to_json(
        value: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    # the local time, as transformers has it
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005
    return environment


if __name__ == "__main__":
    main()
