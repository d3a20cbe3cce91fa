"""What this library sets out to reach on a 2-core AVX2 machine, and whether a run did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from quant import NAMED_KEYS

ADD_NORM = ("fused_add_rms_norm_quant",)
BYTE_KEYS = ("INT8_DYNAMIC_TOKEN", "FP8_DYNAMIC_TOKEN", "FP8_DYNAMIC_GROUP_128")
INT8, FP8 = BYTE_KEYS[:1], BYTE_KEYS[1:]
HEADS = (
    "rope",
    "qk_norm_rope",
    "rope_kv_cache_write",
    "qk_norm_rope_kv_cache_write",
    "mla_rope_kv_cache_concat",
)


@dataclass(frozen=True)
class Bar:
    """`figure` of every result of these operations, keys and numbers of tokens is at least `least` (or at most `most`).

    ops: none: all that work on rows, but not on heads. keys: none: results without one.
    cases: of attention, by name; then tokens and cols count for nothing.
    figure: path of the number in a result, such as ("times_faster", "vllm").
    source: why this much.
    """

    source: str
    ops: tuple[str, ...]
    figure: tuple[str, ...]
    keys: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    cols: int = 4096
    cases: tuple[str, ...] = field(default=(), kw_only=True)
    least: float = field(default=0.0, kw_only=True)
    most: float = field(default=float("inf"), kw_only=True)

    def holds_for(self, result: dict) -> bool:
        if "call" in result:
            return result["call"] in self.ops and self.figure == ("times_add",)
        if "case" in result:
            return result["op"] in self.ops and result["key"] in (self.keys or (None,)) and result["case"] in self.cases
        return (
            (result["op"] in self.ops if self.ops else "share_of_copy" in result and result["op"] not in HEADS)
            and result["key"] in (self.keys or (None,))
            and result["tokens"] in self.tokens
            and result["cols"] == self.cols
        )


def _call(function: str, most: float) -> Bar:
    return Bar("prototype: 0.85 to 0.95 of this", (function,), ("times_add",), most=most)


SHARE = ("share_of_copy",)
INT8_KEYS = tuple(name for name in NAMED_KEYS if name.startswith("INT8"))
FP8_KEYS = tuple(name for name in NAMED_KEYS if name.startswith("FP8"))
SMALL_GROUPS = ("MXFP8", "MXFP4", "NVFP4")
COMPILE, VLLM = ("times_faster", "torch.compile"), ("times_faster", "vllm")
GATHERED, ALONE = ("times_faster", "gather + torch"), ("times_alone",)
ATTENTION = ("paged_attention", "mla_attention")
FUSED_ATTENTION = tuple(f"{op}_quant" for op in ATTENTION)
ATTENTION_KEYS = ("INT8_DYNAMIC_TOKEN", "FP8_STATIC_TENSOR", "FP8_DYNAMIC_GROUP_128")
DECODE = ("decode", "mla decode")
EVERY_BATCH = (*DECODE, "prefill", "mixed")
BARS = (
    Bar("prototype: 3.2x at 512 rows", ADD_NORM, COMPILE, BYTE_KEYS, (512, 4096), least=3.0),
    Bar("prototype: 1.63x", ADD_NORM, VLLM, INT8, (512,), least=1.6),
    Bar("prototype: 1.31x", ADD_NORM, VLLM, INT8, (4096,), least=1.3),
    Bar("prototype: 0.61; bound by arithmetic", ADD_NORM, ("share_of_copy",), INT8, (4096,), least=0.55),
    Bar("prototype: 0.45; bound by arithmetic", ADD_NORM, ("share_of_copy",), FP8, (4096,), least=0.4),
    Bar("one pass against two or more", ("silu_mul_quant",), COMPILE, BYTE_KEYS, (512, 4096), least=2.0),
    Bar("its exp isn't vectorised", ("silu_mul_quant",), VLLM, BYTE_KEYS, (512, 4096), least=5.0),
    Bar("little arithmetic", (), SHARE, (), (4096,), least=0.8),
    Bar("bound by arithmetic", (), SHARE, INT8_KEYS, (4096,), least=0.6),
    Bar("bound by arithmetic", (), SHARE, FP8_KEYS, (4096,), least=0.5),
    Bar("bound by arithmetic", (), SHARE, SMALL_GROUPS, (4096,), least=0.4),
    Bar("one pass", (), COMPILE, (), (4096,), least=2.0),
    Bar("one pass", (), COMPILE, INT8_KEYS + FP8_KEYS + SMALL_GROUPS, (4096,), least=2.0),
    Bar("in a cache; one pass", HEADS, SHARE, (), (512,), least=0.6),
    Bar("one pass", HEADS, COMPILE, (), (512,), least=2.0),
    _call("rms_norm", 2.0),
    _call("fused_add_rms_norm", 2.4),
    _call("rms_norm_quant", 2.8),
    _call("fused_add_rms_norm_quant", 3.5),
    Bar("half the bytes", ("scaled_linear",), ("times_faster", "bfloat16 linear"), BYTE_KEYS, (1,), least=1.5),
    Bar("1.3x fp32's time", ("scaled_linear",), ("times_faster", "float32 linear"), BYTE_KEYS, (256,), least=1 / 1.3),
    Bar("codes of rows in a cache", FUSED_ATTENTION, ALONE, ATTENTION_KEYS, cases=EVERY_BATCH, most=1.05),
    Bar("the cache is read once, not copied", ATTENTION, GATHERED, cases=DECODE, least=2.0),
    Bar("reads the same bytes", ATTENTION, VLLM, cases=DECODE, least=1.0),
    Bar("the same products", ATTENTION, VLLM, cases=("prefill", "mixed"), least=1.0),
    Bar("the same products", ATTENTION, ("times_faster", "torch"), cases=("prefill",), least=1.0),
)
# On GPUs, where only this has been set out: what is stored is smaller than it was.
GPU_BARS = (Bar("fewer bytes written", FUSED_ATTENTION, ALONE, ATTENTION_KEYS, cases=EVERY_BATCH, most=1.02),)


def check(results: list[dict], bars: tuple[Bar, ...] = BARS) -> Iterator[dict]:
    """Every result that a bar speaks of and that has the figure, with what was wanted and got."""
    for bar in bars:
        for result in filter(bar.holds_for, results):
            got: Any = result
            for step in bar.figure:
                got = got.get(step) if got else None
            if got is None:  # the peer isn't there
                continue
            named = ("op", "key", "label") if "case" in result else ("call", "op", "key", "tokens")
            yield {
                "what": " ".join(str(result[k]) for k in named if result.get(k)),
                "figure": " ".join(bar.figure).replace("_", " "),
                "wanted": f">= {bar.least:.2f}" if bar.least else f"<= {bar.most:.2f}",
                "got": got,
                "reached": bar.least <= got <= bar.most,
                "source": bar.source,
            }
