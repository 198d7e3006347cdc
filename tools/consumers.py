"""Load a bundle with old and new versions of transformers and PEFT, and compare their greedy tokens with this environment's.

    make consumers-test ARGS=--write                             # all pairs; updates the results and the table of docs/serving.md
    make consumers-test ARGS='--pairs 4.51.3+0.12.0'             # one pair; prints the result

Each pair gets an environment of its own, installed by pip, that shares this environment's torch and what torch needs. The bundle
is a short run of persona O on the tiny base. `tools/consumer.py` answers the prompts of its `replies.jsonl` in each environment.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parent.parent
BASE: Final = REPOSITORY / "examples" / "tiny-base"
RESULTS: Final = REPOSITORY / "benchmarks" / "results" / "consumers.json"
PAGE: Final = REPOSITORY / "docs" / "serving.md"
MARKERS: Final = ("<!-- consumers:begin -->\n", "<!-- consumers:end -->")
NEWEST: Final = "newest"
"""The version that is installed here, which `locks/cpu.txt` pins."""
# the oldest versions that are still in use, the last 4.x with the PEFT of its time, and how they mix
PAIRS: Final = tuple(
    f"{transformers}+{peft}" for transformers in ("4.51.3", "4.57.6", NEWEST) for peft in ("0.12.0", "0.17.1", NEWEST)
)
EQUAL: Final = "equal"


def versions_of(pair: str) -> tuple[str, str]:
    """Return the versions of transformers and PEFT in `pair`."""
    transformers, _, peft = pair.partition("+")
    return (
        version("transformers") if transformers == NEWEST else transformers,
        version("peft") if peft == NEWEST else peft,
    )


def share_torch(folder: Path) -> None:
    """Link torch and everything that it requires from this environment into `folder`."""
    folder.mkdir()
    waiting, linked = ["torch"], set()
    while waiting:
        found = distribution(waiting.pop())
        if found.name in linked:
            continue
        linked.add(found.name)
        for name in {path.parts[0] for path in found.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path(str(found.locate_file(name))))
        for requirement in found.requires or ():
            matched = re.match(r"[\w.-]+", requirement)
            if matched and "extra ==" not in requirement and is_installed(matched[0]):
                waiting.append(matched[0])


def is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def make_environment(folder: Path, torch: Path, transformers: str, peft: str) -> Path:
    """Create an environment with these versions and the torch in folder `torch`. Return its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "shared-torch.pth").write_text(f"{torch}\n", encoding="utf-8")
    # most of transformers is never imported, so compiling all of it takes most of pip's time for nothing
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    subprocess.run([*install, "--disable-pip-version-check", f"transformers=={transformers}", f"peft=={peft}"], check=True)
    return python


def published_bundle(folder: Path) -> Path:
    """Publish a run on the tiny base that is long enough for the adapter's replies to differ from the base's."""
    from lora_trainer.config import GatesConfig

    settings = [f"gates.{name}=none" for name in GatesConfig.model_fields]
    settings += [
        "memory.micro_batch_tokens=512", f"evaluation.prompts={REPOSITORY / 'tests' / 'assets' / 'few_prompts.jsonl'}",
        "evaluation.temperature=0", "evaluation.max_new_tokens=32", "evaluation.intensities=0.2,0.9",
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "entrypoint", "run", "--config", str(REPOSITORY / "examples" / "demo.yaml"), "--blood-type", "O",
        "--max-steps", "12", "--data", str(REPOSITORY / "data"),
        "--output", str(folder / "out"), "--work-dir", str(folder / "work"),
        *(word for setting in settings for word in ("--set", setting)),
    ]  # fmt: skip
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return (folder / "out" / "adapter_O").resolve()


def answers(python: Path, bundle: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the replies of `tools/consumer.py` under `python`, and why there are none."""
    done = subprocess.run(
        [str(python), "-I", str(REPOSITORY / "tools" / "consumer.py"), str(BASE), str(bundle)],
        # greedy tokens do not depend on the number of threads, and idle threads that spin slow down a busy machine
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        # a message may name the folder of the environment behind its first sentence
        return [], re.sub(r" \(/.*", "", lines[-1])
    replies: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["replies"]
    return replies, ""


def compared(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    """Return `equal`, or where the first difference is."""
    for at, (ours, theirs) in enumerate(zip(expected, found, strict=True), start=1):
        for name in ("prompt_ids", "ids", "reply"):
            if ours[name] != theirs[name]:
                return f"reply {at}: {name} differs"
    return EQUAL


def evaluated(bundle: Path) -> list[dict[str, Any]]:
    """Return what the run itself recorded of each reply."""
    lines = (bundle / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: reply[name] for name in ("reply", "stopped", "tokens")} for reply in map(json.loads, lines)]


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    said = {EQUAL: "the same tokens"}
    lines = ["| transformers | PEFT | Result |", "|---|---|---|"]
    for row in results["pairs"]:
        lines.append(
            f"| {row['transformers']} | {row['peft']} | {said.get(row['result'], '**broken**: `' + row['result'] + '`')} |"
        )
    return "\n".join(lines) + "\n"


def with_table(text: str, results: dict[str, Any]) -> str:
    """Return the page with its table replaced. Raises ValueError if the page has no markers."""
    begin, end = MARKERS
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"docs/serving.md: expected {begin.strip()} and {end}")
    return before + begin + table(results) + end + after


def measure(pairs: list[str], work: Path) -> dict[str, Any]:
    """Build an environment for each pair and compare its replies with this environment's."""
    bundle = published_bundle(work)
    expected, reason = answers(Path(sys.executable), bundle)
    if reason or [{name: reply[name] for name in ("reply", "stopped", "tokens")} for reply in expected] != evaluated(bundle):
        raise SystemExit(f"this environment does not repeat its own replies: {reason or 'they differ from replies.jsonl'}")
    share_torch(work / "torch")
    rows = []
    for pair in pairs:
        transformers, peft = versions_of(pair)
        started = time.monotonic()
        python = make_environment(work / pair, work / "torch", transformers, peft)
        built_s = time.monotonic() - started
        found, reason = answers(python, bundle)
        row = {"transformers": transformers, "peft": peft, "result": reason or compared(expected, found)}
        rows.append({**row, "environment_s": round(built_s), "answers_s": round(time.monotonic() - started - built_s)})
        print(json.dumps(rows[-1]), flush=True)
    return {
        "what": "greedy replies of a bundle's base and adapter in environments with these versions, compared with our own",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "replies": len(expected),
        "tokens": sum(reply["tokens"] for reply in expected),
        "pairs": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a bundle's greedy tokens between versions of transformers and PEFT.")
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=list(PAIRS),
        metavar="TRANSFORMERS+PEFT",
        help=f"default: all; '{NEWEST}' is what is installed here",
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} and the table of docs/serving.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="consumers-") as work:
        results = measure(arguments.pairs, Path(work))
    if arguments.write:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    else:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
