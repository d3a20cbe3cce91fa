import os

# Kernels for GPUs run on the host, by fibers and by Triton's interpreter, unless there is a GPU to test them on. Before
# anything imports Triton, which decides then.
os.environ.setdefault("FUSED_OPS_TEST_DEVICE", "cpu")
os.environ.setdefault("TRITON_INTERPRET", "1" if os.environ["FUSED_OPS_TEST_DEVICE"] == "cpu" else "0")

import importlib.util

import pairwise
import pytest
import torch
from flashinfer_calls import flashinfer  # noqa: F401
from linear_gpu_double import decoded, pretend  # noqa: F401


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every combination of arguments, not only every pair")


def pytest_configure(config):
    pairwise.everything = config.getoption("--full")


@pytest.fixture(autouse=True, scope="session")
def triton_interpreter():
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
        import interpreter

        interpreter.install()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert dtype == torch.float32, (
        "a model was made in a thread: transformers sets the default dtype meanwhile, for all"
    )


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN (the largest integer in integer ones), so that an element nobody writes is caught."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def untouched_memory(poisoned_memory):
    """Fresh tensors cost no memory until they are written: for those of gigabytes."""
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler():
    """What is compiled is compiled anew: a graph from the compiler's cache is shown to no pass, and to no report."""
    from torch._functorch import config as autograd
    from torch._inductor import config as inductor

    torch._dynamo.reset()
    with inductor.patch(fx_graph_cache=False), autograd.patch(enable_autograd_cache=False), torch.no_grad():
        yield
