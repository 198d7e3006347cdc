"""Records that are there already: the same text again, and nearly the same one."""

from __future__ import annotations

import unicodedata
from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import regex

from lora_trainer.data.records import TrainingRecord

if TYPE_CHECKING:
    from datasketch import MinHash

_DECORATION = regex.compile(r"[ㅋㅎㅠㅜ]+|[^\p{L}\p{N}]+")


def normalized(text: str) -> str:
    """`text` without what does not make it another text: case, width, white space, punctuation, emoji, ㅋㅎㅠㅜ.

    A text that is nothing else (`ㅋㅋ!`) is compared as it stands.
    """
    plain = unicodedata.normalize("NFKC", _DECORATION.sub("", text)).casefold()
    return plain or unicodedata.normalize("NFKC", text).casefold()


def near_fingerprint(record: TrainingRecord) -> int:
    """64 bits that two records share when what the user says and what the friend answers are nearly the same."""
    return _hash64(normalized(record.input) + "\0" + normalized(record.reply.text))


def exact_fingerprint(record: TrainingRecord) -> int:
    """64 bits that two records share when all their fields are the same."""
    emotion = record.context.current_emotion
    return _hash64(
        "\0".join(
            (
                record.instruction,
                record.context.summary,
                emotion.type,
                repr(emotion.intensity),
                record.input,
                record.reply.text,
                record.reply.emotion,
            )
        )
    )


def _hash64(text: str) -> int:
    # never 0: that is an empty slot of the table below
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


class DuplicateFinder:
    """Says of each record whether an earlier one was the same, and at which line.

    An open-addressing table in three arrays, at most two thirds full: 36 to 72 bytes a record, where a
    dict of Python integers takes 150. Two different texts of a million share a fingerprint with a
    probability of 3 in 100 million.
    """

    def __init__(self) -> None:
        self._count = 0
        self._allocate(1 << 10)

    def _allocate(self, slots: int) -> None:
        self._mask = slots - 1
        self._near = array("Q", bytes(8 * slots))
        self._exact = array("Q", bytes(8 * slots))
        self._line = array("Q", bytes(8 * slots))

    def first_line(self, record: TrainingRecord, line: int) -> tuple[int, bool] | None:
        """`(line, is_exact)` of the first record like this one; `None`, and remembered, when it is the first itself."""
        near, exact = near_fingerprint(record), exact_fingerprint(record)
        slot = self._find(near)
        if self._near[slot]:
            return self._line[slot], self._exact[slot] == exact
        self._near[slot], self._exact[slot], self._line[slot] = near, exact, line
        self._count += 1
        if 3 * self._count > 2 * len(self._near):
            self._grow()
        return None

    def _find(self, near: int) -> int:
        slot = near & self._mask
        while self._near[slot] and self._near[slot] != near:
            slot = (slot + 1) & self._mask
        return slot

    def _grow(self) -> None:
        near_before, exact_before, line_before = self._near, self._exact, self._line
        self._allocate(2 * len(near_before))
        for old, near in enumerate(near_before):
            if near:
                slot = self._find(near)
                self._near[slot], self._exact[slot], self._line[slot] = near, exact_before[old], line_before[old]


# --- nearly the same -----------------------------------------------------------------------------------

SHINGLE_CHARACTERS: Final = 5
NEAR_JACCARD: Final = 0.7
"""Two texts are nearly the same from this Jaccard similarity of their character 5-grams on."""

# 32 bands of 4 hashes: a pair at 0.7 is found with a probability of 0.9998, and what is found below is weighed exactly
_BANDS: Final = (32, 4)


def shingles(text: str) -> frozenset[str]:
    """The character 5-grams of `normalized(text)`; a shorter text is its own and only one."""
    plain = normalized(text)
    return frozenset(plain[at : at + SHINGLE_CHARACTERS] for at in range(max(1, len(plain) - SHINGLE_CHARACTERS + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Size of the intersection over size of the union, in [0, 1]."""
    return len(one & other) / len(one | other) if one or other else 1.0


class NearDuplicateFinder:
    """Finds texts that are nearly the same as an earlier one: MinHash with banding picks the candidates, exact Jaccard decides.

    The same texts in the same order give the same answers. Broder, On the resemblance and containment of documents (1997);
    the hashing is datasketch's.
    """

    def __init__(self, threshold: float = NEAR_JACCARD) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        self._hashes = _BANDS[0] * _BANDS[1]
        self._index = MinHashLSH(num_perm=self._hashes, params=_BANDS)
        self._shingles: list[frozenset[str]] = []
        # a text that was asked about is mostly the next that is added
        self._latest: tuple[str, frozenset[str], MinHash | None] = ("", frozenset(), None)

    def __len__(self) -> int:
        return len(self._shingles)

    def like(self, text: str) -> int | None:
        """The position of the first text added that `text` is nearly the same as."""
        parts, sketch = self._sketched(text)
        found = (at for at in self._index.query(sketch) if jaccard(parts, self._shingles[at]) >= self._threshold)
        return min(found, default=None)

    def add(self, text: str) -> None:
        """Remember `text`; its position is the number of texts added before."""
        parts, sketch = self._sketched(text)
        self._index.insert(len(self._shingles), sketch)
        self._shingles.append(parts)

    def _sketched(self, text: str) -> tuple[frozenset[str], MinHash]:
        from datasketch import MinHash

        latest, parts, known = self._latest
        if known is not None and latest == text:
            return parts, known
        parts = shingles(text)
        # the scheme is named so that another default of the library cannot change what a seed composes
        sketch = MinHash(num_perm=self._hashes, seed=1, scheme="affine32")
        sketch.update_batch([part.encode() for part in parts])
        self._latest = (text, parts, sketch)
        return parts, sketch
