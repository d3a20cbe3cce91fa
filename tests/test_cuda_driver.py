"""How the CUDA backend loads and launches, against a driver that writes down what it is asked for.

Each test is a process of its own, whose libcuda and libtorch_cuda are tests/fake_cuda.c and whose tensors lie on the
CPU; what would run on device 1 is only written down.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PREPARE = """
import ctypes, pytest, torch
import fused_ops
from fused_ops import _cuda
fake = ctypes.CDLL("libcuda.so.1")
fake.fake_calls.restype = ctypes.c_char_p
calls = lambda: fake.fake_calls().decode().split(";")[:-1]
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.is_available = lambda: True
real = _cuda.Launch(("fused_ops_launch", _cuda.library()))
launch = lambda device, *rest: real(1, *rest)
compile = lambda a, b, device, *rest: _cuda.compile(a, b, 1, *rest)
_cuda.serve()
_cuda.set_driver(_cuda.Driver(_cuda.Launch(launch), _cuda.Compile(compile), for_cpu=True))
fake.fake_reset(0)
x, w = torch.zeros(6, 4096).bfloat16(), torch.ones(4096)
run = lambda: fused_ops.rms_norm(x, w, 1e-6)
key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
op = torch.ops.fused_ops.rms_norm.default
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake_cuda")
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, HERE / "fake_cuda.c"], check=True)
    (folder / "libtorch_cuda.so").symlink_to(library)
    return folder


def process(folder, script: str, **environment: str) -> None:
    env = os.environ | {"LD_LIBRARY_PATH": str(folder), "FUSED_OPS_CACHE": str(folder / "cache")} | environment
    done = subprocess.run([sys.executable, "-c", PREPARE + script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_kernel_is_loaded_once_and_launched_on_the_current_stream(folder):
    process(
        folder,
        """
run()
assert calls() == ["retain 1", "push 1", "load 1", "get kernel", "pop",
                   "push 1", "launch 17 6 1 1 256 1 1 0 stream 1001 rows 6", "pop"], calls()
fake.fake_reset(0); fake.fake_set_context(1); run()   # the device's context is current
assert calls() == ["launch 17 6 1 1 256 1 1 0 stream 1001 rows 6"], calls()
fake.fake_reset(0); fused_ops.rms_norm(x[:0], w, 1e-6)
assert calls() == []
""",
    )


def test_heads_of_any_number_of_tokens_are_launched_at_once(folder):
    process(
        folder,
        """
qkv, table = torch.zeros(600, 48, 128).bfloat16(), torch.zeros(64, 128)
q, k, v = qkv.split([32, 8, 8], dim=1)
caches, positions = [torch.zeros(40, 16, 8, 128).bfloat16() for _ in range(2)], torch.arange(600) % 64
args = lambda n: (q[:n], k[:n], v[:n], positions[:n], table, *caches, torch.arange(n))
fused_ops.rope(q[:6], k[:6], positions[:6], table)   # 4 heads for 8 threads: 48 and 12 of them, 16 to a block
assert calls()[-2] == "launch 17 4 1 1 128 1 1 0 stream 1001 rows 6", calls()
assert fused_ops.warmup(lambda: fused_ops.rope_kv_cache_write(*args(1))) == 1
fake.fake_reset(0); fused_ops.rope_kv_cache_write(*args(600))
assert calls() == ["push 1", "launch 17 450 1 1 128 1 1 0 stream 1001 rows 600", "pop"], calls()
fake.fake_reset(0); fused_ops.rope_kv_cache_write(*args(0))
assert calls() == []
""",
    )


def test_the_dispatcher_has_the_row_operations_for_cuda(folder):
    process(
        folder,
        """
with_kernels = [n for n in fused_ops.OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_ops::{n}", "CUDA")]
without = {n for n in fused_ops.OPS if "attention" in n or "linear" in n or "expert" in n}  # Triton's, torch's
assert set(fused_ops.OPS) - set(with_kernels) == without, with_kernels
assert all("cuda" in fused_ops.OPS[n].backends for n in with_kernels)
op.redispatch(key, x, w, 1e-6, 0)
assert calls()[-2].startswith("launch"), calls()
with fused_ops.use_backend("cuda"):
    op.redispatch(key, x, w, 1e-6, 0)
    with pytest.raises(ValueError, match="there is no backend 'cuda' for CPU"):
        run()
""",
    )


def test_errors_are_named(folder):
    process(
        folder,
        """
fake.fake_reset(700)
with pytest.raises(RuntimeError, match="a kernel for sm_90a can't be loaded: CUDA_ERROR_ILLEGAL_ADDRESS"):
    run()
assert "can't be loaded" in str(fused_ops.OPS["rms_norm"].backends["cuda"].failure())
fake.fake_reset(0); run(); fake.fake_reset(700)
with pytest.raises(RuntimeError, match="a kernel could not be launched: CUDA_ERROR_ILLEGAL_ADDRESS"):
    run()
fake.fake_reset(1)
with pytest.raises(RuntimeError, match="an unknown error of the CUDA driver"):
    run()
""",
    )


def test_an_interrupted_compilation_launches_nothing(folder):
    process(
        folder,
        """
cubin = _cuda.cubin
def interrupted(*_):
    raise KeyboardInterrupt
_cuda.cubin = interrupted
with pytest.raises(RuntimeError, match="could not be compiled: KeyboardInterrupt"):
    run()
assert isinstance(_cuda._failure(), KeyboardInterrupt)
assert calls() == []
_cuda.cubin = cubin
run()
assert calls()[-2].startswith("launch 17"), calls()
""",
    )


def test_threads_compile_at_once(folder, tmp_path):
    process(
        folder,
        """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(12) as pool:
    done = [pool.submit(fused_ops.relu2, torch.zeros(1, 64 * (1 + i % 4))) for i in range(12)]
[one.result() for one in done]
""",
        FUSED_OPS_CACHE=str(tmp_path),
    )


def test_a_warmup_compiles_and_loads(folder):
    process(
        folder,
        """
from pathlib import Path
import os
other = lambda: fused_ops.relu2(x)
before = len(list(Path(os.environ["FUSED_OPS_CACHE"]).glob("*")))
assert fused_ops.warmup(lambda: fused_ops.silu_mul(x, x), other) == 2
assert len(list(Path(os.environ["FUSED_OPS_CACHE"]).glob("*"))) == before + 2
assert sum(call.startswith("load") for call in calls()) == 2
assert sum(call.startswith("launch") for call in calls()) == 2   # in the second run only
fake.fake_reset(0)
assert fused_ops.warmup(other) == 0
assert fused_ops.warmup(lambda: (fused_ops.warmup(other), fused_ops.relu2(x.float()))) == 1
with pytest.raises(ZeroDivisionError):
    fused_ops.warmup(lambda: 1 / 0)
fake.fake_reset(0); other()
assert calls()[-2].startswith("launch")
""",
    )


def test_cuda_core_launches_beside_ours(folder, tmp_path):
    """What bench/launch.py compares with."""
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-DFOR_CUDA_PYTHON", "-o", library, HERE / "fake_cuda.c"], check=True)
    process(folder, "from bench import launch; _cuda.cubin(launch.KERNEL, 'sm_90a')")
    process(
        tmp_path,
        """
from bench import launch
launch.by_cuda_core(_cuda.cubin(launch.KERNEL, "sm_90a"), 1001)()
assert calls()[-1] == "launch 16 1 1 1 256 1 1 0 stream 1001 rows 1", calls()
_cuda.set_driver(_cuda.driver())
with launch.without_launches():
    pass
""",
        FUSED_OPS_CACHE=str(folder / "cache"),
    )


def test_a_missing_driver_is_named(folder, tmp_path):
    (tmp_path / "libcuda.so.1").symlink_to(folder / "libcuda.so.1")  # without torch's library for CUDA
    process(
        tmp_path,
        """
with pytest.raises(RuntimeError, match="libtorch_cuda.so has no aoti_torch_get_current_cuda_stream"):
    run()
""",
    )
