"""What the ranks of one host share on CPUs: one anonymous mapping of all their processes.

It has no name, and so is gone with the last of them, however they end. csrc/cpu/meeting.h says what lies in it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import secrets
import stat
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

# As in csrc/cpu/meeting.h.
_MAGIC = 0x32736F7073667573
_HEADER = struct.Struct("=7q")  # magic, bytes, ranks, bytes of a slot, timeout in ns, two_shot_above, nonce
_BROKEN = struct.Struct("=q")  # ranks waited for (or that failed) | rank that gave up << 32 | 1 << 62
_RANK = struct.Struct("=q56xqqqq")  # turns; in a call; process; its address of the memory; attempts
_HAS_ENDED = 1 << 61  # in the same, where their processes have
_BROKEN_AT, _RANKS_AT, _RANK_BYTES, _CALLING_AT, _ATTEMPTS_AT = 64, 128, 384, 64, 88


def from_all(group: ProcessGroup, values: list[int]) -> list[list[int]]:
    """The ints of every rank, by the group's own all-gather."""
    devices = group._device_types
    device = torch.device("cpu") if torch.device("cpu") in devices or not devices else devices[0]
    ops = torch.ops._c10d_functional
    mine = torch.tensor(list(map(int, values)), dtype=torch.int64, device=device)
    every = ops.wait_tensor(ops.all_gather_into_tensor(mine, group.size(), group.group_name))
    return every.view(group.size(), -1).tolist()


def everywhere(group: ProcessGroup, make: Callable[[], Any]) -> Any:
    """What `make` returns; where it raises on a rank, all ranks raise."""
    made, failure = None, None
    try:
        made = make()
    except Exception as error:  # raised when the other ranks know, since they would wait
        failure = error
    mine = 0 if failure is None else getattr(failure, "errno", None) or errno.EIO
    codes = [code for (code,) in from_all(group, [mine])]
    if failure is not None:
        raise failure
    rank = next((rank for rank, code in enumerate(codes) if code), None)
    if rank is not None:
        raise OSError(codes[rank], f"AllReduceWorkspace: rank {rank} has no memory: {os.strerror(codes[rank])}")
    return made


def shared_memory(group: ProcessGroup, header: list[int]) -> Tensor | None:
    """Memory that all ranks map, with the header in it; None where they are on several hosts."""
    world, slot, *_ = header
    size = -(-(_RANKS_AT + world * _RANK_BYTES) // 4096) * 4096 + world * 2 * slot
    nonce, fd = secrets.randbits(62), -1
    every = from_all(group, [_host()])
    if any(host != every[0] for host in every):
        return None

    def create() -> Tensor | None:
        nonlocal fd
        if group.rank() != 0:
            return None
        if not hasattr(os, "memfd_create"):
            raise OSError(errno.ENOSYS, "AllReduceWorkspace: this system has no memory without a name")
        fd = os.memfd_create("fused_ops")
        os.ftruncate(fd, size)
        created = _mapped(os.getpid(), fd, size)
        _put(created, 0, _HEADER.pack(_MAGIC, size, *header, nonce))
        return created

    try:
        mine = everywhere(group, create)
        pid, theirs, known = from_all(group, [os.getpid(), fd, nonce])[0]

        def join() -> Tensor:
            buffer = _mapped(pid, theirs, size) if mine is None else mine
            if _HEADER.unpack(bytes(buffer[: _HEADER.size].tolist()))[-1] != known:
                raise OSError(errno.ESRCH, f"AllReduceWorkspace: process {pid}, rank 0, is another one here")
            at = _RANKS_AT + group.rank() * _RANK_BYTES
            _put(buffer, at, _RANK.pack(0, 0, os.getpid(), buffer.data_ptr(), 0))
            return buffer

        return everywhere(group, join)
    finally:
        if fd >= 0:
            os.close(fd)  # the mapping stays


def _host() -> int:
    """A number of this machine, as it runs now."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = platform.node()
    return int.from_bytes(sha256(name.encode()).digest()[:8], "little", signed=True)


def _mapped(pid: int, fd: int, size: int) -> Tensor:
    """The memory behind another process's file descriptor; OSError where there is no such memory of that size."""
    path = f"/proc/{pid}/fd/{fd}"
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise OSError(errno.ESRCH, f"AllReduceWorkspace: {path} is not rank 0's memory here")
    try:
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"AllReduceWorkspace: {size} bytes can't be mapped: {error}") from error


def _put(buffer: Tensor, at: int, data: bytes) -> None:
    buffer[at : at + len(data)] = torch.tensor(list(data), dtype=torch.uint8)


def raise_if_broken(name: str, buffer: Tensor) -> None:
    """TimeoutError if a rank has given up waiting in this memory; nothing where it isn't a workspace's."""
    world, _, timeout, *_, broken = _header_of(buffer) or (0,) * 6
    if not broken:
        return
    waited, by = [rank for rank in range(world) if broken >> rank & 1], broken >> 32 & 15
    if waited == [by]:
        raise TimeoutError(f"{name}: rank {by} failed in a call; the workspace is broken on all ranks: make a new one")
    absent = ", ".join(f"rank {rank} ({_process(buffer, rank)})" for rank in waited)
    long = "" if broken & _HAS_ENDED else f" {timeout / 1e9:g} s"
    raise TimeoutError(
        f"{name}: rank {by} waited{long} for {absent}; the workspace is broken on all ranks: make a new one"
    )


def _process(buffer: Tensor, rank: int) -> str:
    """A rank's process, and whether it lives, as far as this one can see."""
    pid = _pid_of(buffer, rank)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ended = fields[0] in "ZX" and int(fields[17]) <= 1  # of its threads the first, which may end before others
    except OSError:
        ended = True
    return f"process {pid}, which {'has ended' if ended else 'is alive'}"


def _pid_of(buffer: Tensor, rank: int) -> int:
    at = _RANKS_AT + rank * _RANK_BYTES
    return _RANK.unpack(bytes(buffer[at : at + _RANK.size].tolist()))[2]


def _header_of(buffer: Tensor) -> tuple | None:
    """What `_HEADER` says, and which ranks somebody waits for in vain; None where it isn't shared memory of CPUs."""
    if type(buffer) is not Tensor or buffer.device.type != "cpu" or buffer.numel() < _RANKS_AT or buffer.ndim != 1:
        return None
    header = bytes(buffer[:_RANKS_AT].tolist())
    magic, size, *rest = _HEADER.unpack_from(header)
    return (*rest, *_BROKEN.unpack_from(header, _BROKEN_AT)) if (magic, size) == (_MAGIC, buffer.numel()) else None


def attempts_of(buffer: Tensor, rank: int) -> ctypes.c_int64:
    """How many calls this rank has made or refused, in memory that ranks share on a CPU."""
    return _number(buffer, rank, _ATTEMPTS_AT)


def calling_of(buffer: Tensor, rank: int) -> ctypes.c_int64:
    """Whether a kernel runs a call of this rank."""
    return _number(buffer, rank, _CALLING_AT)


def _number(buffer: Tensor, rank: int, at: int) -> ctypes.c_int64:
    number = ctypes.c_int64.from_address(buffer.data_ptr() + _RANKS_AT + rank * _RANK_BYTES + at)
    number.memory = buffer  # type: ignore[attr-defined]  # which stays as long as it is read
    return number


def meet(what: str, buffer: Tensor, rank: int, group: str) -> None:
    """Number a call of the reference backend, and wait until all ranks make it, with the same to exchange.

    As csrc/cpu/meeting.h: who refused a call waits until the others have raised in it. Ranks that share no memory of
    CPUs don't meet.

    Raises ValueError, on every rank, where one has refused this call or exchanges something else than `what`; by itself
    in a child that was forked, whose numbers are its parent's.
    """
    if _header_of(buffer) is None:
        return
    if _pid_of(buffer, rank) != os.getpid():
        raise ValueError(f"workspace: expected the buffer that this process has made as rank {rank}, not a copy")
    attempts, said = attempts_of(buffer, rank), what.encode()[:64].ljust(64)
    attempts.value += 1
    while True:
        mine = [attempts.value, *struct.unpack("=8q", said)]
        every = from_all(_resolve_process_group(group), mine)  # type: ignore[arg-type]
        last = max(every)[0]
        if attempts.value < last:
            ahead = next(other for other, (attempt, *_) in enumerate(every) if attempt == last)
            raise ValueError(f"rank {ahead} has refused this call, rank {rank} exchanges {what}")
        if all(attempt == last for attempt, *_ in every):
            break
    for other, (_, *words) in enumerate(every):
        if words != mine[1:]:
            theirs = struct.pack("=8q", *words).decode().strip()
            raise ValueError(f"rank {other} exchanges {theirs}, rank {rank} {what}")
