"""What the ranks' workspaces on GPUs have in common: where each lies, and how a call that failed is told of.

Kernels wait for other ranks on the device, for so many nanoseconds at most. One that fails writes what went wrong into
memory of the host, its results are NaN, and the next call with the workspace raises; so a call never synchronises.
A workspace that failed is of no use any more, to any rank: kernels that are on their way would not know of a repair.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from quant import QuantKey

MOST_RANKS = 16
MAILBOX = 128 + 2 * 64 + 2 * 2 * 64 * MOST_RANKS * 8  # bytes of csrc/cuda/stages.h's
# Bytes of a rank's rows above which a sum takes two steps, by compute capability and ranks. These are the sizes up to
# which other libraries' kernels take one; nothing here is measured.
TWO_SHOT_ABOVE = {
    (9, 0): {2: 32 << 20, 4: 2 << 20, 8: 1 << 19},
    (10, 0): {2: 32 << 20, 4: 4 << 20, 8: 1 << 20},
}
NEVER = (1 << 63) - 1


def two_shot_above(capability: tuple[int, int], ranks: int) -> int:
    """The table's entry of the nearest number of ranks that is no smaller; unknown devices are taken for Hopper's."""
    if ranks <= 2:
        return NEVER if ranks == 1 else TWO_SHOT_ABOVE.get(capability, TWO_SHOT_ABOVE[9, 0])[2]
    known = TWO_SHOT_ABOVE.get(capability, TWO_SHOT_ABOVE[9, 0])
    return known[min((n for n in known if n >= ranks), default=max(known))]


class Call(ctypes.Structure):
    """`Call` of csrc/cuda/stages.h: what cuda_collective.cpp and _triton/collective.py fill in."""

    _fields_ = (("words", ctypes.c_int64 * 8),)

    def __str__(self) -> str:
        options, rows, cols, dtype, code, eps, multiplier, part = self.words
        by = "triton" if options & TRITON else "cuda"
        if options & GATHERS:
            return f"all_gather of {rows} rows of {cols} bytes by {by}"
        name = "reduce_scatter" if options & SCATTERED else "all_reduce"
        name = "qk_all_reduce" if options & SQUARES else name
        name += (
            "_fused_add" * bool(options & ADDS)
            + "_rms_norm" * bool(options & NORMS)
            + "_quant" * (code >= 0 and not options & SQUARES)
        )
        dtypes = {number: str(dtype).removeprefix("torch.") for dtype, number in NUMBER_OF.items()}
        said = [f"{rows} rows of {f'{cols} and {code}' if options & SQUARES else cols} {dtypes.get(dtype, dtype)}"]
        if options & NORMS:
            said += [f"eps {_text(eps)}", "a weight" if options & WEIGHT else "no weight"]
            said += ["round_before_weight"] * bool(options & ROUND_BEFORE) + ["weight_bias 1"] * bool(
                options & PLUS_ONE
            )
        said += [f"x_multiplier {_text(multiplier)}"] * (_float(multiplier) != 1.0)
        said += [str(QuantKey.from_code(code))] if code >= 0 and not options & SQUARES else []
        return f"{name} of {', '.join(said)}, {('one', 'two')[part & 1]}-shot, by {by}"


# Bits of a call's first word, which the calls that the rank has refused lie above.
NORMS, ROUND_BEFORE, PLUS_ONE, WEIGHT, ADDS, SCATTERED, GATHERS, SQUARES, TRITON = (1 << i for i in range(9))
REFUSED_FROM = 32
NUMBER_OF = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def bits_of(value: float | None) -> int:
    return ctypes.c_uint32.from_buffer(ctypes.c_float(value or 0.0)).value


def _float(bits: int) -> float:
    return ctypes.c_float.from_buffer(ctypes.c_uint32(bits)).value


def _text(bits: int) -> str:
    """As few digits as say which float32 these bits are."""
    texts = (f"{_float(bits):.{digits}g}" for digits in range(6, 10))
    return next(text for text in texts if bits_of(float(text)) == bits or "n" in text)


class Failure(ctypes.Structure):
    """`Failure` of csrc/cuda/stages.h."""

    _fields_ = (("reason", ctypes.c_uint64), ("rank", ctypes.c_uint64), ("call", Call), ("theirs", Call))


class _Memory(ctypes.Structure):
    """`Workspace` of csrc/cuda_collective.cpp."""

    _fields_ = (
        ("memory", ctypes.c_void_p * MOST_RANKS),
        ("ranks", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("bytes", ctypes.c_int64),
        ("two_shot_above", ctypes.c_int64),
        ("limit", ctypes.c_uint64),
        ("failure", ctypes.c_void_p),
        ("refused", ctypes.c_void_p),
    )


class Memory:
    """A rank's memory of a workspace on GPUs, and where that of the others is.

    buffer: uint8, this rank's, zeroed before any rank uses it. addresses: of every rank's, here.
    failure: at least 144 bytes of the host that kernels can write.
    refused: how many calls this rank has refused by itself; each call carries it, so that no other rank takes the
        next one for the refused one.
    """

    def __init__(
        self, buffer: Tensor, addresses: list[int], rank: int, timeout: float, above: int, failure: Tensor, keep=None
    ):
        self.buffer, self.addresses, self.rank, self.timeout, self.above = buffer, addresses, rank, timeout, above
        self.failure, self._keep = failure, keep
        self.refused = ctypes.c_int64(0)
        self._record = Failure.from_address(failure.data_ptr())
        _open[buffer.data_ptr()] = self
        _tell_cuda(self)
        self._forget = weakref.finalize(self, _forget, buffer.data_ptr())  # which comes before the buffer goes
        self._forget.atexit = False

    def check(self, name: str = "AllReduceWorkspace") -> None:
        """Raise what a call of this rank met on the device: TimeoutError or ValueError."""
        reason = self._record.reason
        if not reason:
            return
        rank, call = self._record.rank, self._record.call
        broken = "the workspace is broken, results since are NaN: make a new one"
        if reason == TIMED_OUT:
            raise TimeoutError(f"{name}: rank {rank} did not come within {self.timeout:g} s to {call}: {broken}")
        if reason == OTHER_CALL:
            theirs = self._record.theirs
            mine, other = (each.words[0] >> REFUSED_FROM for each in (call, theirs))
            if mine < other:
                raise ValueError(f"{name}: rank {rank} has refused a call, this rank called {call}: {broken}")
            if mine > other:
                raise ValueError(f"{name}: this rank has refused a call, rank {rank} called {theirs}: {broken}")
            raise ValueError(f"{name}: this rank called {call}, but rank {rank} called {theirs}: {broken}")
        raise TimeoutError(f"{name}: rank {rank} gave up, and says why; this rank called {call}: {broken}")

    def close(self) -> None:
        """Forget it; the memory goes with the tensor, and stays where another rank still has it open."""
        self._forget()


TIMED_OUT, OTHER_CALL = 1, 2
# By address: operations take a tensor, and refuse one that isn't here. What nobody holds is closed by that.
_open: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()


def _forget(address: int) -> None:
    _open.pop(address, None)
    if (library := _cuda_library()) is not None:
        library.fused_ops_close_workspace(ctypes.c_void_p(address))


def raise_if_failed(name: str, buffer: Tensor) -> None:
    """What `Memory.check` raises, where the buffer is of one."""
    if type(buffer) is Tensor and (found := _open.get(buffer.data_ptr())) is not None:
        found.check(name)


def memory_of(workspace: Tensor, rank: int) -> Memory:
    """The memory that an operation's arguments name."""
    found = _open.get(workspace.data_ptr())
    if found is None or found.buffer.numel() != workspace.numel():
        raise ValueError("workspace is a tensor, expected the buffer of an AllReduceWorkspace that is open")
    if found.rank != rank:
        raise ValueError(f"rank is {rank}, expected {found.rank}, the workspace's")
    return found


def _cuda_library() -> ctypes.CDLL | None:
    from ._cpu import library_path
    from ._cuda import library

    return library() if library_path() is not None else None


def _tell_cuda(memory: Memory) -> None:
    if (library := _cuda_library()) is None:
        return
    told = _Memory(
        (ctypes.c_void_p * MOST_RANKS)(*memory.addresses),
        len(memory.addresses),
        memory.rank,
        memory.buffer.numel(),
        memory.above,
        round(memory.timeout * 1e9),
        memory.failure.data_ptr(),
        ctypes.addressof(memory.refused),
    )
    library.fused_ops_open_workspace(ctypes.byref(told))


def bytes_for(max_tokens: int, hidden_size: int, dtype: torch.dtype) -> int:
    """What a workspace takes: `csrc/cuda/collective.cuh` says of what it is made."""
    return MAILBOX + 2 * max_tokens * -(-hidden_size * dtype.itemsize // 16) * 16


class UnreachableError(RuntimeError):
    """The group's GPUs don't reach each other's memory."""


def empty(size: int, device: torch.device) -> Tensor:
    """Memory of `size` bytes that other GPUs may be let into."""
    import torch.distributed._symmetric_memory as symmetric

    return symmetric.empty(size, dtype=torch.uint8, device=device)


def opened(buffer: Tensor, group: ProcessGroup, timeout: float, above: int | None) -> Memory:
    """A rank's memory, of `empty`, zeroed; every rank of the group calls this, then meets the others.

    Torch's symmetric memory gives it, and maps that of the others. What torch signals by isn't used: its signals are
    set and taken back, so that a call that gave up would leave one; flags here count calls.

    Raises UnreachableError where the ranks' memory can't be mapped.
    """
    import torch.distributed._symmetric_memory as symmetric

    try:
        handle = symmetric.rendezvous(buffer, group)
    except RuntimeError as error:
        raise UnreachableError(f"AllReduceWorkspace: {error}") from error
    buffer.zero_()
    torch.cuda.synchronize(buffer.device)
    if above is None:
        above = two_shot_above(torch.cuda.get_device_capability(buffer.device), group.size())
    failure = torch.zeros(ctypes.sizeof(Failure), dtype=torch.uint8, pin_memory=True)
    return Memory(buffer, list(handle.buffer_ptrs), group.rank(), timeout, above, failure, handle)
