"""AdamW and Adam by PyTorch's fused kernels, Muon, clipping, the schedule. The twin of ref_numpy/optim.py.

Nothing here reads a value back from the device: norms, clipping factors and learning rates stay tensors.
"""

from math import cos, pi

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from ref_numpy.config import TrainConfig
from ref_numpy.parameters import is_muons
from torch_impl.muon import Muon
from torch_impl.training.ranks import whole


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The config's optimizer over the parameters that require a gradient; decay on matrices and embeddings.

    With Muon, it has the matrices of the blocks, and its products are in the model's compute_dtype. Learning
    rates are tensors, to be set before each step (set_learning_rate).
    """
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    params = list(named.values())
    device = params[0].device
    precision = torch.float64 if device.type == "cpu" else torch.float32  # what the fused kernels take
    shared = {
        "lr": torch.tensor(config.learning_rate, dtype=precision, device=device),
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "fused": True,
        "capturable": device.type == "cuda",  # in a CUDA graph
    }
    if config.optimizer == "adam":
        return torch.optim.Adam(params, **shared)
    muons = set()
    if config.optimizer == "muon":
        muons = {param for name, param in named.items() if is_muons(name, tuple(param.shape))}
    rest = [param for param in params if param not in muons]
    groups = [
        {"params": [param for param in rest if param.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [param for param in rest if param.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **shared)
    by_muon = {
        "params": [param for param in params if param in muons],
        "weight_decay": config.weight_decay,
        "momentum": config.muon_momentum,
        "products": model.compute_dtype,
        "lr": shared["lr"].clone(),
        "times_rate": config.muon_learning_rate / config.learning_rate,
    }
    return Muon([*groups, by_muon], **shared)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: Float[Tensor, ""]) -> None:
    """Writes a rate into the optimizer's own tensor, on its device."""
    for group in optimizer.param_groups:
        group["lr"].copy_(rate * group.get("times_rate", 1.0))


def clip_by_global_norm(model: nn.Module, limit: float) -> Float[Tensor, ""]:
    """Scales all gradients in place by min(1, limit / norm), a limit of 0 being none; returns the norm."""
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if limit > 0:
        torch._foreach_mul_(gradients, (limit / norm).clamp(max=1.0))
    return norm


def learning_rates(config: TrainConfig) -> Float64[Tensor, "steps"]:
    """The learning rate of every step, as a table: a step that looks its own up needs no host."""
    peak, least, warmup, steps = (
        config.learning_rate,
        config.min_learning_rate,
        config.warmup_steps,
        config.steps,
    )
    rates = [peak * (step + 1) / (warmup + 1) for step in range(warmup)]
    for step in range(warmup, steps):
        r = (step - warmup) / (steps - warmup)
        if config.schedule == "constant":
            rates.append(peak)
        elif config.schedule == "linear":
            rates.append(peak - (peak - least) * r)
        else:
            rates.append(least + (peak - least) * 0.5 * (1.0 + cos(pi * r)))
    return torch.tensor(rates, dtype=torch.float64)
