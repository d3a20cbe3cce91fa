"""Two RMSNorms in one launch: of the compressed query and of the compressed keys and values of MLA.

Both inputs are usually views of one projection. A result that isn't quantized (NO_KEY) has an empty scale.

Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quant import QuantizedActivation, QuantKey

from ._check import FLOATS, check, check_eps, check_key
from ._gradient import refuse_backward, refuse_backward_of
from ._op import NO_KEY, OPS, op, refused
from .norm import norm_flags
from .quantize import (
    QuantOptions,
    asked,
    case_keys,
    empty_quantized,
    given_tensor,
    key_inputs,
    plain_out,
    quantized,
    target,
)

_rms_norm = OPS["rms_norm"]


@op("q q_scale kv kv_scale q_zero_point kv_zero_point q_unquantized kv_unquantized", returns=4)
def _dual_rms_norm(
    q: Tensor,
    kv: Tensor,
    q_weight: Tensor | None,
    kv_weight: Tensor | None,
    q_eps: float,
    kv_eps: float,
    flags: int,
    q_key: int,
    kv_key: int,
    q_given: Tensor | None,
    kv_given: Tensor | None,
    q_zero_point: Tensor | None = None,
    kv_zero_point: Tensor | None = None,
):
    first = _side(q, q_weight, q_eps, flags, q_key, q_given, q_zero_point)
    return _interleaved(first, _side(kv, kv_weight, kv_eps, flags, kv_key, kv_given, kv_zero_point))


def _side(x, weight, eps, flags, key, given, zero_point) -> tuple:
    y = _rms_norm.reference(x, weight, eps, flags)
    return (y, _no_scale(x), None, None) if key == NO_KEY else quantized(y, key, given, zero_point)


def _interleaved(a: tuple, b: tuple) -> tuple:
    """The outputs of both sides, each (data, scale, zero_point, unquantized), in the operation's order."""
    return a[0], a[1], b[0], b[1], a[2], b[2], a[3], b[3]


def _no_scale(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)


@_dual_rms_norm.declares("check")
def _(
    q, kv, q_weight, kv_weight, q_eps, kv_eps, flags, q_key, kv_key, q_given, kv_given,
    q_zero_point=None, kv_zero_point=None, *, name,
):  # fmt: skip
    check(name, q=(q, "... N", FLOATS), kv=(kv, "... columns", "q"), kv_weight=(kv_weight, "columns ?", FLOATS))
    check(name, q=(q, "... N", FLOATS), q_weight=(q_weight, "N ?", FLOATS))
    check_eps(name, q_eps=q_eps, kv_eps=kv_eps)
    _rms_norm.check(q, q_weight, q_eps, flags, name=name)
    _rms_norm.check(kv, kv_weight, kv_eps, flags, name=name)
    for side, x, key, given, zero_point in (
        ("q", q, q_key, q_given, q_zero_point),
        ("kv", kv, kv_key, kv_given, kv_zero_point),
    ):
        if key != NO_KEY:
            check_key(f"{name}, {side}", key, x.shape[-1], given, x.device, zero_point, rows=side)
        elif given is not None or zero_point is not None:
            raise ValueError(f"{name}: a scale or zero point is given for {side}, which isn't quantized")


@_dual_rms_norm.declares("empty")
def _(q, kv, q_weight, kv_weight, q_eps, kv_eps, flags, q_key, kv_key, *_):
    def side(x: Tensor, key: int) -> tuple:
        return (x.new_empty(x.shape), _no_scale(x), None, None) if key == NO_KEY else empty_quantized(x, key)

    return _interleaved(side(q, q_key), side(kv, kv_key))


def _inputs(tokens: int, q_cols: int, kv_cols: int, dtype, device: str) -> tuple:
    packed = torch.randn(tokens, q_cols + kv_cols + 64, device=device).to(dtype)
    q, kv, _ = packed.split([q_cols, kv_cols, 64], dim=-1)
    return q, kv, torch.randn(q_cols, device=device).to(dtype), torch.randn(kv_cols, device=device), 1e-6, 1e-5


@_dual_rms_norm.declares("cases")
def _(device: str) -> Iterator[tuple]:
    keys = [None, *case_keys()]
    for i, key in enumerate(keys):
        for tokens, q_cols, kv_cols in (1, 1536, 512), (5, 192, 64), (0, 64, 64):
            for j, dtype in enumerate(FLOATS):
                sides = key, keys[(i + 7 * j) % len(keys)]
                codes = [(NO_KEY, None) if side is None else key_inputs(side, device) for side in sides]
                zero_points = [c[2] if len(c) > 2 else None for c in codes]
                yield (
                    *_inputs(tokens, q_cols, kv_cols, dtype, device),
                    j,
                    *(c[0] for c in codes),
                    *(c[1] for c in codes),
                    *(zero_points if any(z is not None for z in zero_points) else ()),
                )


@_dual_rms_norm.declares("workload")
def _(tokens: int, cols: int, key: QuantKey | None, dtype: torch.dtype, device: str) -> tuple:
    code, given = (NO_KEY, None) if key is None else key_inputs(key, device)[:2]
    return *_inputs(tokens, cols * 3 // 4, cols // 4, dtype, device), 0, code, NO_KEY, given, None


def dual_rms_norm(
    q: Tensor,
    kv: Tensor,
    q_weight: Tensor | None,
    kv_weight: Tensor | None,
    q_eps: float,
    kv_eps: float,
    *,
    q_quant_key: QuantKey | None = None,
    kv_quant_key: QuantKey | None = None,
    q_options: QuantOptions | None = None,
    kv_options: QuantOptions | None = None,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
) -> tuple[QuantizedActivation | Tensor, QuantizedActivation | Tensor]:
    """`rms_norm_quant` of q and of kv, in one launch; bit for bit what the two calls return.

    Args:
        q: [..., N], kv: [..., M], of one dtype S; rows may be strided, as views of one projection are.
        q_weight, kv_weight: [N], [M] or None. q_eps, kv_eps, weight_bias, round_before_weight: as in `rms_norm`.
        q_quant_key, kv_quant_key: how each is quantized; None leaves it in S.
        q_options, kv_options: see `QuantOptions`; a side without a key takes a Tensor as `out`, and nothing else.

    Returns:
        (normed q, normed kv), each a `QuantizedActivation`, or a Tensor where its key is None.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    flags = norm_flags("dual_rms_norm", weight_bias, round_before_weight)
    q_code, q_given, q_plain = _asked("q", q_quant_key, q_options)
    kv_code, kv_given, kv_plain = _asked("kv", kv_quant_key, kv_options)
    args = (q, kv, q_weight, kv_weight, q_eps, kv_eps, flags, q_code, kv_code, q_given, kv_given)
    if not (q_plain and kv_plain):
        return _write(args, (q_quant_key, q_options or {}), (kv_quant_key, kv_options or {}))
    try:
        made = _dual_rms_norm.call(*args)
    except RuntimeError as error:
        refused(_dual_rms_norm, args, error)
        raise
    if made[0].requires_grad or made[1].requires_grad or made[2].requires_grad:
        refuse_backward("dual_rms_norm", *made)
    return _result(q, q_quant_key, q_options, *made[:2]), _result(kv, kv_quant_key, kv_options, *made[2:])


def _asked(side: str, key: QuantKey | None, options: QuantOptions | None) -> tuple[int, Tensor | None, bool]:
    """(code, given tensor, whether the functional overload serves it)."""
    name = f"dual_rms_norm, {side}"
    if options is not None and not isinstance(options, dict):
        raise TypeError(f"{name}: options are {type(options).__name__}, expected a dict")
    if key is None:
        return NO_KEY, None, plain_out(name, options or {}) is None
    if type(key) is not QuantKey:
        raise TypeError(f"{name}: quant_key is {type(key).__name__}, expected a QuantKey or None")
    if key.code < 0:
        raise ValueError(f"{name}: quant_key has groups that span rows, as only a weight's do")
    options = options or {}
    plain = key.symmetric and all(option in ("scale", "scale2", "scale_ub") for option in asked(name, options))
    return key.code, given_tensor(name, key, options), plain


def _write(args: tuple, *sides: tuple[QuantKey | None, QuantOptions]) -> tuple:
    """Run the `out` overload, for all that isn't the plain functional call."""
    args = (*args, *(options.get("zero_point") for _, options in sides))
    written: dict[str, Tensor | None] = {}
    results: list[Any] = []
    try:
        _dual_rms_norm.check(*args)
        fresh = dict(zip(_dual_rms_norm.outputs, _dual_rms_norm.empty(*args), strict=True))
        for name, (key, options) in zip(("q", "kv"), sides, strict=True):
            own = {"data": name} | {part: f"{name}_{part}" for part in ("scale", "zero_point", "unquantized")}
            if key is None:
                result = fresh[name] if options.get("out") is None else options["out"]
                parts = {"data_out": result}
            else:
                made = {part: fresh[output] for part, output in own.items()}
                result, parts = target(f"dual_rms_norm, {name}", key, options, made, args[0].dtype)
            written |= {f"{output}_out": parts.get(f"{part}_out") for part, output in own.items()}
            results.append(result)
        _dual_rms_norm.out(*args, **written)
    except RuntimeError as error:
        refused(_dual_rms_norm, args, error, written)
        raise
    refuse_backward_of("dual_rms_norm", args, written.values())
    return tuple(results)


def _result(x: Tensor, key: QuantKey | None, options: Any, data: Tensor, scale: Tensor) -> QuantizedActivation | Tensor:
    if key is None:
        return data
    options = options or {}
    given = options.get("scale")
    return QuantizedActivation(data, scale if given is None else given, key, x.dtype, options.get("scale2"))
