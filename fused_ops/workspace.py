"""Memory that the ranks of a process group share, for collectives fused with what follows them.

`_shared` has that of CPUs, `_symmetric` that of GPUs.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _shared, _symmetric
from ._check import FLOATS
from ._shared import attempts_of, calling_of, everywhere, from_all, shared_memory

DEFAULT_TIMEOUT = 60.0  # seconds
# Bytes of a rank's rows from which on each rank sums its share of them and all read the sums, rather than everyone
# summing all. On two cores, of 4096 columns of bfloat16: 2 MiB are faster in one shot with 2, 3 and 4 ranks, 8 MiB in
# two shots with 3, 4 and 8, and about as fast with 2.
TWO_SHOT_ABOVE = 1 << 22

Function = TypeVar("Function", bound=Callable)


class AllReduceWorkspace:
    """Memory shared by the ranks of `group`, of which every collective operation takes one.

    Constructing and every call are collective: all ranks make them, in the same order. A workspace holds `max_tokens`
    rows a rank; a larger call goes through it in chunks of rows, and gives the same bits. Workspaces know nothing of
    each other: any number, of any groups, may be in use side by side.

    A rank that waits longer than `timeout`, or for a process that has ended, raises TimeoutError, and the workspace is
    broken: every later call with it does the same, on every rank. Calls that differ between ranks raise ValueError on
    all of them and break nothing, and so does a call that one rank refuses by itself, say for an argument that it alone
    has wrong: the next one is the next on all. Only what is refused while a graph is traced, or since a rank has closed
    its workspace, has no number: the others wait for that rank. On a GPU both, and limits, are found while the kernel
    runs: its results are NaN, a later call raises, and the workspace is broken. Ranks that share no memory find
    neither.
    A call belongs to the process that made the workspace, one thread at a time: a child that was forked is no rank.
    Operations write `buffer`, so compiled graphs keep their order; a compiler that copies what is written, as
    `backend="aot_eager"` does where Inductor doesn't, is refused when it calls, for nobody waits behind a copy. What a
    kernel refuses in such a graph, and that a rank doesn't come, is a RuntimeError there.

    Args:
        group: the ranks, 1 to 16 of them; `torch.distributed.group.WORLD` for all.
        max_tokens: rows of `hidden_size` that one exchange takes.
        hidden_size: columns of the widest row.
        dtype: of the widest row: bfloat16, float16 or float32. Calls may be of another; what counts is a row's bytes.
        timeout: seconds after which a rank that waits for another raises TimeoutError; the same on all ranks.
        device: "cpu" or a CUDA device; by default the current CUDA device where the group serves one, else "cpu".
        two_shot_above: bytes of a rank's rows above which ranks share the summing; None: on CPUs what was
            measured here, on GPUs what others report.

    Attributes:
        rank, world_size, group_name: of the group.
        buffer: uint8, what operations take for it; empty where it isn't shared, None when closed.
        shared: whether the ranks share memory; if not, because they are on several hosts, operations run the group's
            own collective, then the fused norm: same formula, but the sum's order is the group's.

    Raises:
        TypeError, ValueError: an argument is not as above, or differs between the ranks.
        OSError: a rank can't have the memory, or, though all are on one host, not map it; on all ranks.
    """

    def __init__(
        self,
        group: ProcessGroup,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        device: torch.device | str | None = None,
        two_shot_above: int | None = None,
    ):
        if not isinstance(group, ProcessGroup):
            raise TypeError(f"AllReduceWorkspace: group is {type(group).__name__}, expected a ProcessGroup")
        if group.size() > _symmetric.MOST_RANKS:
            raise ValueError(
                f"AllReduceWorkspace: group has {group.size()} ranks, expected at most {_symmetric.MOST_RANKS}"
            )
        self.group, self.group_name = group, group.group_name
        self.rank, self.world_size = group.rank(), group.size()
        self.max_tokens, self.hidden_size, self.dtype, self.timeout = max_tokens, hidden_size, dtype, timeout
        self.buffer: Tensor | None = None
        above = TWO_SHOT_ABOVE if two_shot_above is None else two_shot_above
        refusal: Exception | None = None
        settings = [0] * 6
        try:
            _check_arguments(max_tokens, hidden_size, dtype, timeout, above)
            self.device = _device(group, device)
            on_cpu = self.device.type == "cpu"
            # A call that scatters rows exchanges at least one for each rank.
            most = max(max_tokens, self.world_size)
            slot = -(-most * hidden_size * dtype.itemsize // 64) * 64
            if 2 * slot * self.world_size >= 1 << 62:
                raise ValueError(f"AllReduceWorkspace: max_tokens is {max_tokens}, too many of {hidden_size} {dtype}")
            settings = [max_tokens, hidden_size, FLOATS.index(dtype), round(timeout * 1e9), above, on_cpu]
        except Exception as error:  # raised when the other ranks know, since they would wait
            refusal = error
        every = from_all(group, [refusal is None, *settings])
        if refusal is not None:
            raise refusal
        _check_alike(every)
        header = [self.world_size, slot, round(timeout * 1e9), above]
        self._memory: _symmetric.Memory | None = None
        if on_cpu:
            self.buffer = shared_memory(group, header)
        else:
            size = _symmetric.bytes_for(most, hidden_size, dtype)
            self._memory = _memory_of_gpus(group, size, timeout, two_shot_above, self.device)
            self.buffer = None if self._memory is None else self._memory.buffer
        self.shared = self.buffer is not None
        self._process = os.getpid()
        # Calls of this rank: what it has refused, on CPUs also what has reached kernels, and whether it is in one.
        self._attempts: Any = ctypes.c_int64(0)
        self._calling: Any = ctypes.c_int64(0)
        self._thread = threading.RLock()
        if self._memory is not None:
            self._attempts = self._memory.refused
        elif self.buffer is not None:
            self._attempts = attempts_of(self.buffer, self.rank)
            self._calling = calling_of(self.buffer, self.rank)
        if self.buffer is None:
            self.buffer = torch.empty(0, dtype=torch.uint8, device=self.device)

    def rows(self, tokens: int) -> slice:
        """The rows of `tokens` that are this rank's where a result is scattered: ceil(tokens / world_size) a rank."""
        return share_of(tokens, self.world_size, self.rank)

    def close(self) -> None:
        """Drop the memory, which is freed with the last tensor on it; later calls with this workspace raise ValueError.

        So does the end of a `with` block, and so does garbage collection. Other ranks keep theirs, in which they wait
        for this one in vain.
        """
        if self._memory is not None:
            self._memory.close()
        self._memory = self.buffer = self._attempts = self._calling = None

    def __enter__(self) -> AllReduceWorkspace:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"AllReduceWorkspace(rank {self.rank} of {self.world_size}, {self.max_tokens} rows of {self.hidden_size} "
            f"{self.dtype}, {self.device})"
        )


def ranks_of(workspace: AllReduceWorkspace) -> tuple[Tensor, int, str]:
    """A workspace as operations take it; kernels refuse one that isn't shared."""
    if not isinstance(workspace, AllReduceWorkspace):
        raise TypeError(f"workspace is {type(workspace).__name__}, expected an AllReduceWorkspace")
    if workspace.buffer is None:
        raise ValueError("workspace is closed")
    return workspace.buffer, workspace.rank, workspace.group_name


def counted(function: Function) -> Function:
    """Decorator of a public function: a call that it refuses counts among this rank's, as those do that others join.

    Kernels count the calls that reach them. Without that, the rank's next call would meet the others' in this one. What
    is refused where a compiled graph runs, so not while it was traced, counts where a kernel refused it.
    """
    position = list(inspect.signature(function).parameters).index("workspace")

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        workspace = args[position] if position < len(args) else kwargs.get("workspace")
        if not isinstance(workspace, AllReduceWorkspace) or workspace.buffer is None:
            return function(*args, **kwargs)
        if not workspace._thread.acquire(blocking=False):  # nothing of it would tell the two calls apart
            name = function.__name__
            raise ValueError(f"{name}: workspace: rank {workspace.rank} is in a call already, by another thread")
        attempts = workspace._attempts
        before = attempts.value
        try:
            return function(*args, **kwargs)
        except BaseException:
            own = workspace._process == os.getpid()  # a child has the memory, but is no rank
            if own and attempts.value == before and not workspace._calling.value:
                attempts.value += 1
            raise
        finally:
            workspace._thread.release()

    return call  # type: ignore[return-value]


def raise_if_broken(name: str, buffer: Tensor) -> None:
    """TimeoutError if a rank has given up waiting in this workspace; on a GPU also what else went wrong there."""
    _symmetric.raise_if_failed(name, buffer)
    _shared.raise_if_broken(name, buffer)


def share_of(tokens: Any, world: int, rank: int) -> slice:
    """The rows of `tokens` that are a rank's: ceil(tokens / world) each, the last ones fewer or none."""
    share = -(-tokens // world)
    return slice(torch.sym_min(rank * share, tokens), torch.sym_min((rank + 1) * share, tokens))


def _check_arguments(max_tokens: Any, hidden_size: Any, dtype: Any, timeout: Any, above: Any) -> None:
    least = {"max_tokens": (max_tokens, 1), "hidden_size": (hidden_size, 1), "two_shot_above": (above, 0)}
    for name, (value, low) in least.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"AllReduceWorkspace: {name} is {type(value).__name__}, expected an int")
        if not low <= value < 1 << 40:
            raise ValueError(f"AllReduceWorkspace: {name} is {value}, expected at least {low}, below 2^40")
    if dtype not in FLOATS:
        raise TypeError(f"AllReduceWorkspace: dtype is {dtype}, expected one of {FLOATS}")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"AllReduceWorkspace: timeout is {type(timeout).__name__}, expected seconds")
    if not 1e-9 <= timeout <= 1e9:
        raise ValueError(f"AllReduceWorkspace: timeout is {timeout!r}, expected 10^-9 to 10^9 seconds")


def _device(group: ProcessGroup, device: Any) -> torch.device:
    if device is None:
        on_cuda = torch.cuda.is_available() and any(served.type == "cuda" for served in group._device_types)
        device = "cuda" if on_cuda else "cpu"
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError):
        known = None
    if known is None or known.type not in ("cpu", "cuda"):
        raise ValueError(f"AllReduceWorkspace: device is {device!r}, expected the CPU or a CUDA device")
    device = known
    if device.type == "cuda" and device.index is None:
        if not torch.cuda.is_available():
            raise ValueError(f"AllReduceWorkspace: device is {device}, of which torch finds none")
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _check_alike(every: list[list[int]]) -> None:
    """Raise, on all ranks alike, unless all of them make the same workspace."""

    def words(known: int, tokens: int, cols: int, dtype: int, timeout: int, above: int, on_cpu: int) -> str:
        if not known:
            return "refuses its arguments"
        what = f"max_tokens {tokens}, hidden_size {cols}, {FLOATS[dtype]}, timeout {timeout / 1e9:g}"
        return f"has {what}, two_shot_above {above}, on {'the CPU' if on_cpu else 'CUDA'}"

    other = next((rank for rank, settings in enumerate(every) if settings != every[0]), None)
    if other is not None:
        raise ValueError(f"AllReduceWorkspace: rank 0 {words(*every[0])}, but rank {other} {words(*every[other])}")


def _memory_of_gpus(
    group: ProcessGroup, size: int, timeout: float, above: int | None, device: torch.device
) -> _symmetric.Memory | None:
    """This rank's memory; None where the ranks' GPUs don't reach each other's."""
    buffer = everywhere(group, lambda: _symmetric.empty(size, device))

    def reached() -> _symmetric.Memory | None:
        try:
            return _symmetric.opened(buffer, group, timeout, above)
        except _symmetric.UnreachableError:
            return None

    memory = everywhere(group, reached)
    return memory if all(have for (have,) in from_all(group, [memory is not None])) else None
