"""What backends for GPUs promise, each by a function `by(op, args)` that returns an operation's results on the CPU."""

import os

import torch
from compare import assert_close, assert_same
from test_ops import BITWISE, results, terms_of, tokens_of

from fused_ops._op import NO_KEY, OPS, describe
from fused_ops.rope import NORM_V, ROTARY_FLAGS, WHOLE_VECTOR

DEVICE = os.environ["FUSED_OPS_TEST_DEVICE"]


def on_device(value):
    """The value there, with the strides that it has here."""
    if not isinstance(value, torch.Tensor) or DEVICE == "cpu":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE).copy_(value)


def results_are_the_cpus(by, op, every) -> None:
    """Promise 4: what rounds nothing in another order is bitwise the same, sums differ by a step."""
    for args in every:
        expected, actual = results(op, args), by(op, args)
        for name in expected:
            a, e, context = actual[name], expected[name], f"{op.name} {name} {describe(args, op)}"
            if op.name in BITWISE or "norm" not in op.name or (name == "residual" and op.name.startswith("fused_add")):
                assert_same(a, e, context)
            elif "_quant" not in op.name and op.name != "dual_rms_norm":  # what they quantize differs by a step
                assert_close(a, e, context, roundings=2, terms=terms_of(op, args))


def fused_is_unfused(by, op, every) -> None:
    """Promise 1."""
    plain, quantize = OPS[op.name.removesuffix("_quant")], OPS["quantize"]
    n = plain.required
    for args in every:
        if tokens_of(op, args) is not None:
            continue
        fused = by(op, args)
        first, *others = by(plain, (*args[:n], *args[n + 3 :])).values()
        expected = by(quantize, (first, *args[n : n + 3]))
        expected |= {"unquantized": first, **dict(zip(op.outputs[2:-2], others, strict=True))}
        for name, value in expected.items():
            assert_same(fused[name], value, f"{op.name} {name} {describe(args, op)}")


def heads_are_normed_first(by, op, every) -> None:
    """Promise 1: `rms_norm` of rows, the operation without norms, `quantize`."""
    plain, norm_flags = OPS[op.name.removeprefix("qk_norm_")], ROTARY_FLAGS | WHOLE_VECTOR | NORM_V
    for args in every:
        named = dict(zip(op.arguments, args, strict=False))
        context, flags = f"{op.name} {describe(args, op)}", named["flags"]

        def normed(x, weight, whole, flags, eps=named["eps"]):
            rows = x.flatten(-2) if whole else x
            return by(OPS["rms_norm"], (rows, weight, eps, flags & ~norm_flags))["y"].view(x.shape)

        changed = {name: normed(named[name], named[f"{name}_weight"], flags & WHOLE_VECTOR, flags) for name in "qk"}
        changed |= {"v": normed(named["v"], None, False, 0)} if flags & NORM_V else {}
        changed |= {"flags": flags & ROTARY_FLAGS}
        expected = by(plain, tuple((named | changed)[name] for name in plain.arguments[: plain.required]))
        if (key := named.get("q_key", NO_KEY)) != NO_KEY:
            codes = by(OPS["quantize"], (expected["q"], key, named["q_given"]))
            expected |= {"q": codes["data"]} | ({"q_scale": codes["scale"]} if "scale" in codes else {})
        fused = by(op, args)
        if named.get("gate") is not None:
            assert_close(fused.pop("gate"), named["gate"].sigmoid(), context)
        assert fused.keys() == expected.keys(), context
        for name, value in expected.items():
            assert_same(fused[name], value, f"{context}: {name}")
