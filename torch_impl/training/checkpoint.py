"""Checkpoints: a folder that holds all a run needs to go on, and nothing that can execute.

    model.safetensors       parameters, float32, under the names of ref_numpy.parameters.parameter_shapes
    optimizer.safetensors   <parameter>.exp_avg, .exp_avg_sq (but Muon's) and .step; empty before step 1
    config.json             model, training and run settings
    tokenizer.json          in the format of Hugging Face's tokenizers
    training.json           how far the run is: see progress.py

A quantised model is kept without optimizer.safetensors and training.json, for it is not trained any more. Its
config.json says how it is quantised, and model.safetensors holds torch_impl.quantise.quantised_shapes.

Everything read is checked against the config before it is used: a checkpoint may come from a stranger.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ref_numpy.config import ModelConfig
from ref_numpy.parameters import parameter_shapes
from torch_impl.quantise import Header, load_quantised, quantised_shapes
from torch_impl.seq2seq import make_model
from torch_impl.train import TrainState
from torch_impl.training.config import FORMAT_VERSION, RunConfig, read_config
from torch_impl.training.files import InputError, new_folder, replaced_folder, whole_folder
from torch_impl.training.hf_config import is_hf
from torch_impl.training.hf_tensors import read_hf_tensors
from torch_impl.training.memory import refuse_context_beyond_memory
from torch_impl.training.progress import Progress, load_progress
from torch_impl.training.ranks import part_of, whole
from torch_impl.training.tensor_files import opened_tensors, write_tensors
from torch_impl.training.tokenizer import Tokenizer, load_tokenizer
from torch_impl.transformer import Embedded

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_MOMENTS_OF_MUON = ("exp_avg", "step")  # for the matrices that it has


class LoadedModel(NamedTuple):
    config: RunConfig
    tokenizer: Tokenizer
    model: Embedded


def save_checkpoint(
    folder: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    state: TrainState,
    progress: Progress,
    require_folder: Callable[[], None],
) -> None:
    """Write a checkpoint in one piece. Raises OSError where it cannot; the one before is then still there.

    Of several processes the first one writes, and the others help it to put parameters together: but for what
    is remembered of the commands, the files do not tell how many there were.
    """
    moments = {
        f"{name}.{moment}": state.optimizer.state[parameter][moment]
        for name, parameter in state.model.named_parameters()
        if parameter in state.optimizer.state
        for moment in state.optimizer.state[parameter]
    }
    first = state.ranks.first
    weights, moments = (_gathered(part, first) for part in (state.model.state_dict(), moments))
    if not first:
        return
    training = {"format_version": FORMAT_VERSION, **asdict(progress)}
    with replaced_folder(folder, require_folder) as new:
        _write_model(new, config, tokenizer, weights)
        write_tensors(new / "optimizer.safetensors", moments)
        content = json.dumps(training, indent=2, allow_nan=False)
        (new / "training.json").write_bytes(content.encode("utf-8"))


def _gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors in the machine's memory, one after the other, or nothing where they are not to be kept."""
    gathered = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in gathered if keep}


def save_model(folder: Path, config: RunConfig, tokenizer: Tokenizer, model: Embedded) -> None:
    """Write a model that is not trained any more to a new folder, in one piece.

    Raises InputError where the name is taken, and OSError where the folder cannot be written.
    """
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    with new_folder(folder) as new:
        _write_model(new, config, tokenizer, weights)


def _write_model(folder: Path, config: RunConfig, tokenizer: Tokenizer, weights: dict[str, Tensor]) -> None:
    (folder / "config.json").write_bytes(config.to_json())
    write_tensors(folder / "model.safetensors", weights)
    tokenizer.save(folder / "tokenizer.json")


def load_model(folder: Path, compute_dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """The model of a checkpoint, or of a folder in Hugging Face's layout with a tokenizer.json.

    Raises InputError naming the file that is missing, damaged or another's.
    """
    config = read_config(folder)
    folder = whole_folder(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size != config.model.text_tokens:
        raise InputError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, but the model of config.json "
            f"{config.model.text_tokens}: they do not belong together"
        )
    # Tensors first: nothing is built on the word of the config.
    if config.quantisation is None:
        params = load_parameters(folder, config.model)
        refuse_context_beyond_memory(folder, config.model, compute_dtype.itemsize)
        model = make_model(config.model, compute_dtype)
        model.load_state_dict(params)
    else:
        path, how = folder / "model.safetensors", asdict(config.quantisation)
        tensors = _read_tensors(path, config.model, lambda model: quantised_shapes(model, **how))
        for name, tensor in tensors.items():
            if name.endswith(".scales") and not (tensor.isfinite() & (tensor > 0)).all():
                raise InputError(f"{path} is damaged: a number of {name} is no positive finite number")
        refuse_context_beyond_memory(folder, config.model, compute_dtype.itemsize)
        model = make_model(config.model, compute_dtype)
        load_quantised(model, tensors, **how)
    return LoadedModel(config, tokenizer, model.to(device))


def load_parameters(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The parameters of a checkpoint, or of a folder in Hugging Face's layout, whose config is `config`.

    Raises InputError where they do not fit it, or are missing or damaged.
    """
    folder = whole_folder(folder)
    if is_hf(folder):
        return read_hf_tensors(folder, config, torch.float32)
    return _read_tensors(folder / "model.safetensors", config, _parameters)


def load_state(folder: Path, state: TrainState) -> Progress:
    """Take a state back to its checkpoint. Raises InputError where that does not fit it."""
    params, progress = load_parameters(folder, state.model.config), load_progress(folder)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            parameter.copy_(part_of(params[name], parameter))
    put_back(folder, state, progress)
    return progress


def put_back(folder: Path, state: TrainState, progress: Progress) -> None:
    """The optimizer, the loss scale and the number of the step, as they were at a checkpoint."""
    _load_moments(folder, state)
    state.step = progress.step
    if progress.loss_scale and state.scaler.is_enabled():
        state.scaler.load_state_dict(progress.loss_scale)


def _load_moments(folder: Path, state: TrainState) -> None:
    """Put the optimizer's moments back. Raises InputError where they are not those of the model."""
    path = whole_folder(folder) / "optimizer.safetensors"
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    kept = {
        names[parameter]: _MOMENTS if group.get("momentum") is None else _MOMENTS_OF_MUON
        for group in state.optimizer.param_groups
        for parameter in group["params"]
    }
    tensors = _read_tensors(path, state.model.config, partial(_moments, kept), may_be_empty=True)
    parameters = dict(state.model.named_parameters())
    state.optimizer.load_state_dict(
        {
            "state": {
                i: {
                    # A copy: what safetensors reads stays in the file, which is to be replaced.
                    moment: (tensor if moment == "step" else part_of(tensor, parameters[name])).clone()
                    for moment in kept[name]
                    for tensor in [tensors[f"{name}.{moment}"]]
                }
                for i, name in enumerate(kept if tensors else [])
            },
            "param_groups": state.optimizer.state_dict()["param_groups"],
        }
    )


def _read_tensors(
    path: Path, config: ModelConfig, header: Callable[[ModelConfig], Header], may_be_empty: bool = False
) -> dict[str, Tensor]:
    """The tensors of a file that has just those of the model's `header`, by name, shape and dtype.

    This is checked first: nothing is allocated on the word of a file or of a config that does not fit it.
    """
    with opened_tensors(path) as file:
        found = set(file.keys())
        if may_be_empty and not found:
            return {}
        # A config that claims a billion layers is not worth a list of their names.
        expected = header(config) if config.n_layer <= len(found) else None
        if expected is None or found != set(expected):
            odd = sorted(found ^ set(expected or {}))[0]
            raise InputError(f"{path} does not fit config.json: {odd!r} is missing or too many")
        for name, (dtype, shape) in expected.items():
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != shape or stored.get_dtype() != dtype:
                raise InputError(
                    f"{path} does not fit config.json: {name} is {stored.get_dtype()} "
                    f"{stored.get_shape()}, but must be {dtype} {list(shape)}"
                )
        return {name: file.get_tensor(name) for name in expected}


def _parameters(config: ModelConfig) -> Header:
    return {name: ("F32", shape) for name, shape in parameter_shapes(config).items()}


def _moments(kept: dict[str, tuple[str, ...]], config: ModelConfig) -> Header:
    shapes = parameter_shapes(config)
    return {
        f"{name}.{moment}": ("F32", () if moment == "step" else shapes[name])
        for name, moments in kept.items()
        for moment in moments
    }
