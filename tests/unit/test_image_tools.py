"""Test the tools that build the image and run `make train-local`, without Docker."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
from conftest import REPOSITORY, load_tool

trim: Any = load_tool("trim_packages")
GCC: Final = shutil.which("gcc") or ""
MAKE: Final = shutil.which("make") or "make"
DOCKERFILE: Final = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")


# trimming the environment


def made_site(tmp_path: Path, cuda: str = "'13.0'") -> Path:
    site = tmp_path / "site-packages"
    for name in (
        "torch/bin/protoc", "torch/lib/libtorch_cuda.so", "studio/frontend/index.js", "unsloth/__init__.py",
        "bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/libbitsandbytes_cuda128.so",
        "bitsandbytes/libbitsandbytes_rocm72.so", "nvidia/cu13/lib/libcusolver.so.12", "nvidia/cu13/lib/libcusolverMg.so.12",
        "nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cu13/lib/libnvrtc.alt.so.13", "nvidia/cu13/lib/libcudart_static.a",
        "nvidia/cu13/lib/libcudart.so.13", "nvidia/nvshmem/lib/libnvshmem_device.bc", "pandas/tests/frame/test_x.py",
        "jinja2/tests.py", "numpy/testing/__init__.py", "pyarrow/libarrow.so.2600", "pyarrow/libarrow_flight.so.2600",
        "pyarrow/_flight.so", "pyarrow/include/arrow/api.h",
    ):  # fmt: skip
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 100)
    (site / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\nhip = None\n")
    return site


def left(site: Path) -> set[str]:
    return {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}


def test_cuts_take_what_is_listed_and_nothing_else(tmp_path: Path) -> None:
    site = made_site(tmp_path)
    before = trim.size_bytes(site)
    removed: set[str] = set()
    freed = sum(trim.remove(site, cut, removed) for cut in trim.cuts(site))
    assert left(site) == {
        "torch/lib/libtorch_cuda.so", "torch/version.py", "unsloth/__init__.py", "bitsandbytes/libbitsandbytes_cpu.so",
        "bitsandbytes/libbitsandbytes_cuda130.so", "nvidia/cu13/lib/libcusolver.so.12", "nvidia/cu13/lib/libnvrtc.so.13",
        "nvidia/cu13/lib/libcudart.so.13", "jinja2/tests.py", "numpy/testing/__init__.py", "pyarrow/libarrow.so.2600",
    }  # fmt: skip
    assert {"libcusolverMg.so.12", "libbitsandbytes_cuda128.so", "_flight.so"} <= removed
    assert freed == before - trim.size_bytes(site) == 12 * 100


def test_bitsandbytes_is_kept_for_the_cuda_of_the_installed_torch(tmp_path: Path) -> None:
    site = made_site(tmp_path, cuda="'12.8'")
    for cut in trim.cuts(site):
        trim.remove(site, cut, set())
    kept = {path.name for path in (site / "bitsandbytes").iterdir()}
    assert kept == {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda128.so"}


def test_a_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    site = made_site(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (site / "scipy").mkdir()
    (site / "scipy" / "tests").symlink_to(outside)
    for cut in trim.cuts(site):
        trim.remove(site, cut, set())
    assert not (site / "scipy" / "tests").is_symlink()
    assert (outside / "kept").exists()


@pytest.mark.skipif(not GCC or shutil.which("readelf") is None, reason="no gcc and readelf")
def test_a_library_that_a_cut_breaks_fails_the_build(tmp_path: Path) -> None:
    """Arrow's tables need the library for query plans, which looks as unused as the RPC library."""
    package = tmp_path / "pyarrow"
    package.mkdir()
    source = tmp_path / "source.c"
    source.write_text("int one(void) { return 1; }\n")
    subprocess.run([GCC, "-shared", "-fPIC", "-o", package / "libarrow_flight.so", source], check=True)
    link = ["-Wl,--no-as-needed", f"-L{package}", "-larrow_flight"]
    subprocess.run([GCC, "-shared", "-fPIC", "-o", package / "lib.so", source, *link], check=True)
    done = subprocess.run([sys.executable, trim.__file__, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "pyarrow/lib.so needs libarrow_flight.so, which was cut\n"


@pytest.mark.skipif(not GCC or shutil.which("strip") is None, reason="no gcc and strip")
def test_debug_information_goes_and_the_library_still_loads(tmp_path: Path) -> None:
    library = tmp_path / "triton" / "_C" / "libtriton.so"
    library.parent.mkdir(parents=True)
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 42; }\n")
    subprocess.run([GCC, "-g3", "-shared", "-fPIC", "-o", library, source], check=True)
    assert [trim.strip_debug(path) > 0 for path in trim.strippable(tmp_path)] == [True]
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "42\n"


# the Dockerfile


def test_base_is_pinned_by_tag_and_digest() -> None:
    (base,) = re.findall(r"^ARG BASE_IMAGE=(.+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04@sha256:[0-9a-f]{64}", base)
    lock = (REPOSITORY / "locks" / "gpu.txt").read_text(encoding="utf-8")
    (toolkit,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)\.", lock, re.MULTILINE)
    assert base.split(":")[1].startswith(f"{toolkit}."), "the base is of another CUDA version than the locked torch"


def test_dependencies_come_before_the_source() -> None:
    final = DOCKERFILE[DOCKERFILE.index(" AS image\n") :]
    copies = re.findall(r"^COPY --from=(\w+) (\S+)", final, re.MULTILINE)
    assert copies == [("packages", "/layers/cuda"), ("packages", "/layers/torch"), ("packages", "/layers/rest"), ("job", "/layer")]
    # layers that change with every commit come after all large layers
    assert final.index("ARG REVISION") > final.index("COPY --from=job")


def test_every_file_that_is_copied_is_let_in() -> None:
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    named = [
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    ]  # fmt: skip
    assert named
    for word in named:
        assert any(entry == word or entry.startswith(f"{word}/") for entry in allowed), f"{word} is not in .dockerignore"
    for entry in allowed:
        assert list(REPOSITORY.glob(entry)), f"{entry} of .dockerignore is not there"
        assert any(entry == word or entry.startswith(f"{word}/") for word in named), f"{entry} of .dockerignore is copied nowhere"


def test_build_tools_are_locked_with_hashes() -> None:
    requires = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    lock = (REPOSITORY / "locks" / "build.txt").read_text(encoding="utf-8")
    for requirement in requires:
        (name,) = re.findall(r"^[\w-]+", requirement)
        assert re.search(rf"^{name}==\S+ \\\n +--hash=sha256:", lock, re.MULTILINE)


# make train-local


def train_local(**environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    return subprocess.run(
        [MAKE, "--no-print-directory", "train-local"],
        cwd=REPOSITORY,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def dry_run(**environment: str) -> list[str]:
    done = train_local(DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def test_dry_run_prints_one_docker_command(tmp_path: Path) -> None:
    # a dry run needs neither Docker nor a driver
    command = dry_run(BLOOD_TYPE="A", OUTPUT=str(tmp_path / "not there"))
    assert command[:2] == ["docker", "run"]
    assert command[command.index("--gpus") + 1] == "all"
    assert {"--read-only", "--rm", f"{os.getuid()}:{os.getgid()}", f"{REPOSITORY / 'data'}:/data:ro"} <= set(command)
    assert f"{tmp_path / 'not there'}:/outputs:rw" in command
    image = command.index("localhost/lora-trainer:gpu")
    assert command[image + 1 :] == ["run", "--blood-type", "A", "--data", "file:///data/", "--output", "file:///outputs/"]
    assert not (tmp_path / "not there").exists()


def test_dry_run_on_a_cpu_takes_the_tiny_base() -> None:
    command = dry_run(BLOOD_TYPE="AB", DEVICE="cpu", ARGS="--max-steps 3 --set lora.r=8")
    assert "--gpus" not in command
    image = command.index("localhost/lora-trainer:cpu")
    assert command[image + 1 :] == [
        "run", "--blood-type", "AB", "--config", "/opt/lora-trainer/examples/demo.yaml", "--data", "file:///data/",
        "--output", "file:///outputs/", "--max-steps", "3", "--set", "lora.r=8",
    ]  # fmt: skip


def test_stores_are_named_and_not_mounted_and_secrets_have_no_value() -> None:
    secrets = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "HF_TOKEN"), "planted")
    command = dry_run(BLOOD_TYPE="A", DATA="s3://bucket/personas/", OUTPUT="s3://bucket/lora/", **secrets)
    assert not [word for word in command if word.endswith((":/data:ro", ":/outputs:rw"))]
    assert command[-4:] == ["--data", "s3://bucket/personas/", "--output", "s3://bucket/lora/"]
    assert secrets.keys() <= set(command)
    assert "planted" not in " ".join(command)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "BLOOD_TYPE is not set: make train-local BLOOD_TYPE=A"),
        ({"BLOOD_TYPE": "A", "DEVICE": "tpu"}, "DEVICE=tpu: expected cuda or cpu"),
        ({"BLOOD_TYPE": "A", "DATA": "/not/there"}, "DATA=/not/there: no such folder"),
    ],
)
def test_train_local_says_what_is_wrong(environment: dict[str, str], said: str) -> None:
    done = train_local(**environment)
    assert done.returncode != 0
    assert said in done.stderr


ENGINE: Final = "case $1 in version) echo 20.10.24 20.10.24 ;; image) exit 0 ;; *) exit 9 ;; esac"


def only(folder: Path, **scripts: str) -> str:
    """Return a PATH that has only a few common programs and these scripts."""
    for program in ("bash", "sh", "make", "env", "dirname", "id", "realpath", "grep", "sed", "mkdir"):
        found = shutil.which(program)
        assert found is not None
        (folder / program).symlink_to(found)
    for name, body in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("scripts", "said"),
    [
        ({}, "Docker is not installed"),
        ({"docker": "exit 1"}, "Docker does not answer"),
        ({"docker": ENGINE}, "no NVIDIA GPU or no driver"),
        ({"docker": ENGINE, "nvidia_smi": "exit 9"}, "no NVIDIA GPU or no driver"),
        ({"docker": ENGINE, "nvidia_smi": "echo GPU 0"}, "the NVIDIA Container Toolkit is missing"),
        (
            {"docker": ENGINE.replace("image) exit 0", "image) exit 1"), "nvidia_smi": "echo GPU 0", "nvidia_ctk": "true"},
            "there is no image localhost/lora-trainer:gpu: make image",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, scripts: dict[str, str], said: str) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    # hide any other engine and client of this machine
    done = train_local(
        BLOOD_TYPE="A", PATH=only(path, **scripts), OUTPUT=str(tmp_path), DOCKER_HOST="unix:///not/there", DOCKER="docker"
    )
    assert done.returncode != 0
    assert said in done.stderr
