"""`lora-trainer chat`: talk to an adapter in a terminal. Decoding is held to the response schema, so every reply is exact JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from lora_trainer.base_model import fetch_base
from lora_trainer.config import RunConfig
from lora_trainer.data.records import Reply
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.evaluate.decoding import Decoding
from lora_trainer.persona.prompt import Message, prompt_messages, reply_json
from lora_trainer.persona.reply_schema import response_schema
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling
from lora_trainer.run.reevaluation import Adapter, find_base
from lora_trainer.store.bundle import fresh_folder
from lora_trainer.store.manifest import download_files
from lora_trainer.store.retry import RETRY_BUDGET
from lora_trainer.train.backends import Backend, open_reference_backend
from lora_trainer.train.constrained_decoding import ReplyGrammar, most_tokens

MOST_TURNS: Final = 8
"""Turns of user and friend that are shown to the model; older ones are forgotten. It was trained on one."""

COMMANDS: Final = {
    "/feeling NAME": "what the friend feels: " + ", ".join(Feeling),
    "/intensity X": "how strongly, from 0 (hardly) to 1 (fully)",
    "/situation TEXT": "what has happened so far; nothing behind it: nothing",
    "/seed N": "another seed for sampling",
    "/new": "forget what was said",
    "/help": "this list",
    "/quit": "leave; so does Ctrl-D",
}


@dataclass(slots=True)
class ChatState:
    """What the next reply depends on."""

    blood_type: BloodType
    feeling: Feeling = Feeling.NEUTRAL
    intensity: float = 0.5
    situation: str = ""
    seed: int = 0
    turns: list[tuple[str, Reply]] = field(default_factory=list)

    def messages(self, said: str, turns: list[tuple[str, Reply]]) -> list[Message]:
        """The conversation with `said` at its end; `turns` is what the model remembers of it."""
        first, *_ = prompt_messages(persona_spec(self.blood_type).instruction, self.situation, self.feeling, self.intensity, said)
        messages: list[Message] = [first]
        for before, reply in turns[-MOST_TURNS:]:
            messages.append(prompt_messages("", "", self.feeling, self.intensity, before)[1])
            messages.append({"role": "assistant", "content": reply_json(reply.text, reply.emotion)})
        messages.append(prompt_messages("", "", self.feeling, self.intensity, said)[1])
        return messages


class Friend:
    """A loaded adapter that answers."""

    def __init__(self, backend: Backend, temperature: float) -> None:
        self._backend, self._temperature = backend, temperature
        schema = response_schema()
        self._grammar, self._most_tokens = ReplyGrammar(backend.tokenizer, schema), most_tokens(schema)

    def answer(self, messages: list[Message], seed: int, *, adapter: bool = True) -> str:
        """The raw reply: one JSON object, always."""
        decoding = Decoding("sampled", self._most_tokens, self._temperature, top_p=0.8, top_k=20, seed=seed)
        (generation,) = self._backend.generate(
            [messages], decoding, adapter=adapter, batch_size=1, processors=lambda: [self._grammar.processor()]
        )
        return generation.text


def load_friend(adapter: Adapter, config: RunConfig, temperature: float) -> Friend:
    """Fetch adapter and base, and load both. Raises a `LoraTrainerError`."""
    RETRY_BUDGET.begin(config.storage)
    base = find_base(adapter, config)
    folder = fresh_folder(config.work_dir / "chat" / str(config.blood_type) / adapter.run_id)
    download_files(adapter.storage, "", adapter.manifest, folder)
    backend = open_reference_backend(config)
    backend.start()
    base_folder = fetch_base(base, config.base)
    backend.load_tokenizer(base_folder)
    backend.load_adapter(base_folder, folder)
    return Friend(backend, temperature)


def talk(friend: Friend, state: ChatState, lines: Iterator[str], console: Console, *, raw: bool, beside_base: bool) -> None:
    """Read lines until there are no more, and answer each."""
    spec = persona_spec(state.blood_type)
    remembered_by_base: list[tuple[str, Reply]] = []
    for line in lines:
        # a terminal gives bytes that are no UTF-8 as lone surrogates, which no tokenizer takes
        said = line.encode("utf-8", "replace").decode("utf-8").strip()
        if not said:
            continue
        if said.startswith("/"):
            try:
                if not obey(said, state, console):
                    return
            except ConfigError as error:
                console.print(Text(str(error), style="red"), soft_wrap=True)
            if said == "/new":
                remembered_by_base.clear()
            continue
        try:
            text = friend.answer(state.messages(said, state.turns), state.seed + len(state.turns))
            reply = read_reply(text)
            state.turns.append((said, reply))
            show(console, f"{state.blood_type} {spec.name}", text, reply, raw=raw)
            if beside_base:
                text = friend.answer(state.messages(said, remembered_by_base), state.seed + len(remembered_by_base), adapter=False)
                reply = read_reply(text)
                remembered_by_base.append((said, reply))
                show(console, "base", text, reply, raw=raw)
        except DataError as error:
            console.print(Text(str(error), style="red"), soft_wrap=True)


def read_reply(text: str) -> Reply:
    """The reply in `text`. Raises `DataError` for one that says nothing, or says it in characters that nobody writes."""
    try:
        return Reply.model_validate_json(text)
    except ValidationError:
        # the grammar knows no characters that are controls of a terminal or of the direction of writing
        raise DataError(
            "the reply is blank or holds control characters, and is forgotten; say it again, or take another /seed"
        ) from None


def show(console: Console, who: str, text: str, reply: Reply, *, raw: bool) -> None:
    """One reply, as JSON or as a line."""
    if raw:
        # nothing but the reply itself, so that it can be piped on
        console.print(Text(text), soft_wrap=True)
        return
    line = Text(f"{who}  ", style="bold cyan")
    line.append(reply.text, style="not bold default")
    line.append(f"  ({reply.emotion})", style="not bold dim")
    console.print(line, soft_wrap=True)


def obey(line: str, state: ChatState, console: Console) -> bool:
    """Carry out a command; False: leave. Raises `ConfigError` for what is none."""
    name, _, value = line.partition(" ")
    value = value.strip()
    setters: dict[str, Callable[[str], Any]] = {"/feeling": Feeling, "/intensity": float, "/seed": int, "/situation": str}
    if name in ("/quit", "/exit"):
        return False
    if name == "/new":
        state.turns.clear()
    elif name == "/help":
        for command, meaning in COMMANDS.items():
            console.print(Text(f"{command:18} {meaning}"), soft_wrap=True)
        return True
    elif name in setters:
        try:
            found = setters[name](value)
            if name == "/intensity" and not 0 <= found <= 1:
                raise ValueError(value)
        except ValueError:
            usage = next(f"{command}: {meaning}" for command, meaning in COMMANDS.items() if command.startswith(name + " "))
            raise ConfigError(f"{name}: got {value!r}; {usage}") from None
        setattr(state, name[1:], found)
    else:
        raise ConfigError(f"{name}: no such command; /help lists them")
    console.print(Text(status(state), style="dim"), soft_wrap=True)
    return True


def status(state: ChatState) -> str:
    """Feeling, intensity and situation, as a line."""
    situation = f", situation: {state.situation}" if state.situation else ""
    return f"feels {state.feeling} {state.intensity:.1f}{situation}; {len(state.turns)} turns so far"
