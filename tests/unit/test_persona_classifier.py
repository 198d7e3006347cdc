"""Test the evaluation's classifier: it is accurate on unseen replies, and its file holds only numbers."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, load_tool

from lora_trainer.evaluate.persona_classifier import PersonaClassifier, accuracy, bundled_classifier, confusion
from lora_trainer.persona.vocabulary import BloodType

bundled: Any = load_tool("bundled_data")
tool: Any = load_tool("persona_classifier")


def test_four_personas_are_told_apart_on_replies_that_were_held_out() -> None:
    matrix = tool.measure(bundled_classifier())
    assert sum(sum(row.values()) for row in matrix.values()) >= 500
    assert accuracy(matrix) >= 0.92, tool.table(matrix)
    for name, row in matrix.items():
        assert row[name] / sum(row.values()) >= 0.88, tool.table(matrix)


def test_what_ships_is_what_the_tool_trains(tmp_path: Path) -> None:
    """The shipped file matches the data. Between machines, weights may differ in their last digits but predictions may not."""
    fresh = tool.train()
    fresh.save(tmp_path / "fresh.npz")
    with np.load(tool.ARTEFACT, allow_pickle=False) as shipped, np.load(tmp_path / "fresh.npz", allow_pickle=False) as trained:
        assert sorted(shipped.files) == sorted(trained.files)
        assert list(shipped["ngrams"]) == list(trained["ngrams"])
        assert np.abs(shipped["coefficients"] - trained["coefficients"]).max() < 0.05
    records, _ = tool.replies(held_out=True)
    texts = [record.reply.text for record in records]
    same = sum(one == other for one, other in zip(fresh.predict(texts), bundled_classifier().predict(texts), strict=True))
    assert same >= 0.995 * len(texts)


def test_the_confusion_matrix_in_the_documents_is_the_measured_one() -> None:
    page = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    said = tool.section(tool.measure(bundled_classifier()))
    assert bundled.with_section(page, "confusion", said) == page, "run: python tools/persona_classifier.py"


def test_the_file_holds_arrays_and_no_pickle(tmp_path: Path) -> None:
    with zipfile.ZipFile(tool.ARTEFACT) as archive:
        assert {Path(name).suffix for name in archive.namelist()} == {".npy"}
    np.savez(tmp_path / "bad.npz", ngrams=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        PersonaClassifier.load(tmp_path / "bad.npz")


def test_saved_and_loaded_it_says_the_same(tmp_path: Path) -> None:
    replies = ["마음이 아팠겠다", "그래서 할 거야", "당장 출동이다!", "문어가 그랬대"] * 3
    trained = PersonaClassifier.train(replies, list(BloodType) * 3)
    trained.save(tmp_path / "c.npz")
    loaded = PersonaClassifier.load(tmp_path / "c.npz")
    assert loaded.predict(replies) == list(BloodType) * 3
    for one, other in zip(trained.probabilities(replies), loaded.probabilities(replies), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert sum(one.values()) == pytest.approx(1)


def test_nothing_and_anything_can_be_asked() -> None:
    assert bundled_classifier().predict([]) == []
    assert set(bundled_classifier().predict(["", "ㅋㅋ", "x" * 10_000, "\ud7a3"])) <= set(BloodType)


def test_confusion_counts_by_what_was_true() -> None:
    a, b = BloodType.A, BloodType.B
    matrix = confusion([a, a, b], [a, b, b])
    assert (matrix[a][a], matrix[a][b], matrix[b][b], matrix[b][a]) == (1, 1, 1, 0)
    assert accuracy(matrix) == 2 / 3
    assert accuracy(confusion([], [])) == 0
