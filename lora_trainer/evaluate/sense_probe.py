"""A linear probe of sense: regularised logistic regression on the base's hidden states behind a reply.

For every fold, one regression learns from all examples but those of the fold's situations and adapters. The examination takes each
example's score from the regression of its own fold; the judge is the mean of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self
from zipfile import BadZipFile

from lora_trainer.evaluate.sense_examination import examine
from lora_trainer.evaluate.sense_examples import BAD_KINDS, SITUATION_FOLDS, WRITER_FOLDS, Cell, SenseExample, SenseSet
from lora_trainer.evaluate.sense_metrics import SenseExamination

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Features = NDArray[np.float32]
    Array = NDArray[np.float64]

INVERSE_REGULARISATION: Final = 30.0
"""C of the regression, for features of unit variance divided by the square root of their number."""
_CELLS: Final[tuple[Cell, ...]] = tuple(product(range(SITUATION_FOLDS), range(WRITER_FOLDS)))


@dataclass(frozen=True, slots=True)
class SenseProbe:
    """One regression for each cell, in the order of `_CELLS`."""

    weights: Array
    """[cells, F], for the raw features."""
    intercepts: Array
    """[cells]."""

    @classmethod
    def fit(cls, sense_set: SenseSet, features: Features, inverse_regularisation: float = INVERSE_REGULARISATION) -> Self:
        """Fit every cell's regression. `features` is [N, F], one row for each example of `sense_set`, in order."""
        import numpy as np

        good = np.array([example.is_good for example in sense_set.examples])
        raw = features.astype(np.float64)
        # these three know no label, so they may know the replies of every fold
        mean, deviation = raw.mean(axis=0), raw.std(axis=0)
        # a constant feature tells nothing; the width makes the regularisation mean the same for every base
        scale = np.where(deviation > 0, deviation, np.inf) * np.sqrt(raw.shape[1])
        inputs, basis = _reduced((raw - mean) / scale)
        fitted = []
        for cell in _CELLS:
            taught = np.array([sense_set.folds.may_teach(example, cell) for example in sense_set.examples])
            examples = [example for example, used in zip(sense_set.examples, taught, strict=True) if used]
            fitted.append(_fit(inputs[taught], good[taught], _example_weights(examples), inverse_regularisation))
        weights = np.stack([coefficients for coefficients, _ in fitted]) @ basis.T / scale
        return cls(weights, np.array([intercept for _, intercept in fitted]) - weights @ mean)

    def out_of_fold(self, sense_set: SenseSet, features: Features) -> Array:
        """Return each example's log-odds of sense, [N], from the regression that knows neither its situation nor its adapter."""
        import numpy as np

        scores = self._all(features)
        cells = [_CELLS.index(sense_set.folds.cell(example)) for example in sense_set.examples]
        found: Array = scores[np.arange(len(cells)), cells]
        return found

    def scores(self, sense_set: SenseSet, features: Features, dialogues: Sequence[tuple[str, str]]) -> Array:
        """Return the log-odds of sense of an adapter's replies, [N], to messages with these summaries and inputs.

        If the examples contain the message, only regressions that did not learn from its situation are asked.
        """
        import numpy as np

        scores = self._all(features)
        asked = np.ones_like(scores, dtype=bool)
        for row, situation in enumerate(sense_set.situations_of(dialogues)):
            if situation is not None:
                asked[row] = [fold == sense_set.folds.situations[situation] for fold, _ in _CELLS]
        means: Array = (scores * asked).sum(axis=1) / asked.sum(axis=1)
        return means

    def _all(self, features: Features) -> Array:
        """Return each regression's log-odds: [N, cells]."""
        import numpy as np

        found: Array = features.astype(np.float64) @ self.weights.T + self.intercepts
        return found

    def save(self, file: IO[bytes]) -> None:
        """Write the weights as plain arrays."""
        import numpy as np

        np.savez(file, weights=self.weights, intercepts=self.intercepts)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises `OSError`, or `ValueError` for anything else."""
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(arrays["weights"], arrays["intercepts"])
        except (AttributeError, EOFError, KeyError, TypeError, BadZipFile) as error:
            raise ValueError(f"{path}: holds no probe") from error


def examine_probe(
    model: str, sense_set: SenseSet, features: Features, inverse_regularisation: float = INVERSE_REGULARISATION
) -> tuple[SenseProbe, SenseExamination]:
    """Fit the probe and examine it. `model` names the base that the features come from."""
    probe = SenseProbe.fit(sense_set, features, inverse_regularisation)
    return probe, examine("probe", model, sense_set, list(map(float, probe.out_of_fold(sense_set, features))))


def _example_weights(examples: Sequence[SenseExample]) -> Array:
    """Give good and bad replies equal weight, and the same to each kind of bad ones; the mean is 1."""
    import numpy as np

    counts = {kind: sum(example.kind is kind for example in examples) for kind in {example.kind for example in examples}}
    kinds_present = sum(kind in counts for kind in BAD_KINDS)
    share = [0.5 if example.is_good else 0.5 / kinds_present for example in examples]
    return np.array([part / counts[example.kind] for part, example in zip(share, examples, strict=True)]) * len(examples)


def _reduced(inputs: Array) -> tuple[Array, Array]:
    """Return at most as many inputs as there are rows, [N, R], and the basis that they are coordinates in, [F, R].

    The rows span all that a regression with an L2 penalty can learn from them, so it finds the same weights there, much faster
    for a base whose features outnumber the examples tenfold.
    """
    import numpy as np

    rows, width = inputs.shape
    if width <= rows:
        return inputs, np.eye(width)
    values, vectors = np.linalg.eigh(inputs @ inputs.T)
    kept = values > values[-1] * 1e-12
    lengths = np.sqrt(values[kept])
    return vectors[:, kept] * lengths, inputs.T @ (vectors[:, kept] / lengths)


def _fit(inputs: Array, good: NDArray[np.bool_], example_weights: Array, inverse_regularisation: float) -> tuple[Array, float]:
    """Return weights [R] and intercept of one regression."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=inverse_regularisation, max_iter=500, random_state=0)
    model.fit(inputs, good, sample_weight=example_weights)
    return model.coef_[0], float(model.intercept_[0])
