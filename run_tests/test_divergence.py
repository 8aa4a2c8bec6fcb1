"""A loss or a gradient that is no number: the run ends, names step and culprit, and keeps what it has."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from torch_impl import multi_head_attention
from torch_impl.ffn import FFN
from torch_impl.training import objectives
from torch_impl.training import run as run_module


def test_training_that_blows_up_stops_and_keeps_the_last_good_checkpoint(small_run):
    flags = ("--learning-rate", "1e9", "--warmup-steps", "0", "--clip", "0", "--checkpoint-every", "1")
    outcome = small_run("--out", "run", *flags)
    assert outcome.code == 1
    assert re.search(
        r"step \d+: .* (nan|inf|finite number).*stopped.*run.last.*learning-rate below 1e\+09", outcome.error
    )
    for name in ("last", "best"):
        for tensor in load_file(Path("run") / name / "model.safetensors").values():
            assert tensor.isfinite().all()


@pytest.mark.parametrize("flags", [(), ("--precision", "float16"), ("--detect-anomaly",)])
def test_what_is_to_blame_for_a_loss_that_is_none_is_named(small_run, monkeypatch, flags):
    """From step 7 on, the first block's feed-forward layer divides by zero. The run goes back to its last
    checkpoint, of step 5, and finds it."""
    forward = FFN.forward

    def broken(self, x):
        return forward(self, x) / (0.0 if clock[0] >= 6 else 1.0)

    clock, sample_batch = [0], objectives.sample_batch

    def watched(tokens, context_length, step, config):
        clock[0] = int(step)
        return sample_batch(tokens, context_length, step, config)

    monkeypatch.setattr(objectives, "sample_batch", watched)
    monkeypatch.setattr(FFN, "forward", broken)
    outcome = small_run("--out", "run", "--eval-every", 5, *flags)
    assert outcome.code == 1
    if "--detect-anomaly" in flags:
        assert (
            "the first component that loses its numbers is blocks.0.ffn (the reference's numbers are finite"
            in outcome.error
        )
    else:
        assert "step 7: the loss is nan: the first to make one is blocks.0.ffn; gradients" in outcome.error
        assert "gradients that are not finite: token_embedding.weight, " in outcome.error
    assert json.loads(Path("run/last/training.json").read_bytes())["step"] == 5


@pytest.mark.parametrize("flags", [(), ("--detect-anomaly",)])
def test_a_gradient_that_is_none_though_the_forward_pass_is_finite(small_run, monkeypatch, flags):
    """--detect-anomaly compared forward passes alone, and told that each component does what the reference
    does. What breaks the gradient stands behind the layer's last product."""
    forward = FFN.forward

    def broken(self, x):
        y = forward(self, x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient / 0.0)
        return y

    monkeypatch.setattr(FFN, "forward", broken)
    error = small_run("--out", "run", *flags).error
    told = "the norm of the gradient is nan: the forward pass is finite, the gradient that comes back to "
    assert f"step 1: {told}blocks.0.ffn is not; gradients that are not finite: " in error
    departs = (
        "that loses its numbers is blocks.0.ffn.down, in the gradient of its input (the reference's numbers"
    )
    assert (departs in error) == bool(flags)


def test_no_component_is_blamed_that_the_model_has_not(small_run, monkeypatch):
    """What broke inside of attention was told to come from the norm of keys, of which there is none."""
    join_heads = multi_head_attention.join_heads

    def broken(x):
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient / 0.0)
        return join_heads(x)

    monkeypatch.setattr(multi_head_attention, "join_heads", broken)
    error = small_run("--out", "run").error
    assert "the gradient that comes back to blocks.0.attention.qkv is not" in error


def test_a_failure_that_only_the_compiled_step_has_is_told_as_such(small_run, monkeypatch):
    train_steps = run_module.train_steps

    def poisoned(state, tokens, config):
        for metrics in train_steps(state, tokens, config):
            yield metrics._replace(loss=metrics.loss * float("nan"))

    monkeypatch.setattr(run_module, "train_steps", poisoned)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    told = "done again without torch.compile, the step is finite: the cause may be the compiled code"
    assert told in small_run("--out", "compiled", "--compile", "on").error
    assert "done again, the step is finite; stopped" in small_run("--out", "eager").error


def test_the_step_that_blew_up_is_named_though_the_loss_is_read_seldom(small_run, monkeypatch):
    train_steps = run_module.train_steps

    def poisoned(state, tokens, config):
        for metrics in train_steps(state, tokens, config):
            yield metrics._replace(loss=metrics.loss * float("nan")) if state.step >= 7 else metrics

    monkeypatch.setattr(run_module, "train_steps", poisoned)
    outcome = small_run("--out", "run", "--log-every", 100, "--eval-every", 5)
    assert "step 7: the loss is nan" in outcome.error
    assert json.loads(Path("run/last/training.json").read_bytes())["step"] == 5
