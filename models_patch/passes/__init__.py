"""The second way in: passes that find unfused computations in a graph and put the same operations in their place.

options = models_patch.passes.inductor_options()
compiled = torch.compile(model, options=options)
compiled(tokens)
print(models_patch.passes.report(options))
"""

from __future__ import annotations

from typing import Any

# Each registers its fusions, in the order of the default pipeline.
# isort: off
from .compiler import CustomGraphPass, inductor_config as _inductor
from . import cleanup as _cleanup  # noqa: F401
from . import lift_norm as _lift_norm  # noqa: F401
from . import lift_activation as _lift_activation  # noqa: F401
from . import add_norm as _add_norm  # noqa: F401
from . import collective_norm as _collective_norm  # noqa: F401
from . import quantized as _quantized  # noqa: F401
from . import dual_norm as _dual_norm  # noqa: F401
from . import lift_rope as _lift_rope  # noqa: F401
from . import heads as _heads  # noqa: F401

# isort: on
from .backend import Backend
from .config import PassConfig, Range, compile_range, current_config, use_config
from .floats import SpecializeFloats
from .fusion import (
    HOOKS,
    POST_GRAD,
    Function,
    FusionPass,
    Outcome,
    Pass,
    PatternReplacement,
    Site,
    register_fusion,
    registered,
)
from .manager import PassManager

__all__ = [
    "HOOKS",
    "POST_GRAD",
    "Backend",
    "FusionPass",
    "Outcome",
    "Pass",
    "PassConfig",
    "PassManager",
    "PatternReplacement",
    "Range",
    "Site",
    "compile_range",
    "current_config",
    "inductor_options",
    "register_fusion",
    "registered",
    "report",
    "use_config",
]


def inductor_options(*passes: PassManager | PassConfig) -> dict[str, Any]:
    """The options of `torch.compile` that run these passes: managers, each at its hook, or what one is made from.

    A pass that `torch._inductor.config` has at a hook already runs after the manager's, as before. Where one is a plain
    function the compiler keeps no graph, as it wouldn't without the manager. Numbers that `dynamic=True` makes inputs
    become constants again, with a guard, where a pattern wants one.

    Raises:
        TypeError: one is neither. ValueError: two managers have one hook.
    """
    for item in passes:
        if not isinstance(item, (PassManager, PassConfig)):
            raise TypeError(
                f"inductor_options: passes is {type(item).__name__}, expected a PassManager or a PassConfig"
            )
    managers = [p if isinstance(p, PassManager) else PassManager.from_config(p) for p in passes or (PassConfig(),)]
    options: dict[str, Any] = {}
    for manager in managers:
        if manager.hook in options:
            raise ValueError(f"inductor_options: two managers are bound to {manager.hook}, expected one a hook")
        options[manager.hook] = manager
    if POST_GRAD in options:
        floats = SpecializeFloats(options[POST_GRAD])
        if floats.HOOK in options or _there(floats.HOOK):
            _add(options.setdefault(floats.HOOK, PassManager(hook=floats.HOOK)), floats, "specialize_floats")
    for hook, manager in options.items():
        for index, item in enumerate(_there(hook)):
            _add(manager, item, f"{hook}[{index}]")
    return {floats.HOOK: floats} | options if POST_GRAD in options else options


def _there(hook: str) -> list[Any]:
    """What the compiler has at a hook, besides."""
    items = getattr(_inductor, hook)
    return [item for item in (items if isinstance(items, (list, tuple)) else [items]) if item is not None]


def _add(manager: PassManager, item: Any, name: str) -> None:
    item = item if isinstance(item, CustomGraphPass) or not callable(item) else Function(item)
    if item is not manager and item not in [known for _, known in manager.passes]:
        manager.add(item, name)


def report(of: dict[str, Any] | Backend | PassManager) -> Any:
    """What passes did: those of `inductor_options`, of a `Backend` or a manager, as `PassManager.report`.

    A list where options have several managers. Raises TypeError where there are none.
    """
    if isinstance(of, PassManager):
        return of.report()
    if isinstance(of, Backend):
        return of.manager.report()
    found = [m.report() for m in of.values() if isinstance(m, PassManager)] if isinstance(of, dict) else []
    if not found:
        raise TypeError(f"report: of is {of!r}, expected inductor_options(), a Backend or a PassManager")
    return found[0] if len(found) == 1 else found
