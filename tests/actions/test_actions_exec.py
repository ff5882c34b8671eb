"""What `kubernetes.diagnose` makes of a stream's messages; the streams themselves are in tests/kubernetes."""

from __future__ import annotations

import json

import pytest

from actions.builtin.kubernetes_api import ApiError, Name, Refused
from actions.builtin.kubernetes_exec import KEPT, MAX_DOCUMENT, STATUS, STDERR, STDOUT, Stream, bounded, running
from actions.catalog import load_catalog

NAME = Name("pod", "shop", "cart-0")


def told(status: object) -> Stream:
    found = Stream()
    found.take(bytes([STATUS]) + (status if isinstance(status, bytes) else json.dumps(status).encode()))
    return found


def test_exit_codes_are_those_of_the_status() -> None:
    assert told({"metadata": {}, "status": "Success"}).exit_code() == 0
    cause = {"reason": "ExitCode", "message": "137"}
    failed = {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": [{"reason": "Other"}, cause]}}
    assert told(failed).exit_code() == 137


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"status": "Failure", "reason": "InternalError", "message": "no such\ncontainer"}, "no such container"),
        ({"status": "Failure", "reason": "NonZeroExitCode", "message": "odd"}, "odd"),
        ({"status": "Failure", "reason": "NonZeroExitCode", "details": None}, "NonZeroExitCode"),
        (
            {"status": "Failure", "reason": "NonZeroExitCode",
             "details": {"causes": [{"reason": "ExitCode", "message": "-1"}]}},
            "NonZeroExitCode",
        ),
        (b"command terminated", "no Status"),
        (b"[0]", "no Status"),
        (b"\xff\xfe", "no Status"),
    ],
)  # fmt: skip
def test_anything_else_is_no_exit_code(status: object, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        told(status).exit_code()


def test_messages_of_no_known_channel_are_passed_over() -> None:
    found = Stream()
    for message in (b"", b"\x01", b"\x00in", b"\x04{}", b"\xff\x01"):
        found.take(message)
    assert not any(found.size.values())


@pytest.mark.parametrize("byte", [b"x", b"\x00", b"\xff", "é".encode(), b'"'])
def test_the_document_stays_within_the_sandboxs_bound(byte: bytes) -> None:
    """Whatever is said: a NUL is six characters of JSON."""
    found = Stream()
    said = (byte * KEPT[STDOUT])[: KEPT[STDOUT]]
    for channel in (STDOUT, STDERR, STDOUT):
        found.take(bytes([channel]) + said)
    document = bounded({"exit_code": 0}, found)
    assert len(json.dumps(document)) <= MAX_DOCUMENT
    assert document["exit_code"] == 0
    kept = len(said) * 2 - document["stdout_left_out"]
    assert 0 < kept <= KEPT[STDOUT]
    assert document["stdout"].startswith(byte.decode(errors="replace")[0])
    (definition,) = (d for d in load_catalog() if d.name == "kubernetes.diagnose")
    assert definition.limits.output_bytes > MAX_DOCUMENT


def entered(**change: object) -> dict[str, object]:
    state = {"name": "app", "state": {"running": {}}, "containerID": "containerd://1"} | change
    return {"status": {"containerStatuses": [state]}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": {"uid": "u", "deletionTimestamp": "now"}}, "being deleted"),
        ({"status": {}}, "does not run"),
        ({"status": {"containerStatuses": None}}, "does not run"),
        (entered(containerID=""), "does not run"),
        (entered(state={"terminated": {}}), "does not run"),
        (entered(name="db"), "does not run"),
        ({"spec": {"containers": [{"name": "app"}, {"name": "db"}]}}, "name one of app, db"),
    ],
)
def test_only_a_container_that_runs_is_entered(change: dict[str, object], words: str) -> None:
    pod = {"metadata": {"uid": "u"}, "spec": {"containers": [{"name": "app"}]}} | entered()
    assert running(NAME, pod, "") == ("app", "containerd://1")
    with pytest.raises(Refused, match=words):
        running(NAME, pod | change, "")
