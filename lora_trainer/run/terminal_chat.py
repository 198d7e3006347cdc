"""The terminal loop of `lora-trainer chat`. Decoding is constrained to the response schema, so every reply is exact JSON."""

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
from lora_trainer.escaping import escaped
from lora_trainer.evaluate.decoding import Decoding, PromptTooLongError
from lora_trainer.persona.prompt import EARLIER_TURNS, PROMPT_VERSION, Message, prompt_messages, reply_json
from lora_trainer.persona.reply_schema import response_schema
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling
from lora_trainer.run.adapter import Adapter, base_of, check_adapter
from lora_trainer.run.bundle_files import read_prompt_version
from lora_trainer.run.job import ProcessContext
from lora_trainer.store.local import fresh_folder
from lora_trainer.store.manifest import download_files
from lora_trainer.train.backends import Backend, open_reference_backend
from lora_trainer.train.constrained_decoding import ReplyGrammar, most_tokens
from lora_trainer.train.requirements import require_stack

_EARLIER_TURNS_2: Final = 8
"""The most earlier turns in a prompt of version 2. Its `prompt.json` has no limit."""
NO_EARLIER_TURNS: Final = "The adapter sees each message alone, as in training: say with /situation TEXT what has happened before."

COMMANDS: Final = {
    "/feeling NAME": "what the friend feels: " + ", ".join(Feeling),
    "/intensity X": "how strongly, from 0 (hardly) to 1 (fully)",
    "/situation TEXT": "what has happened so far, earlier messages too; without TEXT: nothing",
    "/seed N": "set the sampling seed",
    "/new": "start a new conversation",
    "/help": "list the commands",
    "/quit": "leave (or press Ctrl-D)",
}


@dataclass(slots=True)
class ChatState:
    """State of the conversation: settings that `/` commands change, and past turns."""

    blood_type: BloodType
    feeling: Feeling = Feeling.NEUTRAL
    intensity: float = 0.5
    situation: str = ""
    seed: int = 0
    turns: list[tuple[str, Reply]] = field(default_factory=list)
    prompt_version: int = PROMPT_VERSION
    """Version of the prompt that the adapter was trained on."""

    @property
    def most_turns(self) -> int:
        """The most earlier turns that a prompt holds."""
        return EARLIER_TURNS if self.prompt_version >= 3 else _EARLIER_TURNS_2

    def messages(self, said: str, turns: list[tuple[str, Reply]]) -> list[Message]:
        """Return the chat messages of the conversation: earlier `turns`, then `said`."""
        instruction = persona_spec(self.blood_type).instruction

        def prompt(text: str) -> list[Message]:
            return prompt_messages(instruction, self.situation, self.feeling, self.intensity, text, self.prompt_version)

        system, last = prompt(said)
        messages = [system]
        for before, reply in turns:
            messages.append(prompt(before)[1])
            messages.append({"role": "assistant", "content": reply_json(reply.text, reply.emotion, self.prompt_version)})
        return [*messages, last]


class ChatModel:
    """A loaded adapter that answers one message at a time."""

    def __init__(self, backend: Backend, temperature: float, prompt_version: int) -> None:
        self.prompt_version = prompt_version
        self._backend, self._temperature = backend, temperature
        schema = response_schema()
        self._grammar, self._most_tokens = ReplyGrammar(backend.tokenizer, schema), most_tokens(schema)

    def answer(self, messages: list[Message], seed: int, *, adapter: bool = True) -> str:
        """Return the raw reply, which is always one JSON object."""
        decoding = Decoding("sampled", self._most_tokens, self._temperature, top_p=0.8, top_k=20, seed=seed)
        (generation,) = self._backend.generate(
            [messages], decoding, adapter=adapter, batch_size=1, processors=lambda: [self._grammar.processor()]
        )
        return generation.text


def load_chat_model(adapter: Adapter, config: RunConfig, temperature: float, process: ProcessContext) -> ChatModel:
    """Fetch and load the adapter and its base. Raise a `LoraTrainerError` if that fails."""
    require_stack(config, reference=True)
    base = base_of(adapter, config, process)
    folder = fresh_folder(config.work_dir / "chat" / str(config.blood_type) / adapter.run_id)
    download_files(adapter.storage, "", adapter.manifest, folder)
    check_adapter(adapter, folder, base)
    prompt_version = read_prompt_version(folder, adapter.storage.uri)
    backend, _ = process.models.start(open_reference_backend, config, process.interruption)
    base_folder = fetch_base(base, config.base)
    backend.load_tokenizer(base_folder)
    backend.load_adapter(base_folder, folder)
    return ChatModel(backend, temperature, prompt_version)


def chat_loop(model: ChatModel, state: ChatState, lines: Iterator[str], console: Console, *, raw: bool, beside_base: bool) -> None:
    """Answer each line, until `lines` ends or the user quits. `beside_base` also shows the base's replies."""
    spec = persona_spec(state.blood_type)
    base_turns: list[tuple[str, Reply]] = []
    for line in lines:
        # Python decodes invalid UTF-8 from a terminal to lone surrogates, which tokenizers reject
        said = line.encode("utf-8", "replace").decode("utf-8").strip()
        if not said:
            continue
        if said.startswith("/"):
            try:
                if not run_command(said, state, console):
                    return
            except ConfigError as error:
                console.print(Text(escaped(str(error)), style="red"), soft_wrap=True)
            if said == "/new":
                base_turns.clear()
            continue
        try:
            text = _answer(model, state, said, state.turns)
            reply = read_reply(text)
            state.turns.append((said, reply))
            print_reply(console, f"{state.blood_type} {spec.name}", text, reply, raw=raw)
            if beside_base:
                text = _answer(model, state, said, base_turns, adapter=False)
                reply = read_reply(text)
                base_turns.append((said, reply))
                print_reply(console, "base", text, reply, raw=raw)
        except DataError as error:
            console.print(Text(escaped(str(error)), style="red"), soft_wrap=True)


def _answer(model: ChatModel, state: ChatState, said: str, turns: list[tuple[str, Reply]], *, adapter: bool = True) -> str:
    """Return the reply to `said`. Leave out the oldest of `turns` while the conversation is longer than the base's positions.

    Raises `PromptTooLongError` if the message alone is too long.
    """
    seed, kept = state.seed + len(turns), turns[max(0, len(turns) - state.most_turns) :]
    while True:
        try:
            return model.answer(state.messages(said, kept), seed, adapter=adapter)
        except PromptTooLongError:
            if not kept:
                raise
            kept = kept[1:]


def read_reply(text: str) -> Reply:
    """Parse a reply. Raise `DataError` if its text is blank or contains control characters."""
    try:
        return Reply.model_validate_json(text)
    except ValidationError:
        # check again, although the grammar should exclude both: a terminal would interpret control characters
        raise DataError(
            "the reply is blank or holds control characters, and is dropped; say it again, or set another /seed"
        ) from None


def print_reply(console: Console, who: str, text: str, reply: Reply, *, raw: bool) -> None:
    """Print a reply, as generated if `raw`, else as a line of dialogue. Escape what a terminal would obey, as JSON allows."""
    if raw:
        # print nothing else, so that the reply can be piped into other programs
        console.print(Text(escaped(text)), soft_wrap=True)
        return
    line = Text(f"{who}  ", style="bold cyan")
    line.append(escaped(reply.text), style="not bold default")
    line.append(f"  ({reply.emotion})", style="not bold dim")
    console.print(line, soft_wrap=True)


def run_command(line: str, state: ChatState, console: Console) -> bool:
    """Run a `/` command. Return False to leave the chat. Raise `ConfigError` for an unknown command or value."""
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
    console.print(Text(escaped(status(state)), style="dim"), soft_wrap=True)
    return True


def status(state: ChatState) -> str:
    """Describe feeling, intensity and situation in one line."""
    situation = f", situation: {state.situation}" if state.situation else ""
    return f"feels {state.feeling} {state.intensity:.1f}{situation}; {len(state.turns)} turns so far"
