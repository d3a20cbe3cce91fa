"""Functions and models compiled with the passes, and what the graph calls then."""

from collections import Counter

import torch
from patching import without_blocks

import fused_ops
from models_patch.passes import Backend, Pass, PassManager
from models_patch.passes.calls import call_of
from models_patch.passes.rewrite import path_of

HEADS = {"rope", "qk_norm_rope"}
WRITES = {"rope_kv_cache_write", "qk_norm_rope_kv_cache_write"}
NORMS = "rms_norm", "fused_add_rms_norm", "rms_norm_add", "rms_norm_add_rms_norm", "dual_rms_norm"
ACTIVATIONS = "silu_mul", "gelu_tanh_mul", "relu2", "swiglu_oai_mul"
OWN = {name + end for name in NORMS + ACTIVATIONS for end in ("", "_quant")}


class Calls(Pass):
    """Keeps (path, operation) of every call of a fused operation in the graphs it sees."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __call__(self, graph, outcome):
        calls = [call for node in graph.nodes if (call := call_of(node)) is not None]
        self.found += Counter((path_of(call.node), call.op.name) for call in calls)

    def uuid(self):
        return "calls"


class Compiled:
    """A function or a model behind the codegen-free back end. calls: by operation; misses: why not."""

    def __init__(self, function, **options):
        torch._dynamo.reset()
        self.manager = PassManager.from_config()
        self.recorder = Calls()
        self.manager.add(self.recorder, "calls")
        self.function = torch.compile(function, backend=Backend(self.manager), **options)

    def __call__(self, *args, **options):
        with torch.no_grad():
            return self.function(*args, **options)

    @property
    def sites(self) -> Counter:
        return self.recorder.found

    @property
    def calls(self) -> Counter:
        counts = Counter()
        for (_, name), times in self.sites.items():
            counts[name] += times
        return counts

    @property
    def misses(self) -> str:
        return "\n".join(site.reason for site in self.manager.report().misses)


def bytes_of(results):
    results = results if isinstance(results, (tuple, list)) else (results,)
    return [r.contiguous().view(torch.uint8) for r in results]


def same_on_both_backends(compiled, function, *args, **options):
    """Whether both give the same bytes, by the kernels and by the reference."""
    with torch.no_grad():
        same = _equal(compiled(*args, **options), function(*args, **options))
        with fused_ops.use_backend("reference"):
            return same and _equal(compiled(*args, **options), function(*args, **options))


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(bytes_of(a), bytes_of(b), strict=True))


def heads_put_in(report) -> Counter:
    """Operations that are in the graph in the end, with the modules they are in."""
    sites = Counter((s.operation, s.path) for s in report.sites if s.operation in HEADS | WRITES)
    for (name, path), number in list(sites.items()):
        replaced = {
            "qk_norm_rope": "rope",
            "rope_kv_cache_write": "rope",
            "qk_norm_rope_kv_cache_write": "qk_norm_rope",
        }
        if name in replaced:
            sites[replaced[name], path] -= number
    return +sites


def heads_by_hand(report) -> Counter:
    names = without_blocks(report)
    return Counter((e.operation, e.path) for e in report.replaced if e.operation in HEADS & set(names))


def by_hand(report) -> Counter:
    return Counter((entry.path, entry.operation) for entry in report.replaced if entry.operation in OWN)


def by_passes(sites: Counter) -> Counter:
    """`patch` names MLA's norms after their attention; those of heads are done with the rotation."""
    found = Counter()
    for (path, name), times in sites.items():
        attention, _, norm = path.rpartition(".")
        if name in OWN and norm not in ("q_norm", "k_norm"):
            found[attention if norm in ("q_a_layernorm", "kv_a_layernorm") else path, name] += times
    return found
