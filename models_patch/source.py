"""What a forward computes, read from its source: enough to tell whether a fused body may take its place."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
from collections.abc import Callable
from typing import Any

_parsing = threading.Lock()


@functools.cache
def formula(function: Callable, **helpers: Callable) -> str | None:
    """What `function` returns, as one expression of its parameters; None where it does more than assign and return.

    More is also a call of its own methods or submodules whose result goes nowhere.

    Locals are replaced by their values, by a conditional expression where a branch assigns them; `not` in a condition
    turns it round; keywords stand in order, and an option (a parameter after the first) that is passed on under its own
    name counts as part of `**kwargs`. So names of variables and options that are only handed through don't matter, and
    of the same object two methods with the same formula compute the same.

    helpers: functions whose calls, by these names, are replaced by what they return.
    """
    definition = _definition(function)
    if definition is None:
        return None
    options = {argument.arg for argument in definition.args.args[2:]} | {"kwargs"}
    value = _Inline(options, helpers, {}).returned(definition)
    return None if value is None else ast.unparse(value)


@functools.cache
def reads(function: Callable, name: str) -> tuple[str, ...] | None:
    """How `function` reads the variable `name`, in order of the source: "x.shape[:-1]", "self.q_proj(x)", "y = x".

    A call is shown with this argument alone. None where there is no source.
    """
    definition = _definition(function)
    if definition is None:
        return None
    parents = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
    names = [node for node in ast.walk(definition) if isinstance(node, ast.Name) and node.id == name]
    names = [node for node in names if isinstance(node.ctx, ast.Load)]
    names.sort(key=lambda node: (node.lineno, node.col_offset))
    return tuple(_read(node, parents) for node in names)


@functools.cache
def statements(function: Callable) -> str | None:
    """The text of a function's body without its docstring, for one that does more than assign and return."""
    definition = _definition(function)
    if definition is None:
        return None
    docstring = ast.get_docstring(definition) is not None
    return "\n".join(map(ast.unparse, definition.body[docstring:]))


@functools.cache
def first_argument(function: Callable) -> str | None:
    """The name of a method's first parameter after `self`; None where there is none, or no source."""
    definition = _definition(function)
    return definition.args.args[1].arg if definition is not None and len(definition.args.args) > 1 else None


def parsed(text: str, mode: str = "exec") -> Any:
    """`ast.parse`, by one thread at a time: Python 3.11's raises SystemError now and then where two are in it."""
    with _parsing:
        return ast.parse(text, mode=mode)


def _definition(function: Callable) -> ast.FunctionDef | None:
    # Decorators of transformers and torch are known to leave the result alone; others may change it.
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        module = getattr(function, "__globals__", {}).get("__name__", "")
        if module.partition(".")[0] not in ("transformers", "torch"):
            return None
        function = wrapped
    try:
        tree = parsed(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # built in, compiled, or typed at a prompt
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


def _parts(value: ast.expr, count: int) -> list[ast.expr]:
    if (
        isinstance(value, ast.Tuple)
        and len(value.elts) == count
        and not any(isinstance(part, ast.Starred) for part in value.elts)
    ):
        return value.elts
    return [ast.Subscript(value, ast.Constant(index), ast.Load()) for index in range(count)]


def _conditional(test: ast.expr, then: ast.expr, otherwise: ast.expr) -> ast.expr:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return ast.IfExp(test.operand, otherwise, then)
    return ast.IfExp(test, then, otherwise)


class _Inline(ast.NodeTransformer):
    def __init__(self, options: set[str], helpers: dict[str, Callable], values: dict[str, ast.expr]) -> None:
        self.options, self.helpers, self.values = options, helpers, values
        self.calls: set[str] = set()  # of methods and submodules: a result that nothing reads is work all the same

    def returned(self, definition: ast.FunctionDef) -> ast.expr | None:
        *body, last = definition.body
        if not all(map(self.assign, body)) or not isinstance(last, ast.Return) or last.value is None:
            return None
        value = self.visit(last.value)
        text = ast.unparse(value)
        return value if all(call in text for call in self.calls) else None

    def assign(self, statement: ast.stmt) -> bool:
        """Take note of what the statement assigns to names; False where it does anything else."""
        match statement:
            case ast.Expr(ast.Constant()):  # the docstring
                pass
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                self.values[name] = self.visit(value)
            case ast.Assign([ast.Tuple(targets)], value) if all(isinstance(target, ast.Name) for target in targets):
                parts = _parts(self.visit(value), len(targets))
                self.values.update(zip((ast.unparse(target) for target in targets), parts, strict=True))
            case ast.If(test, body, orelse):
                return self.choose(self.visit(test), body, orelse)
            case _:
                return False
        return True

    def choose(self, test: ast.expr, *branches: list[ast.stmt]) -> bool:
        before, after = self.values, []
        for branch in branches:
            self.values = dict(before)
            if not all(map(self.assign, branch)):
                return False
            after.append(self.values)
        self.values = before
        for name in sorted({*after[0], *after[1]}):
            then, otherwise = (values.get(name, ast.Name(name, ast.Load())) for values in after)
            before[name] = then if then is otherwise else _conditional(test, then, otherwise)
        return True

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.values.get(node.id, node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in self.helpers:
            return self.inlined(self.helpers[node.func.id], node.args)
        own = [keyword for keyword in node.keywords if not self._handed_through(keyword)]
        kwargs = [ast.keyword(None, ast.Name("kwargs", ast.Load()))] if len(own) < len(node.keywords) else []
        node.keywords = sorted(own, key=lambda keyword: keyword.arg or "") + kwargs
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "self":
            self.calls.add(ast.unparse(node))
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        return _conditional(node.test, node.body, node.orelse)

    def inlined(self, helper: Callable, arguments: list[ast.expr]) -> ast.expr:
        definition = _definition(helper)
        assert definition is not None, helper
        names = [argument.arg for argument in definition.args.args]
        value = _Inline(self.options, self.helpers, dict(zip(names, arguments, strict=True))).returned(definition)
        assert value is not None, helper
        return value

    def _handed_through(self, keyword: ast.keyword) -> bool:
        value = keyword.value
        return isinstance(value, ast.Name) and value.id in self.options and keyword.arg in (value.id, None)


def _read(node: ast.expr, parents: dict[ast.AST, ast.AST]) -> str:
    parent = parents[node]
    while isinstance(parent, (ast.Attribute, ast.Subscript)) and parent.value is node:
        node, parent = parent, parents[parent]
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        return ast.unparse(parent)
    passed = parents[parent] if isinstance(parent, ast.keyword) else parent
    if isinstance(passed, ast.Call) and passed.func is not node:
        return f"{ast.unparse(passed.func)}({ast.unparse(node)})"
    return ast.unparse(node if isinstance(node, (ast.Attribute, ast.Subscript)) else parent)
