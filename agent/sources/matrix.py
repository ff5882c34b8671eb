"""Prometheus' JSON answers as matrices on one grid.

Called by `agent.sources.prometheus` (in a thread when the answer is large), so it is pure: bytes in, frame out. Exists
apart from the client because this is the hot path and has laws of its own. It never trusts the answer: what is not of
the documented shape raises MalformedError, and what is more than was asked for is left out and said.

Parses with orjson and reads samples itself: msgspec refuses the strings "NaN" and "+Inf", which are samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from agent.sources import bounded
from rules.model import FloatArray, Frame, SeriesId

MAX_POINTS = 11_000  # Prometheus refuses more for one series
MAX_WARNINGS = 20


class MalformedError(ValueError):
    """An answer that is not what the API documents."""


class RefusedError(ValueError):
    """An answer of status "error": errorType and error, as sent."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much of one answer becomes a frame: series, and series times points."""

    series: int
    cells: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One element of an instant vector. `value` is as sent, infinite ones included; a scalar has no labels."""

    labels: Mapping[str, str]
    time: float
    value: float


@dataclass(frozen=True, slots=True)
class Answered:
    """A range answer: the frame and what must be known with it."""

    frame: Frame
    warnings: tuple[str, ...]
    partial: str = ""  # what was left out of the frame, "" for nothing


@dataclass(frozen=True, slots=True)
class Grid:
    """The points `start_ms + i * step_ms`, i < `points`. Milliseconds, so that equality is exact."""

    start_ms: int
    step_ms: int
    points: int
    warnings: tuple[str, ...] = ()

    @classmethod
    def over(cls, start: float, end: float, step: float) -> Grid:
        """The grid for a window in seconds: the start goes down to a multiple of the step, the end is kept where a
        point falls on it. A window of more than MAX_POINTS gets a multiple of the step, so that its points stay a
        subset."""
        step_ms = max(1, round(step * 1000))
        start_ms, end_ms = math.floor(start * 1000), math.floor(end * 1000)
        warnings: tuple[str, ...] = ()
        points = _points(start_ms, end_ms, step_ms)
        if points > MAX_POINTS:
            asked = step_ms
            step_ms *= -(-points // (MAX_POINTS - 2))  # aligning the start to the wider step may add a point
            warnings = (
                f"step widened from {asked / 1000:g} s to {step_ms / 1000:g} s: the window has {points} points,"
                f" at most {MAX_POINTS} can be asked for",
            )
        return cls(start_ms // step_ms * step_ms, step_ms, _points(start_ms, end_ms, step_ms), warnings)

    @property
    def end_ms(self) -> int:
        return self.start_ms + (self.points - 1) * self.step_ms

    def times(self) -> FloatArray:
        """(points,) unix seconds."""
        return np.asarray((self.start_ms + self.step_ms * np.arange(self.points)) / 1000.0, dtype=np.float64)


def _points(start_ms: int, end_ms: int, step_ms: int) -> int:
    return (end_ms - start_ms // step_ms * step_ms) // step_ms + 1


def envelope(body: bytes) -> tuple[Any, tuple[str, ...]]:
    """`data` of an answer, and its warnings and infos. Raises MalformedError, and RefusedError for an error answered
    with 200."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedError(f"the answer is not JSON ({bounded(str(error), 80)}): {_head(body)}") from error
    if not isinstance(answer, dict) or answer.get("status") not in ("success", "error"):
        raise MalformedError(f"the answer is not of the Prometheus API: {_head(body)}")
    if answer["status"] == "error":
        raise RefusedError(error_text(answer))
    notes = [n for key in ("warnings", "infos") for n in _list(answer.get(key)) if isinstance(n, str)]
    if answer.get("isPartial") is True:  # VictoriaMetrics' cluster says so
        notes.append("the answer is partial: not all storage nodes answered")
    warnings = [bounded(n) for n in notes[:MAX_WARNINGS]]
    if len(notes) > MAX_WARNINGS:
        warnings.append(f"{len(notes) - MAX_WARNINGS} more warnings left out")
    return answer.get("data"), tuple(warnings)


def error_text(answer: Mapping[str, Any]) -> str:
    """`bad_data: parse error: ...` out of an error answer."""
    return bounded(": ".join(str(answer[k]) for k in ("errorType", "error") if answer.get(k)) or "no reason given")


def frame_of(
    data: Any, warnings: tuple[str, ...], grid: Grid, name: str, service_label: str, bounds: Bounds
) -> Answered:
    """A matrix answer as a frame on `grid`, series sorted by name.

    Every series gets the metric `name` ("" keeps its own, `value` where it has none); its label `service_label` becomes
    `service`, an own `service` label beside it `exported_service`. Two series that become one by this are laid over
    each other (the first wins where both have a sample). No series: `Frame.empty()`. Raises MalformedError.
    """
    result = _result(data, "matrix")
    notes, partial = list(warnings), ""
    try:
        found = sorted(
            ((_series(item, name, service_label), item) for item in result),
            key=lambda pair: (pair[0].metric, pair[0].labels),
        )
        limit = min(bounds.series, max(1, bounds.cells // grid.points))
        if len(found) > limit:
            partial = f"{len(found)} series, only the first {limit} are kept: narrow the query"
            found = found[:limit]
        values, times = np.full((len(found), grid.points), math.nan), grid.times()
        kept: dict[SeriesId, int] = {}
        counts = {"infinite": 0, "stray": 0, "histograms": 0, "doubled": 0}
        for series, item in found:
            counts["histograms"] += "histograms" in item
            if "values" not in item:
                continue
            row = _row(item["values"], grid, times, counts)
            if series not in kept:
                kept[series] = len(kept)
                values[kept[series]] = row
            else:
                counts["doubled"] += 1
                known = values[kept[series]]
                values[kept[series]] = np.where(np.isnan(known), row, known)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise MalformedError(
            f"a series of the answer is not of the Prometheus API ({bounded(str(error), 80)})"
        ) from error
    notes += _notes(counts)
    if not kept:
        return Answered(Frame.empty(), tuple(notes), partial)
    return Answered(Frame(times, tuple(kept), values[: len(kept)]), tuple(notes), partial)


def samples_of(data: Any, limit: int) -> tuple[Sample, ...]:
    """A vector or scalar answer as samples, native histograms left out. Raises MalformedError, also for more than
    `limit`."""
    if isinstance(data, dict) and data.get("resultType") == "scalar":
        data = {"resultType": "vector", "result": [{"metric": {}, "value": data.get("result")}]}
    result = _result(data, "vector")
    if len(result) > limit:
        raise MalformedError(f"the answer has {len(result)} samples, at most {limit} are taken")
    try:
        return tuple(
            Sample(
                {str(k): str(v) for k, v in item["metric"].items()}, float(item["value"][0]), float(item["value"][1])
            )
            for item in result
            if "value" in item
        )
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise MalformedError(
            f"a sample of the answer is not of the Prometheus API ({bounded(str(error), 80)})"
        ) from error


def _result(data: Any, wanted: str) -> list[Any]:
    if not isinstance(data, dict) or not isinstance(data.get("result"), list):
        raise MalformedError("the answer has no data.result")
    if data.get("resultType") != wanted:
        raise MalformedError(f"the answer is a {bounded(str(data.get('resultType')), 40)}, expected a {wanted}")
    result: list[Any] = data["result"]
    return result


def _series(item: Mapping[str, Any], name: str, service_label: str) -> SeriesId:
    labels = dict(item["metric"])
    if not all(isinstance(value, str) for value in labels.values()):
        raise TypeError("a label value is not a string")
    metric = labels.pop("__name__", "")
    if service_label != "service":
        if "service" in labels:
            away = "exported_service"
            while away in labels:
                away = f"exported_{away}"
            labels[away] = labels.pop("service")
        if service_label in labels:
            labels["service"] = labels.pop(service_label)
    return SeriesId.of(name or metric or "value", labels)


def _row(samples: list[Any], grid: Grid, times: FloatArray, counts: dict[str, int]) -> FloatArray:
    """The samples of one series on the grid, whose `times` these are: (points,)."""
    n = len(samples)
    at = np.array([sample[0] for sample in samples], np.float64)
    values = np.array([float(sample[1]) for sample in samples], np.float64)
    infinite = np.isinf(values)
    if infinite.any():
        counts["infinite"] += int(np.count_nonzero(infinite))
        values[infinite] = math.nan
    if n == grid.points and np.array_equal(at, times):  # nothing is missing, which is how most series come
        return values
    offset = np.rint(at * 1000.0) - grid.start_ms
    index = np.floor_divide(offset, grid.step_ms)
    fits = (offset == index * grid.step_ms) & (index >= 0) & (index < grid.points)
    counts["stray"] += int(n - np.count_nonzero(fits))
    row = np.full(grid.points, math.nan)
    row[index[fits].astype(np.intp)] = values[fits]
    return row


def _notes(counts: Mapping[str, int]) -> list[str]:
    said = {
        "infinite": "{} samples were infinite and count as gaps",
        "stray": "{} samples lay beside the grid and were left out",
        "histograms": "{} series are native histograms, which are left out: query a quantile of them instead",
        "doubled": "{} series had the same name as another one and were laid over it",
    }
    return [text.format(counts[key]) for key, text in said.items() if counts[key]]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _head(body: bytes) -> str:
    return repr(bounded(body[:200].decode("utf-8", "replace"), 80))
