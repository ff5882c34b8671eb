"""Laws of the grid and of decoding, without a server."""

from __future__ import annotations

import json
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agent.sources.matrix import MAX_POINTS, Bounds, Grid, envelope, frame_of
from rules.model import SeriesId

WINDOWS = st.tuples(
    st.floats(0, 4e9),
    st.floats(0, 400 * 86400),
    st.one_of(st.floats(0.001, 86400), st.sampled_from([1, 5, 15, 30, 60])),
)


@given(WINDOWS)
def test_the_grid_of_any_window(window: tuple[float, float, float]) -> None:
    start, length, step = window
    grid = Grid.over(start, start + length, step)
    asked = max(1, round(step * 1000))
    assert 1 <= grid.points <= MAX_POINTS
    assert grid.start_ms % grid.step_ms == 0
    assert grid.step_ms % asked == 0
    assert grid.start_ms <= math.floor(start * 1000) < grid.start_ms + grid.step_ms
    assert grid.end_ms <= math.floor((start + length) * 1000) < grid.end_ms + grid.step_ms
    assert bool(grid.warnings) == (grid.step_ms != asked)
    if grid.step_ms == asked:
        assert grid.points == (math.floor((start + length) * 1000) - grid.start_ms) // asked + 1
    assert len(grid.times()) == grid.points


VALUES = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([math.nan, math.inf, -math.inf]))


def sent(value: float) -> str:
    """As Prometheus writes a sample."""
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(repr(value), repr(value))


@given(
    st.integers(0, 2_000_000_000),
    st.sampled_from([0.001, 0.5, 1.0, 15.0, 30.0]),
    st.lists(st.dictionaries(st.integers(0, 19), VALUES, min_size=1), max_size=5),
)
def test_samples_land_on_their_points(start: int, step: float, series: list[dict[int, float]]) -> None:
    grid = Grid.over(float(start), start + 19 * step, step)
    series = [{i: v for i, v in one.items() if i < grid.points} for one in series]
    result = [
        {
            "metric": {"__name__": "x", "service": f"s{n}"},
            "values": [[(grid.start_ms + i * grid.step_ms) / 1000, sent(v)] for i, v in sorted(one.items())],
        }
        for n, one in enumerate(series)
    ]
    body = json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()
    data, warnings = envelope(body)
    answer = frame_of(data, warnings, grid, "y", "service", Bounds(100, 10_000))
    assert answer.frame.ids == tuple(SeriesId.of("y", {"service": f"s{n}"}) for n in range(len(series)))
    for row, one in zip(answer.frame.values, series, strict=True):
        expected = [one.get(i, math.nan) for i in range(grid.points)]
        np.testing.assert_array_equal(row, [math.nan if math.isinf(v) else v for v in expected])
    infinite = sum(math.isinf(v) for one in series for v in one.values())
    assert answer.warnings == ((f"{infinite} samples were infinite and count as gaps",) if infinite else ())
