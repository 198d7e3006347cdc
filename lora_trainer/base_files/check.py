"""Check a base's files before anything loads them.

transformers does not refuse most broken bases: it fills missing layers with random numbers, fails deep inside a library, or fails
only after the training data was fetched and a GPU started. This check reads the documents and the headers of the weights, not the
weights, and takes a few tenths of a second for a base of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_trainer.base_files.documents import parse_object
from lora_trainer.base_files.guarded import Chat, GuardError, load_tokenizer, render_chats
from lora_trainer.base_files.weights import ARCHITECTURES, Read, check_weights, head_size
from lora_trainer.errors import ConfigError
from lora_trainer.store.local import local_errors

_GOOD_BASE: Final = "Qwen2.5-7B-Instruct"
TEMPLATE_NAME: Final = "chat_template.jinja"
_MAX_DOCUMENT_BYTES: Final = 128 * 2**20
"""Gemma's `tokenizer.json`, one of the largest, has 33 MB."""
_MAX_TEMPLATE_CHARACTERS: Final = 2**20
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_SIZES: Final = {
    "num_hidden_layers": (1, 1024),
    "hidden_size": (1, 2**18),
    "intermediate_size": (1, 2**20),
    "num_attention_heads": (1, 4096),
    "vocab_size": (1, 2**23),
    "max_position_embeddings": (16, 2**27),
}
_OPTIONAL_SIZES: Final = {"num_key_value_heads": (1, 4096), "head_dim": (1, 2**14), "sliding_window": (1, 2**27)}
_DTYPES: Final = ("auto", "bfloat16", "float16", "float32")
_SAMPLE: Final = [
    {"role": "system", "content": "너는 친구야.\n기분: happy 0.8"},
    {"role": "user", "content": "안녕, how are you? 1 + 1 = 2 <b>\"'{}%\\ 😊"},
]
_SAMPLE_REPLY: Final = {"role": "assistant", "content": '{"text":"응!","emotion":"smile"}'}
# a pre-tokenizer's regular expression comes from the file as well, and some need exponential time for some texts
_SAMPLE_UNITS: Final = ("a", "가", " ", "1", "!", "\n", "a1", "aA", "ㅋ ", "a ", "점심 뭐 먹지? 나 배고파! ", "Let's go at 3. ")
_SAMPLE_TEXTS: Final = tuple(unit * (4000 // len(unit)) for unit in _SAMPLE_UNITS)


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """The files of a base, wherever they are."""

    where: str
    """Folder or URI, for messages."""
    sizes: Mapping[str, int]
    """Size in bytes of each file directly in the folder, by name."""
    read: Read

    @classmethod
    def of_folder(cls, folder: Path) -> BaseFiles:
        """Describe a local folder."""

        def read(name: str, at: int, length: int) -> bytes:
            path = folder / name
            with local_errors(path), path.open("rb") as file:
                file.seek(at)
                return file.read(length)

        with local_errors(folder):
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        return cls(str(folder), sizes, read)


def check_base(files: BaseFiles) -> None:
    """Raise `ConfigError` with every problem that keeps the base from being trained, `StorageError` if a file cannot be read."""
    if problems := list(_problems(files)):
        raise ConfigError(problems)


def check_documents(files: BaseFiles) -> None:
    """Check `config.json`, the tokenizer and the chat template, without the weights. Raises as `check_base` does."""
    where = f"base.model: {files.where}".rstrip("/")
    config, problems = _config(where, files)
    if problems := [*problems, *_tokenizer_problems(where, files, config)]:
        raise ConfigError(problems)


def _problems(files: BaseFiles) -> Iterator[str]:
    where = f"base.model: {files.where}".rstrip("/")
    config, problems = _config(where, files)
    yield from problems
    yield from check_weights(where, files.sizes, files.read, config)
    yield from _tokenizer_problems(where, files, config)


def _read_object(where: str, files: BaseFiles, name: str) -> dict[str, Any]:
    size_bytes = files.sizes[name]
    if size_bytes > _MAX_DOCUMENT_BYTES:
        raise ConfigError(f"{where}/{name}: got {size_bytes:,} bytes, expected at most {_MAX_DOCUMENT_BYTES:,}; download it again")
    return parse_object(f"{where}/{name}", files.read(name, 0, size_bytes))


def _config(where: str, files: BaseFiles) -> tuple[dict[str, Any] | None, list[str]]:
    """Return `config.json` if it is usable, and its problems."""
    problems: list[str] = []
    config: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if name in files.sizes:
            try:
                found = _read_object(where, files, name)
                config = found if name == "config.json" else config
            except ConfigError as error:
                problems.extend(error.problems)
    if problems:
        return None, problems
    problems.extend(f"{where}/config.json: {problem}" for problem in _config_problems(config))
    return (None if problems else config), problems


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        code = config.get("auto_map")
        own = f"; its auto_map names code in its own folder ({_shown(code)}), which is never run" if code else ""
        known = ", ".join(ARCHITECTURES)
        yield f"model_type: got {_shown(kind)}, expected one of {known}{own}; use such a base, for example {_GOOD_BASE}"
        return
    class_name = ARCHITECTURES[kind].class_name
    # auto_map is ignored here: transformers has its own code for these types
    if config.get("architectures") not in (None, [], [class_name]):
        yield f"architectures: got {_shown(config['architectures'])}, expected {class_name} for the model_type {kind}"
    if config.get("quantization_config"):
        yield (
            "quantization_config: got weights that are already quantized; use the original model, which "
            "training.quantization=nf4 quantizes on loading"
        )
    invalid = False
    for name, (least, most) in {**_SIZES, **_OPTIONAL_SIZES}.items():
        value = config.get(name)
        if value is None and name in _OPTIONAL_SIZES:
            continue
        if type(value) is not int or not least <= value <= most:
            invalid = True
            yield f"{name}: got {_shown(value)}, expected a whole number from {least:,} to {most:,}"
    if invalid:
        return
    heads = config["num_attention_heads"]
    if not config.get("head_dim") and config["hidden_size"] % heads:
        yield f"num_attention_heads: got {heads:,}, expected a divisor of hidden_size ({config['hidden_size']:,})"
    elif head_size(config) % 2:
        yield f"head_dim: got {head_size(config)}, expected an even number: rotary embeddings turn pairs"
    if heads % (config.get("num_key_value_heads") or heads):
        yield f"num_key_value_heads: got {config['num_key_value_heads']:,}, expected a divisor of num_attention_heads ({heads:,})"
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        yield f"tie_word_embeddings: got {_shown(config['tie_word_embeddings'])}, expected true or false"
    for name in ("dtype", "torch_dtype"):
        if config.get(name) not in (None, *_DTYPES):
            yield f"{name}: got {_shown(config[name])}, expected one of {', '.join(_DTYPES)}"
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name), dict | None):
            yield f"{name}: got {_shown(config[name])}, expected an object"
        elif config.get(name) and not _is_positive(config[name].get("rope_theta", 1)):
            yield f"{name}.rope_theta: got {_shown(config[name]['rope_theta'])}, expected a positive number"
    for name in ("rope_theta", "rms_norm_eps"):
        if config.get(name) is not None and not _is_positive(config[name]):
            yield f"{name}: got {_shown(config[name])}, expected a positive number"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = config.get(name)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and (type(token) is not int or not -1 <= token < config["vocab_size"]):
                yield f"{name}: got {_shown(token)}, expected a token below vocab_size ({config['vocab_size']:,})"
    if isinstance(layers := config.get("layer_types"), list) and len(layers) != config["num_hidden_layers"]:
        yield f"layer_types: got {len(layers):,} entries, expected {config['num_hidden_layers']:,} (num_hidden_layers)"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


def _tokenizer_problems(where: str, files: BaseFiles, config: Mapping[str, Any] | None) -> Iterator[str]:
    documents: dict[str, dict[str, Any]] = {}
    broken = False
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if name in files.sizes:
            try:
                documents[name] = _read_object(where, files, name)
            except ConfigError as error:
                broken = True
                yield from error.problems
    if broken or "tokenizer.json" not in documents:
        return
    special = special_tokens(documents.get("tokenizer_config.json", {}), documents.get("special_tokens_map.json", {}))
    names = [token for token in special.values() if token]
    try:
        text = files.read("tokenizer.json", 0, files.sizes["tokenizer.json"]).decode()
        facts = load_tokenizer(text, names, _SAMPLE_TEXTS)
    except GuardError as error:
        yield _not_a_tokenizer(where, error)
        return
    end = special.get("eos_token")
    if end is None or facts.ids[end] is None:
        got = "none" if end is None else f"{_shown(end)}, which tokenizer.json does not have"
        yield f"{where}/tokenizer_config.json: eos_token: got {got}; expected the token that ends a turn, such as <|im_end|>"
        return
    for name, token in special.items():
        if facts.ids[token] is None:
            yield f"{where}/tokenizer_config.json: {name}: got {_shown(token)}, which tokenizer.json does not have; download both"
    if config is not None and facts.largest_id >= config["vocab_size"]:
        yield (
            f"{where}/tokenizer.json: got token {facts.largest_id:,}, expected tokens below {config['vocab_size']:,} "
            "(vocab_size in config.json): the tokenizer belongs to another model"
        )
    try:
        template = chat_template(where, files, documents.get("tokenizer_config.json", {}))
        check_template(where, template, special)
    except ConfigError as error:
        yield from error.problems


def _not_a_tokenizer(where: str, error: GuardError) -> str:
    said = f" ({_shown(error.said)})" if error.said else ""
    return f"{where}/tokenizer.json: not a tokenizer: {error.what}{said}; download it again"


def check_tokenizer(folder: Path) -> None:
    """Check that the folder's `tokenizer.json` loads and encodes text within limits. Raises `ConfigError`."""
    files, where = BaseFiles.of_folder(folder), f"base.model: {folder}"
    _read_object(where, files, "tokenizer.json")
    try:
        load_tokenizer(files.read("tokenizer.json", 0, files.sizes["tokenizer.json"]).decode(), [], _SAMPLE_TEXTS)
    except GuardError as error:
        raise ConfigError(_not_a_tokenizer(where, error)) from None


def special_tokens(*documents: Mapping[str, Any]) -> dict[str, str]:
    """Return the named special tokens that the tokenizer's settings give; the first document that has one wins."""
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        for document in documents:
            token = document.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and text:
                found[name] = text
                break
    return found


def folder_template(folder: Path) -> str:
    """Return the default chat template of the base in `folder`. Raises `ConfigError` if it has none."""
    files, where = BaseFiles.of_folder(folder), f"base.model: {folder}"
    has_settings = "tokenizer_config.json" in files.sizes
    return chat_template(where, files, _read_object(where, files, "tokenizer_config.json") if has_settings else {})


def folder_special_tokens(folder: Path) -> dict[str, str]:
    """Return the named special tokens of the base in `folder`. Raises `ConfigError` for a broken document."""
    files, where = BaseFiles.of_folder(folder), f"base.model: {folder}"
    names = [name for name in ("tokenizer_config.json", "special_tokens_map.json") if name in files.sizes]
    return special_tokens(*(_read_object(where, files, name) for name in names))


def chat_template(where: str, files: BaseFiles, settings: Mapping[str, Any]) -> str:
    """Return the base's default chat template. Raises `ConfigError` if it has none.

    `additional_chat_templates/` is not read: its files are no part of the base's identity.
    """
    if TEMPLATE_NAME in files.sizes:
        if files.sizes[TEMPLATE_NAME] > 4 * _MAX_TEMPLATE_CHARACTERS:
            raise ConfigError(f"{where}/{TEMPLATE_NAME}: got {files.sizes[TEMPLATE_NAME]:,} bytes, expected a chat template")
        try:
            template: object = files.read(TEMPLATE_NAME, 0, files.sizes[TEMPLATE_NAME]).decode()
        except UnicodeDecodeError:
            raise ConfigError(f"{where}/{TEMPLATE_NAME}: got bytes that are not UTF-8, expected a chat template") from None
        # as Python's text files do
        template = str(template).replace("\r\n", "\n").replace("\r", "\n")
        place = f"{where}/{TEMPLATE_NAME}"
    else:
        place = f"{where}/tokenizer_config.json: chat_template"
        template = settings.get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
    if not template:
        raise ConfigError(f"{place}: got none: no chat template; use an instruction-tuned base such as {_GOOD_BASE}")
    if not isinstance(template, str) or len(template) > _MAX_TEMPLATE_CHARACTERS:
        raise ConfigError(
            f"{place}: got {_shown(template)}, expected a template of at most {_MAX_TEMPLATE_CHARACTERS:,} characters"
        )
    return template


def check_template(where: str, template: str, special: Mapping[str, str]) -> None:
    """Render a sample conversation. Raises `ConfigError` if the template fails or has a form that cannot be trained on."""
    chats: list[Chat] = [(_SAMPLE, True), ([*_SAMPLE, _SAMPLE_REPLY], False)]
    try:
        prompt, whole = render_chats(template, special, chats)
    except GuardError as error:
        # the sample is harmless, so the template's own words are as well
        said = f" ({_shown(error.said)})" if error.said else ""
        raise ConfigError(
            f"{where}: its chat template {error.what}{said}; use the model's own template, or a ChatML base such as {_GOOD_BASE}"
        ) from None
    if problem := training_form_problem(prompt, whole, special["eos_token"]):
        raise ConfigError(f"{where}: {problem}")


def training_form_problem(prompt: str, whole: str, end: str) -> str:
    """Return why a rendered conversation is not the rendered prompt, the reply, and the end-of-turn token; empty if it is."""
    if not whole.startswith(prompt):
        return (
            "its chat template cannot be used for training: it renders a prompt without its reply in another way than with it; "
            f"expected prompt + reply; use a ChatML base such as {_GOOD_BASE}"
        )
    if end not in whole[len(prompt) :]:
        return (
            f"its chat template does not end a reply with its eos_token, '{end}', so an adapter would not learn when to stop: "
            "got a base model that was not trained to chat, or another model's template; use its instruction-tuned version, "
            f"such as {_GOOD_BASE}"
        )
    return ""


def _shown(value: object) -> str:
    """Format a foreign value for a message: on one line, escaped and shortened."""
    if value is None:
        return "none"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
