"""Workspaces of real processes: what they share, what ends a call, what is left behind."""

import ctypes
import os
import signal
import threading
import time

import pytest
import torch
from compare import assert_same
from ranks import Processes, X, everywhere, on_ranks, rows, threads, two_of_them, workspaces
from torch.distributed import PrefixStore, ProcessGroup, Store

import fused_ops
from fused_ops import OPS, AllReduceWorkspace, _shared, _symmetric
from fused_ops.collective import summed
from fused_ops.collective_inputs import group_of
from fused_ops.workspace import share_of
from quant import INT8_DYNAMIC_TOKEN

pytestmark = pytest.mark.skipif("cpu" not in OPS["all_reduce"].backends, reason="no compiled kernels on this machine")


def check_call(w: AllReduceWorkspace, members: list[int], seed: int) -> None:
    """One call on the members' rows, against their sum."""
    tokens, cols = seed % 6, (64, 33)[seed % 2]
    dtype = (torch.bfloat16, torch.float32)[seed // 2 % 2]
    parts = [rows(seed, member, tokens, cols, dtype) for member in members]
    x, total = parts[w.rank], summed(parts)
    if seed % 3 == 0:
        assert_same(fused_ops.all_reduce(x, w), total)
    elif seed % 3 == 1:
        q = fused_ops.reduce_scatter_rms_norm_quant(x, None, 1e-6, INT8_DYNAMIC_TOKEN, w)
        whole = fused_ops.all_gather_quantized(q, w, rows=tokens)
        expected = fused_ops.rms_norm_quant(total, None, 1e-6, INT8_DYNAMIC_TOKEN)
        assert_same(whole.data, expected.data)
        assert_same(whole.scale, expected.scale)
    else:
        y, residual = fused_ops.all_reduce_fused_add_rms_norm_quant(x, total, None, 1e-6, None, w)
        expected, new = fused_ops.fused_add_rms_norm(total, total, None, 1e-6)
        assert_same(y, expected)
        assert_same(residual, new)


def mapped() -> int:
    """How many workspaces this process maps, or holds a descriptor of."""
    with open("/proc/self/maps") as maps:
        count = maps.read().count("memfd:fused_ops")
    for name in os.listdir("/proc/self/fd"):
        try:
            count += "fused_ops" in os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return count


LONG = 90  # seconds, that nobody waits for a process that is gone


def life(group: ProcessGroup, store: Store, reached, calls: int) -> str:
    """What one rank does, in order; what it says at last."""
    rank, world = group.rank(), group.size()
    everyone = list(range(world))
    with AllReduceWorkspace(group, 3, 64, torch.float32, timeout=20) as first:
        assert first.shared
        assert mapped() == 1
        second = AllReduceWorkspace(group, 8, 128, torch.bfloat16, two_shot_above=0, timeout=20)
        half = everyone[rank % 2 :: 2]
        name = f"half {rank % 2}"
        mine = group_of(PrefixStore(name, store), half.index(rank), len(half), name)
        ours = AllReduceWorkspace(mine, 2, 64, torch.float32, timeout=20)
        for seed in range(calls):  # several groups, interleaved, one more often than the other
            check_call((first, second)[seed % 2], everyone, seed)
            for more in range(seed % (2 + rank % 2)):
                check_call(ours, half, 7 * seed + more)
        assert mapped() == 3
    with pytest.raises(ValueError, match="workspace is closed"):
        fused_ops.all_reduce(torch.randn(1, 8), first)
    ours.close()
    del second
    assert mapped() == 0, "closed, closed, and collected"

    last = AllReduceWorkspace(group, 3, 64, torch.float32, timeout=LONG)
    x = torch.randn(2, 64)
    fused_ops.all_reduce(x, last)
    reached()
    if rank == world - 1:
        while True:  # until it is killed
            fused_ops.all_reduce(x, last)
    said = ""
    while not said:
        try:
            fused_ops.all_reduce(x, last)
        except TimeoutError as error:
            said = str(error)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="the workspace is broken on all ranks"):
        fused_ops.reduce_scatter(x, last)
    assert time.monotonic() - began < 1, "a broken workspace says so at once"
    last.close()
    assert mapped() == 0
    return said


@pytest.mark.parametrize(("world", "calls"), [(2, 1500), (3, 300), (4, 200), (8, 50)])
def test_a_life_of_processes(world, calls):
    """Construction, several groups side by side, closing, and a rank that is killed in the middle of a call."""
    processes = Processes(world, life, calls)
    try:
        processes.wait()
        time.sleep(0.2)
        os.kill(processes.processes[-1].pid, signal.SIGKILL)  # and it stays a zombie: nobody asks how it ended
        for rank in range(world - 1):
            said = processes.result(rank, LONG / 2)
            assert f" waited for rank {world - 1} (process {processes.processes[-1].pid}, which has ended)" in said
    finally:
        processes.end()
    assert not [name for name in os.listdir("/dev/shm") if "fused_ops" in name]


def test_a_rank_that_never_calls_and_one_that_comes_late():
    made = workspaces(3, 4, 64, timeout=0.5)
    other = workspaces(3, 4, 64, timeout=30)
    results = on_ranks(made[::2], lambda w: fused_ops.all_reduce(torch.randn(2, 8), w))
    for error in results:
        assert isinstance(error, TimeoutError), error
        assert "waited 0.5 s for rank 1 (process" in str(error)
        assert "which is alive" in str(error)
    for backend in "cpu", "reference":
        with fused_ops.use_backend(backend), pytest.raises(TimeoutError, match="the workspace is broken on all ranks"):
            fused_ops.all_gather(torch.randn(2, 8), made[1])
    x = [torch.randn(2, 8) for _ in other]
    for y in everywhere(other, lambda w: fused_ops.all_reduce(x[w.rank], w)):
        assert_same(y, summed(x))


def test_workspaces_that_differ_are_refused_on_all_ranks():
    def make(group: ProcessGroup, *each) -> str:
        arguments, options = each[group.rank()]
        with pytest.raises((TypeError, ValueError)) as error:
            AllReduceWorkspace(group, *arguments, **options)
        return f"{error.type.__name__}: {error.value}"

    usual = (4, 64, torch.bfloat16), {}
    for other, said, by_itself in (
        (((5, 64, torch.bfloat16), {}), "rank 1 has max_tokens 5", None),
        (((4, 96, torch.bfloat16), {}), "hidden_size 96", None),
        (((4, 64, torch.float32), {}), "torch.float32", None),
        (((4, 64, torch.bfloat16), {"timeout": 7}), "timeout 7,", None),
        (((4, 64, torch.bfloat16), {"two_shot_above": 7}), "two_shot_above 7,", None),
        (
            ((0, 64, torch.bfloat16), {}),
            "rank 1 refuses its arguments",
            "ValueError: AllReduceWorkspace: max_tokens is 0",
        ),
        (((4, 64.0, torch.bfloat16), {}), "rank 1 refuses", "TypeError: AllReduceWorkspace: hidden_size is float"),
        (((4, 64, torch.int8), {}), "rank 1 refuses", "TypeError: AllReduceWorkspace: dtype is torch.int8"),
        (((4, 64, torch.bfloat16), {"timeout": 0}), "rank 1 refuses", "ValueError: AllReduceWorkspace: timeout is 0"),
        (((4, 64, torch.bfloat16), {"device": "meta"}), "rank 1 refuses", "ValueError: AllReduceWorkspace: device is"),
    ):
        results = threads(3, make, usual, other, usual)
        assert said in results[0], results
        assert results[2] == results[0]
        assert results[1].startswith(by_itself) if by_itself else results[1] == results[0]
    with pytest.raises(TypeError, match="group is NoneType, expected a ProcessGroup"):
        AllReduceWorkspace(None, 4, 64, torch.bfloat16)


def test_what_is_no_workspace_of_this_rank_is_refused():
    """No access outside, no wait for nobody: a copy, another rank's, random bytes, a part."""
    made = workspaces(2, 4, 64, timeout=0.3)
    x, buffer, group = torch.randn(2, 8), made[0].buffer, made[0].group_name
    wrong = torch.randint(0, 256, buffer.shape, dtype=torch.uint8)
    forged = buffer.clone()
    forged[8:32] = 255
    for workspace, rank, message in (
        (buffer.clone(), 0, "not a copy"),
        (buffer, 1, "not a copy"),  # rank 1 made a mapping of its own
        (buffer, 2, "rank: expected 0 to 1"),
        (buffer, -1, "rank: expected 0 to 1"),
        (wrong, 0, "expected the buffer of an AllReduceWorkspace"),
        (forged, 0, "expected the buffer of an AllReduceWorkspace"),
        (buffer[:-64], 0, "expected the buffer of an AllReduceWorkspace, all of it"),
        (buffer[1:], 0, "expected the buffer of an AllReduceWorkspace"),
        (buffer[:0], 0, "expected the buffer of an AllReduceWorkspace"),
        (buffer.view(torch.int8), 0, "uint8"),
        (buffer.view(2, -1), 0, "uint8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fused_ops.all_reduce(x, workspace, rank, group)
    for w in made:
        inside = w.buffer[-64:].view(torch.float32).view(2, 8)
        with pytest.raises(RuntimeError, match="overlaps another argument in memory"):
            torch.ops.fused_ops.all_reduce(inside, w.buffer, w.rank, w.group_name)
    with pytest.raises(TypeError, match="workspace is Tensor, expected an AllReduceWorkspace"):
        fused_ops.all_reduce(x, buffer)
    for y in everywhere(made, lambda w: fused_ops.all_reduce(x, w)):
        assert_same(y, x + x)


def test_one_thread_at_a_time_is_a_rank():
    made = workspaces(2, 4, 64, timeout=30)
    x = torch.randn(2, 8)

    def call(w):
        if w is None:
            time.sleep(0.3)
            with pytest.raises(ValueError, match="rank 0 is in a call already, by another thread"):
                fused_ops.all_reduce(x, made[0])
            return fused_ops.all_reduce(x, made[1])
        return fused_ops.all_reduce(x, w)

    for y in on_ranks([made[0], None], call):
        assert_same(y, x + x)


@pytest.mark.parametrize("call", ["function", "kernel"])
def test_threads_that_call_at_once_take_turns_or_are_refused(call):
    """Whoever comes second isn't counted, so the other rank meets each of the first's calls."""
    made, tickets, refused = workspaces(2, 4, 64, timeout=30), iter(range(400)), []
    x = [torch.randn(2, 8) for _ in made]

    def run(w):
        if call == "function":
            return fused_ops.all_reduce(x[w.rank], w)
        return torch.ops.fused_ops.all_reduce(x[w.rank], w.buffer, w.rank, w.group_name)

    def until_it_is_served() -> None:
        for _ in tickets:
            while True:
                try:
                    run(made[0])
                    break
                except (ValueError, RuntimeError) as error:
                    refused.append(str(error))

    def rank(w):
        if w is made[1]:
            return [run(w) for _ in range(400)]
        return until_it_is_served()

    sums = everywhere([made[0], made[0], made[1]], rank)[2]
    assert all(torch.equal(y, x[0] + x[1]) for y in sums)
    assert refused
    assert all("rank 0 is in a call already, by another thread" in error for error in refused), set(refused)


def _serve_without_the_main_thread(group: ProcessGroup, _, reached) -> str:
    workspace = AllReduceWorkspace(group, 4, 64, torch.float32, timeout=20)

    def serve() -> None:
        time.sleep(0.5)  # longer than others wait before they look
        fused_ops.all_reduce(X, workspace)
        reached()
        time.sleep(60)

    if group.rank() == 1:
        threading.Thread(target=serve, daemon=True).start()
        ctypes.CDLL(None).pthread_exit(None)
    assert_same(fused_ops.all_reduce(X, workspace), X + X)
    reached()
    return _shared._process(workspace.buffer, 1)


def _refuse_in_a_child(group: ProcessGroup, *_) -> list[str]:
    """What a forked child is told on each backend; the ranks go on as if it hadn't called."""
    workspace, said = AllReduceWorkspace(group, 4, 64, torch.float32, timeout=20), []
    for backend in "cpu", "reference":
        reading, writing = os.pipe()
        with fused_ops.use_backend(backend):
            if group.rank() == 1 and (pid := os.fork()) == 0:
                signal.alarm(5)  # where it waits for others
                try:
                    fused_ops.all_reduce(X, workspace)
                except ValueError as error:
                    os.write(writing, str(error).encode())
                finally:
                    os._exit(0)
            if group.rank() == 1:
                os.waitpid(pid, 0)
                os.write(writing, b".")
                said.append(os.read(reading, 1000).decode())
            for times in 1, 2:
                assert_same(fused_ops.all_reduce(X * times, workspace), summed([X * times] * 2))
    return said


def test_a_forked_child_is_no_rank():
    processes = Processes(2, _refuse_in_a_child)
    try:
        said = processes.results()[1]
        assert len(said) == 2
        assert all("the buffer that this process has made as rank 1, not a copy" in each for each in said), said
    finally:
        processes.end()


def test_a_process_whose_main_thread_has_ended_is_alive():
    processes = Processes(2, _serve_without_the_main_thread)
    try:
        processes.wait(30)
        assert "is alive" in processes.result(0)
    finally:
        processes.end()


def test_a_gpus_workspace_counts_what_its_rank_refuses(monkeypatch):
    """So that the next call says so: tests of each backend have the rest."""
    monkeypatch.setattr(_symmetric, "empty", lambda size, device: torch.zeros(size, dtype=torch.uint8))

    def opened(buffer, group, timeout, above):
        failure = torch.zeros(256, dtype=torch.uint8)
        return _symmetric.Memory(buffer, [buffer.data_ptr()] * 2, group.rank(), timeout, above or 0, failure)

    monkeypatch.setattr(_symmetric, "opened", opened)
    for w in workspaces(2, 4, 64, device="cuda:0"):
        for _ in range(2):
            with pytest.raises((TypeError, ValueError)):
                fused_ops.all_reduce(X.long(), w)
        assert w._memory.refused.value == 2
        w.close()


def test_what_one_rank_cannot_make_ends_all(monkeypatch):
    """No rank waits for one that raised, and ranks of one host share memory or say why not."""

    def make(group: ProcessGroup, each) -> str:
        with pytest.raises((ValueError, OSError)) as error:
            AllReduceWorkspace(
                group, each["max_tokens"][group.rank()], 1 << 20, torch.float32, **each["of"][group.rank()]
            )
        return f"{error.type.__name__}: {error.value}"

    usual = {"timeout": 5, "device": "cpu"}
    for tokens, options, said in (
        (4, usual | {"device": "bogus"}, "ValueError: AllReduceWorkspace: device is 'bogus', expected the CPU or"),
        (4, usual | {"device": 3.5}, "ValueError: AllReduceWorkspace: device is 3.5, expected the CPU or a CUDA"),
        (1 << 39, usual, "ValueError: AllReduceWorkspace: max_tokens is 549755813888, too many of 1048576"),
        (4, usual | {"timeout": 1e-10}, "ValueError: AllReduceWorkspace: timeout is 1e-10, expected 10^-9"),
    ):
        results = threads(2, make, {"max_tokens": (4, tokens), "of": (usual, options)}, wait=20)
        assert results[1].startswith(said), results
        assert "rank 1 refuses its arguments" in results[0]
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        cuda = usual | {"device": "cuda"}
        for result in threads(2, make, {"max_tokens": (4, 4), "of": (cuda, cuda)}, wait=20):
            assert result == "ValueError: AllReduceWorkspace: device is cuda, of which torch finds none"
    for result in threads(2, make, {"max_tokens": (1 << 30, 1 << 30), "of": (usual, usual)}, wait=20):
        assert result.startswith("OSError: [Errno 12]"), result

    mapped, calls = _shared._mapped, iter(range(9))

    def once(*where):
        if next(calls):
            raise OSError(13, "not for you")
        return mapped(*where)

    monkeypatch.setattr(_shared, "_mapped", once)
    results = threads(2, make, {"max_tokens": (4, 4), "of": (usual, usual)}, wait=20)
    assert "rank 1 has no memory: Permission denied" in results[0]
    assert results[1] == "PermissionError: [Errno 13] not for you"


def test_shares_cover_all_rows_once():
    for world in range(1, 17):
        for tokens in 0, 1, 2, 15, 16, 17, 100:
            shares = [share_of(tokens, world, rank) for rank in range(world)]
            assert [row for share in shares for row in range(tokens)[share]] == list(range(tokens))
            assert max(share.stop - share.start for share in shares) == -(-tokens // world)


def test_compiled_graphs_keep_the_order_of_calls():
    made = workspaces(2, 4, 64)
    compiled = [torch.compile(two_of_them, fullgraph=True) for _ in made]
    x = [torch.randn(3, 64) for _ in made]
    expected = everywhere(made, lambda w: two_of_them(x[w.rank], w))
    actual = everywhere(made, lambda w: compiled[w.rank](x[w.rank], w))
    for rank in 0, 1:
        for a, e in zip(actual[rank], expected[rank], strict=True):
            assert_same(a, e)
