"""Checkpoints: a folder that holds all a run needs to go on, and nothing that can execute.

    model.safetensors       parameters, float32, under the names of ref_numpy.parameters.parameter_shapes
    optimizer.safetensors   <parameter>.exp_avg, .exp_avg_sq (but Muon's) and .step; empty before step 1
    config.json             model, training and run settings
    tokenizer.json          in the format of Hugging Face's tokenizers
    training.json           Progress

A quantised model is kept without optimizer.safetensors and training.json, for it is not trained any more. Its
config.json says how it is quantised, and model.safetensors holds torch_impl.quantise.quantised_shapes.

Everything read is checked against the config before it is used: a checkpoint may come from a stranger.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ref_numpy.config import ConfigError, ModelConfig
from ref_numpy.parameters import parameter_shapes
from torch_impl.quantise import Header, load_quantised, quantised_shapes
from torch_impl.seq2seq import make_model
from torch_impl.train import TrainState
from torch_impl.training.config import FORMAT_VERSION, RunConfig, parse_json, read_config
from torch_impl.training.files import InputError, new_folder, replaced_folder, whole_folder
from torch_impl.training.hf_config import is_hf
from torch_impl.training.hf_tensors import read_hf_tensors
from torch_impl.training.memory import refuse_context_beyond_memory
from torch_impl.training.ranks import part_of, whole
from torch_impl.training.repeating import Resumed, history, settings_before
from torch_impl.training.telemetry import Row
from torch_impl.training.tensor_files import opened_tensors, write_tensors
from torch_impl.training.tokenizer import Tokenizer, load_tokenizer
from torch_impl.transformer import Embedded

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_MOMENTS_OF_MUON = ("exp_avg", "step")  # for the matrices that it has
OWED = ("learning_rate", "grad_norm")
"""What an evaluation tells of the last step, and has to be kept where it is put off."""
_LOSS_SCALE = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


@dataclass
class Progress:
    """How far a run is, beside its weights and moments."""

    corpus: str  # sha256 of the text, which a resumed run must find again
    step: int = 0  # finished steps
    best_step: int = 0
    best_val_loss: float | None = None  # before the first evaluation, None
    no_better: int = 0  # evaluations since the best one
    loss_sum: float = 0.0  # of the steps since the last evaluation ...
    loss_count: int = 0  # ... and how many they are
    seconds: float = 0.0  # spent so far, in all sessions
    loss_scale: dict[str, float] | None = None  # of float16's GradScaler
    owed: dict[str, float | None] | None = None  # of OWED, where the last step's evaluation was put off
    processes: int = 0  # that train it now; 0 where that is not known ...
    on_a_machine: int = 0  # ... and how many of them on one machine
    resumed: list[Resumed] = field(default_factory=list)  # in their order, for the commands that repeat it

    def go_on(self, old: RunConfig, new: RunConfig, processes: int, on_a_machine: int) -> bool:
        """Remember what a --resume changes, and say whether it changes anything. What it changes before the
        first step is how the run begins."""
        before = (self.processes, self.on_a_machine) if self.processes else (processes, on_a_machine)
        change = Resumed(self.step, settings_before(old, new), *before)
        self.processes, self.on_a_machine = processes, on_a_machine
        if not change.leads_elsewhere(self):
            return False
        last = self.resumed[-1] if self.resumed else None
        if last is not None and last.step == self.step and not last.ended_in(old):  # nothing was done with it
            change = self.resumed.pop().and_then(change, new)
        if self.step and change.leads_elsewhere(self):
            self.resumed.append(change)
        return True

    def forget_best(self, rows: list[Row]) -> None:
        """This step is to be the best so far, and evaluated again, with what is known of it besides."""
        self.best_val_loss, self.no_better = None, 0
        for row in rows:
            if row["step"] == self.step:
                self.owed = {name: row[name] for name in OWED}
                self.loss_sum, self.loss_count = row["train_loss"] or 0.0, int(row["train_loss"] is not None)

    @property
    def next_row(self) -> int:
        """The step of the first evaluation that is still to be written."""
        return self.step if self.best_val_loss is None or self.owed is not None else self.step + 1

    def is_weary(self, patience: int, steps: int) -> bool:
        """Whether so many evaluations in a row were no better that the run ends before its last step; a
        patience of 0 has no end."""
        return 0 < patience <= self.no_better and self.owed is None and self.step < steps


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


def load_progress(folder: Path) -> Progress:
    """training.json of a checkpoint. Raises InputError where it is missing, damaged or foreign."""
    path = whole_folder(folder) / "training.json"
    try:
        values = parse_json(path.read_bytes())
        del values["format_version"]
        unnamed = {"owed": None, "no_better": 0, "resumed": [], "processes": 0, "on_a_machine": 0}
        values = unnamed | values  # which older ones do not name
        _check_progress(values)
        values["resumed"] = [Resumed(**each) for each in values["resumed"]]
        history(read_config(folder), values["resumed"])
    except FileNotFoundError as error:
        raise InputError(f"{folder} is incomplete: no {path.name}") from error
    except ConfigError as error:
        raise InputError(f"{path}: {error}") from error
    return Progress(**values)


def _check_progress(values: dict[str, Any]) -> None:
    if set(values) != {field.name for field in fields(Progress)}:
        raise ConfigError("values are missing or unknown")
    whole = all(
        type(values[name]) is int and 0 <= values[name] < 2**63
        for name in ("step", "best_step", "no_better", "loss_count", "processes", "on_a_machine")
    )
    objects = ("loss_scale", _LOSS_SCALE), ("owed", set(OWED))
    known = all(
        value is None or (isinstance(value, dict) and set(value) == names)
        for value, names in ((values[name], names) for name, names in objects)
    )
    if not whole or not known or not isinstance(values["corpus"], str):
        raise ConfigError("a value is of the wrong kind")
    best = values["best_val_loss"]
    numbers = [0.0 if best is None else best, values["loss_sum"], values["seconds"]]
    numbers += (values["loss_scale"] or {}).values()
    owed = (values["owed"] or {}).values()
    if not all(_is_number(number) for number in numbers) or not all(
        number is None or type(number) is float for number in owed
    ):
        raise ConfigError("a value is no number")
    _check_resumed(values["resumed"], values["step"])


def _check_resumed(listed: Any, step: int) -> None:
    if not isinstance(listed, list) or not all(
        isinstance(each, dict)
        and {name: type(value) for name, value in each.items()}
        == {"step": int, "before": dict, "processes": int, "on_a_machine": int}
        for each in listed
    ):
        raise ConfigError("a value is of the wrong kind")
    if not all(1 <= each["on_a_machine"] <= each["processes"] for each in listed):
        raise ConfigError("resumed: on_a_machine is not between 1 and processes")
    steps = [1, *(each["step"] for each in listed), step]
    if listed and steps != sorted(steps):
        raise ConfigError("resumed: the steps are not in their order")


def _is_number(value: Any) -> bool:
    """Whether it is what a float can be; JSON's integers have no end."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


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
    load_moments(folder, state)
    state.step = progress.step
    if progress.loss_scale and state.scaler.is_enabled():
        state.scaler.load_state_dict(progress.loss_scale)


def load_moments(folder: Path, state: TrainState) -> None:
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
