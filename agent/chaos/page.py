"""The page of a comparison: one HTML file that needs nothing else.

Written by `alertmedic chaos report`. It shows what `agent.chaos.report.summary` says and computes nothing of its own;
everything that came from a run is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from agent.chaos.measure import CAP_SECONDS, Run
from agent.chaos.report import OURS, broken, counting, summary

COLOURS = {"nothing": "#8a9099", "liveness": "#a05ee0", "command": "#d97a00", "auto": "#1a7f37", "approve": "#1967d2"}
STAGE_COLOURS = {"alert": "#f2c14e", "diagnosed": "#5b8def", "acted": "#7d4cdb", "recovered": "#2e9e5b"}
WIDTH, ROW = 920, 26
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2em auto;padding:0 1em;color:#1f2328}
h2{margin-top:2em}table{border-collapse:collapse;margin:1em 0;width:100%;font-size:14px}
td,th{padding:.3em .5em;border-bottom:1px solid #d0d7de;text-align:right;vertical-align:top}
td:first-child,th:first-child{text-align:left}td.text,th.text{text-align:left}
.bad{color:#b42318;font-weight:600}.good{color:#1a7f37;font-weight:600}.quiet{color:#59636e}
.cards{display:flex;flex-wrap:wrap;gap:.8em}
.card{border:1px solid #d0d7de;border-radius:6px;padding:.7em 1em;flex:1 1 200px}
.card b{display:block;font-size:1.7em;line-height:1.3}
pre{background:#f6f8fa;padding:.8em;overflow:auto;font-size:12px;white-space:pre-wrap}
svg{max-width:100%;height:auto}summary{cursor:pointer}details{margin:.4em 0}
"""


def page(runs: Sequence[Run]) -> str:
    """The aims, the arms, where the time went, the share still broken over time, every scenario, every miss."""
    told = summary(runs)
    kept = [r for r in broken(counting(runs)) if not r.killed_agent]
    parts = [
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">',
        f"<title>Time to recovery</title><style>{_STYLE}</style><h1>Time to recovery</h1>",
        f"<p class=quiet>{told['runs']} runs ({told['void']} void) from {_text(told['first_at'])} to "
        f"{_text(told['last_at'])}, made by {_text(', '.join(told['made_by']) or 'an unknown version')}. Restricted "
        f"means with a cap of {CAP_SECONDS:g} s; intervals are 95 % bootstrap intervals over scenarios.</p>",
        _cards(told["aims"]),
        "<h2>The arms</h2>",
        _arms_table(told["arms"]),
        _against_table(told["against"]),
        "<h2>Where the time goes</h2><p>Mean seconds after the fault, over the faults that came so far.</p>",
        _stages(told["arms"]),
        "<h2>Share of faults still hurting, by seconds after the fault</h2>",
        _curves(kept),
        "<h2>Every scenario</h2><p>One mark a run: seconds out of bounds.</p>",
        _dots(kept),
        _scenario_table(told["scenarios"]),
        _killed(told["killed_agent"]),
        f"<h2>Misses ({len(told['misses'])})</h2>",
        *(_miss(m) for m in told["misses"]),
    ]
    if told["voids"]:
        rows = "".join(
            f"<tr><td>{_text(v['scenario'])}<td class=text>{_text(v['arm'])}<td>{v['repetition']}"
            f"<td class=text>{_text(v['why'])}"
            for v in told["voids"]
        )
        head = "scenario<th class=text>arm<th>repetition<th class=text>why"
        parts.append(f"<h2>Void runs</h2><table><tr><th>{head}{rows}</table>")
    return "\n".join(parts) + "</html>\n"


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(value: Mapping[str, Any], unit: str = "", scale: float = 1.0) -> str:
    if value["value"] is None:
        return "-"
    low, mid, high = (f"{value[k] * scale:.1f}" for k in ("low", "value", "high"))
    return f"{mid}{unit} <span class=quiet>({low} to {high})</span>"


def _share(value: Mapping[str, Any]) -> str:
    return "-" if not value["of"] else f"{value['hits']} of {value['of']}"


def _cards(aims: Sequence[Mapping[str, Any]]) -> str:
    """What is claimed, and whether it holds."""
    cards = []
    for aim in aims:
        least, found = aim["least"], aim["found"]
        shown = "not measured" if found is None else f"{found:.0f}" if least is None else f"{found:.0%}"
        word = "quiet" if aim["met"] is None else "good" if aim["met"] else "bad"
        wanted = "none wanted" if least is None else f"at least {least:.0%} wanted"
        of = f"; {_text(aim['of'])}" if aim["of"] else ""
        cards.append(
            f"<div class=card><b class={word}>{shown}</b>{_text(aim['what'])}<br>"
            f"<span class=quiet>{wanted}{of}</span></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def _arms_table(arms: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_swatch(name)}{_text(name)}<td>{a['runs']}<td>{_interval(a['restricted_mean_seconds'], ' s')}"
        f"<td>{_interval(a['restricted_mean_seconds_healable'], ' s')}<td>{_share(a['healed_of_healable'])}"
        f"<td>{_share(a['top1']) if name in OURS else '-'}<td>{_share(a['top3']) if name in OURS else '-'}"
        f"<td>{_count(a['wrong_actions'], name)}<td>{_count(a['needless_actions'], name)}"
        f"<td>{(a['collateral'] or 0) * 100:.1f} %"
        for name, a in arms.items()
    )
    head = (
        "arm<th>runs<th>mean, all faults<th>mean, healable<th>healed<th>top 1<th>top 3<th>wrong<th>needless"
        "<th title='share of bad probes where none should be'>collateral"
    )
    return f"<table><tr><th>{head}{rows}</table>"


def _count(number: int, arm: str) -> str:
    if arm not in OURS:
        return f"{number}" if number else "-"
    return f"<span class={'bad' if number else 'good'}>{number}</span>"


def _swatch(arm: str) -> str:
    colour = COLOURS.get(arm, "#000")
    return f"<svg width=12 height=12><circle cx=6 cy=6 r=5 fill='{colour}'/></svg> "


def _against_table(against: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(pair.replace('/', ' against '))}<td>{_interval(a['reduction'], ' %', 100)}"
        f"<td>{_interval(a['reduction_healable'], ' %', 100)}"
        f"<td>{_interval(a['paired_difference_seconds'], ' s')} over {a['paired_difference_seconds']['cases']}"
        for pair, a in against.items()
    )
    head = "arms<th>less time out of bounds<th>the same, healable<th>difference where both healed"
    return f"<table><tr><th>{head}{rows}</table>" if rows else ""


def _stages(arms: Mapping[str, Any]) -> str:
    """A bar an arm: when, in the mean, the alert fired, a cause was named, something was done, and it was over."""
    shown = [name for name in arms if name != "nothing"]
    left, height = 90, ROW * (len(shown) + 2)
    longest = max([a["stages"]["recovered"]["mean"] or 0.0 for a in arms.values()] + [10.0])

    def x(t: float) -> float:
        return left + (WIDTH - left - 60) * t / longest

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img">']
    for number, name in enumerate(shown):
        y, at = ROW * number + 4, 0.0
        parts.append(f'<text x="0" y="{y + 14}" font-size="13">{_text(name)}</text>')
        for stage, colour in STAGE_COLOURS.items():
            mean = arms[name]["stages"][stage]["mean"]
            if mean is None or mean <= at or (stage == "diagnosed" and name not in OURS):
                continue
            parts.append(
                f'<rect x="{x(at):.1f}" y="{y}" width="{x(mean) - x(at):.1f}" height="18" fill="{colour}">'
                f"<title>{stage}: {mean:.1f} s, {arms[name]['stages'][stage]['of']} runs</title></rect>"
            )
            at = mean
        parts.append(f'<text x="{x(at) + 6:.1f}" y="{y + 14}" font-size="12">{at:.1f} s</text>')
    words = {"alert": "until the alert", "diagnosed": "the cause", "acted": "the action", "recovered": "recovery"}
    for number, (stage, word) in enumerate(words.items()):
        at, y = left + 160 * number, ROW * len(shown) + 12
        parts.append(f'<rect x="{at}" y="{y}" width="12" height="12" fill="{STAGE_COLOURS[stage]}"/>')
        parts.append(f'<text x="{at + 18}" y="{y + 11}" font-size="12">{word}</text>')
    return "".join(parts) + "</svg>"


def _curves(runs: Sequence[Run]) -> str:
    """Step curves, one an arm (Kaplan-Meier without other censoring than the cap)."""
    height, left, below = 280, 48, 26

    def x(t: float) -> float:
        return left + (WIDTH - left - 10) * t / CAP_SECONDS

    def y(s: float) -> float:
        return 10 + (height - 10 - below) * (1 - s)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img">']
    for tick in range(0, int(CAP_SECONDS) + 1, 20):
        parts.append(f'<text x="{x(tick):.0f}" y="{height - 6}" font-size="11" text-anchor="middle">{tick} s</text>')
    for s in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line x1="{left}" x2="{WIDTH - 10}" y1="{y(s):.0f}" y2="{y(s):.0f}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{left - 6}" y="{y(s) + 4:.0f}" font-size="11" text-anchor="end">{s * 100:.0f} %</text>')
    for number, arm in enumerate(dict.fromkeys(r.arm for r in runs)):
        mine = [r for r in runs if r.arm == arm]
        ends = sorted(r.time() for r in mine if r.time() < CAP_SECONDS)
        points, at = [(0.0, 1.0)], 1.0
        for n, t in enumerate(ends, 1):
            points += [(t, at), (t, at := 1 - n / len(mine))]
        points.append((CAP_SECONDS, at))
        line = " ".join(f"{x(t):.1f},{y(s):.1f}" for t, s in points)
        colour = COLOURS.get(arm, "#000")
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(
            f'<text x="{WIDTH - 76}" y="{26 + 16 * number}" font-size="13" font-weight="600" fill="{colour}" '
            f'stroke="#fff" stroke-width="4" paint-order="stroke">{_text(arm)}</text>'
        )
    return "".join(parts) + "</svg>"


def _dots(runs: Sequence[Run]) -> str:
    names = sorted({r.scenario for r in runs})
    left, height = 230, ROW * (len(names) + 1)

    def x(t: float) -> float:
        return left + (WIDTH - left - 20) * t / CAP_SECONDS

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img">']
    for number, name in enumerate(names):
        y = ROW * number + 14
        parts.append(f'<line x1="{left}" x2="{WIDTH - 20}" y1="{y}" y2="{y}" stroke="#e4e8ed"/>')
        parts.append(f'<text x="0" y="{y + 4}" font-size="12">{_text(name)}</text>')
        for run in (r for r in runs if r.scenario == name):
            shift = (list(COLOURS).index(run.arm) - 2) * 4 if run.arm in COLOURS else 0
            parts.append(
                f'<circle cx="{x(run.time()):.1f}" cy="{y + shift:.1f}" r="3.5" fill="{COLOURS.get(run.arm, "#000")}" '
                f'fill-opacity=".8"><title>{_text(run.arm)}: {run.time():.1f} s</title></circle>'
            )
    for t in range(0, int(CAP_SECONDS) + 1, 20):
        parts.append(f'<text x="{x(t):.0f}" y="{height - 4}" font-size="11" text-anchor="middle">{t} s</text>')
    return "".join(parts) + "</svg>"


def _scenario_table(scenarios: Mapping[str, Any]) -> str:
    arms = [arm for arm in COLOURS if any(arm in s["arms"] for s in scenarios.values())]
    rows = []
    for name, scenario in sorted(scenarios.items()):
        cells = []
        for arm in arms:
            mine = scenario["arms"].get(arm)
            cells.append(
                "<td>-" if mine is None else f"<td>{_number(mine['mean'])}<br>{mine['recovered']}/{mine['of']}"
            )
        tops = scenario["arms"].get("auto", {}).get("tops", [])
        rows.append(
            f"<tr><td>{_text(name)}<br><span class=quiet>{_text(scenario['kind'])}, {_text(scenario['healed_by'])}"
            f"</span>{''.join(cells)}<td class=text>{'<br>'.join(_text(t) for t in tops)}"
        )
    head = "".join(f"<th>{_swatch(arm)}{arm}" for arm in arms)
    return (
        "<details><summary>The same in numbers: mean seconds, recovered of runs, what auto named first</summary><table>"
        f"<tr><th>scenario{head}<th class=text>named first{''.join(rows)}</table></details>"
    )


def _killed(told: Mapping[str, Any]) -> str:
    if not told["runs"]:
        return ""
    rows = "".join(
        f"<tr><td>{_text(r['scenario'])}<td>{_number(r['killed_at'])}<td>{_number(r['diagnosed'])}<td>{_number(r['acted'])}"
        f"<td>{_number(r['recovered'])}<td class=text>{_text(', '.join(r['actions']) or '-')}"
        f"<td class=text><span class=bad>{_text('; '.join(r['repeated']))}</span>"
        for r in told["each"]
    )
    head = "scenario<th>killed<th>diagnosed<th>acted<th>recovered<th class=text>did<th class=text>done twice"
    return (
        f"<h2>The agent killed at random moments</h2><p>{told['runs']} runs; kill -9 came in {told['killed']} of them, "
        f"before the diagnosis in {told['before_diagnosis']}, before the recovery in {told['before_recovery']}. "
        f"Healed: {_share(told['healed_of_healable'])} of the healable; done twice: {told['repeated']}. "
        f"Times are seconds after the fault.</p><table><tr><th>{head}{rows}</table>"
    )


def _miss(miss: Mapping[str, Any]) -> str:
    killed = "" if miss["killed_at"] is None else f", the agent killed after {miss['killed_at']:.1f} s"
    head = f"{miss['scenario']}, {miss['arm']}, repetition {miss['repetition']}{killed}: {'; '.join(miss['why'])}"
    bad = " class=bad" if miss["wrong_or_needless"] else ""
    stages = ", ".join(f"{stage} {t:.1f} s" for stage, t in miss["stages"].items() if t is not None)
    lines = [
        f"true:    {', '.join(miss['truth']) or '(nothing is wrong)'}",
        f"ranked:  {', '.join(miss['top']) or miss['answer'] or '(no diagnosis)'}",
        f"did:     {', '.join(miss['actions']) or 'nothing'}",
        f"when:    {stages or '-'}",
        "",
        *miss["story"],
    ]
    return f"<details><summary{bad}>{_text(head)}</summary><pre>{_text(chr(10).join(lines))}</pre></details>"
