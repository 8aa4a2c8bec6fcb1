"""Hugging Face's config.json as a ModelConfig and back, for the layouts of GPT-2 and Llama.

The way there is checked by the way back: a model is described only if what the description would be read as
is the model again, so an option that a layout has no word for cannot get lost, whichever it is.
"""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ref_numpy.config import ConfigError, ModelConfig
from torch_impl.training.files import InputError
from torch_impl.training.flags import as_flag

LAYOUTS = {"learned": "gpt2", "rope": "llama"}  # by what tells their models apart: the positions

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_NAMES = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}


def is_hf(folder: Path) -> bool:
    """Whether a folder's config.json is one of Hugging Face's; a missing or damaged one is not."""
    try:
        described = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(described, dict) and "model_type" in described and "format_version" not in described


def read_hf_config(folder: Path) -> ModelConfig:
    """The model that a folder's config.json describes; dropout, a matter of training, is left at 0.

    Raises InputError for a file that is damaged, or that asks for what is not here, by its name.
    """
    path = folder / "config.json"
    try:
        return model_config(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:  # ConfigError too
        reason = error if isinstance(error, ConfigError) else f"not JSON: {error}"
        raise InputError(f"{path}: {reason}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def model_config(described: Any) -> ModelConfig:
    """The ModelConfig of a parsed config.json. Raises ConfigError for what is not here, by its name."""
    if not isinstance(described, dict):
        raise ConfigError("it is no JSON object")
    kind = described.get("model_type")
    if kind not in _READERS:
        raise ConfigError(f"model_type is {kind!r}, but must be one of {', '.join(_READERS)}")
    if described.get("quantization_config") is not None:
        raise ConfigError("quantization_config: quantised weights are not read; save the model without")
    return _READERS[kind](described)


T = TypeVar("T", bool, int, float)


def _value(described: dict[str, Any], name: str, default: T) -> T:
    """A setting of the default's type; files leave out what is as usual."""
    found, kind = described.get(name, default), type(default)
    if type(found) is int and abs(found) >= 2**63:
        raise ConfigError(f"{name} is {found}, but must be below 2**63")
    if kind is float and type(found) is int:
        found = float(found)
    if type(found) is not kind:
        raise ConfigError(f"{name} is {json.dumps(found)}, but must be of type {kind.__name__}")
    return found


def _refuse(described: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        found = described.get(name, value)
        if found != value:
            raise ConfigError(
                f"{name} is {json.dumps(found)}, but must be {json.dumps(value)}: there is nothing else here"
            )


def _from_gpt2(described: dict[str, Any]) -> ModelConfig:
    wanted = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    _refuse(described, wanted)
    activation = described.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        names = ", ".join(_ACTIVATIONS)
        raise ConfigError(f"activation_function is {json.dumps(activation)}, but must be one of {names}")
    return ModelConfig(
        vocab_size=_value(described, "vocab_size", 50257),
        context_length=_value(described, "n_positions", 1024),
        n_layer=_value(described, "n_layer", 12),
        n_head=_value(described, "n_head", 12),
        d_model=_value(described, "n_embd", 768),
        d_ff=0 if described.get("n_inner") is None else _value(described, "n_inner", 0),
        norm_epsilon=_value(described, "layer_norm_epsilon", 1e-5),
        activation=_ACTIVATIONS[activation],
        tied_embeddings=_value(described, "tie_word_embeddings", True),
    )


def _to_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.d_model,
        "n_inner": config.ffn_width,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": _NAMES.get(config.activation, "gelu_new"),
        "tie_word_embeddings": config.tied_embeddings,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


def _from_llama(described: dict[str, Any]) -> ModelConfig:
    width, heads = _value(described, "hidden_size", 4096), _value(described, "num_attention_heads", 32)
    _refuse(described, {"hidden_act": "silu"})
    if heads > 0 and described.get("head_dim") is not None:
        _refuse(described, {"head_dim": width // heads})
    bias, ffn_bias = (_value(described, name, False) for name in ("attention_bias", "mlp_bias"))
    if bias != ffn_bias:
        raise ConfigError(
            f"attention_bias is {bias} and mlp_bias {ffn_bias}, but a model here has both or neither"
        )
    kv_heads = described.get("num_key_value_heads")
    rope_base, rope_scale = _rope(described)
    return ModelConfig(
        vocab_size=_value(described, "vocab_size", 32000),
        context_length=_value(described, "max_position_embeddings", 2048),
        n_layer=_value(described, "num_hidden_layers", 32),
        n_head=heads,
        n_kv_head=heads if kv_heads is None else _value(described, "num_key_value_heads", 32),
        d_model=width,
        d_ff=_value(described, "intermediate_size", 11008),
        norm="rmsnorm",
        norm_epsilon=_value(described, "rms_norm_eps", 1e-6),
        activation="swiglu",
        positions="rope",
        rope_layout="half",
        rope_base=rope_base,
        rope_scale=rope_scale,
        bias=bias,
        tied_embeddings=_value(described, "tie_word_embeddings", False),
    )


def _rope(described: dict[str, Any]) -> tuple[float, float]:
    """Base and linear scale: in rope_parameters; before transformers 5, in rope_theta and rope_scaling."""
    given = described.get("rope_parameters") or described.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"rope_parameters is {json.dumps(given)}, but must be an object")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ConfigError(f"rope_type is {json.dumps(kind)}, but must be default or linear")
    given = described | given
    _refuse(given, {"partial_rotary_factor": 1.0})
    return _value(given, "rope_theta", 10000.0), _value(given, "factor", 1.0) if kind == "linear" else 1.0


def _to_llama(config: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scale != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_scale}
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": rope,
        "rope_theta": config.rope_base,  # these two for transformers before 5
        "rope_scaling": {"type": "linear", "factor": config.rope_scale} if config.rope_scale != 1 else None,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tied_embeddings,
    }


_READERS = {"gpt2": _from_gpt2, "llama": _from_llama}
_WRITERS = {"gpt2": _to_gpt2, "llama": _to_llama}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model. Raises InputError, naming the options that no layout can express.

    GPT-2's models have biases; one without is described as one whose biases are 0: the same function.
    """
    layout = LAYOUTS.get(config.positions)
    if layout is None:
        raise InputError(
            f"positions are {config.positions}, but Hugging Face's GPT-2 layout has learned ones, and its "
            "Llama layout rope; train a model with --positions learned"
        )
    described = {"model_type": layout, **_WRITERS[layout](config)}
    back = model_config(described)
    # What is no part of the function, and what is written out instead of left to its default.
    same = {"dropout": config.dropout}
    if layout == "gpt2":
        same["bias"] = config.bias
    if back.kv_heads == config.kv_heads:
        same["n_kv_head"] = config.n_kv_head
    back = replace(back, d_ff=config.d_ff, **same)
    names = [field.name for field in fields(ModelConfig)]
    if odd := [name for name in names if getattr(config, name) != getattr(back, name)]:
        raise InputError(
            f"{', '.join(f'{name} is {getattr(config, name)}' for name in odd)}, but Hugging Face's {layout} "
            f"layout, which goes with {config.positions} positions, has no such model; train one with "
            + " ".join(part for name in odd for part in as_flag(name, getattr(back, name)))
        )
    return described
