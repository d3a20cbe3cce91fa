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

from ._check import FLOATS, check, check_key, number
from ._op import NO_KEY, OPS, op, refuse_backward, refused
from .norm import norm_flags, rms_norm_quant
from .quantize import QuantOptions, case_keys, empty_quantized, given_tensor, key_inputs, plain_out, quantized

_rms_norm = OPS["rms_norm"]


@op("q q_scale kv kv_scale")
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
):
    sides = (q, q_weight, q_eps, q_key, q_given), (kv, kv_weight, kv_eps, kv_key, kv_given)
    results: list[Tensor] = []
    for x, weight, eps, key, given in sides:
        y = _rms_norm.reference(x, weight, eps, flags)
        results += [y, _no_scale(x)] if key == NO_KEY else quantized(y, key, given, None)[:2]
    return tuple(results)


def _no_scale(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)


@_dual_rms_norm.declares("check")
def _(q, kv, q_weight, kv_weight, q_eps, kv_eps, flags, q_key, kv_key, q_given, kv_given, *, name):
    check(name, q=(q, "... N", FLOATS), kv=(kv, "... M", "q"), kv_weight=(kv_weight, "M ?", FLOATS))
    check(name, q=(q, "... N", FLOATS), q_weight=(q_weight, "N ?", FLOATS))
    number(name, q_eps=q_eps, kv_eps=kv_eps)
    _rms_norm.check(q, q_weight, q_eps, flags, name=name)
    _rms_norm.check(kv, kv_weight, kv_eps, flags, name=name)
    for x, key, given in (q, q_key, q_given), (kv, kv_key, kv_given):
        if key != NO_KEY:
            check_key(name, key, x.shape[-1], given, x.device)
        elif given is not None:
            raise ValueError(f"{name}: a scale is given for a result that isn't quantized")


@_dual_rms_norm.declares("empty")
def _(q, kv, q_weight, kv_weight, q_eps, kv_eps, flags, q_key, kv_key, *_):
    results: list[Tensor] = []
    for x, key in (q, q_key), (kv, kv_key):
        results += [x.new_empty(x.shape), _no_scale(x)] if key == NO_KEY else empty_quantized(x, key)[:2]
    return tuple(results)


def _inputs(tokens: int, q_cols: int, kv_cols: int, dtype, device: str) -> tuple:
    packed = torch.randn(tokens, q_cols + kv_cols + 64, device=device).to(dtype)
    q, kv, _ = packed.split([q_cols, kv_cols, 64], dim=-1)
    return q, kv, torch.randn(q_cols, device=device).to(dtype), torch.randn(kv_cols, device=device), 1e-6, 1e-5


@_dual_rms_norm.declares("cases")
def _(device: str) -> Iterator[tuple]:
    keys = [None, *(key for key in case_keys() if key.symmetric)]
    for i, key in enumerate(keys):
        for tokens, q_cols, kv_cols in (1, 1536, 512), (5, 192, 64), (0, 64, 64):
            for j, dtype in enumerate(FLOATS):
                sides = key, keys[(i + 7 * j) % len(keys)]
                codes = [(NO_KEY, None) if side is None else key_inputs(side, device) for side in sides]
                yield (
                    *_inputs(tokens, q_cols, kv_cols, dtype, device),
                    j,
                    *(c[0] for c in codes),
                    *(c[1] for c in codes),
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
        q_options, kv_options: see `QuantOptions`. Given outputs, `keep_unquantized`, `pad_rows` and asymmetric keys
            take two launches.

    Returns:
        (normed q, normed kv), each a `QuantizedActivation`, or a Tensor where its key is None.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    sides = (q, q_weight, q_eps, q_quant_key, q_options or {}), (kv, kv_weight, kv_eps, kv_quant_key, kv_options or {})
    flags = norm_flags("dual_rms_norm", weight_bias, round_before_weight)
    codes: list[int] = []
    given: list[Tensor | None] = []
    for _, _, _, key, options in sides:
        if key is not None and type(key) is not QuantKey:
            raise TypeError(f"dual_rms_norm: quant_key is {type(key).__name__}, expected a QuantKey or None")
        if not _one_launch(key, options):
            rounding = {"weight_bias": weight_bias, "round_before_weight": round_before_weight}
            results = [rms_norm_quant(x, w, eps, k, **rounding, **o) for x, w, eps, k, o in sides]  # type: ignore[arg-type]
            return results[0], results[1]
        codes.append(NO_KEY if key is None else key.code)
        given.append(None if key is None else given_tensor("dual_rms_norm", key, options))
    args = (q, kv, q_weight, kv_weight, q_eps, kv_eps, flags, *codes, *given)
    try:
        made = _dual_rms_norm.call(*args)
    except RuntimeError as error:
        refused(_dual_rms_norm, args, error)
        raise
    if made[0].requires_grad or made[1].requires_grad or made[2].requires_grad:
        refuse_backward("dual_rms_norm", *made)
    return _result(q, q_quant_key, q_options, *made[:2]), _result(kv, kv_quant_key, kv_options, *made[2:])


def _one_launch(key: QuantKey | None, options: QuantOptions) -> bool:
    asked = [options.get(name) for name in ("out", "zero_point", "keep_unquantized")]
    if key is None:
        return plain_out("dual_rms_norm", options) is None
    return all(a is None or a is False for a in asked) and key.symmetric and options.get("pad_rows", 1) == 1


def _result(x: Tensor, key: QuantKey | None, options: Any, data: Tensor, scale: Tensor) -> QuantizedActivation | Tensor:
    if key is None:
        return data
    options = options or {}
    given = options.get("scale")
    return QuantizedActivation(data, scale if given is None else given, key, x.dtype, options.get("scale2"))
