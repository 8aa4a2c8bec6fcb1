"""Runs whose matrix products have a format of their own: where it is there, and what is said elsewhere."""

import re
from pathlib import Path

import pytest
import torch

from torch_impl.training import announcement, device
from torch_impl.training.config import RunSettings
from torch_impl.training.device import choose_place
from torch_impl.training.files import InputError
from torch_impl.training.ranks import ALONE, Ranks


def test_products_in_float8_are_told(small_run):
    out = small_run("--out", "run", "--steps", "1", "--warmup-steps", "0", "--precision", "float8").out
    first, _, products, *_ = out.splitlines()
    assert first.startswith("preset cpu on cpu, bfloat16, products in float8: ")
    assert products == "matrix products: PyTorch's choice, in float8"


@pytest.mark.parametrize(("times", "told"), [(1.4, False), (1.6, True)])
def test_a_processor_without_instructions_for_half_precision_is_told_of(small_run, monkeypatch, times, told):
    monkeypatch.setattr(announcement, "products_beside_float32", lambda dtype: times)
    out = small_run("--out", "run", "--steps", "1", "--warmup-steps", "0", "--precision", "bfloat16").out
    warning = "in bfloat16 they take this processor 1.6 times as long; --precision float32 is faster"
    assert (warning in out) == told


@pytest.mark.parametrize(
    ("times", "precision", "told"), [(0.51, "auto", True), (0.9, "auto", False), (0.51, "float32", False)]
)
def test_a_processor_with_such_instructions_is_told_of_where_no_precision_was_asked_for(
    small_run, monkeypatch, times, precision, told
):
    monkeypatch.setattr(announcement, "products_beside_float32", lambda dtype: times)
    out = small_run("--out", "run", "--steps", "1", "--warmup-steps", "0", "--precision", precision).out
    assert ("in bfloat16 they would take this processor 0.5 of the time: --precision bfloat16" in out) == told


def test_attention_by_products_is_told(small_run, monkeypatch):
    monkeypatch.setattr(announcement, "products_pay", lambda device, dtype, elements: elements > 0)
    out = small_run("--out", "run", "--steps", "1", "--warmup-steps", "0").out
    assert "\nattention: products of matrices, causal\n" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precision", "tf32"], "--precision tf32: cpu has none; use --precision float32"),
        (["--precision", "float8", "--detect-anomaly"], "use --precision bfloat16 with it"),
    ],
)
def test_products_that_are_not_here(small_run, flags, message):
    outcome = small_run("--out", "run", *flags)
    assert outcome.code == 2 and message in outcome.error and not Path("run").exists()


def test_products_are_timed_beside_those_in_float32(monkeypatch):
    """In turns, on a clock on which those of float32 take 2 at best and the others 6, and both many times as
    long at first, while the machine does something else: so bfloat16 once took 0.0 of float32's time."""
    turns = [(50, 70)] * 15 + [(5, 9), (3, 8), (2, 7), (9, 6), (4, 8)]
    clock = iter([t for turn in turns for took in turn for t in (100, 100 + took)])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))
    assert device.products_beside_float32(torch.bfloat16) == 3


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    """Streams, CUDA graphs and FSDP2 take the current one, where tensors were on another."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, ranks in (
        ("cuda:1", ALONE),
        ("cuda", ALONE),
        ("cuda", Ranks(5, 8, local_rank=3, local_size=4)),
    ):
        device.choose_device(name, ranks)
    assert current == [torch.device("cuda:1"), torch.device("cuda:3")]


def test_a_gpu_that_is_too_old_for_float8(monkeypatch):
    for name, value in {
        "device_count": 1,
        "get_device_capability": (8, 0),  # the least that tf32 needs
        "get_device_name": "A100",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    found = choose_place(RunSettings(device="cuda", precision="tf32", compile="off"))
    assert (found.dtype, found.products) == (torch.float32, "tf32")
    message = "--precision float8 needs a GPU of compute capability 8.9, and A100 has 8.0; use --precision bf"
    with pytest.raises(InputError, match=re.escape(message)):
        choose_place(RunSettings(device="cuda", precision="float8"))
