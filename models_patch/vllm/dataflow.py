"""Where results go in vLLM's modules, by what their forwards compute."""

import ast
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from ..source import formula, parsed


def computes(module: Any) -> str | None:
    """The formula of a module's forward (see `source.formula`), conditions on its own flags decided; None: no formula.

    None too where something else has replaced the forward of this module.
    """
    text = None if "forward" in vars(module) else formula(type(module).forward)
    return None if text is None else ast.unparse(_Decided(module).visit(parsed(text, "eval")))


class _Decided(ast.NodeTransformer):
    def __init__(self, module: Any) -> None:
        self.module = module

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        flag = None
        match node.test:
            case ast.Attribute(ast.Name("self"), name):
                flag = getattr(self.module, name, None)
        if isinstance(flag, bool):
            return self.visit(node.body if flag else node.orelse)
        self.generic_visit(node)
        return node


def taker(parent: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """(module, name) of the one linear layer that all of the result of `parent.name` goes into; None where there isn't.

    By what the forwards of `parent`, and of the module that takes the result, compute.
    """
    goal = _goal(parent, lambda node: _is_call_of(node, name))
    if goal is None:
        return None
    callee, argument = goal
    target: Any = getattr(parent, callee, None)
    if isinstance(target, LinearBase):
        return parent, callee
    if not isinstance(target, nn.Module):  # a method, as Jamba's
        return None
    code = type(target).forward.__code__
    names = code.co_varnames[1 : code.co_argcount]
    parameter = argument if isinstance(argument, str) else names[argument] if argument < len(names) else None
    inner = _goal(target, lambda node: isinstance(node, ast.Name) and node.id == parameter)
    if inner is None or not isinstance(getattr(target, inner[0], None), LinearBase):
        return None
    return target, inner[0]


def asked_by_contract(parent: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The layer for which vLLM's `maybe_fused_act_quant` asks the activation `parent.name`."""
    for node in ast.walk(parsed(computes(parent) or "0", "eval")):
        match node:
            case ast.Call(ast.Name("maybe_fused_act_quant"), [ast.Attribute(_, act), _, ast.Attribute(_, linear)]):
                if act == name:
                    return parent, linear
    return None


def _goal(module: Any, is_source: Callable[[ast.AST], bool]) -> tuple[str, str | int] | None:
    """(method, argument) of the one call `self.method(..)` that values are handed to, wherever they are read."""
    text = computes(module)
    if text is None:
        return None
    tree = parsed(text, "eval")
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    goals = {_follow(node, parents) for node in ast.walk(tree) if is_source(node)} - {_RESIDUAL}
    return goals.pop() if len(goals) == 1 else None  # type: ignore[return-value]


_RESIDUAL = ("", 1)  # the second result of a norm, which isn't quantized


def _follow(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> tuple[str, str | int] | None:
    """The call that takes a value as it is, or one of two by a condition; None where something else is done with it."""
    while True:
        child, node = node, parents[node]
        match node:
            case ast.Subscript(ast.Call() as call, ast.Constant(0)) if _adds(call):
                pass
            case ast.Subscript(ast.Call() as call, ast.Constant(1)) if _adds(call):
                return _RESIDUAL
            case ast.IfExp(test=test) if test is not child:
                pass
            case ast.keyword(arg=str(name)):
                caller = parents[node]
                return (caller.func.attr, name) if _is_method(caller) else None  # type: ignore[attr-defined]
            case ast.Call(args=args) if _is_method(node) and child in args:
                return node.func.attr, args.index(child)  # type: ignore[attr-defined, arg-type]
            case _:
                return None


def _adds(call: ast.Call) -> bool:
    """Whether it is a norm's with a residual, which returns two tensors; of one, [0] would be its first row."""
    second = [*call.args, *(keyword.value for keyword in call.keywords)][1:]
    return len(second) == 1 and not (isinstance(second[0], ast.Constant) and second[0].value is None)


def _is_method(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "self"
    )


def _is_call_of(node: ast.AST, name: str) -> bool:
    return _is_method(node) and node.func.attr == name  # type: ignore[attr-defined]
