"""How an operation is declared: its reference is its definition, backends are alternatives to it."""

from __future__ import annotations

import inspect
import re
import string
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.library import Library

from quant import QuantKey

from ._gradient import refuse_backward, refuse_backward_of
from ._memory import as_callers_know, check_inputs_survive, check_outputs, check_written

OPS: dict[str, Op] = {}  # every declared operation; tests and benchmarks iterate it
DEVICES = ("CPU", "CUDA")  # dispatch keys that a forced backend overrides

NO_KEY = -1  # in the place of a key's code: the result isn't quantized

Written = Annotated[Tensor, "written"]  # an input that the operation writes into, such as a cache
Shared = Annotated[Tensor, "shared"]  # memory that ranks exchange through: written, but no result

_library = Library("fused_ops", "DEF")
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Written: "Tensor(%s!)",
    Shared: "Tensor(%s!)",
    float: "float",
    int: "int",
    torch.SymInt: "SymInt",
    bool: "bool",
    list[int] | None: "int[]?",
    torch.dtype: "ScalarType",
    str: "str",
}


@dataclass(frozen=True)
class Backend:
    """An implementation of an operation, and what it can do.

    run: takes the operation's arguments, checked, and the outputs to write by name, those that are wanted; None where
        the kernel sits in PyTorch's dispatcher already, so that a call meets no Python on its way.
    devices: dispatch keys that it serves.
    supports: whether it serves these arguments, by device, dtype, key and row length, never by the number of rows.
    limits: what `supports` allows, in words; or from the arguments, why it doesn't serve them.
    missing: what must be installed for it, if something isn't.
    failure: why a kernel could not be made just now, if that is why a call was refused.
    make: the functional overload's result from the arguments, checked, where `run` would have to copy it.
    """

    name: str
    run: Callable[[tuple, dict[str, Tensor]], None] | None
    devices: tuple[str, ...] = DEVICES
    supports: Callable[..., bool] = lambda *_: True
    limits: str | Callable[..., str] = ""
    missing: Callable[[], str | None] = lambda: None
    failure: Callable[[], BaseException | None] = lambda: None
    make: Callable[[tuple], Tensor] | None = None

    def refusal(self, op: Op, args: tuple) -> str:
        """That it doesn't serve these arguments, and what it does."""
        limits = self.limits(*args) if callable(self.limits) else self.limits
        return (
            f"{op.name}: the {self.name} backend does not serve {describe(args, op)}{limits and f', but {limits}'}; "
            "`with fused_ops.use_backend('reference')` does"
        )


class Op:
    """A torch custom op made from its reference, a plain function of tensors and numbers that returns every output.

    Two overloads come from its signature:
        name(inputs that have no default) -> the first `returns` outputs, freshly allocated
        name.out(all inputs, *, Tensor(a!)? each output) -> ()     writes the outputs that are not None
    Inputs annotated as `Written` are written by both.
    `check` raises on bad arguments, `empty` allocates outputs; the fake implementations are made of the two.
    """

    def __init__(self, reference: Callable, outputs: str, returns: int | None = None):
        self.name = reference.__name__.lstrip("_")
        self.reference, self.outputs = reference, outputs.split()
        self.returns = returns or len(self.outputs)
        self.prefix = ""  # what the public function puts before the names of a quantization's options
        self.backends = {"reference": Backend("reference", None)}
        self.check: Callable[..., Any] = lambda *_: None
        self.empty: Callable[..., tuple] = _undeclared
        self.cases: Callable[[str], Iterator[tuple]] = _undeclared
        self.workload: Callable[..., tuple] = _undeclared
        self.store: Callable[..., None] = lambda args, name, target, value: target.copy_(value)

        hints = typing.get_type_hints(reference, include_extras=True)
        parameters = inspect.signature(reference).parameters.values()
        self.arguments = [p.name for p in parameters]
        self.written = [name for name in self.arguments if hints[name] == Written]
        self.required = sum(p.default is p.empty for p in parameters)

        aliases = iter(string.ascii_lowercase)
        types = [_SCHEMA_TYPES[hints[name]] for name in self.arguments]
        types = [kind % next(aliases) if "%" in kind else kind for kind in types]
        defaults = ["" if p.default is p.empty else f"={p.default}" for p in parameters]
        inputs = [f"{kind} {name}{value}" for kind, name, value in zip(types, self.arguments, defaults, strict=True)]
        result = ", ".join(["Tensor"] * self.returns)
        result = result if self.returns == 1 else f"({result})"
        _library.define(f"{self.name}({', '.join(inputs[: self.required])}) -> {result}")
        outs = [f"Tensor({next(aliases)}!)? {output}_out=None" for output in self.outputs]
        _library.define(f"{self.name}.out({', '.join(inputs)}, *, {', '.join(outs)}) -> ()")

        packet = getattr(torch.ops.fused_ops, self.name)
        self.default, self.out = packet.default, packet.out
        self.call = _direct(self.default)
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        _library.impl(f"{self.name}.out", self._run_out, "CompositeExplicitAutograd")
        torch.library.register_fake(self.default, self._fake, lib=_library)
        torch.library.register_fake(self.out, self._fake_out, lib=_library)
        OPS[self.name] = self

    def declares(self, role: str) -> Callable[[Callable], Callable]:
        """Decorator that fills a role of the declaration.

        "check": raises on bad arguments; it gets the operation's name where it has a `name`.
        "empty": allocates outputs.
        "cases", "workload": arguments for tests and benchmarks.
        "store": how the reference writes a given output, where it leaves some of it as it was.
        """

        def register(function: Callable) -> Callable:
            named = role == "check" and "name" in inspect.signature(function).parameters
            setattr(self, role, partial(function, name=self.name) if named else function)
            return function

        return register

    def argument(self, name: str) -> int | None:
        """Where the argument `name` stands, or None."""
        return self.arguments.index(name) if name in self.arguments else None

    def keys(self, args: tuple) -> list[int]:
        """The codes of the keys among the arguments that quantize."""
        named = zip(self.arguments, args, strict=False)
        return [code for name, code in named if (name == "key" or name.endswith("_key")) and code != NO_KEY]

    def backend(self, backend: Backend) -> None:
        self.backends[backend.name] = backend

    def _first(self, results: Any) -> Any:
        results = results if isinstance(results, tuple) else (results,)
        return results[0] if self.returns == 1 else results[: self.returns]

    # The reference as a kernel.
    def _run(self, *args):
        self.check(*args)
        first = self._first(self.reference(*args))
        if self.returns == 1:
            return first.contiguous()  # whatever the strides of the inputs are
        exact = [name.endswith("scale") for name in self.outputs]
        return tuple(t if keep else t.contiguous() for t, keep in zip(first, exact, strict=False))

    def _run_out(self, *args, **outs):
        self.check(*args)
        check_outputs(self, args, outs)
        check_inputs_survive(self, args, given_outputs(self, outs))
        self._store(args, self.reference(*args), outs)

    def _store(self, args: tuple, results: Any, outs: dict[str, Tensor | None]) -> None:
        for name, value in zip(self.outputs, results if isinstance(results, tuple) else (results,), strict=True):
            target = outs.get(f"{name}_out")
            if target is not None:
                self.store(args, name, target, value)

    def _fake(self, *args):
        self.check(*args)
        return self._first(self.empty(*args))

    def _fake_out(self, *args, **outs):
        self.check(*args)
        check_outputs(self, args, outs)


def _direct(overload: torch._ops.OpOverload) -> Callable:
    """The C function under an overload: the Python frame around it costs a third of what torch.add does.

    Dynamo knows the overload only, so it is told to trace that instead.
    """
    function = getattr(overload, "_op", None)
    if function is None:
        return overload
    torch.compiler.substitute_in_graph(function, skip_signature_check=True)(lambda *args: overload(*args))
    return function


def op(outputs: str, returns: int | None = None) -> Callable[[Callable], Op]:
    """Declare an operation: the decorated function is its reference and returns `outputs`, in this order."""
    return lambda reference: Op(reference, outputs, returns)


def invoke(op: Op, args: tuple, outs: tuple | None = None, optional: tuple = ()) -> Any:
    """Call `op` as its public function does: what the functional overload returns.

    args: the inputs without default. outs: given outputs, each or None; None: there are none. optional: the inputs
    that have a default, where one differs from it.
    """
    if outs is not None or optional:
        return _invoke_out(op, (*args, *optional), outs or (None,) * op.returns)
    try:
        result = op.call(*args)
    except RuntimeError as error:
        refused(op, args, error)
        raise
    first = result if op.returns == 1 else result[0]
    if first.requires_grad:
        refuse_backward(op.name, *(result if type(result) is tuple else (result,)))
    return result


def _invoke_out(op: Op, args: tuple, outs: tuple) -> Any:
    given = {f"{name}_out": out for name, out in zip(op.outputs, outs, strict=False) if out is not None}
    try:
        fresh: Any = None if len(given) == len(outs) else op.empty(*args)
        if fresh is not None:
            fresh = fresh if isinstance(fresh, tuple) else (fresh,)
            outs = tuple(fresh[i] if out is None else out for i, out in enumerate(outs))
        op.out(*args, **{f"{name}_out": out for name, out in zip(op.outputs, outs, strict=False)})
    except Exception as error:  # of what can't be allocated for, too
        refused(op, args, error, given)
        raise
    refuse_backward_of(op.name, args, outs)
    return outs[0] if op.returns == 1 else outs


def refused(op: Op, args: tuple, error: Exception, outs: dict[str, Tensor | None] | None = None) -> None:
    """A kernel raised `error`: raise the TypeError or ValueError that says which argument and why, if it refused.

    Kernels check what safety needs and raise RuntimeError; the full check in Python runs only then, since on every
    call it would cost several times what the call does.
    """
    op.check(*args)
    if outs is not None:
        check_outputs(op, args, outs)
    device = next(a.device.type.upper() for a in args if isinstance(a, Tensor))
    for name in use_backend.active():
        backend = op.backends.get(name)
        if backend is None or device not in backend.devices:
            continue
        if "could not be compiled" in str(error) and (failure := backend.failure()):
            raise failure from error
        if not backend.supports(*args):
            raise ValueError(backend.refusal(op, args)) from error
    if refusal := re.search(r"csrc\S*:\d+, (.*)", str(error)):
        said = re.sub(r"of code (\d+)", lambda code: str(QuantKey.from_code(int(code[1]))), refusal[1])
        argument, colon, rest = said.partition(":")
        raise ValueError(f"{op.name}: {as_callers_know(argument)}{colon}{rest}") from error


def describe(args: tuple, op: Op | None = None) -> str:
    """The arguments in words; with the operation's names, keys as they are known to users."""
    words = [f"{a.dtype}{list(a.shape)}" if isinstance(a, Tensor) else repr(a) for a in args]
    for i, name in enumerate(op.arguments[: len(args)] if op else ()):
        words[i] = f"{name}={QuantKey.from_code(args[i]) if name.endswith('key') and args[i] != NO_KEY else words[i]}"
    return ", ".join(words)


def _undeclared(*_):
    raise NotImplementedError("this part of the operation's declaration is missing")


class use_backend:
    """Run one backend only, in this block: `with use_backend("reference"): ...`.

    It replaces the operations' kernels in PyTorch's dispatcher while it lasts, for the whole process, so compiled
    graphs obey it too and calls outside a block pay nothing. It never falls back: what the backend can't serve
    raises. Blocks nest. `FUSED_OPS_BACKEND` in the environment is the same for the life of the process.

    Raises ValueError where no operation has a backend of that name on this machine, or it serves GPUs and there is
    none, ImportError where it needs something that isn't installed.
    """

    _stack: typing.ClassVar[list[str]] = []
    _overrides: typing.ClassVar[Library | None] = None

    def __init__(self, name: str, _argument: str = "use_backend: name"):
        known = {b.name: b for op in OPS.values() for b in op.backends.values()}
        if name not in known:
            raise ValueError(f"{_argument} is {name!r}, expected one of {sorted(known)} on this machine")
        if missing := known[name].missing():
            raise ImportError(f"{_argument} is {name!r}: {missing}")
        if "CPU" not in known[name].devices and not torch.cuda.is_available():
            raise ValueError(f"{_argument} is {name!r}, which serves GPUs, and there is none on this machine")
        self.name = name

    def __enter__(self) -> use_backend:
        self._stack.append(self.name)
        self._install()
        return self

    def __exit__(self, *_) -> None:
        self._stack.pop()
        self._install()

    @classmethod
    def active(cls) -> list[str]:
        """The backends that a call may have met: the forced one, or those in PyTorch's dispatcher."""
        return cls._stack[-1:] or ["cpu", "cuda"]

    @classmethod
    def _install(cls) -> None:
        if cls._overrides is not None:
            cls._overrides._destroy()
            cls._overrides = None
        if not cls._stack:
            return
        cls._overrides = Library("fused_ops", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that a kernel is overridden
            for op in OPS.values():
                for device in DEVICES:
                    for overload, kernel in _forced(op, cls._stack[-1], device):
                        cls._overrides.impl(overload, kernel, device)


def _forced(op: Op, name: str, device: str) -> list[tuple[str, Callable]]:
    """The kernels to install so that `op` runs backend `name` on a device, and nothing else."""
    backend = op.backends.get(name)
    if backend is None or device not in backend.devices:

        def refuse(*_, **__):
            raise ValueError(f"{op.name}: there is no backend {name!r} for {device} on this machine")

        return [(op.name, refuse), (f"{op.name}.out", refuse)]
    if name == "reference":
        return [(op.name, op._run), (f"{op.name}.out", op._run_out)]
    return [] if backend.run is None else kernels_of(op, backend)


def given_outputs(op: Op, outs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that aren't None, by the outputs' own names."""
    return {name: out for name in op.outputs if (out := outs.get(f"{name}_out")) is not None}


def kernels_of(op: Op, backend: Backend) -> list[tuple[str, Callable]]:
    """Both overloads of `op` by a backend that writes given outputs."""
    write = backend.run
    assert write is not None

    checked: set[tuple] = set()

    def check(args: tuple) -> None:
        kinds = tuple(map(_kind, args))
        if kinds in checked:
            check_written(op, args)
            return
        op.check(*args)
        if not backend.supports(*args):
            raise ValueError(backend.refusal(op, args))
        if args[0].device.type != "cpu":  # where a check reads values too
            if len(checked) >= 4096:
                checked.clear()
            checked.add(kinds)

    def run(*args):
        check(args)
        if backend.make is not None:
            return backend.make(args)
        made = op.empty(*args)
        made = (made if isinstance(made, tuple) else (made,))[: op.returns]
        write(args, dict(zip(op.outputs, made, strict=False)))
        return made[0] if op.returns == 1 else made

    def run_out(*args, **outs):
        check(args)
        check_outputs(op, args, outs)
        given = given_outputs(op, outs)
        check_inputs_survive(op, args, given)
        write(args, given)

    return [(op.name, run), (f"{op.name}.out", run_out)]


def _kind(argument: Any) -> tuple:
    """All of an argument that a check looks at, but for values of tensors."""
    if not isinstance(argument, Tensor):
        return type(argument), argument
    strides = argument.stride() if argument.layout == torch.strided else None
    return type(argument), argument.shape, strides, argument.dtype, argument.device
