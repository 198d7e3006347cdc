"""Test the second classifier: it knows the personas of replies that it was not fitted on, by their grammar alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, load_tool

from lora_trainer.data.duplicates import normalized
from lora_trainer.evaluate.persona_by_form import FormClassifier, bundled_form_classifier
from lora_trainer.evaluate.persona_classifier import accuracy
from lora_trainer.persona.vocabulary import BloodType

bundled: Any = load_tool("bundled_data")
tool: Any = load_tool("persona_classifier")


def test_it_recognises_the_training_files_although_it_never_saw_them() -> None:
    matrix = tool.measure(bundled_form_classifier())
    assert sum(sum(row.values()) for row in matrix.values()) >= 500
    assert accuracy(matrix) >= 0.77, tool.table(matrix)
    for name, row in matrix.items():
        assert row[name] / sum(row.values()) >= 0.65, tool.table(matrix)
    page = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    assert bundled.with_section(page, "confusion-by-form", tool.section(matrix)) == page, "run: python tools/persona_classifier.py"


def test_it_was_fitted_on_no_reply_of_the_training_files() -> None:
    known = set()
    for name in BloodType:
        with (REPOSITORY / "data" / f"train_data_type_{name}.jsonl").open(encoding="utf-8") as file:
            known |= {normalized(json.loads(json.loads(line)["output"])["text"]) for line in file}
    texts, personas = tool.examples()
    assert len(texts) >= 500
    assert set(personas) == set(BloodType)
    assert not [text for text in texts if normalized(text) in known]


def test_words_alone_do_not_convince_it() -> None:
    """Other nouns and verbs in the same grammar give the same answer."""
    one = ["문어가 우산을 접으면 비가 그친대. 너도 접어 볼래?", "당장 밥부터 먹자!! 뭐 시킬래?"]
    other = ["고래가 이불을 펴면 눈이 그친대. 너도 펴 볼래?", "당장 물부터 마시자!! 뭐 고를래?"]
    classifier = bundled_form_classifier()
    assert classifier.predict(one) == classifier.predict(other)


def test_what_ships_is_what_the_tool_fits(tmp_path: Path) -> None:
    fresh = tool.train_by_form()
    fresh.save(tmp_path / "fresh.npz")
    with np.load(tool.FORM_ARTEFACT, allow_pickle=False) as shipped, np.load(tmp_path / "fresh.npz", allow_pickle=False) as fitted:
        assert list(shipped["ngrams"]) == list(fitted["ngrams"])
        assert np.abs(shipped["coefficients"] - fitted["coefficients"]).max() < 0.05


def test_saved_and_loaded_it_says_the_same(tmp_path: Path) -> None:
    replies = ["마음이 아팠겠다", "그래서 할 거야?", "당장 출동이다!", "문어가 그랬대..."] * 3
    trained = FormClassifier.train(replies, list(BloodType) * 3)
    trained.save(tmp_path / "c.npz")
    assert FormClassifier.load(tmp_path / "c.npz").predict(replies) == list(BloodType) * 3


def test_nothing_and_anything_can_be_asked() -> None:
    assert bundled_form_classifier().predict([]) == []
    assert set(bundled_form_classifier().predict(["", "ㅋㅋ", "x" * 10_000, "\ud7a3"])) <= set(BloodType)


def test_the_file_holds_arrays_and_no_pickle(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", ngrams=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        FormClassifier.load(tmp_path / "bad.npz")
