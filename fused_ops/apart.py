"""Ranks that share no memory: what an operation refuses, then the group's own collectives and the unfused operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant import QuantKey

from ._gradient import refuse_backward_of
from ._memory import check_inputs_survive, check_outputs
from ._op import Op, invoke
from .norm import both
from .quantize import QuantOptions, asked, given_tensor, plain_out, run_quant, target
from .workspace import AllReduceWorkspace


def by_group(name: str, x: Tensor, workspace: AllReduceWorkspace) -> Tensor:
    """The group's own sum of every rank's x, where they share no memory, for the operation `name`."""
    ops = torch.ops._c10d_functional
    total = ops.wait_tensor(ops.all_reduce(x.detach().contiguous(), "sum", workspace.group_name))
    refuse_backward_of(name, (x,), (total,))
    return total


def apart(workspace: Any) -> bool:
    """Whether this is a workspace whose ranks share no memory."""
    return isinstance(workspace, AllReduceWorkspace) and not workspace.shared


def check_apart(op: Op, args: tuple, outs: dict[str, Tensor | None]) -> None:
    """Raise what the operation refuses, before ranks that share no memory exchange anything."""
    op.check(*args)
    if not torch.compiler.is_compiling():  # tensors of a graph have no addresses
        check_outputs(op, args, outs)
        check_inputs_survive(op, args, {name: out for name, out in outs.items() if out is not None})


def invoke_apart(op: Op, args: tuple, make: Callable[[], Any], outs: tuple | None = None) -> Any:
    """`invoke` where ranks share no memory: the same refusals, then the results of `make`."""
    outs = (None,) * op.returns if outs is None else outs
    check_apart(op, args, {f"{name}_out": out for name, out in zip(op.outputs, outs, strict=False)})
    with torch.no_grad():
        made = make()
        made = made if isinstance(made, tuple) else (made,)
        made = tuple(y if out is None else out.copy_(y) for y, out in zip(made, outs, strict=True))
    refuse_backward_of(op.name, args, made)
    return made[0] if len(made) == 1 else made


def check_quant_apart(
    plain: Op,
    fused: Op,
    args: tuple,
    key: QuantKey | None,
    quant: QuantOptions,
    residual_out: Tensor | None = None,
    optional: tuple = (),
) -> None:
    """The refusals of `plain`, or of `fused` where there is a key, as `run_quant` takes its arguments."""
    outs: dict[str, Tensor | None] = {} if residual_out is None else {"residual_out": residual_out}
    if key is None:
        return check_apart(plain, (*args, *optional), {"y_out": plain_out(fused.name, quant), **outs})
    if type(key) is not QuantKey:
        raise TypeError(f"{fused.name}: quant_key is {type(key).__name__}, expected a QuantKey")
    asked(fused.name, quant)
    args = (*args, key.code, given_tensor(fused.name, key, quant), quant.get("zero_point"), *optional)
    fused.check(*args)
    fresh = dict(zip(fused.outputs, fused.empty(*args), strict=True))
    _, written = target(fused.name, key, quant, fresh, args[0].dtype)
    check_apart(fused, args, written | outs)


class FusedNorm(NamedTuple):
    """Operations that are one: a sum over ranks and a norm of it, and the norm alone; each without and with codes."""

    plain: Op
    quantized: Op
    norm: Op
    norm_quantized: Op


def run_norm(
    ops: FusedNorm,
    args: tuple,
    workspace: AllReduceWorkspace,
    key: QuantKey | None,
    quant: QuantOptions,
    residual_out: Tensor | None = None,
    optional: tuple = (),
    total: Callable[[str, Tensor, AllReduceWorkspace], Tensor] = by_group,
) -> Any:
    """Call one of `ops` as its public function does; where ranks share no memory, the norm of the group's own sum.

    args: x, the norm's other inputs, and the workspace as `ranks_of` has it. total: the rows of the sum that this rank
    norms.
    """
    plain, fused = ops.plain, ops.quantized
    if apart(workspace):
        check_quant_apart(plain, fused, args, key, quant, residual_out, optional)
        args = (total(fused.name, args[0], workspace), *args[1:-3])
        plain, fused = ops.norm, ops.norm_quantized
    if key is None:
        outs = both(plain_out(fused.name, quant), residual_out)
        return invoke(plain, args, None if outs is None else outs[: plain.returns], optional)
    return run_quant(fused, args, key, quant, None if residual_out is None else {"residual": residual_out}, optional)
