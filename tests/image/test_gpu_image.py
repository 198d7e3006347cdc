"""Test the GPU image as far as possible without a GPU: it is complete, and it refuses to run."""

from __future__ import annotations

import json
import os
from typing import Final

import pytest
from conftest import REPOSITORY
from docker_cli import Docker, docker_with

from lora_trainer.config import GatesConfig

pytestmark = pytest.mark.image

IMAGE: Final = os.environ.get("GPU_IMAGE", "localhost/lora-trainer:gpu")
HARDENED: Final = (
    "--rm", "--read-only", "--user", "12345:12345", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none",
    "--tmpfs", "/job:rw,mode=1777", "--tmpfs", "/cache:rw,exec,mode=1777", "--tmpfs", "/tmp:rw,exec,mode=1777",
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Docker:
    return docker_with(IMAGE, "image")


def python_in(engine: Docker, code: str) -> str:
    done = engine("run", *HARDENED, "--entrypoint", "python", IMAGE, "-c", code, timeout_s=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_whole_lock_is_there(engine: Docker) -> None:
    """The image has every package of locks/gpu.txt in the locked version."""
    code = """
import importlib.metadata as m, json
print(json.dumps({d.name.lower().replace("_", "-").replace(".", "-"): d.version for d in m.distributions()}))
"""
    installed = json.loads(python_in(engine, code))
    lines = (REPOSITORY / "locks" / "gpu.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split(" ")[0].partition("==") for line in lines if "==" in line and not line.startswith((" ", "#")))
    lock = {name.replace("_", "-").replace(".", "-"): version for name, _, version in pins}
    assert len(lock) > 100
    assert {name: installed.get(name) for name in lock} == lock


def test_stack_imports_without_a_gpu(engine: Docker) -> None:
    """The stack is built for CUDA 13.0 and finds every library but the driver's, which the container toolkit provides."""
    code = """
import json, torch, triton, bitsandbytes, transformers, trl, peft, datasets, torchvision, torchao
print(json.dumps([torch.version.cuda, torch.cuda.is_available(), torch.backends.cudnn.version() > 90000]))
"""
    assert json.loads(python_in(engine, code).splitlines()[-1]) == ["13.0", False, True]


def test_unsloth_imports_without_a_gpu(engine: Docker) -> None:
    """Unsloth falls back to its CPU mode. The job disables that mode, so that it fails on a node whose GPU is missing."""
    code = "import os; os.environ['UNSLOTH_DISABLE_STATISTICS'] = '1'; import unsloth; print('imported', unsloth.__version__)"
    assert python_in(engine, code).splitlines()[-1].startswith("imported 2026.")


def test_bitsandbytes_has_the_library_of_this_cuda(engine: Docker) -> None:
    """The image has no other CUDA library of bitsandbytes, and this one loads."""
    code = """
import ctypes, pathlib, bitsandbytes, torch
folder = pathlib.Path(bitsandbytes.__file__).parent
names = sorted(path.name for path in folder.glob("libbitsandbytes_*.so"))
ctypes.CDLL(str(folder / "libbitsandbytes_cuda130.so"))
print(names)
"""
    assert python_in(engine, code).splitlines()[-1] == "['libbitsandbytes_cpu.so', 'libbitsandbytes_cuda130.so']"


def test_triton_compiles_a_kernel_for_an_h100(engine: Docker) -> None:
    """The stripped compiler and its assembler produce machine code; only launching needs the GPU."""
    code = """
import pathlib, runpy
pathlib.Path("/tmp/kernel.py").write_text('''
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2.0, mask=i < n)

source = triton.compiler.ASTSource(
    fn=double, signature={"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}, constexprs={"BLOCK": 128}
)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"][:4])
''')
runpy.run_path("/tmp/kernel.py", run_name="kernel")
"""
    assert python_in(engine, code).splitlines()[-1] == "b'\\x7fELF'"


def test_no_library_of_torch_is_missing(engine: Docker) -> None:
    """The loader finds every library except the driver's."""
    code = """
import pathlib, re, subprocess, sysconfig
site = pathlib.Path(sysconfig.get_path("purelib"))
missing = set()
for library in [*site.glob("torch/lib/*.so*"), *site.glob("nvidia/**/lib*.so*")]:
    if library.name.startswith("libcufile_rdma"):  # opened only where there is RDMA, as the plug-ins of NVSHMEM are
        continue
    found = subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    missing |= set(re.findall(r"(\\S+) => not found", found))
print(sorted(missing))
"""
    assert python_in(engine, code) == "['libcuda.so.1']\n"


def test_a_run_stops_with_5(engine: Docker) -> None:
    done = engine("run", *HARDENED, IMAGE, "run", "--blood-type", "A", "--data", "/opt/lora-trainer/data/", "--log-format", "json")
    assert done.returncode == 5, done.stderr
    assert "GPU" in " ".join(json.loads(done.stderr.splitlines()[-1])["problems"])


def test_unsloth_trains_on_the_cpu_to_a_published_bundle(engine: Docker) -> None:
    """Train two 4-bit steps on the tiny base to show that trimming removed nothing that the job imports."""
    assets = f"{REPOSITORY / 'tests' / 'assets'}:/assets:ro"
    done = engine(
        "run", *HARDENED, "--env", "HF_HUB_OFFLINE=1", "--volume", assets, IMAGE,
        "run", "--config", "/opt/lora-trainer/examples/demo.yaml", "--blood-type", "A", "--backend", "unsloth", "--device", "cpu",
        "--data", "/opt/lora-trainer/data/", "--output", "/job/out/", "--max-steps", "2",
        "--set", "training.quantization=nf4", "--set", "memory.micro_batch_tokens=512",
        "--set", "evaluation.prompts=/assets/few_prompts.jsonl", "--set", "evaluation.temperature=0",
        "--set", "evaluation.max_new_tokens=16", "--set", "evaluation.intensities=0.5",
        *(argument for name in GatesConfig.model_fields for argument in ("--set", f"gates.{name}=none")),
        timeout_s=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("file:///job/out/adapters/A/")
