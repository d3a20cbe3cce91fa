"""The platform's operation takes the place of its pattern, where its option says so."""

import pytest
import torch
from acme_platform import AcmeConfig, AcmeManager

from models_patch.passes import Backend, PassConfig


def capped(x, weight):
    return 50.0 * torch.tanh((x @ weight) / 50.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", [AcmeConfig(), AcmeConfig(soft_cap=False), PassConfig()])
def test_the_option_decides(config, dtype):
    backend = Backend(AcmeManager.from_config(config))
    x, weight = torch.randn(4, 8).to(dtype), torch.randn(8, 16).to(dtype)
    with torch.no_grad():
        assert torch.equal(torch.compile(capped, backend=backend)(x, weight), capped(x, weight))
    wanted = {"acme::soft_cap": 1} if config == AcmeConfig() else {}
    assert {name: n for name, n in backend.manager.report().operations.items() if "::" in name} == wanted


def test_what_tells_configurations_apart():
    hashes = {config.compute_hash() for config in (AcmeConfig(), AcmeConfig(soft_cap=False), PassConfig())}
    assert len(hashes) == 3
    managers = AcmeManager.from_config(AcmeConfig()), AcmeManager.from_config(AcmeConfig(soft_cap=False))
    assert managers[0].uuid() != managers[1].uuid()
    assert [entry["id"] for entry in managers[0].describe_pipeline()][-1] == "soft_cap"
