"""A linear probe of sense: regularised logistic regressions on what the base computes of a reply.

One regression for each kind of bad reply tells replies of that kind from good ones. A reply makes sense if it is of none of these
kinds. For every fold, the regressions learn from all examples but those of the fold's situations and adapters. The examination
takes each example's score from the regressions of its own fold; the judge is the mean of all folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self
from zipfile import BadZipFile

from lora_trainer.evaluate.sense_examination import examine
from lora_trainer.evaluate.sense_examples import BAD_KINDS, SITUATION_FOLDS, WRITER_FOLDS, Cell, SenseKind, SenseSet
from lora_trainer.evaluate.sense_metrics import SenseExamination

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Features = NDArray[np.float32]
    Array = NDArray[np.float64]

INVERSE_REGULARISATION: Final = 10.0
"""C of the regressions, for features of unit variance divided by the square root of their number."""
_CELLS: Final[tuple[Cell, ...]] = tuple(product(range(SITUATION_FOLDS), range(WRITER_FOLDS)))


@dataclass(frozen=True, slots=True)
class SenseProbe:
    """One regression for each cell, in the order of `_CELLS`, and each kind of bad reply, in the order of `BAD_KINDS`."""

    weights: Array
    """[cells, kinds, F], for the raw features."""
    intercepts: Array
    """[cells, kinds]; -inf for a kind that no example teaches."""

    @classmethod
    def fit(cls, sense_set: SenseSet, features: Features, inverse_regularisation: float = INVERSE_REGULARISATION) -> Self:
        """Fit the regressions of every cell. `features` is [N, F], one row for each example of `sense_set`, in order."""
        import numpy as np

        kinds = np.array([example.kind for example in sense_set.examples])
        good = kinds == SenseKind.GOOD
        raw = features.astype(np.float64)
        # these three know no label, so they may know the replies of every fold
        mean, deviation = raw.mean(axis=0), raw.std(axis=0)
        # a constant feature tells nothing; the width makes the regularisation mean the same for every base
        scale = np.where(deviation > 0, deviation, np.inf) * np.sqrt(raw.shape[1])
        inputs, basis = _reduced((raw - mean) / scale)
        coefficients = np.zeros((len(_CELLS), len(BAD_KINDS), inputs.shape[1]))
        intercepts = np.full((len(_CELLS), len(BAD_KINDS)), -np.inf)
        for row, cell in enumerate(_CELLS):
            taught = np.array([sense_set.folds.may_teach(example, cell) for example in sense_set.examples])
            for column, kind in enumerate(BAD_KINDS):
                bad = taught & (kinds == kind)
                if bad.any():
                    used = bad | (taught & good)
                    coefficients[row, column], intercepts[row, column] = _fit(inputs[used], bad[used], inverse_regularisation)
        weights = coefficients @ basis.T / scale
        return cls(weights, intercepts - weights @ mean)

    def out_of_fold(self, sense_set: SenseSet, features: Features) -> Array:
        """Return each example's log-odds of sense, [N], from the regressions that know neither its situation nor its adapter."""
        return _none_of(self.kinds_out_of_fold(sense_set, features))

    def kinds_out_of_fold(self, sense_set: SenseSet, features: Features) -> Array:
        """Return each example's log-odds of being of each of `BAD_KINDS`, [N, kinds], from the same regressions."""
        import numpy as np

        cells = [_CELLS.index(sense_set.folds.cell(example)) for example in sense_set.examples]
        found: Array = self._log_odds(features)[np.arange(len(cells)), cells]
        return found

    def scores(self, sense_set: SenseSet, features: Features, dialogues: Sequence[tuple[str, str]]) -> Array:
        """Return the log-odds of sense of an adapter's replies, [N], to messages with these summaries and inputs.

        If the examples contain the message, only cells that did not learn from its situation are asked.
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
        """Return the log-odds of sense that each cell finds: [N, cells]."""
        return _none_of(self._log_odds(features))

    def _log_odds(self, features: Features) -> Array:
        """Return the log-odds that a reply is bad that each regression finds: [N, cells, kinds]."""
        import numpy as np

        found: Array = np.tensordot(features.astype(np.float64), self.weights, axes=(1, 2)) + self.intercepts
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


def _none_of(log_odds: Array) -> Array:
    """Return the log-odds that a reply is of none of the kinds, [...], from those that it is of each one, [..., kinds].

    With p the product of the probabilities 1 / (1 + exp(z)), -log p is the sum S of log(1 + exp(z)), and the log-odds of p are
    -log(exp(S) - 1).
    """
    import numpy as np

    # at least the smallest normal number: a reply that no kind suspects has finite log-odds, too
    total = np.maximum(np.logaddexp(0, log_odds).sum(axis=-1), np.finfo(np.float64).tiny)
    # exp(S) - 1 = exp(S) (1 - exp(-S)), which does not overflow
    found: Array = -(total + np.log(-np.expm1(-total)))
    return found


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


def _fit(inputs: Array, bad: NDArray[np.bool_], inverse_regularisation: float) -> tuple[Array, float]:
    """Return weights [R] and intercept of a regression in which good and bad replies have equal weight."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=inverse_regularisation, class_weight="balanced", max_iter=500, random_state=0)
    model.fit(inputs, bad)
    return model.coef_[0], float(model.intercept_[0])
