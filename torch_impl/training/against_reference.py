"""Which component departs from the NumPy reference, for --detect-anomaly.

Each component is given the inputs that it had in a forward pass, and the reference computes from them in
float64. A component ends before the one that it is a part of, so the first that departs is the smallest.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy import ndarray as Array
from torch import nn

from ref_numpy.block import block_forward
from ref_numpy.dropout import DropoutKey
from ref_numpy.embedding import embedding_forward
from ref_numpy.ffn import ffn_forward, swiglu_forward
from ref_numpy.layernorm import layernorm_forward, rmsnorm_forward
from ref_numpy.linear import linear_forward
from ref_numpy.masks import places_in_documents
from ref_numpy.multi_head_attention import multi_head_attention_forward
from ref_numpy.transformer import attention_mask
from torch_impl.block import Block
from torch_impl.embedding import Embedding
from torch_impl.ffn import FFN, SwiGLU
from torch_impl.layernorm import LayerNorm, RMSNorm
from torch_impl.linear import Linear
from torch_impl.multi_head_attention import MultiHeadAttention
from torch_impl.training.ranks import whole
from torch_impl.transformer import Embedded, Transformer

Params = dict[str, Array]


@contextmanager
def compared(model: Embedded, departures: list[str]) -> Iterator[None]:
    """Within the block, forward passes are computed twice; names and errors of what departs are appended."""

    def compare(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            found = _departure(model, name, module, inputs, output)
            if found:
                departures.append(f"{name} ({found})")

        return hook

    handles = [m.register_forward_hook(compare(name)) for name, m in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _departure(model: Embedded, name: str, module: nn.Module, inputs: tuple, output: object) -> str | None:
    """How far an output is from the reference's; None where it is as near as its precision allows."""
    x = inputs[0]
    params = {
        key: whole(value.detach())
        .to(x.dtype if x.is_floating_point() else value.dtype)
        .double()
        .cpu()
        .numpy()
        for key, value in module.named_parameters()
    }
    x_there = x.detach().double().cpu().numpy() if x.is_floating_point() else x.cpu().numpy()
    with np.errstate(all="ignore"):
        wanted = _by_reference(model, name, module, x_there, params, inputs)
    if wanted is None:
        return None
    got = output.detach().double().cpu().numpy()
    if not np.isfinite(wanted).all():
        return None  # the reference cannot do it either: the numbers are too large, not wrong
    if not np.isfinite(got).all():
        return "the reference's numbers are finite here"
    error = np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    in_tf32 = torch.get_float32_matmul_precision() != "highest"
    digit = max(torch.finfo(output.dtype).eps, 2.0**-10 if in_tf32 else 0.0)
    allowed = 8 * digit + 64 * torch.finfo(torch.float32).eps
    return (
        f"off by {error:.1e} of its largest number; rounding excuses {allowed:.1e}"
        if error > allowed
        else None
    )


def _by_reference(
    model: Embedded, name: str, module: nn.Module, x: Array, params: Params, inputs: tuple
) -> Array | None:
    """What the reference makes of a component's input; None for a kind that is not compared."""
    config = model.config
    if isinstance(module, Embedding):
        return embedding_forward(x, params["weight"])[0]
    if isinstance(module, Linear):
        return linear_forward(x, params["weight"], params.get("bias"))[0]
    if isinstance(module, LayerNorm):
        return layernorm_forward(x, params["weight"], params.get("bias"), module.epsilon)[0]
    if isinstance(module, RMSNorm):
        return rmsnorm_forward(x, params["weight"], module.epsilon)[0]
    if isinstance(module, FFN | SwiGLU):
        layers = ("up", "down") if isinstance(module, FFN) else ("gate", "up", "down")
        weights = [params.get(f"{layer}.{kind}") for layer in layers for kind in ("weight", "bias")]
        if isinstance(module, SwiGLU):
            return swiglu_forward(x, *weights)[0]
        return ffn_forward(x, *weights, config.activation)[0]
    if not isinstance(model, Transformer) or not isinstance(module, MultiHeadAttention | Block):
        return None  # an encoder-decoder's attention has masks that its inputs do not tell
    layer, documents = int(re.findall(r"\d+", name)[0]), inputs[1].keywords["pattern"].documents
    places = np.arange(x.shape[1])
    if documents is not None:
        documents = documents.cpu().numpy()
        places = places_in_documents(documents)
    mask = attention_mask(config, layer, x.shape[1], 0, documents)
    if isinstance(module, MultiHeadAttention):
        return multi_head_attention_forward(x, params, config, mask, places)[0]
    return block_forward(x, params, config, mask, places, layer, _plain(inputs[3]))[0]


def _plain(key: DropoutKey | None) -> DropoutKey | None:
    """A key without tensors."""
    return key and DropoutKey(key.seed, int(key.step), int(key.first_row), key.site)
