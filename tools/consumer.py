"""Answer a bundle's own prompts with nothing but the bundle, its base, transformers and PEFT: the code that a server would have.

    python -I tools/consumer.py BASE BUNDLE

Print one line of JSON: for each line of `replies.jsonl`, the prompt's tokens and the greedy reply of the same model. Imports
nothing of this project, and runs with every version of transformers and PEFT that can read a bundle.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from pathlib import Path

import peft
import torch
import transformers
import yaml

base_folder, folder = map(Path, sys.argv[1:])
rules = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
# version 2 has the instruction in persona.yaml alone
instruction = rules.get("instruction") or yaml.safe_load((folder / "persona.yaml").read_text(encoding="utf-8"))["instruction"]
limit = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["evaluation"]["max_new_tokens"]


def require(known, rule):
    """End with a message unless this program knows the prompt's rule."""
    if not known:
        sys.exit(f"prompt.json: {rule}: got {rules[rule]!r}, which this program does not know")


def plain(text):
    """Return `text` as it stands in a prompt."""
    written, tag = rules["text_rules"].split("; put a space behind what matches ")
    known = "collapse white space to single spaces and trim; write '<|' as '< |' and '|>' as '| >'"
    if rules["version"] == 3:
        text, known = unicodedata.normalize("NFC", text), f"compose (Unicode NFC); {known}"
    require(written == known, "text_rules")
    return re.sub(tag.strip("'"), "< ", " ".join(text.split()).replace("<|", "< |").replace("|>", "| >"))


def strength(intensity):
    """Return how the prompt says `intensity`: with a word, or with a number in version 2."""
    if rules["version"] == 2:
        require(rules["intensity_format"] == "one decimal", "intensity_format")
        return f"{intensity:.1f}"
    return next(word["word"] for word in rules["strength"] if intensity < word.get("intensity_below", 2))


def filled(line, values):
    """Return a line of the template with its fields filled in."""
    return re.sub(r"\{(\w+)(?::[^}]*)?\}", lambda field: values[field[1]], line)


def messages(asked):
    """Return the messages of one prompt, by the rules of `prompt.json`."""
    require(rules["version"] in (2, 3), "version")
    said = strength(asked["intensity"])
    values = {
        "instruction": plain(instruction),
        "summary": plain(asked["summary"]),
        "emotion_type": asked["feeling"],
        "intensity": said,
        "strength": said,
        "input": plain(asked["input"]),
    }
    optional = {line for line in rules["left_out_when_empty"] if not values[re.search(r"\{(\w+)", line)[1]]}
    system = rules["joined_with"].join(filled(line, values) for line in rules["system"] if line not in optional)
    return [{"role": "system", "content": system}, {"role": "user", "content": filled(rules["user"], values)}]


tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
# transformers 4 calls the argument torch_dtype and loads float32, transformers 5 calls it dtype and loads what is saved
base = transformers.AutoModelForCausalLM.from_pretrained(base_folder).float()
model = peft.PeftModel.from_pretrained(base, folder).eval()


def reply(asked):
    """Return the greedy reply of the loaded model."""
    inputs = tokenizer.apply_chat_template(messages(asked), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = inputs["input_ids"][0].tolist()
    with torch.inference_mode():
        written = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0, len(prompt) :].tolist()
    stopped = written[-1] == tokenizer.eos_token_id
    kept = written[:-1] if written[-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id) else written
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {"reply": text, "stopped": stopped, "tokens": len(kept), "prompt_ids": prompt, "ids": written}


replies = []
for line in (folder / "replies.jsonl").read_text(encoding="utf-8").splitlines():
    asked = json.loads(line)
    if asked["model"] == "base":
        with model.disable_adapter():
            replies.append(reply(asked))
    else:
        replies.append(reply(asked))

ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("lora_trainer", "entrypoint", "tools", "trl", "datasets"))
versions = {module.__name__: module.__version__ for module in (transformers, peft, torch)}
sys.stdout.write(json.dumps({"replies": replies, "ours": ours, "versions": versions}) + "\n")
