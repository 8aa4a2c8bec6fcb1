"""Memory: what a run needs of it, what fits, and what is said where there is none."""

import json
import os
import re
import weakref
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from ref_numpy.parameters import parameter_shapes
from run_tests.conftest import metrics
from torch_impl.training import memory
from torch_impl.training import run as run_module
from torch_impl.training.checkpoint import load_model
from torch_impl.training.config import read_config
from torch_impl.training.costs import parameter_count
from torch_impl.training.device import Place
from torch_impl.training.files import InputError
from torch_impl.training.memory import fewest_micro_batches, memory_of, needed_bytes, step_bytes
from torch_impl.training.presets import PRESETS
from torch_impl.training.ranks import ALONE, Ranks

GPU = Place(torch.device("cuda"), torch.bfloat16, False)
CPU = torch.device("cpu")
HERE = Place(CPU, torch.float32, False)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out(small_run, monkeypatch, error):
    def exhausted(state, tokens, config):
        raise error
        yield

    monkeypatch.setattr(run_module, "train_steps", exhausted)
    outcome = small_run("--out", "run", "--batch-size", 32)
    assert outcome.code == 1
    assert "out of memory with batch_size 32 in 1 micro_batches and context_length 8" in outcome.error
    for part in ("a step needs ", "weights ", "gradients ", "moments ", "activations "):
        assert part in outcome.error
    assert "largest batch that fits, with the same result: --micro-batches 2, 16 at a time" in outcome.error


def test_the_tensors_of_a_step_that_found_no_room_make_room_for_the_report():
    """The error held them. Under ulimit -v the process ended in the midst of the report with `OpenBLAS error:
    Memory allocation still failed`, and had not said what would fit."""
    held = []

    def step():
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise MemoryError

    with pytest.raises(memory.OutOfMemory) as told, memory.accounted(PRESETS["cpu"], HERE, ALONE):
        step()
    assert told.value.__cause__.__traceback__ and held[0]() is None


def test_the_largest_batch_that_fits_is_the_largest():
    config = PRESETS["gpt2-124m"]
    for gib in (8, 24, 80):
        fewest = fewest_micro_batches(config, GPU, gib << 30, ALONE)
        counts = [m for m in range(1, 481) if 480 % m == 0]
        fits = [step_bytes(config, GPU, m, ALONE).peak <= gib << 30 for m in counts]
        assert fits == sorted(fits) and fewest == counts[fits.index(True)]
    assert fewest_micro_batches(config, GPU, 1 << 30, ALONE) is None
    sharded = replace(config, run=replace(config.run, shard=True))
    eight = Ranks(size=8)
    one, each = (step_bytes(kind, GPU, 60, eight).moments for kind in (config, sharded))
    assert each * 8 == one
    parts, parts_alone = (fewest_micro_batches(config, GPU, 24 << 30, ranks) for ranks in (eight, ALONE))
    assert parts < parts_alone


def test_a_batch_is_fitted_into_the_memory_that_is_free(small_run, monkeypatch):
    """Room for two of the four sequences, at three quarters; the losses are those of the whole batch."""
    size = "--context-length", 64
    assert small_run("--out", "whole", "--batch-size", 4, *size).code == 0
    config = read_config(Path("whole/last"))
    needed = step_bytes(config, Place(torch.device("cpu"), torch.float32, False), 2, ALONE).peak
    monkeypatch.setattr(memory, "free_memory_of", lambda device, processes: int(needed / 0.75) + 8)
    fit = small_run("--out", "fitted", "--batch-size", "auto", "--micro-batches", 1, *size)
    assert fit.code == 0 and "batches of 4 sequences, 2 at a time" in fit.out
    assert read_config(Path("fitted/last")).training.micro_batches == 2
    for whole, part in zip(metrics(Path("whole")), metrics(Path("fitted")), strict=True):
        assert part["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)
    monkeypatch.setattr(memory, "free_memory_of", lambda device, processes: 1000)
    error = small_run("--out", "none", "--batch-size=auto").error
    assert "a single sequence needs " in error and not Path("none").exists()


def test_free_memory_is_some_and_not_all():
    free, present = (ask(CPU) for ask in (memory.free_memory_of, memory.memory_of))
    assert (free, present) == (None, None) or 0 < free < present


@pytest.mark.skipif(os.name == "nt", reason="memory is not promised there: the allocation itself fails")
@pytest.mark.parametrize(
    "flags", [["--d-model", "100000", "--n-layer", "100"], ["--n-layer", 10**12], ["--batch-size", 10**9]]
)
def test_a_model_that_can_never_fit_is_refused_before_anything_is_allocated(small_run, flags):
    outcome = small_run("--out", "run", *flags)
    assert outcome.code == 2
    assert re.search(
        r"need [\d,.]+ [GTP]iB of memory at least, but this machine has [\d,.]+ [GT]iB: reduce", outcome.error
    )
    assert not Path("run").exists()


def test_the_memory_of_a_run_counts_every_parameter():
    config = PRESETS["nanogpt-cpu"]
    assert parameter_count(config.model) == sum(map(prod, parameter_shapes(config.model).values()))
    more = replace(config, training=replace(config.training, micro_batches=12))
    assert 16 * parameter_count(config.model) < needed_bytes(more, CPU) < needed_bytes(config, CPU)


@pytest.mark.skipif(memory_of(torch.device("cpu")) is None, reason="the system does not say what it has")
@pytest.mark.parametrize("context_length", [10**12, 2**63 - 1, 10**19])
def test_nothing_is_allocated_for_a_context_that_a_config_claims(small_run, context_length):
    """Its table of rotations and its cache used to be, until the process was killed."""
    assert small_run("--out", "run", "--positions", "rope").code == 0
    path = Path("run/best/config.json")
    config = json.loads(path.read_bytes())
    config["model"]["context_length"] = context_length
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json: context_length .*(this machine has|below 2\*\*63)"):
        load_model(Path("run/best"), torch.float32, torch.device("cpu"))
