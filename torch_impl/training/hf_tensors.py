"""The tensors of Hugging Face's GPT-2 and Llama layouts: where each of our parameters lies in them.

GPT-2 keeps a weight as (inputs, outputs), since its layers compute x W, not x W^T. Llama keeps apart what
is one projection here: q, k and v, one above the other.
"""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ref_numpy.config import ModelConfig
from ref_numpy.parameters import parameter_shapes
from torch_impl.training.files import InputError
from torch_impl.training.hf_config import LAYOUTS
from torch_impl.training.tensor_files import opened_tensors

INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_HEAD = "lm_head.weight"

# Our names in theirs, as far as they differ; {} is the number of the layer.
_GPT2 = {
    "token_embedding": ["wte"],
    "position_embedding": ["wpe"],
    "norm": ["ln_f"],
    "head": ["lm_head"],
    "norm1": ["h.{}.ln_1"],
    "attention.qkv": ["h.{}.attn.c_attn"],
    "attention.proj": ["h.{}.attn.c_proj"],
    "norm2": ["h.{}.ln_2"],
    "ffn.up": ["h.{}.mlp.c_fc"],
    "ffn.down": ["h.{}.mlp.c_proj"],
}
_LLAMA = {
    "token_embedding": ["embed_tokens"],
    "norm": ["norm"],
    "head": ["lm_head"],
    "norm1": ["layers.{}.input_layernorm"],
    "attention.qkv": [f"layers.{{}}.self_attn.{part}_proj" for part in "qkv"],
    "attention.proj": ["layers.{}.self_attn.o_proj"],
    "norm2": ["layers.{}.post_attention_layernorm"],
    "ffn.gate": ["layers.{}.mlp.gate_proj"],
    "ffn.up": ["layers.{}.mlp.up_proj"],
    "ffn.down": ["layers.{}.mlp.down_proj"],
}
_NAMES = {"gpt2": _GPT2, "llama": _LLAMA}
_PREFIX = {"gpt2": "transformer.", "llama": "model."}  # which a model saved without its head does not have
# Masks and frequencies that older versions saved beside the parameters.
_BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Place(NamedTuple):
    """Where a parameter of ours lies: in tensors of these names, with so many of its rows in each."""

    names: list[str]
    rows: list[int]
    transposed: bool


def _places(config: ModelConfig) -> dict[str, Place]:
    layout = LAYOUTS[config.positions]
    places = {}
    for name, shape in parameter_shapes(config).items():
        stem, _, kind = name.rpartition(".")
        layer, inner = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", stem).groups()
        theirs = [f"{part.format(layer)}.{kind}" for part in _NAMES[layout][inner]]
        keys = config.kv_heads * config.head_width
        rows = [config.d_model, keys, keys] if len(theirs) == 3 else [shape[0]]
        linear = layer is not None and len(shape) == 2
        places[name] = Place(theirs, rows, transposed=layout == "gpt2" and linear)
    return places


def _their_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = parameter_shapes(config)
    theirs = {}
    for name, place in _places(config).items():
        for part, rows in zip(place.names, place.rows, strict=True):
            shape = (rows, *shapes[name][1:])
            theirs[part] = shape[::-1] if place.transposed else shape
    return theirs


def from_hf_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors (weights, or gradients) under our names; theirs come without "transformer." or "model."."""
    ours = {}
    for name, place in _places(config).items():
        whole = torch.cat([tensors[part] for part in place.names])
        ours[name] = whole.t().contiguous() if place.transposed else whole
    return ours


def to_hf_tensors(params: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The parameters under their names, prefix and all. Biases that GPT-2 has and the model has not are 0."""
    layout = LAYOUTS[config.positions]
    if layout == "gpt2":
        config = replace(config, bias=True)
    shapes, dtype = parameter_shapes(config), params["token_embedding.weight"].dtype
    theirs = {}
    for name, place in _places(config).items():
        whole = params[name] if name in params else torch.zeros(shapes[name], dtype=dtype)
        for part, value in zip(place.names, whole.split(place.rows), strict=True):
            full = part if part == _HEAD else _PREFIX[layout] + part
            theirs[full] = (value.t() if place.transposed else value).contiguous()
    return theirs


class _Stored(NamedTuple):
    """A tensor that waits in an open file."""

    file: safe_open
    name: str

    def header(self) -> tuple[tuple[int, ...], str]:
        header = self.file.get_slice(self.name)
        return tuple(header.get_shape()), header.get_dtype()

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.file.get_tensor(self.name).to(dtype)


def read_hf_tensors(folder: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of a folder's model under our names. Raises InputError, naming the tensor and the file.

    Headers are checked first: nothing is allocated on the word of a config that they do not fit.
    """
    with ExitStack() as held:
        found = _find(folder, LAYOUTS[config.positions], held)
        head = found.pop(_HEAD, None) if config.tied_embeddings else None
        # A config that claims a billion layers is not worth a list of their names.
        if config.n_layer > len(found):
            raise InputError(
                f"{folder}: config.json has {config.n_layer} layers, but there are {len(found)} tensors"
            )
        expected = _their_shapes(config)
        for problem, odd in (
            ("missing", expected.keys() - found),
            ("unknown", found.keys() - expected.keys()),
        ):
            if odd:
                more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
                raise InputError(f"{folder} does not fit its config.json: tensor {min(odd)}{more}: {problem}")
        for name, shape in expected.items():
            there, kind = found[name].header()
            if there != shape or kind not in _DTYPES:
                raise InputError(
                    f"{folder} does not fit its config.json: {name} is {kind} {list(there)}, but must be "
                    f"{list(shape)}, and one of {', '.join(_DTYPES)}"
                )
        ours = from_hf_tensors({name: found[name].read(dtype) for name in expected}, config)
        if head is not None and not torch.equal(head.read(dtype), ours["token_embedding.weight"]):
            raise InputError(
                f"{folder}: tie_word_embeddings is true, but {_HEAD} is not the token embedding; set it "
                "to false"
            )
        return ours


def _find(folder: Path, layout: str, held: ExitStack) -> dict[str, _Stored]:
    """All tensors of the folder's files by their names without prefix, buffers left out."""
    found: dict[str, _Stored] = {}
    for name, promised in _files(folder).items():
        file = held.enter_context(opened_tensors(folder / name))
        present = set(file.keys())
        if promised is not None and present != promised:
            raise InputError(f"{folder / INDEX} does not fit {name}: tensor {min(present ^ promised)}")
        for full in present:
            short = full.removeprefix(_PREFIX[layout])
            if short in found:
                raise InputError(f"{folder}: tensor {full} is there twice")
            if not _BUFFERS.fullmatch(short):
                found[short] = _Stored(file, full)
    return found


def _files(folder: Path) -> dict[str, set[str] | None]:
    """The folder's weight files, and what the index says is in each; None where there is no index.

    An index may come from a stranger: it can only name files that lie in the folder itself.
    """
    if (folder / "model.safetensors").exists():
        return {"model.safetensors": None}
    path = folder / INDEX
    try:
        listed = json.loads(path.read_bytes())["weight_map"].items()
    except FileNotFoundError:
        pickled = "; weights in pytorch_model.bin could execute: save them as safetensors"
        raise InputError(
            f"{folder} is incomplete: no model.safetensors and no {INDEX}"
            + pickled * any(folder.glob("pytorch_model*"))
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from None
    files: dict[str, set[str] | None] = {}
    for tensor, name in listed:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise InputError(
                f"{path}: {tensor} lies in {name!r}, which is no .safetensors file of this folder"
            )
        files.setdefault(name, set()).add(tensor)
    return files
