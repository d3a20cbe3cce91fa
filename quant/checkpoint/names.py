"""Names of tensors in files, which are those of a model but for what transformers' own conversion says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from ..methods import QuantExperts
from .experts import PARTS, holds_experts

_OF_EXPERT = re.compile(r"(.+)\.(\d+)\.(\w+)\.(\w+)")


class Names:
    """Between the names of a model's tensors and those in its files.

    Layers of one expert are here `experts.3.gate_proj`, `up_proj` and `down_proj`, whatever files call them: Mixtral's
    are `block_sparse_moe.experts.3.w1`, which the conversion of its class says.
    """

    def __init__(self, model: PreTrainedModel):
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        # Some files have such a prefix and others haven't: none is added, as transformers adds none to a new model.
        # (By its name, since 5.0 hasn't the class.)
        back = [each for each in self._renamings if type(each).__name__ != "PrefixChange"]
        self._back = [each.reverse_transform() for each in reversed(back)]
        self._ours: dict[str, dict[str, str]] = {}  # by the experts' path and a layer's name in files
        for path, module in model.named_modules():
            if isinstance(module, QuantExperts) or holds_experts(module):
                self._ours[path] = _parts(path, converters)
        self._theirs = {path: {ours: each for each, ours in parts.items()} for path, parts in self._ours.items()}

    def of_model(self, name: str) -> str:
        """The model's name of a tensor in a file."""
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return _with_part(name, self._ours)

    def of_file(self, name: str) -> str:
        """What a model's tensor is called in files, as transformers writes them."""
        name = _with_part(name, self._theirs)
        for renaming in self._back:
            name, _ = renaming.rename_source_key(name)
        return name

    def one_by_one(self, path: str) -> bool:
        """Whether files have each of these experts in tensors of its own, rather than stacked as the model has them."""
        return bool(self._ours.get(path))


def _with_part(name: str, table: Mapping[str, Mapping[str, str]]) -> str:
    if (found := _OF_EXPERT.fullmatch(name)) is None:
        return name
    path, expert, part, tensor = found.groups()
    return f"{path}.{expert}.{table.get(path, {}).get(part, part)}.{tensor}"


def _parts(path: str, converters: Iterable[WeightConverter]) -> dict[str, str]:
    """{what files call a layer of each of these experts: what it is called here}; empty where files stack them."""
    found = {}
    for converter in converters:
        for number, pattern in enumerate(converter.source_patterns):
            if (source := re.search(r"\*\.(\w+)\.weight$", pattern)) is None:
                continue
            target, _ = converter.rename_source_key(f"{path}.0.{source[1]}.weight")
            for name, parts in PARTS.items():
                if target == f"{path}.{name}" and len(parts) == len(converter.source_patterns):
                    found[source[1]] = parts[number]
    return found if len(found) == sum(map(len, PARTS.values())) else {}
