"""What a run says of itself before its first step."""

import torch

from torch_impl.attention import products_pay
from torch_impl.flash_attention import Path, choose_path
from torch_impl.linear import product_kernel
from torch_impl.training.command_line import Request
from torch_impl.training.config import RunConfig
from torch_impl.training.device import products_beside_float32
from torch_impl.training.prepare import Run
from torch_impl.training.presets import PRESETS

_SLOW, _FAST = 1.5, 0.7
"""Parts of float32's time: half precision is advised against above one, and pointed to below the other."""


def announce(run: Run, request: Request) -> None:
    """What is trained, on what, and where."""
    place = run.place
    if request.init_from:
        print(f"weights from {request.init_from}")
    parameters = sum(parameter.numel() for parameter in run.state.model.parameters())
    kind = run.config.model.architecture
    ranks, shard = run.state.ranks, run.config.run.shard
    among = f", {'divided among' if shard else 'in each of'} {ranks.size} processes" * (ranks.size > 1)
    print(
        f"preset {run.config.preset} on {place}: {kind} of {parameters:,} parameters{among}; "
        f"run folder {run.folder}"
    )
    if shard and ranks.size == 1:
        print("--shard divides nothing in one process; torchrun starts several")
    print(f"attention: {_attention_paths(run)}")
    kernel = product_kernel(place.device, place.dtype, with_gradient=True)
    told = "PyTorch, compiled" if place.compile else kernel
    print(f"matrix products: {told}{f', in {place.products}' if place.products else ''}")
    if ranks.first and place.device.type == "cpu" and not place.products and (advice := _advice(run)):
        print(advice)
    print(run.objective.describe())
    if not request.resume:
        _tell_what_gave_way(run.config)
    progress, steps = run.progress, run.config.training.steps
    if request.resume and progress.step == steps and progress.owed is None:
        print(f"finished already, at step {progress.step}; a larger --steps trains on")
    elif request.resume and not progress.is_weary(run.config.run.patience, steps):  # told where it ends
        print(f"going on after step {progress.step} of {steps}")


def _tell_what_gave_way(config: RunConfig) -> None:
    """Which settings of the preset the flags made impossible, and what they are now."""
    usual, training = PRESETS[config.preset].training, config.training
    if usual.warmup_steps > training.steps and training.warmup_steps == training.steps // 10:
        print(
            f"warmup_steps {training.warmup_steps}, a tenth of the steps, which are fewer than the preset's "
            f"{usual.warmup_steps}"
        )
    if usual.min_learning_rate > training.learning_rate == 10 * training.min_learning_rate:
        print(
            f"min_learning_rate {training.min_learning_rate:g}, a tenth of the learning rate, which is below "
            f"the preset's {usual.min_learning_rate:g}"
        )


def _attention_paths(run: Run) -> str:
    """The names of the paths that attention takes, in all layers alike or in the full and the local ones."""
    model, config, training, place = run.state.model, run.config.model, run.config.training, run.place
    rows, kinds = training.batch_size // training.micro_batches // run.state.ranks.size, {}
    keys = rows * config.kv_heads * config.context_length * config.head_width
    by_products = products_pay(place.device, place.dtype, keys)
    packed = torch.zeros(1, 1, dtype=torch.long) if run.config.run.content == "conversations" else None
    for window in sorted({config.window_of(layer) for layer in range(config.n_layer)}):
        pattern = model.pattern(window, documents=packed)
        path = str(choose_path(pattern, place.device, place.dtype, config.head_width))
        if by_products:
            path = path.replace(Path.FULL, "products of matrices")
        kinds[f"in local layers, of {window} keys" if window else "in full layers"] = path
    if len(kinds) == 1:
        return str(*kinds.values())
    return "; ".join(f"{path} {kind}" for kind, path in kinds.items())


def _advice(run: Run) -> str:
    """Which precision would be the faster one on this CPU, where one was not asked for or is slow."""
    dtype, asked = run.place.dtype, run.config.run.precision != "auto"
    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    times, name = products_beside_float32(half), str(half).removeprefix("torch.")
    if half == dtype and times > _SLOW:
        return f"in {name} they take this processor {times:.1f} times as long; --precision float32 is faster"
    if half != dtype and times < _FAST and not asked:
        return f"in {name} they would take this processor {times:.1f} of the time: --precision {name}"
    return ""
