"""What the section `kubernetes` lets actions reach."""

from __future__ import annotations

import json

import pytest

from actions.catalog import load_catalog
from agent.config import Config, InventoryEntry, Kubernetes
from agent.config_checks import MAX_DIAGNOSTICS

REACH = {"kubernetes_api", "kubernetes_token_file", "kubernetes_ca_file"}


def test_without_it_nothing_is_added() -> None:
    config = Config(inventory={"cart": InventoryEntry(listen_port="80")})
    assert config.inventory_with(("deployment/shop/cart",)) == {"cart": {"listen_port": "80"}}


def test_listed_services_and_objects_get_the_connection() -> None:
    entry = InventoryEntry(kubernetes_workload="deployment/shop/cart")
    config = Config(inventory={"cart": entry}, kubernetes=Kubernetes(enabled=True))
    found = config.inventory_with(("deployment/shop/cart", "node/a", "somebody"))
    assert set(found) == {"cart", "deployment/shop/cart", "node/a"}
    assert set(found["cart"]) == REACH | {"kubernetes_workload"}
    assert set(found["node/a"]) == REACH


@pytest.mark.parametrize(
    ("subject", "covered"),
    [
        ("pod/shop/cart-0", True),
        ("pod/payments/x", False),
        ("pod/shop/", False),
        ("node/a", True),
        ("cart", False),
        ("node/a/b/c", False),
        ("namespace/shop", False),
    ],
)
def test_only_objects_of_the_named_namespaces_are_covered(subject: str, covered: bool) -> None:
    config = Config(kubernetes=Kubernetes(enabled=True, namespaces=("shop",)))
    found = config.inventory_with((subject,))
    assert (subject in found) is covered
    assert not covered or found[subject]["kubernetes_namespaces"] == "shop"


def test_diagnostics_reach_actions_as_the_argument_lists_that_they_are() -> None:
    """Each word stays a word, and what is not ASCII survives the parameter's own checks."""
    given = {"dump": ("jcmd", "1", "Thread.print"), "odd": ("a b", 'c"d', "\u200b")}
    config = Config(kubernetes=Kubernetes(enabled=True, diagnostics=given))
    reach = config.inventory_with(("pod/shop/cart-0",))["pod/shop/cart-0"]
    assert set(reach) == REACH | {"kubernetes_diagnostics"}
    assert json.loads(reach["kubernetes_diagnostics"]) == {name: list(argv) for name, argv in given.items()}
    (definition,) = (d for d in load_catalog() if d.name == "kubernetes.diagnose")
    parameter = definition.parameters["diagnostics"]
    assert parameter.check(reach["kubernetes_diagnostics"]) == reach["kubernetes_diagnostics"]
    assert parameter.max_length == MAX_DIAGNOSTICS, "what the configuration lets through is no surprise to the action"
