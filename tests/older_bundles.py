"""Turn a bundle into one of an earlier prompt version, as an earlier version of this program published it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Final

from lora_trainer.run.identity import run_id

PROMPT_2: Final[dict[str, Any]] = {
    "version": 2,
    "system": ["{instruction}", "상황: {summary}", "감정: {emotion_type} {intensity:.1f}", '출력: {"text","emotion"} JSON'],
    "placeholders": ["instruction", "summary", "emotion_type", "intensity", "input"],
    "joined_with": "\n",
    "left_out_when_empty": ["상황: {summary}"],
    "user": "{input}",
    "text_rules": "collapse white space to single spaces and trim; write '<|' as '< |' and '|>' as '| >'; "
    "put a space behind what matches '<(?=/?[a-z][a-z0-9_]*>)'",
    "intensity_format": "one decimal",
    "reply": {"keys": ["text", "emotion"], "separators": [",", ":"], "ensure_ascii": False},
}
"""`prompt.json` of prompt version 2."""


def with_prompt_2(bundle: Path, output: Path) -> Path:
    """Copy a bundle to `output`, an empty folder, as a bundle of prompt version 2 in its place. Return its folder."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["ingredients"]["prompt_version"] = 2
    manifest["run_id"] = run_id(manifest["ingredients"])
    folder: Path = output / "adapters" / manifest["blood_type"] / manifest["run_id"]
    shutil.copytree(bundle, folder)
    (folder / "prompt.json").write_text(json.dumps(PROMPT_2, ensure_ascii=False), encoding="utf-8")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    (folder / "metrics.json").write_text(json.dumps({**metrics, "run_id": manifest["run_id"]}), encoding="utf-8")
    for name in ("prompt.json", "metrics.json"):
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder
