"""The FlashInfer backend of attention: its paged wrappers, and this library's `quantize` after them.

Never chosen by default: `with use_backend("flashinfer")`, in which `quantize` stays what it is on the device. It stands
outside promise 2 (a row never depends on its neighbours), doesn't give 3 and 5 (run twice, same bits; nothing is
hidden), which FlashInfer doesn't state, and rounds more often than 1 allows with a v_scale and in MLA; a quantized
result is `quantize` of the unquantized one all the same:

- How FlashInfer splits a sequence over blocks follows from the whole batch, and so do a row's last bits.
- It multiplies keys that a row doesn't see with 0, so NaN in them, or in what lies behind a sequence in its last block,
  may reach the row.
- v_scale multiplies results that were rounded to S, which are rounded once more. MLA is always absorbed, and its
  queries and results in the space of latents are rounded to S.

Sequences are read on the host and planned for anew in every call, which waits for the stream; a CUDA graph can't hold
that. Numbers out of range give NaN, as in the library's own kernels: such a sequence isn't handed to FlashInfer.

Its wrappers split sequences in a workspace of 384 MiB. At most two of them a device are kept between calls, those of
the streams that were used last (calls at one time on one stream have one each while they last), until the process ends.

Written for flashinfer-python 0.6.13; others serve that have the same parameters.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from quant import QuantKey

from ._flashinfer_inputs import ALIGNED, RANK, ROPE, Batch, Latent, Paged, batch_of, refuses_latent, refuses_paged
from ._op import OPS, Backend

NAME = "flashinfer"
WORKSPACE = 384 << 20  # bytes, for a stream: partial results of sequences that are split
KEPT = 2  # workspaces, of a device

CALLS = {  # what is called, of a class or a module, and what is handed over: by place, then after * by name
    ("BatchPrefillWithPagedKVCacheWrapper", "__init__"): "float_workspace_buffer * kv_layout",
    ("BatchPrefillWithPagedKVCacheWrapper", "plan"): (
        "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk "
        "page_size * causal sm_scale window_left logits_soft_cap q_data_type kv_data_type"
    ),
    ("BatchPrefillWithPagedKVCacheWrapper", "run"): "q paged_kv_cache * k_scale v_scale",
    ("BatchDecodeWithPagedKVCacheWrapper", "__init__"): "float_workspace_buffer * kv_layout use_tensor_cores",
    ("BatchDecodeWithPagedKVCacheWrapper", "plan"): (
        "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size "
        "* sm_scale window_left logits_soft_cap q_data_type kv_data_type"
    ),
    ("BatchDecodeWithPagedKVCacheWrapper", "run"): "q paged_kv_cache * k_scale v_scale",
    ("BatchMLAPagedAttentionWrapper", "__init__"): "float_workspace_buffer",
    ("BatchMLAPagedAttentionWrapper", "plan"): (
        "qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe page_size causal sm_scale "
        "q_data_type kv_data_type"
    ),
    ("BatchMLAPagedAttentionWrapper", "run"): "q_nope q_pe ckv_cache kpe_cache",
}


def missing(calls: dict[tuple[str, str], str] = CALLS) -> str | None:
    """What must be installed for these calls; FlashInfer is imported to see whether it takes them."""
    how = "with nvcc and ninja: pip install 'flashinfer-python==0.6.13'"
    if not importlib.util.find_spec("flashinfer"):
        return f"FlashInfer, {how}"
    try:
        found = library()
    except Exception as error:  # of its own, or of what it needs
        return f"FlashInfer, {how}; what is here can't be imported ({type(error).__name__}: {error})"
    if other := _differs(found, calls):
        version = getattr(found, "__version__", "of unknown version")
        return f"a FlashInfer that is called as 0.6.13; {version} is here, whose {other}"
    return None


def _differs(flashinfer: Any, calls: dict[tuple[str, str], str]) -> str:
    """Which of its parameters aren't those of `calls`, or nothing."""
    for (kind, method), names in calls.items():
        placed, named = (part.split() for part in (*names.split("*"), "")[:2])
        name, owner = f"{kind}.{method}", getattr(flashinfer, kind, None)
        function = getattr(owner, method, None)
        if function is None:
            return f"{name} is missing"
        parameters = list(inspect.signature(function).parameters.values())[isinstance(owner, type) :]
        theirs = [p.name for p in parameters]
        if theirs[: len(placed)] != placed:
            return f"{name} takes {', '.join(theirs[: len(placed)])}, expected {', '.join(placed)}"
        if absent := [name for name in named if name not in theirs]:
            return f"{name} has no {', '.join(absent)}"
        rest = [
            p for p in parameters if p.name not in (*placed, *named) and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if more := [p.name for p in rest if p.default is p.empty]:
            return f"{name} needs {', '.join(more)}, too"
    return ""


# --- its wrappers ---


def library() -> Any:
    return importlib.import_module("flashinfer")


class Workspace:
    """The memory of a stream, with the wrappers that use it one after the other.

    A wrapper holds one plan at a time and keeps the kernels of its first: there is one for each choice of dtypes.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        self.wrappers: dict[tuple, Any] = {}

    def wrapper(self, kind: str, _: torch.device, *dtypes: torch.dtype, **options) -> Any:
        """FlashInfer's class of this name."""
        choice = (kind, *dtypes)
        if choice not in self.wrappers:
            self.wrappers[choice] = getattr(library(), kind)(self.memory, **options)
        return self.wrappers[choice]


_kept: OrderedDict[tuple[torch.device, int], Workspace] = OrderedDict()  # idle ones, used last last
_lock = threading.Lock()  # of that alone: a thread that held it while it waits could stop another device's


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@contextmanager
def workspace(device: torch.device) -> Iterator[Workspace]:
    """That of the current stream, nobody else's in this block, in which the sequences must be read on the host.

    Reading waits for the stream: the last plan, which is copied from the host, is then where it belongs.
    """
    place = device, _stream(device)
    with _lock:
        lent = _kept.pop(place, None)
    lent = lent or Workspace(device)
    try:
        yield lent
    finally:
        with _lock:
            dropped = [_kept.pop(place, None)]  # of another call at the same time
            _kept[place] = lent
            own = [other for other in _kept if other[0] == device]
            dropped += [_kept.pop(other) for other in own[:-KEPT]]
        if any(dropped) and device.type == "cuda":
            torch.cuda.synchronize(device)  # plans may still be on their way from the host's memory, freed below
        del dropped


def plan_paged(a: Paged, batch: Batch, make: Callable) -> Callable[[Tensor], Tensor]:
    """From the batch's rows of q to [queries, heads, D]; a batch of single queries has a wrapper of its own.

    make: a wrapper from its name, device, dtypes and options.
    """
    q, size = a.q, a.k_cache.shape[1]
    pages: tuple[Tensor, ...] = (batch.kv_indptr, batch.kv_indices, batch.last_page_len(size))
    sizes = (q.shape[1], a.k_cache.shape[2], q.shape[2], size)
    options = {
        "sm_scale": a.scale,
        "window_left": a.sliding_window - 1,  # how many keys before its own; -1: all
        "logits_soft_cap": a.soft_cap,
        "q_data_type": q.dtype,
        "kv_data_type": a.k_cache.dtype,
    }
    choice: dict[str, Any] = {"kv_layout": "NHD"}
    if batch.queries == len(batch.kv_lens):
        kind, choice["use_tensor_cores"] = "BatchDecodeWithPagedKVCacheWrapper", True
    else:
        kind, options["causal"] = "BatchPrefillWithPagedKVCacheWrapper", a.causal
        pages = (batch.qo_indptr, *pages)
    made = make(kind, q.device, q.dtype, a.k_cache.dtype, **choice)
    made.plan(*pages, *sizes, **options)
    scales = {"k_scale": _number(a.k_scale), "v_scale": _number(a.v_scale)}
    return lambda q: made.run(q, (a.k_cache, a.v_cache), **scales)


def plan_latent(a: Latent, batch: Batch, make: Callable) -> Callable[[Tensor, Tensor], Tensor]:
    """From the batch's rows of queries to [queries, heads, V], with both projections moved to them."""
    held = a.kv_cache
    made = make("BatchMLAPagedAttentionWrapper", held.device, held.dtype, held.dtype)
    lengths = (batch.qo_indptr, batch.kv_indptr, batch.kv_indices, batch.kv_lens)
    sizes = (a.q_pe.shape[1], RANK, ROPE, held.shape[1])
    made.plan(*lengths, *sizes, True, a.scale, held.dtype, held.dtype)

    def run(q_nope: Tensor, q_pe: Tensor) -> Tensor:
        q = torch.einsum("thn,hnr->thr", q_nope, a.w_uk).contiguous()
        latents = made.run(q, q_pe, held[..., :RANK], held[..., RANK:])
        return torch.einsum("thr,hvr->thv", latents, a.w_uv)

    return run


def _number(scale: Tensor | None) -> float | None:
    return None if scale is None else scale.item()


# --- the backend ---


def write_paged(args: tuple, outs: dict[str, Tensor]) -> None:
    a = Paged(*args)
    read = {"k_cache": a.k_cache, "v_cache": a.v_cache}
    _write("paged_attention", outs["y"], a, {"q": a.q}, read, plan_paged, a.sliding_window)


def write_latent(args: tuple, outs: dict[str, Tensor]) -> None:
    a = Latent(*args)
    queries = {"q_nope": a.q_nope, "q_pe": a.q_pe}
    _write("mla_attention", outs["y"], a, queries, {"q_pe": a.q_pe, "kv_cache": a.kv_cache}, plan_latent)


def _write(
    op: str, y: Tensor, a: Any, queries: dict[str, Tensor], read: dict[str, Tensor], plan: Callable, window: int = 0
) -> None:
    """Rows of sequences by FlashInfer, of those out of range NaN, of no sequence zeros.

    Sequences may overlap where query_start_loc goes back. A row of one in range has its result, whichever others claim
    it; NaN is for rows that only sequences out of range have.
    """
    for name, t in (queries | read).items():
        if name != "q_nope" and t.data_ptr() % ALIGNED:
            raise ValueError(f"{op}: {name} begins at {t.data_ptr():#x}, FlashInfer takes multiples of {ALIGNED}")
    if y.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: the flashinfer backend reads sequences on the host, a CUDA graph can't capture that")
    cache = list(read.values())[-1]
    with workspace(y.device) as lent:
        batch = batch_of(y.shape[0], cache, a.block_tables, a.seq_lens, a.query_start_loc, window)
        count = batch.queries
        rows = slice(count) if batch.rows is None else batch.rows.to(y.device)
        if batch.rows is None:
            y[count:] = 0
        else:
            y.zero_()
        for each in batch.broken:
            y[each] = float("nan")
        if count:
            y[rows] = plan(a, batch, lent.wrapper)(*(q[rows] for q in queries.values())).flatten(1)


def _quantizer(device: torch.device) -> Backend | None:
    """What `quantize` runs on there, but for the reference, which serves everything."""
    found = (OPS["quantize"].backends.get(name) for name in ("cpu", "cuda", "triton"))
    return next((b for b in found if b and device.type.upper() in b.devices and not b.missing()), None)


def _then_quantizes(name: str, write: Callable, refuses: Callable) -> tuple[Callable, Callable]:
    """The same two of the operation with a quantized output."""
    plain, quantize = OPS[name], OPS["quantize"]
    n = plain.required

    def write_quant(args: tuple, outs: dict[str, Tensor]) -> None:
        outs = dict(outs)
        key, given = QuantKey.from_code(args[n]), args[n + 1]
        y = outs.pop("unquantized") if "unquantized" in outs else cast(Tensor, plain.empty(*args[:n]))
        write(args[:n], {"y": y})
        if key.scale.static and "scale" in outs:  # the functional overload returns the one that it got
            outs.pop("scale").copy_(given)
        quantize.out(y, *args[n:], **{f"{output}_out": out for output, out in outs.items()})

    def refuses_quant(*args) -> str:
        if reason := refuses(*args[:n]):
            return reason
        quantizer = _quantizer(args[0].device)
        row = cast(Tensor, plain.empty(args[0][:0], *args[1:n]))  # as wide, of no rows
        if quantizer is None or quantizer.supports(row, *args[n:]):
            return ""
        limits = quantizer.limits(row, *args[n:]) if callable(quantizer.limits) else quantizer.limits
        return f"its result is for `quantize` on the {quantizer.name} backend: {limits}"

    return write_quant, refuses_quant


def _missing() -> str | None:
    """Of the backend."""
    return (reason := missing()) and f"the flashinfer backend needs {reason}"


def load(devices: tuple[str, ...] = ("CUDA",)) -> None:
    """Make `flashinfer` a backend of attention, and `quantize` run as without it."""
    if torch.version.hip:
        return
    OPS["quantize"].backend(Backend(NAME, None, devices, missing=_missing))
    for name, write, refuses in (
        ("paged_attention", write_paged, refuses_paged),
        ("mla_attention", write_latent, refuses_latent),
    ):
        served = {name: (write, refuses), f"{name}_quant": _then_quantizes(name, write, refuses)}
        for each, (run, refusal) in served.items():
            supports = lambda *args, refusal=refusal: not refusal(*args)  # noqa: E731
            OPS[each].backend(Backend(NAME, run, devices, supports, refusal, _missing))
