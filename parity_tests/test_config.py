"""Configs refuse a contradiction when they are made, in one line that says how to mend it."""

import subprocess
import sys
from dataclasses import asdict

import pytest
from hypothesis import given

from parity_tests.strategies import model_configs
from ref_numpy.config import ConfigError, ModelConfig, TrainConfig


@given(config=model_configs())
def test_a_config_is_its_values(config):
    assert ModelConfig(**asdict(config)) == config


def test_the_default_width_of_the_feed_forward_layer_is_four_times_the_models():
    assert ModelConfig(d_model=96).ffn_width == 384 and ModelConfig(d_model=96, d_ff=50).ffn_width == 50


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_head": 7, "d_model": 100}, "d_model 100 does not divide into n_head 7 heads; try d_model 105"),
        ({"n_layer": 0}, "n_layer is 0, but must be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0, but must lie in [0, 0.99]"),
        ({"dropout": 0.999999}, "dropout is 0.999999, but must lie in [0, 0.99]"),  # 1 in sixteen bits
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0, but must be above 0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon is nan, but must be above 0"),
        ({"d_ff": -1}, "d_ff is -1, but must be 0 (meaning 4 * d_model) or more"),
        ({"n_kv_head": -1}, "n_kv_head is -1, but must be 0 (meaning n_head) or more"),
        ({"n_kv_head": 3}, "n_head 4 does not divide into n_kv_head 3 groups; try n_head 6"),
        (
            {"attention_pattern": "locl, full", "window": 4},
            "attention_pattern is 'locl, full', but must be a list of full and local: 'local, local, full'",
        ),
        (
            {"attention_pattern": "local"},
            "attention_pattern 'local' has local layers, but window is 0; say how many keys they see",
        ),
        (
            {"window": 8},
            "window is 8, but attention_pattern 'full' has no local layer; set it to local",
        ),
        (
            {"architecture": "encoder", "attention_pattern": "local", "window": 8},
            "window is 8, but encoder layers have no causal order to reach back in; set it to 0",
        ),
        ({"rope_scale": 2.0}, "rope_scale is 2.0, but positions are learned; set positions to rope"),
        ({"positions": "rope", "rope_base": 1.0}, "rope_base is 1.0, but must be above 1"),
        ({"positions": "rope", "rope_scale": 0.0}, "rope_scale is 0.0, but must be above 0"),
        (
            {"positions": "rope", "n_head": 4, "d_model": 12},
            "rope turns pairs of features, but a head is 3 wide (d_model 12 / n_head 4); make it even",
        ),
    ],
)
def test_a_contradiction_in_a_model_is_refused(wrong, message):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**wrong)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"batch_size": 10, "micro_batches": 4},
            "batch_size 10 does not divide into 4 micro_batches; try batch_size 12",
        ),
        ({"learning_rate": 0.0, "min_learning_rate": 0.0}, "learning_rate is 0.0, but must be above 0"),
        (
            {"learning_rate": 1e-4, "min_learning_rate": 1e-3},
            "min_learning_rate is 0.001, but must lie in [0, learning_rate 0.0001]",
        ),
        ({"steps": 9, "warmup_steps": 10}, "warmup_steps is 10, but must lie in [0, steps 9]"),
        ({"beta2": 1.0}, "beta2 is 1.0, but must lie in [0, 1)"),
        ({"clip": -1.0}, "clip is -1.0, but must not be negative"),
        ({"seed": 2**64}, "seed is 18446744073709551616, but must lie in [0, 2**64)"),
        (
            {"optimizer": "adam"},
            "optimizer adam has no weight decay, but weight_decay is 0.1; set it to 0 or use adamw",
        ),
    ],
)
def test_a_contradiction_in_a_training_is_refused(wrong, message):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**wrong)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("config", "name", "allowed", "refused"),
    [
        *(
            (ModelConfig, name, 1, 0)
            for name in ("vocab_size", "context_length", "n_layer", "n_head", "d_model")
        ),
        (ModelConfig, "dropout", 0.0, -0.1),
        (ModelConfig, "dropout", 0.99, 0.991),
        (ModelConfig, "d_ff", 0, -1),
        *((TrainConfig, name, 1, 0) for name in ("batch_size", "micro_batches")),
        (TrainConfig, "learning_rate", 1e-4, 0.0),
        (TrainConfig, "min_learning_rate", 0.0, -1e-9),
        (TrainConfig, "min_learning_rate", 1e-3, 1.1e-3),
        (TrainConfig, "warmup_steps", 0, -1),
        (TrainConfig, "warmup_steps", 1000, 1001),
        *((TrainConfig, name, 0.0, -0.1) for name in ("beta1", "beta2", "label_smoothing")),
        *((TrainConfig, name, 0.999, 1.0) for name in ("beta1", "beta2", "label_smoothing")),
        *((TrainConfig, name, 0.0, -0.1) for name in ("weight_decay", "clip")),
        (TrainConfig, "epsilon", 1e-30, 0.0),
        (TrainConfig, "seed", 0, -1),
        (TrainConfig, "seed", 2**64 - 1, 2**64),
    ],
)
def test_the_last_value_allowed_and_the_first_refused(config, name, allowed, refused):
    sizes = {"n_head": 1} if config is ModelConfig else {}
    assert getattr(config(**(sizes | {name: allowed})), name) == allowed
    with pytest.raises(ConfigError, match=f"^{name} is {refused}, but must "):
        config(**(sizes | {name: refused}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("vocab_size=2.5", "vocab_size is 2.5, but must be a int"),
        ("bias=1", "bias is 1, but must be a bool"),
        ("norm='batch'", "norm is 'batch', but must be one of layernorm, rmsnorm"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(wrong, message):
    """In a process of its own: here the test run's shape checker would be faster."""
    code = f"from ref_numpy.config import ModelConfig; ModelConfig({wrong})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr.strip().endswith(f"ConfigError: {message}")
