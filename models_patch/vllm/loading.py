"""What is done once vLLM has loaded a model: who quantizes for whom, which attention is replaced, and the report."""

import ast
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.worker.cpu_worker import CPUWorker

from ..report import Entry, Report
from ..source import formula, parsed
from . import attention
from .layers import Fused, FusedGeluAndMul, FusedRMSNorm, FusedSiluAndMul
from .linear import input_quant

logger = init_logger("vllm.fused_ops")
NORM = "(fused_add_)rms_norm"  # with an addition where the model hands over a residual
OPERATIONS = {FusedRMSNorm: NORM, FusedSiluAndMul: "silu_mul", FusedGeluAndMul: "gelu_tanh_mul"}


def register(parts: frozenset[str]) -> None:
    stock = CPUWorker.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        transfers = self.vllm_config.kv_transfer_config is not None
        report = connect(self.get_model(), parts, "caches are sent elsewhere" if transfers else "")
        if self.rank == 0:
            logger.info("fused_ops: %s", report)
        return result

    CPUWorker.load_model = load_model


def connect(model: nn.Module, parts: frozenset[str], kept: str = "") -> Report:
    """Tell norms and activations for which layer they quantize, and bind attentions.

    kept: why attention stays vLLM's in this process; "" where it needn't.
    """
    entries = []
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if isinstance(child, Fused):
                entries.append(_connect(f"{path}.{name}".lstrip("."), module, name, child))
            elif isinstance(child, Attention) and "attention" in parts:
                entries.append(_attention(path, module, kept))
            elif isinstance(child, GemmaRMSNorm) and "norm" in parts:
                entries.append(Entry(f"{path}.{name}", type(child).__name__, NORM, note="by vLLM's IR"))
    return Report(type(model).__name__, tuple(entries))


def _connect(path: str, parent: nn.Module, name: str, child: Any) -> Entry:
    stock = type(child).__mro__[2].__name__
    if not child.is_fused:
        return Entry(path, stock, None, note="switched off, or a variant that isn't served")
    operation = OPERATIONS[type(child)]
    if (owner := _through_contract(parent, name)) is not None:
        options, _ = input_quant(getattr(*owner))
    else:
        child.feeds = taker(parent, name)
        options, _ = input_quant(child.consumer)
    key = options["quant_key"]
    if key is None:
        return Entry(path, stock, operation)
    feeds = (owner or child.feeds)[1]
    return Entry(path, stock, f"{operation}_quant", key, (feeds,))


def _attention(path: str, module: Any, kept: str) -> Entry:
    note = kept or attention.problem(module)
    if note:
        return Entry(path, type(module).__name__, None, note=note)
    attention.bind(module)
    key = input_quant(module.o_proj)[0]["quant_key"]
    operation = "rope_kv_cache_write, paged_attention" + ("_quant" if key else "")
    return Entry(path, type(module).__name__, operation, key, ("o_proj",) if key else ())


# --- where a result goes ---


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
    forward = getattr(type(target), "forward", None)
    names = list(forward.__code__.co_varnames[1 : forward.__code__.co_argcount]) if forward is not None else []
    parameter = argument if isinstance(argument, str) else names[argument] if argument < len(names) else None
    inner = _goal(target, lambda node: isinstance(node, ast.Name) and node.id == parameter)
    if inner is None or not isinstance(getattr(target, inner[0], None), LinearBase):
        return None
    return target, inner[0]


def _through_contract(parent: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The layer for which vLLM's `maybe_fused_act_quant` asks the activation `parent.name`."""
    text = None if "forward" in vars(parent) else formula(type(parent).forward)
    for node in ast.walk(parsed(text or "0", "eval")):
        match node:
            case ast.Call(ast.Name("maybe_fused_act_quant"), [ast.Attribute(_, act), _, ast.Attribute(_, linear)]):
                if act == name:
                    return parent, linear
    return None


def _goal(module: Any, is_source: Callable[[ast.AST], bool]) -> tuple[str, str | int] | None:
    """(method, argument) of the one call `self.method(..)` that values are handed to, wherever they are read."""
    text = None if "forward" in vars(module) else formula(type(module).forward)
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
            case ast.Subscript(ast.Call(), ast.Constant(0)):
                pass
            case ast.Subscript(ast.Call(), ast.Constant(1)):
                return _RESIDUAL
            case ast.IfExp(test=test) if test is not child:
                pass
            case ast.keyword(arg=str(name)):
                call = parents[node]
                return (call.func.attr, name) if _is_method(call) else None  # type: ignore[attr-defined]
            case ast.Call(args=args) if _is_method(node) and child in args:
                return node.func.attr, args.index(child)  # type: ignore[attr-defined, arg-type]
            case _:
                return None


def _is_method(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "self"
    )


def _is_call_of(node: ast.AST, name: str) -> bool:
    return _is_method(node) and node.func.attr == name  # type: ignore[attr-defined]
