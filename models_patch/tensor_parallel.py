"""`shard`: leaves each rank of a group its part of a model, as "Megatron-LM" (Shoeybi et al., 2019) cuts one.

Attention is cut by heads and an MLP by columns, so that each needs one sum over the ranks, of its result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_ops.workspace import AllReduceWorkspace

from .attention_family import attentions_of
from .binding import METHODS, changed_linear, is_ours, replaced
from .families import GATED, Family, activation_of, expected_instead, family_of, mismatch
from .ranks import NormOverRanks, RankHook, SumOverRanks
from .report import Entry, Report
from .roles import Attention, LatentAttention

WHOLE_EXPERTS = "router and experts stay whole on every rank"
SHARD_FIRST = "shard the model first, then quantize it"
_BATCHING = (
    "continuous batching sizes its cache by the config, which describes the whole model: call generate with batches, "
    "or the model with a PagedKVCache (docs/attention.md has such an engine)"
)
# Methods of a whole model that would do something else on one that is cut, and why.
UNSERVED = {
    "generate_batch": _BATCHING,
    "init_continuous_batching": _BATCHING,
    "save_pretrained": "a checkpoint would hold this rank's part as if it were the whole: save before shard, or each "
    "rank's state_dict(), which loads into a model that was cut alike",
}


def shard(model: nn.Module, workspace: AllReduceWorkspace) -> Report:
    """Keep this rank's part of a Hugging Face model, which every rank has whole; one is left where all had one each.

        report = shard(model, AllReduceWorkspace(group, 512, model.config.hidden_size, model.dtype))
        patch(model)  # sums, additions, norms and quantization become one call

    Queries, keys and values (packed ones too) and gates and ups are cut by rows of their weights, whole heads and their
    keys' with them; `o_proj` and `down_proj` by columns, and rank 0 adds their biases. Where ranks outnumber the heads
    of keys, several have the same. Sinks go with their heads, and so do the weights of norms over all heads at once,
    whose sums of squares cross. Embeddings, other norms, routers, experts and `lm_head` stay whole on every rank, and
    so does an attention whose heads, or an MLP whose columns, don't divide by the ranks.

    The ranks call the model in the same order, with the same tokens; all of them get the same bits. Sampling needs the
    same seed on all. Caches hold each rank's own heads, a `PagedKVCache`'s steps are the same on all. transformers'
    `generate_batch` and `save_pretrained` raise RuntimeError, and `save_quantized` ValueError, since the config still
    describes the whole model.

    Unpatched, a module that is cut calls `all_reduce` in a forward hook, which copies of the model share; patched, the
    norm that follows the addition does the sum, and forward hooks on the module see this rank's part. State dicts hold
    this rank's part, and load into a model that was cut alike.

    Shard first, then quantize, calibrating on all ranks with the same batches: each rank quantizes the part it has, so
    scales over columns, of `o_proj`'s and `down_proj`'s weights and inputs, are those of its columns alone.

    Returns:
        `Report`: what was cut, and what stays whole, with the reason; the same on every rank but for its number.

    Raises:
        TypeError: an argument is not as above.
        ValueError: no known model is in it, it is patched or cut already, the workspace is closed or doesn't fit its
            rows, or nothing in it can be cut; it is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"shard: model is {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(workspace, AllReduceWorkspace):
        raise TypeError(f"shard: workspace is {type(workspace).__name__}, expected an AllReduceWorkspace")
    if workspace.buffer is None:
        raise ValueError("shard: workspace is closed, expected one that is open as long as the model is used")
    for path, module in model.named_modules():
        if any(isinstance(hook, RankHook) for hook in module._forward_hooks.values()):
            raise ValueError(f"shard: model is cut already, at {path}")
        if any(is_ours(vars(module).get(name)) for name in METHODS):
            raise ValueError("shard: model is patched, expected one that is not: unpatch it, and patch it afterwards")
    bases = [(path, module, family) for path, module in model.named_modules() if (family := family_of(module))]
    if not bases:
        raise ValueError(f"shard: model is {type(model).__name__}, {expected_instead(model)}")
    plan = _Plan(model, workspace)
    for path, base, family in bases:
        plan.add(f"{path}." if path else "", base, family)
    summary = f"rank {workspace.rank} of {workspace.world_size}, {{}} modules cut over the ranks, {{}} left whole"
    report = Report(type(model).__name__, tuple(plan.entries), summary)
    if not plan.steps:
        reasons = "; ".join(dict.fromkeys(entry.note for entry in report.left))
        raise ValueError(f"shard: nothing in {type(model).__name__} can be cut: {reasons}")
    for step in plan.steps:
        step()
    for module in model.modules():
        for name in UNSERVED:
            if hasattr(module, name):
                setattr(module, name, partial(_refuse, name, workspace.world_size))
    return report


def _refuse(name: str, world: int, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(f"{name}: the model is cut over {world} ranks, and {UNSERVED[name]}")


class _Plan:
    """What to cut where, and the report on it; nothing is touched while it is made."""

    def __init__(self, model: nn.Module, workspace: AllReduceWorkspace) -> None:
        self.workspace, self.rank, self.world = workspace, workspace.rank, workspace.world_size
        self.steps: list[Callable[[], Any]] = []
        self.entries: list[Entry] = []
        self.uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))

    def add(self, prefix: str, base: Any, family: Family) -> None:
        have, row = self.workspace.hidden_size * self.workspace.dtype.itemsize, base.norm.weight
        if row.nbytes > have:
            raise ValueError(
                f"shard: workspace has rows of {have} bytes, expected at least the {row.nbytes} of this model's "
                f"{row.numel()} columns of {row.dtype}"
            )
        for index, (layer, (role, note)) in enumerate(zip(base.layers, attentions_of(base), strict=True)):
            path, attention, mlp = f"{prefix}layers.{index}", family.attention.module, family.mlp.module
            self.cut(f"{path}.{attention}", layer, getattr(layer, attention), partial(self.heads, role, note))
            self.cut(f"{path}.{mlp}", layer, getattr(layer, mlp), self.columns)

    def cut(self, path: str, layer: nn.Module, module: Any, plan: Callable[[Any], tuple[list, str]]) -> None:
        """Plan a module of a layer. plan: module -> (what to do; none: leave it. What is kept, or why it is left)."""
        steps, note = plan(module)
        if steps:
            self.steps += steps
            hook = SumOverRanks(self.workspace, layer)
            self.steps.append(partial(module.register_forward_hook, hook, prepend=True))
        self.entries.append(Entry(path, type(module).__name__, "all_reduce" if steps else None, note=note))

    def heads(self, role: Attention | LatentAttention | None, note: str, module: Any) -> tuple[list, str]:
        problem = note if role is None else self.problem(module, _HEADS)
        if role is None or problem:
            return [], problem
        heads, kv_heads = _counts(module, role)
        if heads % self.world or (kv_heads % self.world and self.world % kv_heads):
            return [], f"its {heads} heads on {kv_heads} of keys don't divide by {self.world} ranks"
        own, group = heads // self.world, heads // kv_heads
        q = range(self.rank * own, (self.rank + 1) * own)
        kv = range(q.start // group, (q.stop - 1) // group + 1)
        steps: list[Callable] = []
        steps += [partial(_keep_rows, getattr(module, name), rows) for name, rows in _rows(module, role, q, kv).items()]
        kept = f"{own} of {heads} heads"
        if isinstance(role, LatentAttention):
            return [*steps, self.keep_columns(module.o_proj, _spread(q, module.v_head_dim))], kept
        q_columns, kv_columns = _spread(q, module.head_dim), _spread(kv, module.head_dim)
        if role.norm is not None and role.whole_vector:
            for norm, columns in (module.q_norm, q_columns), (module.k_norm, kv_columns):
                hook = NormOverRanks(self.workspace, role.norm)
                steps += [partial(_keep, norm, "weight", columns), partial(norm.register_forward_hook, hook)]
        steps += [partial(_keep, module, path[0], _spread(q)) for name, path in role.options if name == "s_aux"]
        steps += [self.keep_columns(module.o_proj, q_columns), partial(_set_heads, module, own, len(kv))]
        return steps, f"{kept}, {len(kv)} of {kv_heads} of keys"

    def columns(self, module: Any) -> tuple[list, str]:
        """An MLP's."""
        if hasattr(module, "experts"):
            return [], WHOLE_EXPERTS
        problems = [replaced(module) or mismatch(module, gated.stock, "MLP") for gated in GATED["mlp"]]
        if None not in problems:
            return [], str(problems[0])
        activation = getattr(module, str(GATED["mlp"][problems.index(None)].activation))
        problem = replaced(activation) or activation_of(activation)[1] or self.problem(module, _COLUMNS)
        if problem:
            return [], problem
        width = module.down_proj.in_features
        if width % self.world:
            return [], f"its {width} columns don't divide by {self.world} ranks"
        own = width // self.world
        columns = torch.arange(self.rank * own, (self.rank + 1) * own)
        if hasattr(module, "gate_up_proj"):
            steps = [partial(_keep_rows, module.gate_up_proj, torch.cat((columns, width + columns)))]
        else:
            steps = [partial(_keep_rows, linear, columns) for linear in (module.gate_proj, module.up_proj)]
        return [*steps, self.keep_columns(module.down_proj, columns)], f"{own} of {width} columns"

    def problem(self, module: Any, names: tuple[str, ...]) -> str:
        """Why one of these linear layers of `module`, of which it has some, can't be cut; "" where they can."""
        for name in names:
            linear = getattr(module, name, None)
            if linear is None:
                continue
            problem = changed_linear(linear, bias=True)
            if hasattr(linear, "input_quant"):
                problem = f"is quantized: {SHARD_FIRST}"
            elif problem is None and any(self.uses[id(parameter)] > 1 for parameter in linear.parameters()):
                problem = "shares its weight with another module"
            elif problem is None and linear.weight.device != self.workspace.device:
                problem = f"is on {linear.weight.device}, the workspace on {self.workspace.device}"
            if problem is not None:
                return f"{name} {problem}"
        return ""

    def keep_columns(self, linear: nn.Linear, columns: Tensor) -> Callable[[], None]:
        return partial(_keep_columns, linear, columns, bias=self.rank == 0)


_HEADS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj", "o_proj")
_COLUMNS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


def _counts(module: Any, role: Attention | LatentAttention) -> tuple[int, int]:
    """(heads, those of keys)"""
    if isinstance(role, LatentAttention):
        heads = module.kv_b_proj.out_features // (module.qk_nope_head_dim + module.v_head_dim)
        return heads, heads
    if role.packed:
        keys = module.num_key_value_heads
        return module.qkv_proj.out_features // module.head_dim - 2 * keys, keys
    return module.q_proj.out_features // module.head_dim, module.k_proj.out_features // module.head_dim


def _rows(module: Any, role: Attention | LatentAttention, q: range, kv: range) -> dict[str, Tensor]:
    """The rows of each projection's weight that make these heads."""
    if isinstance(role, LatentAttention):
        return {
            "q_b_proj" if role.low_rank else "q_proj": _spread(q, module.qk_head_dim),
            "kv_b_proj": _spread(q, module.qk_nope_head_dim + module.v_head_dim),
        }
    queries, keys = _spread(q, module.head_dim), _spread(kv, module.head_dim)
    if role.packed:
        heads, kv_heads = (count * module.head_dim for count in _counts(module, role))
        return {"qkv_proj": torch.cat((queries, heads + keys, heads + kv_heads + keys))}
    return {"q_proj": queries, "k_proj": keys, "v_proj": keys}


def _spread(heads: range, size: int = 1) -> Tensor:
    """The columns of heads of this size, side by side."""
    return torch.arange(heads.start * size, heads.stop * size)


def _keep(module: nn.Module, name: str, kept: Tensor, dim: int = 0) -> None:
    """Replace a parameter by a part of it."""
    whole = getattr(module, name)
    part = whole.detach().index_select(dim, kept.to(whole.device))
    setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    """A layer that makes some of its results."""
    _keep(linear, "weight", rows)
    if linear.bias is not None:
        _keep(linear, "bias", rows)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Tensor, bias: bool) -> None:
    """A layer that gets some of its inputs, and makes a part of a sum, in which one rank has the bias."""
    _keep(linear, "weight", columns, dim=1)
    linear.in_features = len(columns)
    if not bias:
        linear.register_parameter("bias", None)


def _set_heads(module: Any, heads: int, kv_heads: int) -> None:
    """What forwards and attention functions read beside the weights."""
    module.num_key_value_groups = heads // kv_heads
    for name, count in ("num_heads", heads), ("num_attention_heads", heads), ("num_key_value_heads", kv_heads):
        if name in vars(module):
            setattr(module, name, count)
    if hasattr(module, "qkv_proj"):
        module.config = _ConfigOfRank(module.config, heads)


class _ConfigOfRank:
    """The model's config as a packed attention reads it, which counts its heads by it."""

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self._config, self.num_attention_heads = config, num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # asked while a copy is made
            raise AttributeError(name)
        return getattr(self._config, name)
