"""Sums of products and quotients of a config's numbers, as mapping files have them: "2*heads*head_dim"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgeinfer.errors import ExportError

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|\d+|[+*/])")


def evaluate(expression: str | int, values: Mapping[str, Any]) -> Any:
    """The value of `expression`; a single name may have any value, arithmetic needs whole numbers.

    Raises ExportError where a name has no value, is no count, or a quotient is not whole.
    """
    if isinstance(expression, int):
        return expression
    tokens = _tokens(expression)
    if len(tokens) == 1 and not tokens[0].isdigit():
        return _look_up(tokens[0], values)
    total, product, operator = 0, _count(tokens[0], values), ""
    for operator, operand in zip(tokens[1::2], tokens[2::2], strict=True):
        number = _count(operand, values)
        if operator == "+":
            total, product = total + product, number
        elif operator == "*":
            product *= number
        elif number == 0 or product % number:
            raise ExportError(
                f"config.json: {expression} must be a whole number, found {product} / {number} "
                f"({_values(tokens, values)})."
            )
        else:
            product //= number
    return total + product


def count(expression: str | int, values: Mapping[str, Any]) -> int:
    """The value of `expression`, which must be a whole number from 1 that GGUF can hold (32 bits)."""
    value = evaluate(expression, values)
    if type(value) is not int or not 0 < value < 1 << 32:
        raise ExportError(
            f"config.json: {expression!r} must be a whole number from 1, found {str(value)[:60]!r}."
        )
    return value


def _tokens(expression: str) -> list[str]:
    tokens, place = [], 0
    while place < len(expression):
        match = _TOKEN.match(expression, place)
        if not match or (match[1] in "+*/") != (len(tokens) % 2 == 1):
            raise ValueError(f"cannot read the expression {expression!r}")
        tokens.append(match[1])
        place = match.end()
    if len(tokens) % 2 == 0:
        raise ValueError(f"cannot read the expression {expression!r}")
    return tokens


def names_in(expression: str | int) -> set[str]:
    """The names that `expression` uses; ValueError where it cannot be read."""
    if isinstance(expression, int):
        return set()
    return {token for token in _tokens(expression) if token[0].isalpha() or token[0] == "_"}


def _look_up(name: str, values: Mapping[str, Any]) -> Any:
    if name not in values:
        raise ExportError(f"config.json: has no {name!r}. The folder's config is incomplete: get it again.")
    return values[name]


def _count(token: str, values: Mapping[str, Any]) -> int:
    value = int(token) if token.isdigit() else _look_up(token, values)
    if type(value) is not int or not 0 < value < 1 << 32:
        raise ExportError(f"config.json: {token!r} must be a whole number from 1, found {str(value)[:60]!r}.")
    return value


def _values(tokens: list[str], values: Mapping[str, Any]) -> str:
    names = [token for token in tokens[::2] if not token.isdigit()]
    return ", ".join(f"{name} {values[name]}" for name in names)
