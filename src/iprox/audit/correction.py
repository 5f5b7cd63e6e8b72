"""Control variates: what a proxy gets wrong by source and by length, taken out with the target's scores of a sample.

The target's score of a row is predicted from the proxy's score, the row's source and its length, by ridge regression on
the audited rows. A source that the proxy rates too high as a whole is so lowered as a whole; within a source and a
length the proxy's order stays. It is worth using only where it raises the fidelity on rows it was not fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from iprox.audit.spearman import spearman

FOLDS = 5
# Pseudo-rows for each source's offset and the slope of length: a source of few audited rows stays near none.
SHRINKAGE = 3.0


@dataclass(frozen=True, slots=True)
class Covariates:
    """What is known of rows beside their scores.

    Attributes:
        sources: [N] names, None where a row has none.
        tokens: [N] lengths.
    """

    sources: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class Correction:
    """A fitted correction: score -> a · score + offset of the source + slope · log(tokens).

    Attributes:
        held_out: corrected scores of the sample [n], each from a fit without its fold.
        before: Spearman correlation of the sample's scores with the target's.
        after: of `held_out`.
        slope: of the score.
        length: of the log of the length, less its mean over the sample.
        mean_log: that mean.
        offsets: by source; others have `offset`.
        offset: of a row whose source the sample does not hold.
    """

    held_out: np.ndarray
    before: float
    after: float
    slope: float
    length: float
    mean_log: float
    offsets: dict[Any, float]
    offset: float

    @property
    def helps(self) -> bool:
        """Whether it raises the held-out fidelity. One that would turn the proxy's order round is never used."""
        return bool(self.after > self.before and self.slope > 0)

    def apply(self, scores: np.ndarray, rows: Covariates) -> np.ndarray:
        """Corrected scores [N]; NaN stays."""
        names, codes = _codes(rows.sources)
        offsets = np.array([self.offset + self.offsets.get(name, 0.0) for name in names])
        return self.slope * scores + offsets[codes] + self.length * (_log(rows.tokens) - self.mean_log)


def fit_correction(proxy: np.ndarray, target: np.ndarray, rows: Covariates) -> Correction:
    """Fit a correction to the scores of a random sample.

    Args:
        proxy: scores [n], all finite.
        target: scores of the same rows [n].
        rows: what else is known of them.
    """
    names, codes = _codes(rows.sources)
    mean_log = float(_log(rows.tokens).mean())
    scale_x, scale_y = (scores.std() if scores.std() > 0 else 1.0 for scores in (proxy, target))
    one_hot = np.eye(len(names))[codes]
    design = np.column_stack([np.ones(len(proxy)), proxy / scale_x, _log(rows.tokens) - mean_log, one_hot])
    penalty = np.diag([0.0, 0.0, *[SHRINKAGE] * (1 + len(names))])

    def weights(chosen: np.ndarray) -> np.ndarray:
        X = design[chosen]
        # The smallest ridge keeps constant scores solvable: theirs is the same column as the intercept.
        normal = X.T @ X + penalty + 1e-9 * len(X) * np.eye(X.shape[1])
        return np.linalg.solve(normal, X.T @ (target[chosen] / scale_y)) * scale_y

    held_out = np.empty(len(proxy))
    folds = np.random.default_rng(0).permutation(len(proxy)) % FOLDS
    for fold in range(FOLDS):
        held_out[folds == fold] = design[folds == fold] @ weights(folds != fold)
    intercept, slope, length, *offsets = weights(np.arange(len(proxy))).tolist()
    return Correction(
        held_out,
        _agreement(proxy, target),
        _agreement(held_out, target),
        slope / scale_x,
        length,
        mean_log,
        dict(zip(names, offsets, strict=True)),
        intercept,
    )


def _codes(sources: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """The distinct sources, None among them, and the number of each row's."""
    names: dict[Any, int] = {}
    codes = np.array([names.setdefault(source, len(names)) for source in sources.tolist()], dtype=np.int64)
    return list(names), codes


def _log(tokens: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(tokens, 1).astype(np.float64))


def _agreement(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's correlation; 0 where there is none."""
    return float(np.nan_to_num(spearman(x, y)))
