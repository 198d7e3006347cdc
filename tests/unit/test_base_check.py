"""Test the check of a base's files: what can be trained passes, and what cannot is refused with its reason."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_bases import TINY_BASE, WEIGHTS, change_header, change_json, copy_base, keep_tensors, set_template

from lora_trainer.base_files.check import BaseFiles, check_base, folder_template
from lora_trainer.base_files.guarded import GuardError, load_tokenizer, render_chats
from lora_trainer.base_files.weights import expected_shapes
from lora_trainer.base_model import fetch_base, identify_base, require_base
from lora_trainer.config import BaseModelConfig
from lora_trainer.errors import ConfigError, ExitCode, StorageError

Break = Callable[[Path], Any]
CHATML = json.loads((TINY_BASE / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
LAST = "model.layers.3.mlp.down_proj.weight"
FIRST_SHARD, SECOND_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return copy_base(tmp_path / "base")


def problems(folder: Path) -> str:
    """Return the message about a broken base."""
    with pytest.raises(ConfigError) as refused:
        require_base(BaseModelConfig(model=str(folder)))
    assert refused.value.exit_code is ExitCode.CONFIG
    for problem in refused.value.problems:
        assert problem.startswith("base.model: "), problem
        assert problem.isprintable(), problem
        assert len(problem) < 1000
    return str(refused.value)


def config(**values: Any) -> Break:
    return lambda folder: change_json(folder, "config.json", **values)


def settings(**values: Any) -> Break:
    return lambda folder: change_json(folder, "tokenizer_config.json", **values)


def content(name: str, data: bytes | str) -> Break:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def entry(**values: Any) -> Break:
    return lambda folder: change_header(folder, lambda header: header[LAST].update(values))


def shard(folder: Path) -> None:
    """Split the weights into two shards with an index."""
    header = json.loads(_header_bytes(folder / WEIGHTS))
    names = [name for name in header if name != "__metadata__"]
    placed = {name: FIRST_SHARD if number % 2 else SECOND_SHARD for number, name in enumerate(names)}
    for target in (FIRST_SHARD, SECOND_SHARD):
        keep_tensors(folder, lambda name, target=target: placed[name] == target, target)  # type: ignore[misc]
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}), encoding="utf-8")


def _header_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def sharded(then: Break) -> Break:
    def change(folder: Path) -> None:
        shard(folder)
        then(folder)

    return change


def move_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][LAST] = {FIRST_SHARD: SECOND_SHARD, SECOND_SHARD: FIRST_SHARD}[index["weight_map"][LAST]]
    (folder / INDEX).write_text(json.dumps(index))


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def larger_vocabulary(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["model"]["vocab"]["Ġzz"] = 9999
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")


BROKEN: dict[str, tuple[Break, str]] = {
    # config.json
    "config is no JSON": (content("config.json", "{"), "config.json: not JSON"),
    "config is empty": (content("config.json", ""), "config.json: not JSON"),
    "config is a list": (content("config.json", "[]"), "config.json: got a list, expected a JSON object"),
    "config has NaN": (content("config.json", '{"model_type": NaN}'), "NaN is no JSON number"),
    "config has infinity": (config(rms_norm_eps=float("inf")), "Infinity is no JSON number"),
    "config is UTF-16": (content("config.json", "{}".encode("utf-16")), "not UTF-8"),
    "config is deep": (content("config.json", "[" * 100_000), "got nesting of more than 32 levels"),
    "config is a web page": (content("config.json", "<!DOCTYPE html><html>"), "got a web page or XML answer"),
    "config is an LFS pointer": (content("config.json", "version https://git-lfs.github.com/spec/v1\n"), "run 'git lfs pull'"),
    "no model_type": (config(model_type=...), "model_type: got none, expected one of qwen2, qwen3, llama, mistral"),
    "another architecture": (config(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "model_type: got 'gpt2'"),
    "a model_type that is a list": (config(model_type=["qwen2"]), "model_type: got ['qwen2']"),
    "code of its own": (config(model_type="evil", auto_map={"AutoConfig": "evil.C"}), "auto_map names code in its own folder"),
    "escapes in a name": (config(model_type="\x1b]0;x\x07"), "model_type: got '\\x1b]0;x\\x07'"),
    "another head": (config(architectures=["Qwen2ForSequenceClassification"]), "expected Qwen2ForCausalLM"),
    "quantized already": (config(quantization_config={"quant_method": "awq"}), "training.quantization=nf4 quantizes on loading"),
    "no hidden size": (config(hidden_size=...), "hidden_size: got none, expected a whole number"),
    "a billion wide": (config(hidden_size=10**9), "hidden_size: got 1000000000, expected a whole number from 1 to"),
    "a million layers": (config(num_hidden_layers=10**6), "num_hidden_layers: got 1000000"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers: got 0"),
    "no positions": (config(max_position_embeddings=0), "max_position_embeddings: got 0"),
    "negative vocabulary": (config(vocab_size=-1), "vocab_size: got -1"),
    "a size as text": (config(intermediate_size="512"), "intermediate_size: got '512'"),
    "a size as truth": (config(num_attention_heads=True), "num_attention_heads: got True"),
    "heads that do not divide": (config(num_attention_heads=7), "num_attention_heads: got 7, expected a divisor of hidden_size"),
    "key heads that do not divide": (config(num_key_value_heads=4), "num_key_value_heads: got 4, expected a divisor"),
    "an odd head": (config(head_dim=33), "head_dim: got 33, expected an even number"),
    "unknown dtype": (config(dtype="float8"), "dtype: got 'float8'"),
    "rope as text": (config(rope_parameters="default"), "rope_parameters: got 'default', expected an object"),
    "rope of zero": (config(rope_parameters={"rope_theta": 0}), "rope_theta: got 0, expected a positive number"),
    "tied as text": (config(tie_word_embeddings="yes"), "tie_word_embeddings: got 'yes'"),
    "end token beyond the vocabulary": (config(eos_token_id=4096), "eos_token_id: got 4096"),
    "layer types of another depth": (config(layer_types=["full_attention"] * 9), "layer_types: got 9 entries, expected 4"),
    "generation config": (content("generation_config.json", "null"), "generation_config.json: got null"),
    "an adapter beside a base": (content("adapter_config.json", "{}"), "got an adapter's folder"),
    "an adapter's folder": (
        lambda f: ((f / "config.json").unlink(), content("adapter_config.json", "{}")(f)),
        "got an adapter's folder",
    ),
    # weights
    "weights are noise": (content(WEIGHTS, b"\xff" * 4096), "expected safetensors weights: damaged"),
    "weights are empty": (content(WEIGHTS, b""), "got 0 bytes, expected safetensors"),
    "weights are zeros": (content(WEIGHTS, bytes(4096)), "got a header of 0 bytes"),
    "weights are cut off": (cut, "by its header: damaged or cut off"),
    "weights have a tail": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x"), "damaged or cut off"),
    "weights are a pickle": (content(WEIGHTS, pickle.dumps({"a": list(range(99))})), "got a pickle"),
    "weights are torch.save's": (zipped, "got a zip archive such as torch.save writes"),
    "weights are an LFS pointer": (content(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
    "weights are GGUF": (content(WEIGHTS, b"GGUF\x03\x00\x00\x00" + bytes(99)), "GGUF"),
    "a header that is a list": (content(WEIGHTS, (8).to_bytes(8, "little") + b"[]      "), "got a list"),
    "a header with a tensor twice": (
        content(WEIGHTS, (40).to_bytes(8, "little") + b'{"a": {}, "a": {}}'.ljust(40)),
        "a repeated key",
    ),
    "tensors overlap": (entry(data_offsets=[0, 196608]), "tensors overlap or leave gaps"),
    "unknown value type": (entry(dtype="F12"), "got dtype 'F12'"),
    "a shape of other bytes": (entry(shape=[192, 511]), "bytes for shape 192×511 in BF16"),
    "a shape that overflows": (entry(shape=[2**49, 2**49, 2**49]), "expected"),
    "negative offsets": (entry(data_offsets=[-196608, 0]), "got no shape and offsets"),
    "an entry that is a number": (lambda f: change_header(f, lambda header: header.update({LAST: 5})), "got dtype None"),
    "wrong format": (lambda f: change_header(f, lambda h: h.update(__metadata__={"format": "flax"})), "format 'flax'"),
    "a layer is missing": (lambda f: keep_tensors(f, lambda name: "layers.3." not in name), "have no model.layers.3."),
    "one tensor is missing": (lambda f: keep_tensors(f, lambda name: name != LAST), f"have no {LAST}, which config.json"),
    "fewer layers than the weights": (
        config(num_hidden_layers=3, layer_types=...),
        "also have model.layers.3.",
    ),
    "another width": (config(intermediate_size=256), "got shape 512×192, expected 256×192 by config.json (12 tensors differ)"),
    "another vocabulary": (config(vocab_size=8192), "model.embed_tokens.weight: got shape 4096×192, expected 8192×192"),
    "untied without a head": (config(tie_word_embeddings=False), "have no lm_head.weight"),
    "another model's names": (config(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=32), "q_norm"),
    "weights under another name": (lambda f: (f / WEIGHTS).rename(f / "weights.safetensors"), "neither model.safetensors nor"),
    "a missing shard": (sharded(lambda f: (f / SECOND_SHARD).unlink()), f"got no {SECOND_SHARD}, which {INDEX} names: 1 of 2"),
    "a tensor in the other shard": (sharded(move_tensor), f"{LAST} not in the shards"),
    "an index of nothing": (sharded(content(INDEX, "{}")), "weight_map: got no object"),
    "an index to another folder": (sharded(content(INDEX, '{"weight_map": {"a": "../x.safetensors"}}')), "in the same folder"),
    "an index to a pickle": (sharded(content(INDEX, '{"weight_map": {"a": "x.bin"}}')), "expected names of *.safetensors"),
    # tokenizer
    "tokenizer without a model": (content("tokenizer.json", '{"version":"1.0"}'), "tokenizer.json: not a tokenizer"),
    "tokenizer is no JSON": (content("tokenizer.json", "tokenizer"), "tokenizer.json: not JSON"),
    "tokenizer settings are a list": (content("tokenizer_config.json", "[]"), "tokenizer_config.json: got a list"),
    "no end token": (settings(eos_token=None), "eos_token: got none; expected the token that ends a turn"),
    "an unknown end token": (
        settings(eos_token={"content": "<|nowhere|>"}),
        "eos_token: got '<|nowhere|>', which tokenizer.json does not have",
    ),
    "an unknown padding token": (settings(pad_token={"content": "<|pad|>"}), "pad_token: got '<|pad|>'"),
    "a tokenizer of another model": (larger_vocabulary, "got token 9,999, expected tokens below 4,096 (vocab_size in config.json)"),
    "no tokenizer settings": (lambda f: (f / "tokenizer_config.json").unlink(), "eos_token: got none"),
    # template
    "no template": (settings(chat_template=...), "got none: no chat template"),
    "an empty template": (settings(chat_template=""), "no chat template"),
    "a template that is a number": (settings(chat_template=5), "got 5, expected a template"),
    "templates without a default": (settings(chat_template=[{"name": "tool_use", "template": CHATML}]), "no chat template"),
    "a template that does not parse": (settings(chat_template="{% for"), "its chat template fails with TemplateSyntaxError"),
    "a template that refuses": (settings(chat_template="{{ raise_exception('no \x1b[31msystem') }}"), "no \\x1b[31msystem"),
    "a template without an end": (settings(chat_template="{{ messages }}"), "cannot be used for training: it renders a prompt"),
    "a base that was not trained to chat": (
        settings(eos_token={"content": "<|endoftext|>"}),
        "does not end a reply with its eos_token, '<|endoftext|>', so an adapter would not learn when to stop",
    ),
    "a template of another family": (
        settings(chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"),
        "use its instruction-tuned version, such as Qwen2.5-7B-Instruct",
    ),
    "a template that reads Python": (settings(chat_template="{{ ''.__class__.__mro__ }}{{ x.y.z }}"), "its chat template fails"),
    "a template that writes without end": (
        settings(chat_template="{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}"),
        "its chat template writes without end",
    ),
    "a template that eats memory": (settings(chat_template="{% set x = 'x' * 10**10 %}" + CHATML), "GiB of memory"),
    "a template that is a large number": (settings(chat_template="{{ 7 ** 9 ** 9 ** 9 }}"), "its chat template"),
    "a filter that eats memory": (settings(chat_template="{{ 'x' | center(10**10) }}" + CHATML), "GiB of memory"),
    "a template file that is broken": (content("chat_template.jinja", "{{ nothing.at.all }}"), "fails with UndefinedError"),
    "a template file that is no text": (content("chat_template.jinja", b"\xff\xfe{"), "not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_base_is_refused_with_its_reason(base: Path, name: str) -> None:
    make, said = BROKEN[name]
    make(base)
    assert said in problems(base)


def test_every_problem_is_named_at_once(base: Path) -> None:
    change_json(base, "config.json", vocab_size=0, hidden_size=None)
    (base / WEIGHTS).write_bytes(b"\xff" * 99)
    set_template(base, "{{")
    found = problems(base)
    for said in ("vocab_size", "hidden_size", "damaged or cut off", "its chat template"):
        assert said in found


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: None,
        shard,
        # auto_map and Python files beside a known architecture: transformers has its own code for it
        lambda folder: (config(auto_map={"AutoModelForCausalLM": "evil.Evil"})(folder), (folder / "evil.py").write_text("x")),
        # never loaded, because safetensors are there
        content("pytorch_model.bin", pickle.dumps({})),
        lambda folder: settings(chat_template=[{"name": "tool_use", "template": "{{"}, {"name": "default", "template": CHATML}])(
            folder
        ),
        lambda folder: (content("chat_template.jinja", CHATML)(folder), set_template(folder, "{{ broken")),
        lambda folder: (config(torch_dtype="bfloat16", dtype=...)(folder), config(pad_token_id=-1)(folder)),
        content("._model.safetensors", b"\x00\x05\x16\x07"),
        lambda folder: settings(eos_token={"content": "<|im_end|>", "special": True})(folder),
    ],
)
def test_a_base_that_can_be_trained_passes(base: Path, make: Break) -> None:
    make(base)
    assert require_base(BaseModelConfig(model=str(base))).endswith("model files, the weights by their headers")
    assert folder_template(base) == CHATML


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["consolidated.00.pth"], ["model.ckpt", "model.pkl"], ["model.gguf"]])
def test_weights_that_are_only_pickled(base: Path, names: list[str]) -> None:
    (base / WEIGHTS).unlink()
    for name in names:
        (base / name).write_bytes(pickle.dumps({}))
    found = problems(base)
    assert f"got {', '.join(names)}, expected *.safetensors" in found
    assert "convert them" in found


def test_the_check_changes_no_identity(base: Path) -> None:
    model = BaseModelConfig(model=str(base))
    before = identify_base(model)
    require_base(model)
    assert identify_base(model) == before
    assert fetch_base(before, model) == base


def test_a_disk_that_fails_is_no_broken_base(base: Path) -> None:
    def read(name: str, at: int, length: int) -> bytes:
        raise StorageError(f"{name}: cannot be read")

    with pytest.raises(StorageError):
        check_base(BaseFiles(str(base), {path.name: path.stat().st_size for path in base.iterdir()}, read))


def test_expected_shapes_are_the_tiny_bases_own() -> None:
    header = json.loads(_header_bytes(TINY_BASE / WEIGHTS))
    settings = json.loads((TINY_BASE / "config.json").read_text(encoding="utf-8"))
    assert {name: tuple(header[name]["shape"]) for name in header if name != "__metadata__"} == expected_shapes(settings)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True, "head_dim": 48}, {"attention_bias": True, "mlp_bias": True}])
def test_expected_shapes_are_those_of_transformers(kind: str, more: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: it knows the shapes")
    torch = pytest.importorskip("torch")
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, **more,
    }  # fmt: skip
    # without transformers' own defaults, such as a head of 128
    sizes.setdefault("head_dim", 8)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **sizes), trust_remote_code=False
        )
    found = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert expected_shapes({"model_type": kind, **sizes}) == found


# -- templates ------------------------------------------------------------------------------------

CHATS = [
    ([{"role": "system", "content": "너는 친구야. <b>&\"'"}, {"role": "user", "content": "안녕 😊\n\n{{ x }}"}], True),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": '{"text": "b"}'}], False),
]


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        (
            "{% for m in messages %}\n  {%- if loop.index0 == 5 %}{% break %}{% endif %}\n"
            "{{ m | tojson(indent=1) }}{{ eos_token }}\n{% endfor %}\n"
        ),
        "  {% generation %}{{ messages[0].content }}{% endgeneration %}  \n{{ bos_token is defined }}{{ tools is none }}",
        (
            "{% macro x(a) %}[{{ a | trim }}]{% endmacro %}"
            "{% for m in messages %}{{ x(m['content']) }}{% endfor %}{{ add_generation_prompt }}"
        ),
    ],
)
def test_a_template_renders_as_in_transformers(template: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_BASE, local_files_only=True, trust_remote_code=False)
    tokenizer.chat_template = template
    theirs = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) for chat, prompt in CHATS]
    assert render_chats(template, tokenizer.special_tokens_map, CHATS) == theirs


def test_a_template_that_behaves_on_the_sample_and_loops_on_another_text() -> None:
    text = "{% if 'secret' in messages[0].content %}" + "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3 + "{% endif %}ok"
    assert render_chats(text, {}, [([{"role": "user", "content": "x"}], True)]) == ["ok"]
    with pytest.raises(GuardError, match=r"takes more than 5 s of processor time|does not end") as refused:
        render_chats(text, {}, [([{"role": "user", "content": "secret"}], True)])
    assert "secret" not in str(refused.value)


def test_many_conversations_are_rendered_in_order() -> None:
    chats = [([{"role": "user", "content": str(number)}], True) for number in range(5000)]
    assert render_chats("{{ messages[0].content }}", {}, chats) == [str(number) for number in range(5000)]


def test_the_child_sees_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_trainer.base_files import guarded

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-value")
    passed = {name for name in guarded._PASSED_VARIABLES if "KEY" in name or "TOKEN" in name or "AWS" in name}
    assert passed == set()


def test_a_tokenizer_says_what_it_holds() -> None:
    text = (TINY_BASE / "tokenizer.json").read_text(encoding="utf-8")
    facts = load_tokenizer(text, ["<|im_end|>", "<|nowhere|>"], ["안녕"])
    assert facts.largest_id == 4095
    assert facts.ids == {"<|im_end|>": 4095, "<|nowhere|>": None}
