"""Memory that the ranks of a process group share, for collectives fused with what follows them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._check import FLOATS

MOST_RANKS = 16
DEFAULT_TIMEOUT = 60.0  # seconds


class AllReduceWorkspace:
    """Memory shared by the ranks of `group`, of which every collective operation takes one.

    Constructing, closing and every call are collective: all ranks make them, in the same order. A workspace holds
    `max_tokens` rows a rank; a larger call goes through it in chunks of rows, and gives the same bits. Workspaces know
    nothing of each other: any number, of any groups, may be in use side by side.

    Args:
        group: the ranks, 1 to 16 of them; `torch.distributed.group.WORLD` for all.
        max_tokens: rows of `hidden_size` that one exchange takes.
        hidden_size: columns of the widest row.
        dtype: S, of the rows: bfloat16, float16 or float32.
        timeout: seconds after which a rank that waits for another raises TimeoutError; the same on all ranks.
        device: "cpu" or a CUDA device; by default the current CUDA device where the group serves one, else "cpu".

    Attributes:
        rank, world_size, group_name: of the group.
        buffer: uint8, what operations take for it.
        shared: whether the ranks share memory; if not, because they are on several hosts, operations run the group's
            own collective, then the fused norm: same formula, but the sum's order is the group's.

    Raises:
        TypeError, ValueError: an argument is not as above, or differs between the ranks.
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
    ):
        if not isinstance(group, ProcessGroup):
            raise TypeError(f"AllReduceWorkspace: group is {type(group).__name__}, expected a ProcessGroup")
        if group.size() > MOST_RANKS:
            raise ValueError(f"AllReduceWorkspace: group has {group.size()} ranks, expected at most {MOST_RANKS}")
        for name, value in ("max_tokens", max_tokens), ("hidden_size", hidden_size):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"AllReduceWorkspace: {name} is {type(value).__name__}, expected an int")
            if value < 1:
                raise ValueError(f"AllReduceWorkspace: {name} is {value}, expected at least 1")
        if dtype not in FLOATS:
            raise TypeError(f"AllReduceWorkspace: dtype is {dtype}, expected one of {FLOATS}")
        if not (isinstance(timeout, (int, float)) and math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"AllReduceWorkspace: timeout is {timeout!r}, expected seconds")
        self.group, self.group_name = group, group.group_name
        self.rank, self.world_size = group.rank(), group.size()
        self.max_tokens, self.hidden_size, self.dtype, self.timeout = max_tokens, hidden_size, dtype, timeout
        self.device = torch.device("cpu" if device is None else device)
        self.shared = True
        self.buffer: Tensor = torch.empty(64, dtype=torch.uint8, device=self.device)

    def rows(self, tokens: int) -> slice:
        """The rows of `tokens` that are this rank's where a result is scattered: ceil(tokens / world_size) a rank."""
        share = -(-tokens // self.world_size)
        return slice(min(self.rank * share, tokens), min((self.rank + 1) * share, tokens))

    def close(self) -> None:
        """Free the memory; later calls with this workspace raise ValueError."""

    def __enter__(self) -> AllReduceWorkspace:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"AllReduceWorkspace(rank {self.rank} of {self.world_size}, {self.max_tokens} rows of {self.hidden_size} "
            f"{self.dtype}, {self.device})"
        )
