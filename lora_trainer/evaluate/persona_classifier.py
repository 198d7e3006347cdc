"""Identify the persona of a reply with TF-IDF over character n-grams and logistic regression.

`tools/persona_classifier.py` trains it on replies of the bundled data; tests/unit/test_persona_classifier.py measures it on
held-out replies. It ships as plain arrays in `assets/persona_classifier.npz`, which load without pickle, so a job needs no
training data for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from typing import Any, Final, Self

import regex

from lora_trainer.data.records import TrainingRecord
from lora_trainer.persona.vocabulary import BloodType

NGRAM_CHARACTERS: Final = (1, 4)
MAX_FEATURES: Final = 40_000
INVERSE_REGULARISATION: Final = 20.0

HELD_OUT_PERCENT: Final = 15
"""Percentage of replies held out from the classifier's training."""

_DIGITS: Final = regex.compile(r"\d+")


def is_held_out(record: TrainingRecord) -> bool:
    """Return whether the record is held out from the classifier's training, based on a hash of its input and reply."""
    digest = blake2b(f"{record.input}\0{record.reply.text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 100 < HELD_OUT_PERCENT


class PersonaClassifier:
    """Predicts which of the four personas wrote a reply."""

    def __init__(self, vectorizer: Any, model: Any) -> None:
        self._vectorizer, self._model = vectorizer, model

    @classmethod
    def train(cls, replies: Sequence[str], personas: Sequence[BloodType]) -> Self:
        """Fit the vectorizer and the regression. Deterministic for the same replies in the same order."""
        from sklearn.linear_model import LogisticRegression

        vectorizer = cls._vectorizer_of(max_features=MAX_FEATURES, min_df=2)
        features = vectorizer.fit_transform(map(cls._prepared, replies))
        model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=2000, random_state=0)
        return cls(vectorizer, model.fit(features, [str(persona) for persona in personas]))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load a classifier written by `save`. Raises `ValueError` for a file with pickled objects."""
        import numpy as np
        from sklearn.linear_model import LogisticRegression

        with np.load(path, allow_pickle=False) as arrays:
            vectorizer = cls._vectorizer_of(vocabulary=[str(ngram) for ngram in arrays["ngrams"]])
            vectorizer.idf_ = arrays["idf"].astype(np.float64)
            model = LogisticRegression()
            model.classes_ = arrays["classes"]
            model.coef_ = arrays["coefficients"].astype(np.float64)
            model.intercept_ = arrays["intercepts"].astype(np.float64)
        return cls(vectorizer, model)

    def save(self, path: Path) -> None:
        """Write n-grams, inverse document frequencies and regression weights as plain float32 and string arrays."""
        import numpy as np

        np.savez_compressed(
            path,
            ngrams=np.array(self._vectorizer.get_feature_names_out(), dtype=np.str_),
            idf=self._vectorizer.idf_.astype(np.float32),
            classes=np.array(self._model.classes_, dtype=np.str_),
            coefficients=self._model.coef_.astype(np.float32),
            intercepts=self._model.intercept_.astype(np.float32),
        )

    def probabilities(self, replies: Iterable[str]) -> list[Mapping[BloodType, float]]:
        """Return the probability of each persona for each reply; the four sum to 1."""
        texts = [self._prepared(reply) for reply in replies]
        if not texts:
            return []
        features = self._vectorizer.transform(texts)
        names = [BloodType(str(name)) for name in self._model.classes_]
        return [dict(zip(names, map(float, row), strict=True)) for row in self._model.predict_proba(features)]

    def predict(self, replies: Iterable[str]) -> list[BloodType]:
        """Return the most probable persona for each reply."""
        return [max(found, key=lambda name: found[name]) for found in self.probabilities(replies)]

    @staticmethod
    def _vectorizer_of(**settings: Any) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(analyzer="char", ngram_range=NGRAM_CHARACTERS, sublinear_tf=True, lowercase=True, **settings)

    @staticmethod
    def _prepared(reply: str) -> str:
        # mark start and end, which are characteristic of a persona, and hide digits, which are not
        return f"^{_DIGITS.sub('0', reply)}$"


@cache
def bundled_classifier() -> PersonaClassifier:
    """Load the classifier that ships with the package."""
    with resources.as_file(resources.files("lora_trainer.evaluate").joinpath("assets/persona_classifier.npz")) as path:
        return PersonaClassifier.load(path)


def confusion(truth: Sequence[BloodType], found: Sequence[BloodType]) -> dict[BloodType, dict[BloodType, int]]:
    """Count predictions: `confusion[true][predicted]` is a number of replies."""
    matrix = {true: dict.fromkeys(BloodType, 0) for true in BloodType}
    for true, guess in zip(truth, found, strict=True):
        matrix[true][guess] += 1
    return matrix


def accuracy(matrix: Mapping[BloodType, Mapping[BloodType, int]]) -> float:
    """Return the share of correct predictions, in [0, 1]; 0 without replies."""
    everything = sum(sum(row.values()) for row in matrix.values())
    return sum(matrix[name][name] for name in matrix) / everything if everything else 0.0
