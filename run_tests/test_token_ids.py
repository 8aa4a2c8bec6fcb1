"""Where a text lies: on the device while it has room, or else on the host, which sends the batches."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ref_numpy.config import ModelConfig, TrainConfig
from run_tests.conftest import content
from torch_impl.data import sample_batch
from torch_impl.seq2seq import make_model
from torch_impl.train import FromHost, start, train_steps
from torch_impl.training import objectives, token_ids
from torch_impl.training.token_ids import tokens_on

GPU = torch.device("meta")  # the nearest to one that is everywhere: it holds no numbers


@pytest.mark.parametrize(
    ("largest", "stored", "copied"),
    [
        (255, np.uint8, torch.uint8),
        (256, np.uint16, torch.int16),
        (2**15 - 1, np.uint16, torch.int16),
        (2**15, np.uint16, torch.int32),
        (2**16 - 1, np.uint16, torch.int32),
        (2**16, np.uint32, torch.int32),
    ],
)
def test_a_copy_of_the_ids_has_a_type_that_gpus_index(largest, stored, copied, monkeypatch):
    monkeypatch.setattr(token_ids, "_COPIED_AT_ONCE", 3)
    ids = np.array([0, 1, largest, 7, largest, 2, 5], stored)
    tokens = token_ids._copied(torch.device("cpu"), ids, token_ids._indexed(ids))
    assert tokens.dtype == copied and tokens.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("free", "largest", "device"),
    [
        (None, 9, "meta"),  # nobody knows, so it is tried
        (4000, 9, "meta"),
        (3999, 9, "cpu"),
        (4000, 2**15, "cpu"),  # which takes four bytes there
        (8000, 2**15, "meta"),
    ],
)
def test_a_text_takes_half_of_the_room_of_a_device_or_stays_on_the_host(monkeypatch, free, largest, device):
    monkeypatch.setattr(token_ids, "free_memory_of", lambda device: free)
    ids = np.full(1000, largest, np.uint16)
    tokens = tokens_on(GPU, ids)
    assert tokens.device.type == device and tokens.numel() == 1000
    if device == "cpu":
        assert tokens.data_ptr() == ids.ctypes.data, "it was copied"


def test_a_device_that_has_less_room_than_it_said(monkeypatch):
    def empty(*_, **__):
        raise torch.OutOfMemoryError("MPS backend out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    assert tokens_on(GPU, np.zeros(9, np.uint8)).device.type == "cpu"


def test_batches_from_the_host_are_asked_for_by_the_number_that_the_host_knows():
    """The device's own clock would make the host wait for every step."""
    config = ModelConfig(vocab_size=31, context_length=8, n_layer=1, n_head=1, d_model=4)
    training = TrainConfig(steps=5, batch_size=4, warmup_steps=1)
    tokens, asked = torch.arange(100) % 31, []

    def sample(step, config):
        asked.append(step)
        return sample_batch(tokens, 8, step, config)

    def losses(sample) -> list[float]:
        model = make_model(config)
        model.initialise(0)
        state = start(model, training)
        steps = train_steps(state, sample, training)
        told = [next(steps).loss.item(), next(steps).loss.item()]
        return told + [metrics.loss.item() for metrics in train_steps(state, sample, training)]

    there = losses(FromHost(sample, torch.device("cpu")))
    assert [int(step) for step in asked] == [0, 1, 2, 3, 4] and len({id(step) for step in asked}) == 5
    assert there == losses(partial(sample_batch, tokens, 8))


def test_a_batch_arrives_on_the_device():
    tokens = torch.arange(100, dtype=torch.int32)
    sample = FromHost(partial(sample_batch, tokens, 8), GPU)
    for part in sample(torch.tensor(3), TrainConfig(batch_size=4, micro_batches=2)):
        assert part.device.type == "meta" and part.shape == (2, 2, 8)


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_a_run_is_the_same_wherever_its_text_lies(small_run, monkeypatch, architecture):
    flags = ("--architecture", architecture, "--looks", 2)
    assert small_run("--out", "device", *flags).code == 0
    monkeypatch.setattr(objectives._OnText, "on_host", True)
    outcome = small_run("--out", "host", *flags)
    assert "cpu has no room for them, so the host makes the batches" in outcome.out
    assert content(Path("host")) == content(Path("device"))
