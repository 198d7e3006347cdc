"""Tell a base that a library cannot load from a bug, a full device and a disk that cannot be read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lora_trainer.errors import ConfigError, LoraTrainerError, StorageError

_READ_FAILURES: Final = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.ENOSPC, errno.EDQUOT)


@contextmanager
def loading(base: Path, what: str) -> Iterator[None]:
    """Translate the errors of a library that loads `what` from the folder `base`. Put only the library's call in the block.

    Raises `ConfigError`, or `StorageError` if the disk failed. Errors of the device pass through.
    """
    import torch

    try:
        yield
    except (LoraTrainerError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # the files are foreign, and what a library raises for them is anything: KeyError, AttributeError, a bare Exception
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _READ_FAILURES:
            raise StorageError(f"base.model: {base}: {what} cannot be read: {error.strerror}; check the disk") from error
        said = repr(str(error).strip().partition("\n")[0])[1:-1][:300]
        raise ConfigError(
            f"base.model: {base}: {what} cannot be loaded ({type(error).__name__}: {said}); download the model again, or use "
            "another base such as Qwen2.5-7B-Instruct"
        ) from error
