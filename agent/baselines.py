"""Two published rankings to hold diagnosis against, on the same recordings. Called by `agent.evaluate`; never by the
service.

Both look at each series alone and rank by the largest score that it reaches in the abnormal window; a service counts
by its first series, a true metric by its own. They name no fault type and cannot say that nothing is wrong.

* N-sigma: (x - mean) / standard deviation of the normal window (Lin et al., "Microscope", ICSOC 2018; as in RCAEval,
  Pham et al., ASE 2024).
* BARO scorer: (x - median) / interquartile range of the normal window (Pham, Ha and Zhang, "BARO: Robust Root Cause
  Analysis for Microservices via Multivariate Bayesian Online Change Point Detection", FSE 2024).

Series whose scale is 0 are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from rules.model import FloatArray, SeriesId, Situation

Scores = list[tuple[float, SeriesId]]
_CONSTANT = 1e-12


def n_sigma(situation: Situation) -> Scores:
    """Series by (x - mean) / standard deviation, largest first."""
    return _ranked(situation, lambda normal: (float(normal.mean()), float(normal.std())))


def baro(situation: Situation) -> Scores:
    """Series by (x - median) / interquartile range, largest first."""
    return _ranked(situation, _robust)


METHODS: Mapping[str, Callable[[Situation], Scores]] = {"n_sigma": n_sigma, "baro": baro}


def _robust(normal: FloatArray) -> tuple[float, float]:
    low, middle, high = np.quantile(normal, [0.25, 0.5, 0.75])
    return float(middle), float(high - low)


def _ranked(situation: Situation, scale: Callable[[FloatArray], tuple[float, float]]) -> Scores:
    found: Scores = []
    for evidence in situation.evidence:
        frame = evidence.frame
        before = frame.times < situation.onset
        for series, row in zip(frame.ids, frame.values, strict=True):
            normal, abnormal = row[before & np.isfinite(row)], row[~before & np.isfinite(row)]
            centre, spread = scale(normal) if normal.size and abnormal.size else (0.0, 0.0)
            if spread > _CONSTANT:
                found.append((float(abnormal.max() - centre) / spread, series))
    return sorted(found, key=lambda pair: -pair[0])
