"""The text form of policies: ``h2o(heavy=0.1, recent=0.1) | skipdecode(min_layers=11, max_layers=22)``."""

from __future__ import annotations

import ast
import difflib
from dataclasses import fields

from .base import REGISTRY, Policy
from .compose import compose


def parse_policy(text: str) -> Policy:
    """The policy that ``text`` describes; ``parse_policy(str(policy)) == policy``.

    A policy is its class name in lower case with keyword arguments that are plain literals; ``|`` combines policies.
    Raises ValueError for an unknown policy or argument, naming the nearest known one, or a value that the policy
    refuses; TypeError when ``text`` is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"policy must be text, got {text!r}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"policy {text!r} cannot be read: {error.msg}") from None
    return _build(tree, text)


def _build(node: ast.expr, text: str) -> Policy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return compose(_build(node.left, text), _build(node.right, text))
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name):
        raise ValueError(f"policy {text!r} cannot be read: expected name(argument=value, ...), joined by |")
    name = call.func.id
    cls = REGISTRY.get(name.lower())
    if cls is None:
        raise ValueError(f"unknown policy {name!r} in {text!r}{_nearest(name.lower(), REGISTRY)}")
    if call.args:
        raise ValueError(f"policy {text!r}: arguments of {name} must be given by name, for example {cls()}")
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    values = {}
    for keyword in call.keywords:
        if keyword.arg not in known:
            raise ValueError(f"{name} has no argument {keyword.arg!r}{_nearest(str(keyword.arg), known)}")
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            raise ValueError(f"{name}: {keyword.arg} must be a number or text in {text!r}") from None
    return cls(**values)


def _nearest(word: str, known: object) -> str:
    options = sorted(map(str, known))  # type: ignore[call-overload]
    close = difflib.get_close_matches(word, options, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(options)}"
