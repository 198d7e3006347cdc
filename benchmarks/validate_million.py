"""Measure the validation of a file with a million records: wall time, and peak memory compared with 50,000 records.

    python benchmarks/validate_million.py --tokenizer FOLDER
    python benchmarks/validate_million.py --tokenizer FOLDER --lines 200000 --before CHECKOUT --out FILE

Writes both files to a temporary folder (about 550 MB), checks each with as many processes as `validate` would use, and writes
`benchmarks/results/validate-million.json`. `--before` measures the same files with the code of another checkout, right before
this one's. A fixed seed makes the files the same everywhere. The exit code is 1 if the large file takes over 300 MiB more than
the small one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL_LINES = 50_000
"""Enough for `validate` to use several processes."""
ALLOWED_GROWTH_MIB = 300
SAMPLED_EVERY_S = 1.0

CHECK = """
import sys
from functools import partial
from pathlib import Path
from lora_trainer.data.prompt_cost import TokenCounter, chatml_overhead_tokens
from lora_trainer.data.validation import check_file, write_json
counter = TokenCounter(Path(sys.argv[2]))
check = partial(check_file, template_overhead_tokens=chatml_overhead_tokens(counter))
write_json(sys.stdout, [Path(sys.argv[1])], lambda path, on_problem: check(path, None, counter, on_problem=on_problem))
"""

WORDS = {
    "place": "카페 도서관 한강 공원 학교 편의점 영화관 지하철역 서점 노래방 분식집 헬스장 미술관 바닷가 빵집 시장 옥상 놀이공원",
    "time": "아까 어제 방금 아침에 점심때 저녁에 주말에 새벽에 퇴근하고 수업끝나고 요즘 매일 가끔",
    "thing": "떡볶이 라면 커피 케이크 신발 기타 고양이 강아지 우산 소설책 게임기 "
    "사진 김밥 자전거 화분 드라마 시험 면접 여행 선물 이어폰",
    "doing": "보다가 먹다가 고르다가 찾다가 사다가 얘기하다가 기다리다가 준비하다가 잃어버리고 빌려주고 자랑하다가",
    "end": "깜짝/놀랐어 웃음이/터졌어 네/생각났어 좀/지쳤어 기분이/좋아졌어 눈물이/났어 살짝/설렜어 배가/고파졌어",
    "reaction": "오! 와! 헐! 아! 우와! 음... 진짜? 대박!",
    "feeling": "neutral happy excited love surprised worried sad angry embarrassed tired",
    "expression": "neutral smile laugh love wink proud surprise think worry sad cry angry pout shy sleepy",
}
"""Words separated by white space. `/` stands for a space within a word."""

ANSWERS = [
    "나도 가고 싶다",
    "그거 완전 너답다",
    "나는 아직 못 해봤어",
    "네가 좋았다니 다행이야",
    "그 마음 알 것 같아",
    "조금 쉬어도 괜찮아",
]
QUESTIONS = [
    "다음엔 같이 갈래?",
    "누구랑 있었어?",
    "지금은 좀 어때?",
    "그래서 어떻게 됐어?",
    "맛있었어?",
    "내일도 갈 거야?",
    "뭐가 제일 좋았어?",
]
EMOJI = ["😊", "😂", "🎉", "💪🏽", "🥹", "✨", "❤️", "🐶"]


def lines(count: int) -> Iterator[str]:
    """Yield `count` lines: one in 1,000 is broken, one in 200 repeats an earlier line, the others are plausible records."""
    chance = random.Random(20)
    choices = {name: words.split() for name, words in WORDS.items()}

    def word(name: str) -> str:
        return chance.choice(choices[name]).replace("/", " ")

    kept = ""
    for number in range(count):
        if kept and chance.random() < 0.005:
            yield kept
            continue
        place, thing = word("place"), word("thing")
        emoji = "".join(chance.choices(EMOJI, k=chance.choice((0, 0, 0, 1, 1, 2))))
        sentences = f"{place} {thing}{_particle(thing)} {chance.choice(ANSWERS)}! {chance.choice(QUESTIONS)}"
        reply = {"text": f"{word('reaction')} {sentences} {emoji}".strip(), "emotion": word("expression")}
        summary = f"우리는 {word('time')} {word('place')}에서 {word('thing')} 얘기를 {chance.randrange(2, 90)}분쯤 했어."
        record = {
            "instruction": "너는 A형 다정한 친구야. 짧은 반말로 답해.",
            "context": {"summary": summary, "current_emotion": {"type": word("feeling"), "intensity": round(chance.random(), 2)}},
            "input": f"나 {word('time')} {place}에서 {thing} {word('doing')} {word('end')}. {word('thing')}도 있었고.",
            "output": json.dumps(reply, ensure_ascii=False),
        }
        line = json.dumps(record, ensure_ascii=False)
        if number % 1000 == 999:
            line = line[: len(line) // 2]
        elif number % 100 == 0:
            kept = line
        yield line


def _particle(noun: str) -> str:
    return "이라니" if (ord(noun[-1]) - 0xAC00) % 28 else "라니"


def tree_mib(pid: int) -> float:
    """Return the memory of a process and its descendants: the sum of their proportional set sizes. 0 without Linux's /proc."""
    proc = Path(f"/proc/{pid}")
    try:
        rollup = (proc / "smaps_rollup").read_text().splitlines()
        children = [int(child) for task in proc.glob("task/*/children") for child in task.read_text().split()]
    except OSError:
        # it has just ended
        return 0.0
    pss = sum(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    return pss / 1024 + sum(map(tree_mib, children))


def measure(command: list[str], folder: Path, checkout: Path) -> dict[str, object]:
    """Measure wall time and peak memory of one command, whose standard output goes to a file in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    peak_mib = 0.0
    with (folder / "report.json").open("wb") as out:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, cwd=checkout, env=environment)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            peak_mib = max(peak_mib, tree_mib(process.pid))
            time.sleep(SAMPLED_EVERY_S)
        _, status, usage = ended
        wall_s = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    raw = (folder / "report.json").read_bytes()
    report = json.loads(raw)["files"][0]
    return {
        "wall_s": round(wall_s, 1),
        # of the process and of the workers that it waited for
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(peak_mib, 1),
        "exit_code": process.returncode,
        "records": report["records"],
        "errors": report["errors"],
        "warnings": report["warnings"],
        "problems_written": len(report["problems"]),
        "problems_sha256": hashlib.sha256(json.dumps(report["problems"]).encode()).hexdigest()[:16],
        "mean_tokens": report["prompt_cost"]["whole"]["mean_tokens"],
    }


def machine() -> dict[str, object]:
    """Return the properties of the machine that affect the numbers."""
    cpuinfo = Path("/proc/cpuinfo")
    described = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "os": f"{platform.system()} {platform.release()}",
        "load_average_before": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    """Run both measurements and write the result."""
    parser = argparse.ArgumentParser(description="Measure time and peak memory of validating 1,000 and 1,000,000 records.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the base's tokenizer.json")
    parser.add_argument(
        "--command", help="command to measure instead of the library, such as 'python -m entrypoint validate {file} --json'"
    )
    parser.add_argument("--lines", type=int, default=1_000_000, help="lines of the large file")
    parser.add_argument("--before", type=Path, help="another checkout, to measure the same files with its code")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/validate-million.json")
    options = parser.parse_args()
    measured_on = machine()
    checkouts = {"before": options.before, "after": ROOT} if options.before else {"after": ROOT}
    results: dict[str, dict[str, dict[str, object]]] = {side: {} for side in checkouts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (SMALL_LINES, options.lines):
            file = folder / f"{count}.jsonl"
            with file.open("w", encoding="utf-8") as out:
                out.writelines(line + "\n" for line in lines(count))
            if options.command:
                command = [part.format(file=file, tokenizer=options.tokenizer) for part in shlex.split(options.command)]
            else:
                command = [sys.executable, "-c", CHECK, str(file), str(options.tokenizer.resolve())]
            for side, checkout in checkouts.items():
                load = round(os.getloadavg()[0], 1)
                found = measure(command, folder, checkout.resolve())
                results[side][f"{count}_lines"] = {
                    "file_mib": round(file.stat().st_size / 2**20, 1),
                    "load_average_before": load,
                    **found,
                }
                print(side, count, found, flush=True)
    small, large = results["after"].values()
    growth_mib = round(float(str(large["peak_mib"])) - float(str(small["peak_mib"])), 1)
    document = {
        "what": "validate with the token cost of every record, all problems as JSON; memory of all processes",
        "command": options.command
        or f"python benchmarks/validate_million.py --tokenizer FOLDER --lines {options.lines}"
        + (" --before CHECKOUT" if options.before else ""),
        "machine": measured_on,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("kiwipiepy", "pydantic", "regex", "tokenizers")},
        "results": results,
        "growth_mib": growth_mib,
        "allowed_growth_mib": ALLOWED_GROWTH_MIB,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if growth_mib <= ALLOWED_GROWTH_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
