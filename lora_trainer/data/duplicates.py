"""Find duplicates and near-duplicates among records and texts."""

from __future__ import annotations

import unicodedata
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple

import regex

from lora_trainer.data.records import TrainingRecord

if TYPE_CHECKING:
    from datasketch import MinHash

_DECORATION = regex.compile(r"[ㅋㅎㅠㅜ]+|[^\p{L}\p{N}]+")


def normalized(text: str) -> str:
    """Return `text` normalized for comparison: no case, width, white space, punctuation, emoji or ㅋㅎㅠㅜ.

    A text that consists of nothing else, such as `ㅋㅋ!`, only loses its case and width.
    """
    composed = unicodedata.normalize("NFC", text)
    plain = unicodedata.normalize("NFKC", _DECORATION.sub("", composed)).casefold()
    return plain or unicodedata.normalize("NFKC", composed).casefold()


def near_fingerprint(record: TrainingRecord) -> int:
    """Return a 64-bit hash of the normalized input and reply."""
    return _hash64(normalized(record.input) + "\0" + normalized(record.reply.text))


def exact_fingerprint(record: TrainingRecord) -> int:
    """Return a 64-bit hash of all fields, with their texts in NFC."""
    emotion = record.context.current_emotion
    fields = (
        record.instruction,
        record.context.summary,
        emotion.type,
        repr(emotion.intensity),
        record.input,
        record.reply.text,
        record.reply.emotion,
    )
    return _hash64(unicodedata.normalize("NFC", "\0".join(fields)))


def _hash64(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class Fingerprints(NamedTuple):
    """The two hashes by which `DuplicateFinder` compares records."""

    near: int
    exact: int


def fingerprints(record: TrainingRecord) -> Fingerprints:
    """Return both fingerprints of a record."""
    return Fingerprints(near_fingerprint(record), exact_fingerprint(record))


class DuplicateFinder:
    """Find records that repeat an earlier one.

    A million records take about 225 MiB. The probability of any fingerprint collision among them is 3 in 100 million.
    """

    def __init__(self) -> None:
        self._first: dict[int, tuple[int, int]] = {}
        """Near fingerprint -> line and exact fingerprint of the first record with it."""

    def first_line(self, record: Fingerprints, line: int) -> tuple[int, bool] | None:
        """Return `(line, is_exact)` of the first record like this one, or None if this is the first."""
        this = (line, record.exact)
        first = self._first.setdefault(record.near, this)
        return None if first is this else (first[0], first[1] == this[1])


# --- near-duplicates -----------------------------------------------------------------------------------

SHINGLE_CHARACTERS: Final = 5
NEAR_JACCARD: Final = 0.7
"""Two texts are near-duplicates if the Jaccard similarity of their character 5-grams is at least this."""

# 32 bands of 4 hashes find a pair of similarity 0.7 with a probability of 0.9998; exact Jaccard removes false candidates
_BANDS: Final = (32, 4)


def shingles(text: str) -> frozenset[str]:
    """Return the character 5-grams of `normalized(text)`; a shorter text is its own single shingle."""
    plain = normalized(text)
    return frozenset(plain[at : at + SHINGLE_CHARACTERS] for at in range(max(1, len(plain) - SHINGLE_CHARACTERS + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the size of the intersection over the size of the union, in [0, 1]; 1 for two empty sets."""
    return len(one & other) / len(one | other) if one or other else 1.0


class NearDuplicateFinder:
    """Find texts that nearly repeat an earlier one: MinHash LSH proposes candidates, exact Jaccard similarity decides.

    Results depend only on the texts and their order. The method is Broder's "On the resemblance and containment of documents"
    (1997), the implementation datasketch's.
    """

    def __init__(self, threshold: float = NEAR_JACCARD) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        self._hashes = _BANDS[0] * _BANDS[1]
        self._index = MinHashLSH(num_perm=self._hashes, params=_BANDS)
        self._shingles: list[frozenset[str]] = []
        # cache the latest sketch: callers usually add the text that they have just looked up
        self._latest: tuple[str, frozenset[str], MinHash | None] = ("", frozenset(), None)

    def __len__(self) -> int:
        return len(self._shingles)

    def find(self, text: str) -> int | None:
        """Return the position of the first added text that `text` nearly repeats, or None."""
        return min(self.find_all(text), default=None)

    def find_all(self, text: str) -> list[int]:
        """Return the positions of all added texts that `text` nearly repeats, in no particular order."""
        parts, sketch = self._sketched(text)
        return [at for at in self._index.query(sketch) if jaccard(parts, self._shingles[at]) >= self._threshold]

    def add(self, text: str) -> None:
        """Add `text`; its position is the number of texts added before it."""
        parts, sketch = self._sketched(text)
        self._index.insert(len(self._shingles), sketch)
        self._shingles.append(parts)

    def _sketched(self, text: str) -> tuple[frozenset[str], MinHash]:
        from datasketch import MinHash

        latest, parts, known = self._latest
        if known is not None and latest == text:
            return parts, known
        parts = shingles(text)
        # set explicitly: a new default in datasketch would change the generator's output for a given seed
        sketch = MinHash(num_perm=self._hashes, seed=1, scheme="affine32")
        sketch.update_batch([part.encode() for part in parts])
        self._latest = (text, parts, sketch)
        return parts, sketch
