"""What is done once vLLM has loaded a model: who quantizes for whom, which attention is replaced, and the report."""

from collections import Counter
from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.v1.worker.cpu_worker import CPUWorker

from ..report import Entry, Report
from . import attention
from .dataflow import asked_by_contract, taker
from .layers import PROVIDER, Fused, FusedGeluAndMul, FusedRMSNorm, FusedSiluAndMul
from .linear import input_quant

logger = init_logger("vllm.fused_ops")
NORM = "(fused_add_)rms_norm"  # with an addition where the model hands over a residual
OPERATIONS = {FusedRMSNorm: NORM, FusedSiluAndMul: "silu_mul", FusedGeluAndMul: "gelu_tanh_mul"}


def register(parts: frozenset[str]) -> None:
    stock = CPUWorker.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        transfers = self.vllm_config.kv_transfer_config is not None
        provided = PROVIDER in self.vllm_config.kernel_config.ir_op_priority.rms_norm[:1]
        report = connect(self.get_model(), parts, "caches are sent elsewhere" if transfers else "", provided)
        if self.rank == 0:
            logger.info("fused_ops: %s", report)
        return result

    CPUWorker.load_model = load_model


def connect(model: nn.Module, parts: frozenset[str], kept: str = "", provided: bool = True) -> Report:
    """Tell norms and activations for which layer they quantize, and bind attentions.

    kept: why attention stays vLLM's in this process; "" where it needn't.
    provided: whether norms of vLLM's IR are ours, as long as the user wants no other.
    """
    entries = []
    times: Counter[Any] = Counter(child for module in model.modules() for child in module.children())
    lent = {module.kv_sharing_target_layer_name for module in model.modules() if isinstance(module, Attention)}
    for path, module in model.named_modules():
        within: tuple[str, ...] = ()  # what attention does itself
        if "attention" in parts and any(isinstance(child, Attention) for child in module.children()):
            entries.append(_attention(path, module, kept, lent))
            within = ("q_norm", "k_norm") if "qk_norm" in (entries[-1].operation or "") else ()
        for name, child in module.named_children():
            if name in within:
                continue
            if isinstance(child, Fused):
                entries.append(_connect(f"{path}.{name}".lstrip("."), module, name, child, times[child]))
            elif isinstance(child, GemmaRMSNorm) and "norm" in parts:
                operation, note = (NORM, "by vLLM's IR") if provided else (None, "ir_op_priority has another first")
                entries.append(Entry(f"{path}.{name}", type(child).__name__, operation, note=note))
    return Report(type(model).__name__, tuple(entries))


def _connect(path: str, parent: nn.Module, name: str, child: Any, times: int) -> Entry:
    stock = type(child).__mro__[2].__name__
    if not child.is_fused:
        return Entry(path, stock, None, note="switched off, or a variant that isn't served")
    operation = OPERATIONS[type(child)]
    if (owner := asked_by_contract(parent, name)) is not None:
        options, _ = input_quant(getattr(*owner))
    elif times > 1:
        return Entry(path, stock, operation, note=f"{times} modules call it")
    else:
        child.feeds = taker(parent, name)
        options, _ = input_quant(child.consumer)
    key = options["quant_key"]
    if key is None:
        return Entry(path, stock, operation)
    feeds = (owner or child.feeds)[1]
    return Entry(path, stock, f"{operation}_quant", key, (feeds,))


def _attention(path: str, module: Any, kept: str, lent: set[str | None]) -> Entry:
    note = kept or attention.problem(module)
    if not note and module.attn.layer_name in lent:  # its order in a block is another
        note = "another layer reads its cache"
    if note:
        return Entry(path, type(module).__name__, None, note=note)
    write = attention.bind(module)
    key = input_quant(module.o_proj)[0]["quant_key"]
    operation = f"{write}, paged_attention" + ("_quant" if key else "")
    return Entry(path, type(module).__name__, operation, key, ("o_proj",) if key else ())
