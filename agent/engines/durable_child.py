"""The child process that runs durable-rules: rules once, then facts again and again, over standard input and output.

Started by `agent.engines.durable`, as a plain script: it imports nothing of ours, so that whatever the extension in C
does to this process is done to nothing else. It uses durable-rules in the one form that is known to be safe: a rule set
of its own without a host, facts asserted one at a time, actions that only collect, equality joins of short tokens, the
session deleted at the end of each request. It decides nothing and reads no file.

A frame is four bytes of length (big-endian) and JSON. First request: `{"rules": {name: [[flag, [[field, pattern,
field], ...]], ...]}}`, a pattern being met by facts with the flag whose fields equal those of earlier patterns; answer
`{"ready": true}`. Every further request: `{"facts": [{"flags": [...], "fields": {field: token}}, ...]}`; answer
`{"matches": [[name, [fact, ...]], ...]}`, facts by their place in the request.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any, BinaryIO

ALWAYS = "always"
MAX_RULES = 100  # of one rule set: with a little more than 500 it does not come to an end


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    found: list[tuple[str, list[int]]] = []
    rulesets: list[tuple[Any, set[str]]] = []  # each with the flags that it knows
    while (request := receive(source)) is not None:
        if not rulesets:
            every = list(request["rules"].items())
            for first in range(0, max(1, len(every)), MAX_RULES):
                rules = dict(every[first : first + MAX_RULES])
                flags = {flag for patterns in rules.values() for flag, _ in patterns}
                rulesets.append((compiled(rules, found, len(rulesets)), flags))
            send(sink, {"ready": True})
            continue
        found.clear()
        for ruleset, flags in rulesets:
            run(ruleset, request["facts"], flags)
        send(sink, {"matches": found})


def compiled(rules: dict[str, list[Any]], found: list[tuple[str, list[int]]], number: int) -> Any:
    """The rules for durable-rules, and one that the first fact of every session meets."""
    from durable.engine import Ruleset

    def collector(name: str) -> Any:
        def collect(c: Any) -> None:
            facts = c._m
            if name != ALWAYS:
                found.append((name, [facts[key]["id"] for key in sorted(facts, key=lambda k: int(k[2:]))]))

        return collect

    definition: dict[str, Any] = {ALWAYS: {"all": [{"m_0": {"z": 1}}], "run": collector(ALWAYS)}}
    for name, patterns in rules.items():
        every = []
        for i, (flag, joins) in enumerate(patterns):
            tests: list[Any] = [{flag: 1}, *({field: {f"m_{at}": other}} for field, at, other in joins)]
            every.append({f"m_{i}": {"$and": tests} if len(tests) > 1 else tests[0]})
        definition[name] = {"all": every, "run": collector(name)}
    return Ruleset(f"alertmedic{number}", None, definition)


def run(ruleset: Any, facts: list[dict[str, Any]], flags: set[str]) -> None:
    """One session: the facts that have any of the flags."""
    failures: list[Any] = []

    def complete(error: Any, _: Any) -> None:
        if error is not None:
            failures.append(error)

    try:
        ruleset.do_actions(ruleset.assert_fact({"sid": "s", "id": -1, "z": 1}), complete)
        for number, fact in enumerate(facts):
            if not (raised := flags.intersection(fact["flags"])):
                continue
            told = {"sid": "s", "id": number, **dict.fromkeys(sorted(raised), 1), **fact["fields"]}
            ruleset.do_actions(ruleset.assert_fact(told), complete)
    finally:
        ruleset.delete_state("s")
    if failures:
        raise RuntimeError(f"durable-rules: {failures[0]}")


def receive(source: BinaryIO) -> Any:
    """The next request, None at the end."""
    head = source.read(4)
    return json.loads(source.read(int.from_bytes(head, "big"))) if len(head) == 4 else None


def send(sink: BinaryIO, answer: Any) -> None:
    body = json.dumps(answer).encode()
    sink.write(len(body).to_bytes(4, "big") + body)
    sink.flush()


if __name__ == "__main__":
    main()
