"""Weight-only quantisation to 8 or 4 bits, and models whose matrices are kept so. The twin of
ref_numpy/quantise.py, with the same values, bytes and scales.

    python -m torch_impl.quantise RUN_FOLDER --bits 8 --group-size 64 --out QUANTISED_FOLDER

What of a model is quantised: every linear layer in the asked-for bits; the token embedding and the head, tied
or not, in 8, since in 4 bits they cost more than all blocks together (the default model: 0.032 bits per byte
against 0.013, for a tenth of the weights); the table of learned positions, which is small, not at all.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, Integer, UInt8
from torch import Tensor, nn

from ref_numpy.config import ModelConfig
from ref_numpy.parameters import parameter_shapes
from torch_impl.embedding import Embedding
from torch_impl.linear import Linear, linear
from torch_impl.transformer import Transformer

LIMITS = {8: 127, 4: 7}  # the largest magnitude by the number of bits

_NUMBERS_AT_ONCE = 1 << 19  # of a matrix that is multiplied: 2 MB in float32, which stay in the cache


class Quantised(NamedTuple):
    """A matrix (O, I) in few bits."""

    values: Tensor  # 8 bits: int8 (O, I); 4 bits: uint8 (O, ceil(I / 2)), see pack
    scales: Tensor  # (O, G), in the dtype that the matrix had
    bits: int
    group_size: int  # g, at most I
    inputs: int  # I


def quantise(weight: Float[Tensor, "O I"], bits: int, group_size: int = 0) -> Quantised:
    """s = max(max |W| / L, smallest normal number) for each group of a row, q = round(W / s), half to even.

    A group size of 0 (or above I) is one group per row. Raises ValueError for bits other than 8 or 4, for a
    negative group size, and for a weight that is no finite number.
    """
    if bits not in LIMITS:
        raise ValueError(f"bits is {bits}, but must be 8 or 4")
    if group_size < 0:
        raise ValueError(f"group_size is {group_size}, but must be 0 (one scale per channel) or more")
    if not weight.isfinite().all():
        raise ValueError("a weight is no finite number")
    outputs, inputs = weight.shape
    g = min(group_size or inputs, inputs)
    groups = nn.functional.pad(weight, (0, -inputs % g)).view(outputs, -1, g)  # (O, G, g)
    largest = groups.abs().amax(dim=-1)  # (O, G)
    # By a tensor: CUDA divides by a Python number through its reciprocal, which rounds twice.
    scales = (largest / torch.full_like(largest, LIMITS[bits])).clamp(min=torch.finfo(weight.dtype).tiny)
    values = (groups / scales[..., None]).round().to(torch.int8).view(outputs, -1)[:, :inputs]
    return Quantised(pack(values) if bits == 4 else values.contiguous(), scales, bits, g, inputs)


def pack(values: Int8[Tensor, "O I"]) -> UInt8[Tensor, "O J"]:
    """Byte j of a row holds column j in its low half and column j + J in its high half, J = ceil(I / 2)."""
    half = -(-values.shape[1] // 2)
    nibbles = nn.functional.pad(values, (0, values.shape[1] % 2)).view(torch.uint8) & 15
    return nibbles[:, :half] | nibbles[:, half:] << 4


def unpack(packed: UInt8[Tensor, "O J"], inputs: int) -> Int8[Tensor, "O {inputs}"]:
    """The numbers that were packed."""
    signed = packed.view(torch.int8)
    return torch.cat([(signed << 4) >> 4, signed >> 4], dim=1)[:, :inputs]


def dequantise(quantised: Quantised) -> Float[Tensor, "O I"]:
    """W = q s, in the dtype of the scales."""
    values, scales, bits, g, inputs = quantised
    if bits == 4:
        values = unpack(values, inputs)
    outputs = values.shape[0]
    if inputs % g:  # a last group that is smaller
        return values * scales.repeat_interleave(g, dim=1)[:, :inputs]
    return (values.to(scales.dtype).view(outputs, -1, g) * scales[..., None]).view(outputs, inputs)


def quantised_linear(
    x: Float[Tensor, "*rows I"], quantised: Quantised, bias: Float[Tensor, "O"] | None
) -> Float[Tensor, "*rows O"]:
    """y = x W^T + b in the precision of x, with the dequantised W. How it is computed is chosen here.

    W is dequantised some rows at a time, into memory that stays in the cache, so that what comes from memory
    is the bytes. With one scale per channel the product is scaled instead of the matrix, which is faster.
    PyTorch's own kernels for this (torch._weight_int8pack_mm, _weight_int4pack_mm_for_cpu) are not used: on
    the CPU they are ten times slower than float32 for float32, and the first of them reads beyond a matrix
    whose width is no multiple of 16.
    """
    values, scales, bits, g, inputs = quantised
    per_channel = bits == 8 and g == inputs and x.dtype != torch.float16  # where sums of 127 x might overflow
    at_once = max(_NUMBERS_AT_ONCE // inputs, 1)
    parts = []
    for part, its_scales in zip(values.split(at_once), scales.split(at_once), strict=True):
        if per_channel:
            parts.append(linear(x, part.to(x.dtype), None) * its_scales[:, 0].to(x.dtype))
        else:
            weight = dequantise(Quantised(part, its_scales, bits, g, inputs))
            parts.append(linear(x, weight.to(x.dtype), None))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return y if bias is None else y + bias


class QuantisedMatrix(nn.Module):
    """Holds values and scales, in place of a `weight`; they are buffers, for there is nothing to train."""

    def __init__(self, quantised: Quantised) -> None:
        super().__init__()
        self.register_buffer("values", quantised.values)
        self.register_buffer("scales", quantised.scales)
        self.bits, self.group_size, self.inputs = quantised.bits, quantised.group_size, quantised.inputs

    def quantised(self) -> Quantised:
        return Quantised(self.values, self.scales, self.bits, self.group_size, self.inputs)

    @property
    def weight(self) -> Float[Tensor, "O I"]:
        """The whole matrix again."""
        return dequantise(self.quantised())


class QuantisedLinear(QuantisedMatrix):
    """Takes the place of a Linear."""

    def __init__(self, quantised: Quantised, bias: Tensor | None) -> None:
        super().__init__(quantised)
        self.bias = bias

    def forward(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        return quantised_linear(x, self.quantised(), None if self.bias is None else self.bias.to(x.dtype))


class QuantisedEmbedding(QuantisedMatrix):
    """Takes the place of an Embedding: only the rows that are looked up are dequantised."""

    def forward(self, ids: Integer[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
        rows = self.quantised()._replace(values=self.values[ids.flatten()], scales=self.scales[ids.flatten()])
        return dequantise(rows).view(*ids.shape, self.inputs)

    def logits(self, x: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows V"]:
        """The table as the output projection that it is when embeddings are tied."""
        return quantised_linear(x, self.quantised(), None)


def bits_of(module: str, bits: int) -> int:
    """The bits of a module's matrix, by the module's name, in a model that is quantised to `bits`."""
    return 8 if module in ("token_embedding", "head") else bits


def replace_matrices(model: Transformer, quantised: Callable[[str, Tensor], Quantised]) -> None:
    """Puts quantised modules into the places of the linear layers and of the token embedding.

    `quantised` is asked for each, by the module's name and its weight.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            new = QuantisedLinear(quantised(name, module.weight.detach()), module.bias)
        elif isinstance(module, Embedding):
            new = QuantisedEmbedding(quantised(name, module.weight.detach()))
        else:
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    if model.config.tied_embeddings:
        model.head = model.token_embedding.logits  # a method, so there is one table and not two


def quantise_model(model: Transformer, bits: int, group_size: int) -> None:
    """Quantises a trained model in place. Raises ValueError for a weight that is no finite number."""
    replace_matrices(model, lambda name, weight: quantise(weight, bits_of(name, bits), group_size))


def load_quantised(model: Transformer, tensors: dict[str, Tensor], bits: int, group_size: int) -> None:
    """Makes a model, whose weights do not matter, the quantised one whose state these tensors are."""

    def stored(name: str, weight: Tensor) -> Quantised:
        inputs = weight.shape[1]
        values, scales = tensors[f"{name}.values"], tensors[f"{name}.scales"]
        return Quantised(values, scales, bits_of(name, bits), min(group_size or inputs, inputs), inputs)

    replace_matrices(model, stored)
    model.load_state_dict(tensors)


Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype, as safetensors calls it, and shape, by name


def quantised_shapes(config: ModelConfig, bits: int, group_size: int) -> Header:
    """What the state of a quantised model consists of."""
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) < 2 or name == "position_embedding.weight":
            tensors[name] = ("F32", shape)
            continue
        module, (outputs, inputs) = name.removesuffix(".weight"), shape
        packed = ("U8", (outputs, -(-inputs // 2)))
        tensors[f"{module}.values"] = packed if bits_of(module, bits) == 4 else ("I8", shape)
        tensors[f"{module}.scales"] = ("F32", (outputs, -(-inputs // min(group_size or inputs, inputs))))
    return tensors


if __name__ == "__main__":
    from torch_impl.training.quantise_command import main

    sys.exit(main(sys.argv[1:]))
