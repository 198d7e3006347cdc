"""Identify the persona of a reply by its grammatical form alone: a second opinion beside `persona_classifier`.

It is independent of the first one in both respects that matter. It was fitted on other replies: the hand-written ones of
`assets/sense_examples.jsonl`, whose situations occur neither in the training files nor among the prompts. And it sees other
features: endings, particles, interjections, adverbs and punctuation, but no noun and no verb. So an adapter that has only learned
the words of the training files does not convince it.

`tools/persona_classifier.py` fits it and measures it on the training files. It ships as plain arrays, which load without pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Final, Self

from lora_trainer.data.korean import morphemes
from lora_trainer.evaluate.persona_classifier import PersonaClassifier
from lora_trainer.persona.vocabulary import BloodType

FORM_NGRAMS: Final = (1, 3)
FORM_INVERSE_REGULARISATION: Final = 5.0
# Sejong tags whose words are form: endings, particles, affixes, interjections, adverbs and determiners, symbols, emoji and the like
_FORM_TAGS: Final = ("E", "J", "X", "I", "M", "S", "W", "NP", "VX", "VCP", "VCN")


class FormClassifier(PersonaClassifier):
    """Predicts which of the four personas wrote a reply, from its form."""

    @classmethod
    def train(cls, replies: Sequence[str], personas: Sequence[BloodType]) -> Self:
        """Fit the vectorizer and the regression. Deterministic for the same replies in the same order."""
        from sklearn.linear_model import LogisticRegression

        vectorizer = cls._vectorizer_of()
        features = vectorizer.fit_transform(map(cls._prepared, replies))
        model = LogisticRegression(C=FORM_INVERSE_REGULARISATION, max_iter=2000, class_weight="balanced", random_state=0)
        return cls(vectorizer, model.fit(features, [str(persona) for persona in personas]))

    @staticmethod
    def _vectorizer_of(**settings: Any) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        # the forms are separated by single spaces
        return TfidfVectorizer(
            tokenizer=str.split, token_pattern=None, ngram_range=FORM_NGRAMS, sublinear_tf=True, lowercase=False, **settings
        )

    @staticmethod
    def _prepared(reply: str) -> str:
        # a word's own form if it is grammar, otherwise only its tag; start and end are characteristic, too
        forms = (f"{form}/{tag}" if tag.startswith(_FORM_TAGS) else tag for form, tag in morphemes(reply))
        return " ".join(("^", *("".join(form.split()) for form in forms), "$"))


@cache
def bundled_form_classifier() -> FormClassifier:
    """Load the classifier that ships with the package."""
    with resources.as_file(resources.files("lora_trainer.evaluate").joinpath("assets/persona_by_form.npz")) as path:
        return FormClassifier.load(path)
