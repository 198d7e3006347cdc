"""Turns a persona's JSONL into a LoRA adapter: see `pipeline.run` for the whole story."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lora-trainer")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
