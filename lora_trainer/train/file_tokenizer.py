"""Load a base's tokenizer without transformers, which would import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lora_trainer.base_files.check import folder_special_tokens, folder_template
from lora_trainer.errors import InvariantError


class FileTokenizer:
    """The `ChatTokenizer` of a base's folder, whose documents have been checked."""

    def __init__(self, folder: Path) -> None:
        """Load `tokenizer.json`. Raises `ConfigError` if the base has no chat template."""
        self.chat_template = folder_template(folder)
        self._special_tokens = folder_special_tokens(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_token: str = self._special_tokens["eos_token"]
        if (end := self._tokenizer.token_to_id(self.eos_token)) is None:
            raise InvariantError(f"{folder}: the tokenizer lacks its end-of-turn token, although the documents were checked")
        self.eos_token_id: int = end

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        """Named special tokens, which templates may use as variables."""
        return self._special_tokens

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens added to the vocabulary by id, with the attributes `content` and `special`."""
        return dict(self._tokenizer.get_added_tokens_decoder())

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        """Encode texts. Return a mapping with their `input_ids`."""
        encodings = self._tokenizer.encode_batch_fast(text, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encodings]}
