"""Where kernels are launched, and what happens where they cannot be."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from hf_treeflash.kernels import _launch
from hf_treeflash.kernels._launch import LazyKernel, use_triton


@LazyKernel
def kernel(POINTER, size):
    """Never run here."""


class FakeLauncher:
    """Notes the current device of every launch."""

    def __init__(self):
        self.current, self.launches = 0, []

    def exchange(self, device: int) -> int:
        before, self.current = self.current, device if device >= 0 else self.current
        return before

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.current, grid, args[1:], kwargs))


@pytest.fixture
def devices(monkeypatch) -> FakeLauncher:
    fake = FakeLauncher()
    monkeypatch.setattr(torch.cuda, "_exchange_device", fake.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", fake.exchange)
    monkeypatch.setitem(vars(kernel), "jitted", fake)
    return fake


def on_cuda(index: int):
    return SimpleNamespace(is_cuda=True, get_device=lambda: index, device=torch.device("cuda", index))


def test_a_launch_goes_to_the_device_of_its_tensors(devices):
    for index in (1, 0, 3):
        kernel[(2,)](on_cuda(index), 7, num_warps=4)
        assert devices.current == 0  # as the caller left it
    assert devices.launches == [(index, (2,), (7,), {"num_warps": 4}) for index in (1, 0, 3)]


@pytest.mark.parametrize(
    ("capability", "error"),
    [((9, 0), None), ((9, 0), RuntimeError("Failed to find C compiler")), ((9, 0), PermissionError("read-only")),
     ((7, 5), None)],
)  # fmt: skip
def test_one_probe_and_one_warning(monkeypatch, caplog, capability, error):
    launches = []

    class Probe:
        def __getitem__(self, grid):
            def launch(tensor):
                launches.append(tensor)
                if error is not None:
                    raise error

            return launch

    monkeypatch.setattr(_launch, "_probe_kernel", Probe())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    works = error is None and capability >= (8, 0)
    _launch._runs_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [use_triton(on_cuda(0)) for _ in range(3)] == [works] * 3
    _launch._runs_kernels.cache_clear()
    assert len(launches) == (capability >= (8, 0))
    assert [("plain torch" in record.message) for record in caplog.records] == [True] * (not works)


def test_the_probe_runs(triton_kernels, device):
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    _launch._probe_kernel[(1,)](flag)
    assert flag.item() == 1
