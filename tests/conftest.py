import os

# Before anything imports Triton, which decides then: its kernels run on NumPy, unless this says 0 (on a GPU).
os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib.util

import pairwise
import pytest
import torch


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


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN (the largest integer in integer ones), so that an element nobody writes is caught."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
