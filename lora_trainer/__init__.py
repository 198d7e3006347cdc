"""Train LoRA adapters from personas' JSONL. Start reading at `run.pipeline.run`."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lora-trainer")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
