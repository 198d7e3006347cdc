"""Identify the persona of a reply by its grammatical form alone: a second opinion beside `persona_classifier`.

It is independent of the first one in both respects that matter. It was fitted on other replies: the hand-written ones of
`assets/sense_examples.jsonl`, whose situations occur neither in the training files nor among the prompts. And it sees other
features: endings, particles, affixes, interjections and punctuation. It sees that there is a noun, verb, adverb, number, foreign
word or emoji, but not which: each persona's set of emoji is easy to copy. So an adapter that has learned only the words of the
training files does not convince it.

`tools/persona_classifier.py` fits it and measures it on the training files. It ships as plain arrays, which load without pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Final, Self

from lora_trainer.data.korean import morphemes
from lora_trainer.evaluate.persona_classifier import PersonaClassifier
from lora_trainer.persona.emoji import emoji_count
from lora_trainer.persona.vocabulary import BloodType

FORM_NGRAMS: Final = (1, 3)
FORM_INVERSE_REGULARISATION: Final = 5.0
# Sejong tags whose words are form: endings, particles, affixes, interjections, 그리고 and the like, pronouns, auxiliaries, symbols
_FORM_TAGS: Final = ("E", "J", "XP", "XS", "IC", "MAJ", "NP", "VX", "VCP", "VCN", "SF", "SP", "SS", "SE", "SO", "SW")
_EMOJI: Final = "W_EMOJI"


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
        return " ".join(("^", *(_seen(form, tag) for form, tag in morphemes(reply)), "$"))


def _seen(form: str, tag: str) -> str:
    if emoji_count(form):
        # Kiwi tags some emoji as symbols
        return _EMOJI
    return f"{''.join(form.split())}/{tag}" if tag.startswith(_FORM_TAGS) else tag


@cache
def bundled_form_classifier() -> FormClassifier:
    """Load the classifier that ships with the package."""
    with resources.as_file(resources.files("lora_trainer.evaluate").joinpath("assets/persona_by_form.npz")) as path:
        return FormClassifier.load(path)
