"""What a backend may offer: the reference's components by name, and where the reference keeps them.

Differentiable components are a pair X_forward, X_backward in the reference; a backend offers X, or the pair.
Functions have no gradient: the optimizer's step, filters of sampling, masks. Their numbers are compared in
float64, their integers, booleans and tokens exactly.

Not to be offered: byte pair encoding, beams, key/value caches and training runs. They are programs around the
components, with interfaces of their own on each side.
"""

import importlib
from collections.abc import Callable
from inspect import signature

# The file of each in ref_numpy, whose name its test has too.
DIFFERENTIABLE = {
    "linear": "linear",
    "relu": "activations",
    "gelu": "activations",
    "gelu_tanh": "activations",
    "silu": "activations",
    "layernorm": "layernorm",
    "rmsnorm": "layernorm",
    "dropout": "dropout",
    "embedding": "embedding",
    "learned_positions": "positions",
    "rope": "rope",
    "attention": "attention",
    "flash_attention": "flash_attention",
    "multi_head_attention": "multi_head_attention",
    "cross_attention": "cross_attention",
    "ffn": "ffn",
    "swiglu": "ffn",
    "block": "block",
    "cross_block": "cross_block",
    "transformer": "transformer",
    "seq2seq": "seq2seq",
    "cross_entropy": "loss",
    "linear_cross_entropy": "linear_cross_entropy",
}
FUNCTIONS = {
    "keep_mask": "dropout",
    "causal_mask": "masks",
    "window_mask": "masks",
    "document_mask": "masks",
    "adam": "optim",
    "adamw": "optim",
    "clip_by_global_norm": "optim",
    "filtered_logits": "sampling",
    "sample_token": "sampling",
    "generate": "generate",
}
FILES = DIFFERENTIABLE | FUNCTIONS
NAMES = tuple(FILES)


def _find(component: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"ref_numpy.{FILES[component]}"), name)


def reference(component: str) -> tuple[Callable, Callable]:
    """The reference's forward and backward of a differentiable component."""
    return _find(component, f"{component}_forward"), _find(component, f"{component}_backward")


def reference_function(component: str) -> Callable:
    """The reference's version of a function."""
    return _find(component, component)


def parameters(component: str) -> list[str]:
    """The names of the arguments that a backend is given, in their order: all but caches of the past."""
    find = reference_function(component) if component in FUNCTIONS else reference(component)[0]
    return [name for name in signature(find).parameters if name != "past"]
