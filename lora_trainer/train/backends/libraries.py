"""Import the training libraries without telemetry, progress bars or stray log lines."""

from __future__ import annotations

import logging
import os

from lora_trainer.config import RunConfig
from lora_trainer.errors import ConfigError
from lora_trainer.logs import adopt_library_loggers


def import_torch(config: RunConfig, install_command: str) -> None:
    """Import torch with the environment that the job needs. Raises `ConfigError` if it is not installed."""
    if config.device == "cpu":
        # waiting OpenMP threads should sleep instead of spinning: with another busy process on the same cores, two runs
        # of six steps took 5 s each instead of 65 s
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the training stack is not installed ({error.name or 'torch'} is missing): {install_command}") from None
    adopt_library_loggers()


def import_stack(config: RunConfig, install_command: str) -> None:
    """Import transformers, TRL, PEFT and datasets. Raises `ConfigError` if one of them is missing."""
    if config.device == "cpu" and "nf4" not in (config.training.quantization, config.evaluated_base.quantization):
        # on a CPU, peft's import of bitsandbytes warns about a kernel package that this run does not use
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import lora_trainer.train.backends.step_trainer  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the training stack is not complete ({error}): {install_command}") from None
    _quiet_libraries()


def _quiet_libraries() -> None:
    """Route the libraries' log records through our handlers, and disable progress bars, which would garble the log."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    adopt_library_loggers()
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
