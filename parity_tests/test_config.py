"""Configs refuse a contradiction when they are made, in one line that says how to mend it."""

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, dataclass, fields
from math import inf, nan
from typing import Literal

import pytest
from hypothesis import given

from parity_tests.strategies import model_configs
from ref_numpy.config import (
    BeamConfig,
    ConfigError,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    _check_types,
)


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
        ({"norm_epsilon": float("nan")}, "norm_epsilon is nan, but must be a finite number"),
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
        ({"rope_scale": 0.5}, "rope_scale is 0.5, but positions are learned; set positions to rope"),
        (
            {"rope_scale": 2.0, "positions": "sinusoidal"},
            "rope_scale is 2.0, but positions are sinusoidal; set positions to rope",
        ),
        (
            {"architecture": "encoder", "vocab_size": 1},
            "vocab_size is 1, but the encoder has 1 of its own; make it 2 or more",
        ),
        (
            {"architecture": "encoder-decoder", "vocab_size": 2},
            "vocab_size is 2, but the encoder-decoder has 3 of its own; make it 4 or more",
        ),
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
    ("wrong", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5, but must be 0 (greedy) or at least 1e-9"),
        ({"temperature": float("nan")}, "temperature is nan, but must be a finite number"),
        ({"top_k": -1}, "top_k is -1, but must be 0 (all tokens) or more"),
        ({"top_p": 0.0}, "top_p is 0.0, but must lie in (0, 1]"),
        ({"top_p": 1.5}, "top_p is 1.5, but must lie in (0, 1]"),
        ({"min_p": 2.0}, "min_p is 2.0, but must lie in [0, 1]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, but must lie in [1e-9, 1e9]"),
    ],
)
def test_a_contradiction_in_sampling_is_refused(wrong, message):
    with pytest.raises(ConfigError) as error:
        SamplingConfig(**wrong)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 0}, "width is 0, but must be at least 1"),
        ({"width": 2, "n_best": 3}, "n_best is 3, but must lie in [1, width 2]"),
        ({"length_penalty": float("nan")}, "length_penalty is nan, but must be a finite number"),
        ({"phrases": ((1,),) * 9}, "there are 9 phrases, but at most 8 are possible"),
        ({"phrases": ((),)}, "phrases holds an empty one; take it out"),
        ({"stop_sequences": ((1,), ())}, "stop_sequences holds an empty one; take it out"),
        ({"forbidden": (-1,)}, "a token id is -1, but must not be negative"),
        ({"phrases": ((1, 2),), "forbidden": (2,)}, "phrase (1, 2) needs what is forbidden: [2]"),
        (
            {"phrases": ((1, 2, 3),), "end_token": 2},
            "phrase (1, 2, 3) cannot be written to its end: (2,) stops before it",
        ),
    ],
)
def test_a_contradiction_in_a_beam_is_refused(wrong, message):
    with pytest.raises(ConfigError) as error:
        BeamConfig(**wrong)
    assert str(error.value) == message


FRACTIONS = ("beta1", "beta2", "muon_momentum", "label_smoothing")


@pytest.mark.parametrize(
    ("config", "name", "allowed", "refused"),
    [
        *(
            (ModelConfig, name, 1, 0)
            for name in ("vocab_size", "context_length", "n_layer", "n_head", "d_model")
        ),
        (ModelConfig, "dropout", 0.0, -0.1),
        (ModelConfig, "dropout", 0.99, 0.991),
        (ModelConfig, "dropout", 0.5, 1.5),
        (ModelConfig, "d_ff", 0, -1),
        (ModelConfig, "n_kv_head", 0, -1),
        (ModelConfig, "norm_epsilon", 1e-30, 0.0),
        (ModelConfig, "norm_epsilon", 1e9, -1.0),
        (ModelConfig, "rope_base", 1.1, 1.0),
        (ModelConfig, "rope_base", 1e300, inf),
        (ModelConfig, "rope_base", 2.0, 0.5),
        (ModelConfig, "rope_scale", 1e-9, 0.0),
        (ModelConfig, "rope_scale", 1e300, inf),
        (ModelConfig, "rope_scale", 0.5, -1.0),
        (ModelConfig, "window", 1, -1),
        *((TrainConfig, name, 1, 0) for name in ("batch_size", "micro_batches")),
        (TrainConfig, "steps", 100, 0),
        (TrainConfig, "learning_rate", 1e-4, 0.0),
        (TrainConfig, "learning_rate", 1e9, -1.0),
        (TrainConfig, "learning_rate", 1e300, inf),
        (TrainConfig, "clip", 1e300, inf),
        (TrainConfig, "muon_learning_rate", 1e-9, 0.0),
        (TrainConfig, "muon_learning_rate", 1e9, -1.0),
        (TrainConfig, "min_learning_rate", 0.0, -1e-9),
        (TrainConfig, "min_learning_rate", 1e-3, 1.1e-3),
        (TrainConfig, "warmup_steps", 0, -1),
        (TrainConfig, "warmup_steps", 1000, 1001),
        *((TrainConfig, name, 0.0, -0.1) for name in FRACTIONS),
        *((TrainConfig, name, 0.999, 1.0) for name in FRACTIONS),
        *((TrainConfig, name, 0.5, 1.5) for name in FRACTIONS),
        *((TrainConfig, name, 0.0, -0.1) for name in ("weight_decay", "clip")),
        *((TrainConfig, name, 1e9, -1e9) for name in ("weight_decay", "clip")),
        (TrainConfig, "epsilon", 1e-30, 0.0),
        (TrainConfig, "epsilon", 1.0, -1.0),
        (TrainConfig, "seed", 0, -1),
        (TrainConfig, "seed", 2**64 - 1, 2**64),
        (TrainConfig, "seed", 1, 2**65),
        (SamplingConfig, "temperature", 0.0, -1e-9),
        (SamplingConfig, "temperature", 1e-9, 9e-10),
        (SamplingConfig, "temperature", 1e300, inf),
        (SamplingConfig, "top_k", 0, -1),
        (SamplingConfig, "top_k", 10**9, -(10**9)),
        (SamplingConfig, "top_p", 1e-9, 0.0),
        (SamplingConfig, "top_p", 1.0, 1.1),
        (SamplingConfig, "top_p", 0.5, -0.5),
        (SamplingConfig, "min_p", 0.0, -0.1),
        (SamplingConfig, "min_p", 1.0, 1.1),
        (SamplingConfig, "min_p", 0.5, 1.5),
        (SamplingConfig, "repetition_penalty", 1e-9, 9e-10),
        (SamplingConfig, "repetition_penalty", 1e9, 1e9 + 1),
        (SamplingConfig, "repetition_penalty", 0.5, -0.5),
        (SamplingConfig, "repetition_penalty", 2.0, inf),
        (BeamConfig, "width", 1, 0),
        (BeamConfig, "width", 9, -1),
        (BeamConfig, "n_best", 1, 0),
        (BeamConfig, "n_best", 4, 5),
        (BeamConfig, "n_best", 2, -1),
        (BeamConfig, "length_penalty", -10.0, -10.1),
        (BeamConfig, "length_penalty", 10.0, 10.1),
        (BeamConfig, "length_penalty", 0.0, nan),
    ],
)
def test_the_last_value_allowed_and_the_first_refused(config, name, allowed, refused):
    others = {"n_head": 1} if config is ModelConfig else {}
    others |= {"window": {"attention_pattern": "local"}}.get(name, {})
    others |= {"positions": "rope"} if name.startswith("rope") else {}
    assert getattr(config(**(others | {name: allowed})), name) == allowed
    with pytest.raises(ConfigError, match=re.escape(f"{name} is {refused}, but must ")):
        config(**(others | {name: refused}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("ModelConfig(vocab_size=2.5)", "vocab_size is 2.5, but must be a int"),
        ("ModelConfig(bias=1)", "bias is 1, but must be a bool"),
        ("ModelConfig(norm='batch')", "norm is 'batch', but must be one of layernorm, rmsnorm"),
        ("SamplingConfig(top_k=1.5)", "top_k is 1.5, but must be a int"),
        ("SamplingConfig(forbidden=(1, 2.0))", "forbidden is (1, 2.0), but must be a tuple[int, ...]"),
        ("BeamConfig(width='4')", "width is '4', but must be a int"),
        ("BeamConfig(end_token='.')", "end_token is '.', but must be a int | None"),
        (
            "BeamConfig(phrases=((1,), [2]))",
            "phrases is ((1,), [2]), but must be a tuple[tuple[int, ...], ...]",
        ),
        (
            "BeamConfig(early_stopping='soon')",
            "early_stopping is 'soon', but must be one of exact, estimate, full",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(wrong, message):
    """In a process of its own: here the test run's shape checker would be faster."""
    code = f"from ref_numpy.config import BeamConfig, ModelConfig, SamplingConfig; {wrong}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr.strip().endswith(f"ConfigError: {message}")


@dataclass
class Kinds:
    whole: int = 1
    real: float = 1.0
    truth: bool = True
    choice: Literal["a", "b"] = "a"
    perhaps: int | None = None
    several: tuple[int, ...] = ()


@pytest.mark.parametrize(
    "right",
    [
        {},
        {"real": 2},
        {"whole": 7, "real": 0.5, "truth": False, "choice": "b"},
        {"perhaps": 1, "several": (2, 3)},
    ],
)
def test_a_whole_number_may_stand_for_a_real_one(right):
    _check_types(Kinds(**right))


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"whole": 1.0}, "int"),
        ({"whole": True}, "int"),
        ({"real": "1"}, "float"),
        ({"real": True}, "float"),
        ({"truth": 1}, "bool"),
        ({"real": inf}, "finite number"),
        ({"real": -inf}, "finite number"),
        ({"real": nan}, "finite number"),
        ({"perhaps": "1"}, "int | None"),
        ({"several": [1]}, "tuple[int, ...]"),
        ({"several": (1, 2.0)}, "tuple[int, ...]"),
    ],
)
def test_nothing_else_stands_for_another_kind(wrong, kind):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=re.escape(f"{name} is {value!r}, but must be a {kind}")):
        _check_types(Kinds(**wrong))


def test_what_a_phrase_may_be():
    """It may end in a stop sequence, and hold what comes before or after one in order of its ids."""
    for end in (0, 3, 9):
        assert BeamConfig(phrases=((1, 2, 3),), end_token=end, forbidden=(4,)).end_token == end
    assert len(BeamConfig(phrases=((1,),) * 8).phrases) == 8
    config = BeamConfig(end_token=3, stop_sequences=((1, 2),), forbidden=(0,), phrases=((5, 6), (7,)))
    assert config.stops == ((1, 2), (3,))
    assert config.ids == (0, 1, 2, 3, 5, 6, 7)


def test_the_last_tokens_of_a_vocabulary_are_the_models_own():
    pairs = ModelConfig(architecture="encoder-decoder", vocab_size=10)
    assert (pairs.text_tokens, pairs.begin_token, pairs.end_token, pairs.padding_token) == (7, 7, 8, 9)
    encoder = ModelConfig(architecture="encoder", vocab_size=10)
    assert (encoder.text_tokens, encoder.mask_token) == (9, 9)
    assert ModelConfig(vocab_size=10).text_tokens == 10


def test_a_pattern_of_windows_is_repeated_over_the_layers():
    config = ModelConfig(attention_pattern="local, full", window=3)
    assert [config.window_of(layer) for layer in range(4)] == [3, 0, 3, 0]


def test_adam_is_for_those_who_want_no_decay():
    assert TrainConfig(optimizer="adam", weight_decay=0.0).optimizer == "adam"


@pytest.mark.parametrize("config", [ModelConfig, TrainConfig, SamplingConfig, BeamConfig])
def test_a_config_does_not_change_after_it_was_checked(config):
    made = config()
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(made)[0].name, 0)


def test_what_nobody_chose_stays_as_it_is():
    """A run without flags is the same run in every version."""
    model = asdict(ModelConfig())
    assert {name: value for name, value in model.items() if value not in (0, "", False)} == {
        **{"architecture": "decoder", "vocab_size": 256, "context_length": 64, "n_layer": 2, "n_head": 4},
        **{"d_model": 96, "norm": "layernorm", "norm_placement": "pre", "norm_epsilon": 1e-5},
        **{"attention_pattern": "full", "activation": "gelu_tanh", "positions": "learned"},
        **{
            "rope_base": 10000.0,
            "rope_layout": "half",
            "rope_scale": 1.0,
            "bias": True,
            "tied_embeddings": True,
        },
    }
    training = asdict(TrainConfig())
    assert {name: value for name, value in training.items() if value not in (0, False)} == {
        **{"steps": 1000, "batch_size": 12, "micro_batches": 1, "learning_rate": 1e-3},
        **{"min_learning_rate": 1e-4, "warmup_steps": 100, "schedule": "cosine", "optimizer": "adamw"},
        **{"muon_learning_rate": 0.02, "muon_momentum": 0.95, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8},
        **{"weight_decay": 0.1, "clip": 1.0},
    }
    assert [*asdict(SamplingConfig()).values()] == [1.0, 0, 1.0, 0.0, 1.0, ()]
    assert [*asdict(BeamConfig()).values()] == [4, 1, 1.0, "exact", None, (), (), ()]
