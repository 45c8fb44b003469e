"""The formula of components/keda-headroom equals the policy of `fleet up --autoscale`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

import pytest
from manifests import K8S, of_kind, render

from services.cli.replica_policy import with_headroom

# KEDA evaluates formulas in expr-lang, in which these operators have the same precedence as in Python.
_OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def value(node: ast.expr, wanted: float) -> float:
    """Evaluate a formula whose only variable is `wanted`."""
    match node:
        case ast.BinOp(left, sign, right):
            return _OPERATORS[type(sign)](value(left, wanted), value(right, wanted))
        case ast.Constant(number):
            return float(number)  # type: ignore[arg-type]
        case ast.Name("wanted"):
            return wanted
    raise ValueError(f"formula: {ast.unparse(node)!r} is not a sum, product, quotient or power of wanted and numbers")


@pytest.mark.parametrize("replicas", [0.0, 0.3, 1.0, 7.0, 64.0])
def test_the_formula_equals_the_headroom_of_the_local_policy(replicas: float) -> None:
    scalers = list(of_kind(render(K8S / "overlays" / "production"), "ScaledObject"))
    assert scalers
    for each in scalers:
        modifiers = each["spec"]["advanced"]["scalingModifiers"]
        target = float(modifiers["target"])
        computed = value(ast.parse(modifiers["formula"], mode="eval").body, replicas * target) / target
        assert computed == pytest.approx(with_headroom(replicas, 2.0))
