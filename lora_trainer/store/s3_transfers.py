"""Transfer files of any size in parts, several at a time."""

from __future__ import annotations

import mimetypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from lora_trainer.config import StorageConfig
from lora_trainer.store.s3_client import CONNECTIONS

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from s3transfer.futures import TransferFuture
    from s3transfer.manager import TransferManager

SHA256_METADATA: Final = "lora-trainer-sha256"
_PART_BYTES: Final = 16 * 2**20
"""Allows objects of 156 GiB, because S3 limits an upload to 10,000 parts."""
_STOP_WAIT_S: Final = 3.0
"""How long a failed transfer waits for its threads. Threads blocked by an unresponsive store end later, in the background."""


@contextmanager
def transfers(client: S3Client) -> Iterator[TransferManager]:
    """Yield a manager of transfers, all of which have ended when the block has succeeded."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    config = TransferConfig(
        multipart_threshold=_PART_BYTES,
        multipart_chunksize=_PART_BYTES,
        max_concurrency=CONNECTIONS,
        # chunks of 256 KiB: if the disk is slower than the network, 32 MiB wait in memory instead of 250
        max_io_queue=128,
        # the CRT client, if installed, ignores most of these settings
        preferred_transfer_client="classic",
    )
    manager = create_transfer_manager(client, config)
    try:
        yield manager
    except BaseException as error:
        # exit in a thread, because the manager waits for all its threads even if the store never answers
        leave = (type(error), error, error.__traceback__)
        stopping = threading.Thread(target=manager.__exit__, args=leave, name="transfer-stop", daemon=True)
        stopping.start()
        stopping.join(_STOP_WAIT_S)
        raise
    manager.shutdown()


def pinned_to(size_bytes: int, etag: str) -> Any:
    """Return a subscriber that passes the size and etag of our HEAD to a transfer, which then fails if the object is replaced."""
    from s3transfer.subscribers import BaseSubscriber

    class Pinned(BaseSubscriber):
        def on_queued(self, future: TransferFuture, **_: Any) -> None:
            future.meta.provide_transfer_size(size_bytes)
            future.meta.provide_object_etag(etag)

    return Pinned()


def upload_headers(settings: StorageConfig, key: str, sha256: str) -> dict[str, Any]:
    """Return the headers of an upload. With the content type, a browser can show `report.html` from the store."""
    headers: dict[str, Any] = {
        "ContentType": mimetypes.guess_type(key)[0] or "application/octet-stream",
        "Metadata": {SHA256_METADATA: sha256},
    }
    if settings.server_side_encryption != "none":
        headers["ServerSideEncryption"] = settings.server_side_encryption
    if settings.kms_key_id is not None:
        headers["SSEKMSKeyId"] = settings.kms_key_id
    return headers
