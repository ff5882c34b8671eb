"""An alert's own expression, read by a real PromQL parser: what it selects, compares and divides.

Called by `agent.situation` (which alert reads which metrics) and by `rules.anyalert` (correlated queries). Exists so
that an alert nobody wrote a pack for says by itself what to look at. The text comes from a URL or from the server, so
it is bounded and never trusted: what cannot be parsed raises ExpressionError, whose text becomes missing evidence.

`rendered` writes an expression back with more matchers in each selector. It renders the tree itself, since the
parser's own printing does not escape strings; `$` inside strings becomes `\\x24`, so that nothing of an expression is
taken for a variable of a query template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MAX_TEXT = 16 * 1024
MAX_DEPTH = 64  # of parentheses; alerting rules have less than ten
COMPARISONS = frozenset({">", "<", ">=", "<=", "==", "!="})
SETS = frozenset({"and", "or", "unless"})
_RANGED = frozenset({"rate", "irate", "increase", "delta", "deriv", "changes", "resets"})


class ExpressionError(ValueError):
    """The text is no PromQL expression that can be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """`left op threshold`, as the alert asks it. `threshold` None: the right side is a vector or there is none; `node`
    is then the comparison itself."""

    left: Any
    op: str  # "": nothing is compared, what the expression gives is the alert
    threshold: float | None
    node: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Expression:
    """A parsed expression. `metrics`: the names of what it selects, sorted; `range_seconds`: its longest range."""

    text: str
    tree: Any
    metrics: tuple[str, ...]
    range_seconds: float
    comparison: Comparison


@lru_cache(maxsize=256)
def read(text: str) -> Expression:
    """The expression of an alert. Raises ExpressionError."""
    import promql_parser  # 10 MB that a service without alerts does not need

    if len(text) > MAX_TEXT:
        raise ExpressionError(f"the expression is longer than {MAX_TEXT} characters")
    plain = _without_backticks(text)
    if _depth(plain) > MAX_DEPTH:
        raise ExpressionError(f"the expression nests deeper than {MAX_DEPTH} parentheses")
    try:
        tree = promql_parser.parse(plain)
    except ValueError as error:
        raise ExpressionError(f"the expression cannot be parsed: {error}") from error
    nodes = list(walk(tree))
    selectors = [node for node in nodes if _kind(node) == "VectorSelector"]
    ranges = [node.range.total_seconds() for node in nodes if _kind(node) in ("MatrixSelector", "SubqueryExpr")]
    metrics = tuple(sorted({name for node in selectors if (name := metric_of(node))}))
    return Expression(text, tree, metrics, max(ranges, default=0.0), _comparison(tree))


def walk(node: Any) -> Iterator[Any]:
    """The node and everything below it, from left to right."""
    yield node
    for child in _children(node):
        yield from walk(child)


def metric_of(selector: Any) -> str:
    """The metric that a selector names, by its name or by an equality with `__name__`; "" if it names none."""
    if selector.name:
        return str(selector.name)
    named = [m.value for m in selector.matchers.matchers if m.name == "__name__" and str(m.op) == "MatchOp.Equal"]
    return str(named[0]) if named else ""


def division_of(node: Any) -> tuple[Any, Any] | None:
    """Numerator and denominator of a ratio, looked for below factors, signs, parentheses and complements (`1 - x`)."""
    kind = _kind(node)
    if kind in ("ParenExpr", "UnaryExpr"):
        return division_of(node.expr)
    if kind == "AggregateExpr" and str(node.op).split()[0] in ("sum", "max", "min", "avg"):
        return division_of(node.expr)
    if kind != "BinaryExpr":
        return None
    op = _operator(node)
    if op in ("*", "-", "+", "/") and number_of(node.lhs) is not None:
        return division_of(node.rhs)
    if op in ("*", "-", "+", "/") and number_of(node.rhs) is not None:
        return division_of(node.lhs)
    return (node.lhs, node.rhs) if op == "/" else None


def innermost(node: Any) -> Any:
    """What is below aggregations, factors and parentheses: a function of a selector, or a selector. The left part of
    anything with two vectors."""
    kind = _kind(node)
    if kind in ("ParenExpr", "UnaryExpr", "AggregateExpr"):
        return innermost(node.expr)
    if kind == "BinaryExpr":
        return innermost(node.rhs if number_of(node.lhs) is not None else node.lhs)
    if kind == "SubqueryExpr":
        return innermost(node.expr)
    if kind == "Call" and node.func.name not in _RANGED and not node.func.name.endswith("_over_time"):
        vectors = [a for a in node.args if any(_kind(n) == "VectorSelector" for n in walk(a))]
        return innermost(vectors[-1]) if vectors else node
    return node


def number_of(node: Any) -> float | None:
    """The value of an expression that is made of numbers alone."""
    kind = _kind(node)
    if kind == "NumberLiteral":
        return float(node.val)
    if kind in ("ParenExpr", "UnaryExpr"):
        value = number_of(node.expr)
        return value if value is None or kind == "ParenExpr" else -value
    if kind != "BinaryExpr":
        return None
    left, right = number_of(node.lhs), number_of(node.rhs)
    if left is None or right is None:
        return None
    try:
        made = {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else math.nan}
        value = made.get(_operator(node))
    except OverflowError:
        return None
    return value if value is not None and math.isfinite(value) else None


def rendered(node: Any, more: str = "", keep: Callable[[Any], bool] = lambda selector: True) -> str:
    """The tree as PromQL, with the matchers `more` added to each selector that `keep` holds for."""
    kind = _kind(node)
    if kind == "NumberLiteral":
        return _number(node.val)
    if kind == "StringLiteral":
        return quoted(node.val)
    if kind == "VectorSelector":
        return _selector(node, more if keep(node) else "") + _time_shift(node)
    if kind == "MatrixSelector":
        inner = node.vector_selector
        return f"{_selector(inner, more if keep(inner) else '')}[{_duration(node.range)}]{_time_shift(inner)}"
    if kind == "SubqueryExpr":
        step = _duration(node.step) if node.step is not None else ""
        return f"{_operand(node.expr, more, keep)}[{_duration(node.range)}:{step}]{_time_shift(node)}"
    if kind == "ParenExpr":
        return f"({rendered(node.expr, more, keep)})"
    if kind == "UnaryExpr":
        return f"-{_operand(node.expr, more, keep)}"
    if kind == "Call":
        return f"{node.func.name}({', '.join(rendered(a, more, keep) for a in node.args)})"
    if kind == "AggregateExpr":
        return _aggregate(node, more, keep)
    if kind == "BinaryExpr":
        return f"{_operand(node.lhs, more, keep)} {_joined(node)} {_operand(node.rhs, more, keep)}"
    raise ExpressionError(f"the expression holds a {kind}, which is not known here")


def _operand(node: Any, more: str, keep: Callable[[Any], bool]) -> str:
    """In parentheses, unless it stands for itself anyway."""
    text = rendered(node, more, keep)
    return f"({text})" if _kind(node) in ("BinaryExpr", "UnaryExpr", "SubqueryExpr") else text


def difference(comparison: Any, more: str = "") -> str:
    """What is compared minus what it is compared with, matched as the comparison matches them."""
    sides = rendered(comparison.lhs, more), rendered(comparison.rhs, more)
    how = _joined(comparison).removeprefix(_operator(comparison)).removeprefix(" bool")
    return f"({sides[0]}) -{how} ({sides[1]})"


def is_absence(tree: Any) -> bool:
    """Whether the alert stands on `absent` or `absent_over_time`: then what it selects has no series."""
    return any(_kind(n) == "Call" and n.func.name in ("absent", "absent_over_time") for n in walk(tree))


def has_alternatives(tree: Any) -> bool:
    """Whether it is one comparison or another (`a > 1 or b > 2`): then what one of them says of its threshold says
    nothing of why the alert fires."""
    kind = _kind(tree)
    if kind in ("ParenExpr", "AggregateExpr"):
        return has_alternatives(tree.expr)
    if kind != "BinaryExpr" or _operator(tree) != "or":
        return False
    return all(
        any(_kind(n) == "BinaryExpr" and _operator(n) in COMPARISONS for n in walk(s)) for s in (tree.lhs, tree.rhs)
    )


def quoted(text: str) -> str:
    """A double-quoted PromQL string, with nothing in it that a query template would look at."""
    out = []
    for c in text:
        code = ord(c)
        if c in '"\\':
            out.append("\\" + c)
        elif c == "$":
            out.append("\\x24")
        elif code < 0x20 or 0x7F <= code < 0xA0 or code in (0x2028, 0x2029, 0xFEFF, 0xFFFD):
            out.append(f"\\u{code:04x}")
        else:
            out.append(c)
    return f'"{"".join(out)}"'


def _comparison(tree: Any) -> Comparison:
    """The comparison that the alert stands on: the first one on the way down through sets, parentheses, aggregations
    and factors."""
    kind = _kind(tree)
    if kind in ("ParenExpr", "AggregateExpr"):
        below = _comparison(tree.expr)
        return below if below.op and kind == "ParenExpr" else Comparison(tree, "", None)
    if kind == "BinaryExpr":
        op = _operator(tree)
        if op in SETS:
            left = _comparison(tree.lhs)
            right = _comparison(tree.rhs) if op == "and" else left
            return left if left.op or not right.op else right
        if op in COMPARISONS:
            inner = _comparison(tree.lhs)  # `a > 0.9 < 1`: the first is what matters
            if inner.op:
                return inner
            if (threshold := number_of(tree.rhs)) is not None:
                return Comparison(tree.lhs, op, threshold)
            if (threshold := number_of(tree.lhs)) is not None:
                return Comparison(tree.rhs, op.translate(str.maketrans("<>", "><")), threshold)
            return Comparison(tree.lhs, op, None, tree)
    return Comparison(tree, "", None)


def _children(node: Any) -> tuple[Any, ...]:
    kind = _kind(node)
    if kind in ("ParenExpr", "UnaryExpr", "SubqueryExpr"):
        return (node.expr,)
    if kind == "MatrixSelector":
        return (node.vector_selector,)
    if kind == "Call":
        return tuple(node.args)
    if kind == "AggregateExpr":
        return (node.expr,) if node.param is None else (node.param, node.expr)
    if kind == "BinaryExpr":
        return node.lhs, node.rhs
    return ()


def _kind(node: Any) -> str:
    return type(node).__name__


def _operator(node: Any) -> str:
    return str(node.op)


def _selector(node: Any, more: str) -> str:
    if node.matchers.or_matchers:
        raise ExpressionError("the expression joins matchers by `or`, which Prometheus does not know")
    texts = [f"{m.name}{_MATCH[str(m.op)]}{quoted(m.value)}" for m in node.matchers.matchers]
    inner = ",".join([*texts, more] if more else texts)
    return f"{node.name or ''}{{{inner}}}"


_MATCH = {"MatchOp.Equal": "=", "MatchOp.NotEqual": "!=", "MatchOp.Re": "=~", "MatchOp.NotRe": "!~"}


def _time_shift(node: Any) -> str:
    """`offset` and `@` of a selector or subquery."""
    text = ""
    if node.at is not None:
        kind = str(node.at.type).rsplit(".", 1)[-1]
        moment = node.at.at
        text += f" @ {moment.timestamp():.3f}" if kind == "At" and moment is not None else f" @ {kind.lower()}()"
    if node.offset is not None:
        seconds = node.offset.total_seconds()
        text += f" offset {'-' if seconds < 0 else ''}{round(abs(seconds) * 1000)}ms"
    return text


def _aggregate(node: Any, more: str, keep: Callable[[Any], bool]) -> str:
    by = ""
    if node.modifier is not None:
        word = "by" if str(node.modifier.type).endswith("By") else "without"
        by = f" {word} ({', '.join(node.modifier.labels)})"
    inner = rendered(node.expr, more, keep)
    param = f"{rendered(node.param, more, keep)}, " if node.param is not None else ""
    return f"{node.op}{by} ({param}{inner})"


def _joined(node: Any) -> str:
    """The operator with `bool`, `on`, `ignoring` and `group_left`."""
    text, modifier = _operator(node), node.modifier
    if modifier is None:
        return text
    if modifier.return_bool:
        text += " bool"
    if modifier.matching is not None:
        word = "on" if str(modifier.matching.type).endswith("Include") else "ignoring"
        text += f" {word} ({', '.join(modifier.matching.labels)})"
    card = str(modifier.card).rsplit(".", 1)[-1]
    side = {"ManyToOne": " group_left", "OneToMany": " group_right"}.get(card, "")
    if side:
        text += f"{side} ({', '.join(modifier.group_labels or ())})"
    return text


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return ("+Inf" if value > 0 else "-Inf") if math.isinf(value) else repr(value)


def _duration(delta: Any) -> str:
    return f"{round(delta.total_seconds() * 1000)}ms"


def _without_backticks(text: str) -> str:
    """Raw strings as quoted ones: the parser would look for escapes in them."""
    out: list[str] = []
    at = 0
    while at < len(text):
        c = text[at]
        if c == "`":
            end = text.find("`", at + 1)
            if end < 0:
                raise ExpressionError("the expression cannot be parsed: a raw string has no end")
            out.append(quoted(text[at + 1 : end]))
            at = end + 1
        elif c in "\"'":
            end = at + 1
            while end < len(text) and text[end] != c:
                end += 2 if text[end] == "\\" else 1
            out.append(text[at : end + 1])
            at = end + 1
        elif c == "#":
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
        else:
            out.append(c)
            at += 1
    return "".join(out)


def _depth(text: str) -> int:
    deepest = depth = 0
    for c in text:
        depth += (c == "(") - (c == ")")
        deepest = max(deepest, depth)
    return deepest
