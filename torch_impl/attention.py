"""Attention: the scaled dot product. The twin of ref_numpy/attention.py."""

from collections.abc import Iterator
from contextlib import nullcontext
from math import sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_impl.alibi import alibi_bias

_QUERIES_AT_ONCE = 128
_SCORES_AT_ONCE = 2**23
"""So many sequences at a time have no more, or it is one."""
_HAS_BFLOAT16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
"""Whether this processor has instructions for products in bfloat16: then twice as fast as float32."""
_WORTH_PRODUCTS = 2**18
"""Elements of the keys from which products gain more than the cost of their calls."""
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    mask: Bool[Tensor, "*#mask"],
    slopes: tuple[float, ...] | Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H T D"]:
    """y = softmax(q k^T / sqrt D + ALiBi) v over the keys that the mask allows; 0 for a query that sees none.

    What the fused kernels make of a row without keys differs from one to the next. Such a row is let see
    everything, which is finite, and its result is then replaced by 0, which also stops its gradient.
    """
    sees_something = mask.any(dim=-1, keepdim=True)
    allowed = mask | ~sees_something
    if slopes is not None:
        # Of four axes: given three, the CPU falls back on the plain formulas.
        bias = alibi_bias(slopes, q.shape[-2], k.shape[-2], q.dtype, q.device)[None]
        allowed = torch.where(allowed, bias, -torch.inf)
    y = fused_attention(q, k, v, allowed)
    return torch.where(sees_something, y, 0.0)


def fused_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    mask: Bool[Tensor, "*#mask"] | Float[Tensor, "*#mask"] | None = None,
    is_causal: bool = False,
    elements: int | None = None,
) -> Float[Tensor, "B H T D"]:
    """scaled_dot_product_attention, with groups of heads; a mask of numbers is added to the scores.

    CUDA's kernels for float32 and for masks know no groups, and a plain one, with all scores, would step in.
    On Hopper PyTorch takes cuDNN's first, in half precision. They are the fastest, but make a plan for each
    new shape, for tens of milliseconds or more: steps of training repay that, and a text that grows by a
    token at a time never does. With a mask they can make the gradient of q NaN (PyTorch 2.11 and 2.13,
    pytorch/pytorch issue 196678), which in causal order was not seen. So theirs are causal steps alone.
    On a CPU with AVX-512, PyTorch 2.13's kernels gain nothing from half precision, and their backward pass
    takes up to five times as long in bfloat16, and ten in float16. So where there is a gradient, bfloat16 is
    multiplied by oneDNN if the processor can and the keys have enough elements (or those that they are a
    part of), and elsewhere it is computed in float32. Without one the kernels err less, whose scores are not
    rounded.
    """
    half, groups = q.dtype in (torch.float16, torch.bfloat16), q.shape[1] // k.shape[1]
    by_products = torch.is_grad_enabled() and products_pay(k.device, k.dtype, elements or k.numel())
    if groups > 1 and (by_products or (q.device.type != "cpu" and (mask is not None or not half))):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if by_products:
        return attention_by_products(q, k, v, mask, is_causal)
    if half and q.device.type == "cpu" and torch.is_grad_enabled():
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return fused_attention(q.float(), k.float(), v.float(), mask, is_causal).to(q.dtype)
    without_cudnn = q.is_cuda and not (is_causal and torch.is_grad_enabled())
    with sdpa_kernel(_WITHOUT_CUDNN) if without_cudnn else nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )


def products_pay(device: torch.device, dtype: torch.dtype, elements: int) -> bool:
    """Whether attention to keys of so many elements, and its gradients, are faster by products of oneDNN's
    than by PyTorch's kernels."""
    has_instructions = device.type == "cpu" and dtype == torch.bfloat16 and _HAS_BFLOAT16
    return has_instructions and elements >= _WORTH_PRODUCTS


def attention_by_products(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S D"],
    mask: Bool[Tensor, "*#mask"] | Float[Tensor, "*#mask"] | None = None,
    is_causal: bool = False,
    queries_at_once: int = _QUERIES_AT_ONCE,
    scores_at_once: int = _SCORES_AT_ONCE,
) -> Float[Tensor, "B H T D"]:
    """The same by products of matrices: those of a block of queries and all the keys that they may see.

    Memory is linear in the context, since each block's weights are made again in the backward pass. Every
    product is rounded to the precision of q, as where the plain formulas compute in it: in bfloat16 a score
    of 10 to 0.03. Blocks add up in dk and dv in at least float32. A mask has no gradient.
    """
    bias = torch.where(mask, 0.0, -torch.inf) if mask is not None and mask.dtype == torch.bool else mask
    if bias is not None:
        bias = bias.to(q.dtype).expand(*q.shape[:3], k.shape[2])  # a view
    return _by_products(q, k, v, bias, is_causal, queries_at_once, scores_at_once)


# Operators of their own, into which torch.compile does not see: it would write out each block.


@torch.library.custom_op("transformer::attention_by_products", mutates_args=())
def _by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    queries_at_once: int,
    scores_at_once: int,
) -> Tensor:
    y = _heads_like(q)
    for part in _parts(k, queries_at_once, scores_at_once):
        queries, keys, values = (tensor[part].flatten(0, 1) for tensor in (q, k, v))
        for rows, seen, p in _weights(queries, keys, bias, part, is_causal, queries_at_once):
            y[part, :, rows] = torch.bmm(p, values[:, seen]).unflatten(0, (-1, q.shape[1]))
    return y


@torch.library.custom_op("transformer::attention_by_products_backward", mutates_args=())
def _by_products_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    queries_at_once: int,
    scores_at_once: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of ref_numpy/attention.py, by their numbers."""
    scale, precise = 1 / sqrt(q.shape[-1]), torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = _heads_like(q), k.new_empty(k.shape), v.new_empty(v.shape)
    for part in _parts(k, queries_at_once, scores_at_once):
        queries, keys, values, of_y = (tensor[part].flatten(0, 1) for tensor in (q, k, v, dy))
        of_keys, of_values = (torch.zeros(keys.shape, dtype=precise, device=k.device) for _ in range(2))
        for rows, seen, p in _weights(queries, keys, bias, part, is_causal, queries_at_once):
            of_values[:, seen] += torch.bmm(p.mT, of_y[:, rows])  # (1)
            dp = torch.bmm(of_y[:, rows], values[:, seen].mT)  # (2)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)  # (3)
            of_queries = torch.bmm(ds, keys[:, seen]).mul_(scale)  # (4)
            dq[part, :, rows] = of_queries.unflatten(0, (-1, q.shape[1]))
            of_keys[:, seen] += torch.bmm(ds.mT, queries[:, rows])  # (4)
        dk[part] = of_keys.mul_(scale).view(k[part].shape)
        dv[part] = of_values.view(v[part].shape)
    return dq, dk, dv


@_by_products.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return _heads_like(q)


@_by_products_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_by_products_backward(dy, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_by_products.register_autograd(_backward, setup_context=_keep)


def _heads_like(q: Tensor) -> Tensor:
    """An empty tensor of q's shape (B, H, T, D), in which the heads of a place lie side by side."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def _parts(k: Tensor, queries_at_once: int, scores_at_once: int) -> Iterator[slice]:
    """The sequences, some at a time."""
    B, H, S, _ = k.shape
    size = max(scores_at_once // (H * queries_at_once * S), 1)
    return (slice(start, start + size) for start in range(0, B, size))


def _weights(
    queries: Tensor, keys: Tensor, bias: Tensor | None, part: slice, is_causal: bool, at_once: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries, the keys that they may see, and their weights (N, queries, keys).

    Of N = sequences times heads queries are (N, T, D) and keys (N, S, D); the bias (B, H, T, S) is of all
    sequences, of which these are a part.
    """
    (_, T, D), S = queries.shape, keys.shape[1]
    scale, nothing = 1 / sqrt(D), queries.new_empty(())
    later = queries.new_full((at_once, at_once), -torch.inf).triu_(1)
    for start in range(0, T, at_once):
        stop = min(start + at_once, T)
        last = stop if is_causal else S
        added = nothing if bias is None else bias[part, :, start:stop, :last].flatten(0, 1)
        beta = 0 if bias is None else 1
        scores = torch.baddbmm(added, queries[:, start:stop], keys[:, :last].mT, beta=beta, alpha=scale)
        if is_causal:
            scores[:, :, start:] += later[: stop - start, : stop - start]
        yield slice(start, stop), slice(last), scores.softmax(-1)
