"""torch_impl under the reference's names: the suite's default target.

Its functions are offered as they are, flash attention with the mask for a pattern; its modules (attention
heads, ffn, block, transformer) are called with the weights handed in; its optimizer is given its moments.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.func import functional_call

from ref_numpy.config import TrainConfig
from torch_impl import generate as generation
from torch_impl import optim
from torch_impl.activations import gelu, gelu_tanh, relu, silu  # noqa: F401
from torch_impl.alibi import AlibiSlopes
from torch_impl.attention import attention  # noqa: F401
from torch_impl.block import Block
from torch_impl.cross_attention import CrossAttention
from torch_impl.cross_block import CrossBlock
from torch_impl.dropout import dropout, keep_mask  # noqa: F401
from torch_impl.embedding import embedding  # noqa: F401
from torch_impl.ffn import FFN, SwiGLU
from torch_impl.flash_attention import AttentionPattern
from torch_impl.flash_attention import flash_attention as fused
from torch_impl.layernorm import layernorm, rmsnorm  # noqa: F401
from torch_impl.linear import linear  # noqa: F401
from torch_impl.linear_cross_entropy import linear_cross_entropy  # noqa: F401
from torch_impl.loss import cross_entropy  # noqa: F401
from torch_impl.masks import causal_mask, document_mask, window_mask  # noqa: F401
from torch_impl.multi_head_attention import MultiHeadAttention, attend_by
from torch_impl.positions import learned_positions  # noqa: F401
from torch_impl.rope import RotaryPositions
from torch_impl.sampling import filtered_logits, sample_token  # noqa: F401
from torch_impl.seq2seq import Seq2Seq
from torch_impl.transformer import Transformer


def _present(params):
    return {name: value for name, value in params.items() if value is not None}


def _called(module, params, inputs):
    """A module with the parameters handed in, which have to be of its own names and shapes."""
    own, given = (
        {name: tuple(value.shape) for name, value in each}
        for each in (module.named_parameters(), params.items())
    )
    if own != given:
        raise ValueError(f"{type(module).__name__} has the parameters {own}, and is given {given}")
    return functional_call(module, params, inputs)


def rope(x, places, config):
    return _rotation(x, places, config).turn(x)


def _rotation(x, places, config):
    """The table of a model that is long enough, in the precision of x."""
    if config.positions != "rope":
        return None
    needed = replace(config, context_length=max(int(places.max()) + 1, config.context_length))
    return RotaryPositions(needed).to(x.device, x.dtype)(places)


def _attend(config, mask, x):
    """As models do it, but for a mask of any kind."""
    slopes = None
    if config.positions == "alibi":
        slopes = AlibiSlopes(config.n_head).to(x.device, x.dtype).slopes
    return attend_by(AttentionPattern(alibi_slopes=slopes, mask=mask))


def multi_head_attention(x, params, config, mask, places):
    attend = _attend(config, mask, x)
    return _called(MultiHeadAttention(config), params, (x, attend, _rotation(x, places, config)))


def cross_attention(x, memory, params, n_head, mask):
    module = CrossAttention(x.shape[-1], n_head, "q.bias" in params)
    return _called(module, params, (x, memory, mask))


def flash_attention(q, k, v, mask, bias, tile):
    """Biases are the pattern's own; the rows of a tile are the queries of a block."""
    assert bias is None
    return fused(q, k, v, AttentionPattern(mask=mask), queries_at_once=tile[0])


def ffn(x, up_weight, up_bias, down_weight, down_bias, activation):
    module = FFN(x.shape[-1], up_weight.shape[0], activation, up_bias is not None)
    weights = {"up.weight": up_weight, "up.bias": up_bias, "down.weight": down_weight, "down.bias": down_bias}
    return _called(module, _present(weights), (x,))


def swiglu(x, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias):
    module = SwiGLU(x.shape[-1], up_weight.shape[0], up_bias is not None)
    weights = {"gate.weight": gate_weight, "up.weight": up_weight, "down.weight": down_weight}
    weights |= {"gate.bias": gate_bias, "up.bias": up_bias, "down.bias": down_bias}
    return _called(module, _present(weights), (x,))


def block(x, params, config, mask, places, layer, key):
    attend = _attend(config, mask, x)
    return _called(Block(config, layer), params, (x, attend, _rotation(x, places, config), key))


def cross_block(x, memory, params, config, mask, memory_mask, places, site, key):
    attend = _attend(config, mask, x)
    rotation = _rotation(x, places, config)
    return _called(CrossBlock(config, site), params, (x, memory, memory_mask, attend, rotation, key))


def transformer(params, ids, config, key, documents):
    return _whole(Transformer, params, config, ids, documents, key)


def seq2seq(params, source, present, target, config, key):
    return _whole(Seq2Seq, params, config, source, present, target, key)


def _whole(model_class, params, config, *inputs):
    """As in training: parameters in float32 or better, activations in the precision under test."""
    dtype = params["token_embedding.weight"].dtype
    held = torch.promote_types(dtype, torch.float32)
    model = model_class(config, compute_dtype=dtype).to(inputs[0].device, held)
    return _called(model, {name: value.to(held) for name, value in params.items()}, inputs)


def _holding(params):
    """A module with these parameters."""
    module = nn.Module()
    for name, value in params.items():
        module.register_parameter(name, nn.Parameter(value.clone()))
    return module


def _step(param, gradient, m, v, t, learning_rate, config):
    module = _holding({"param": param})
    module.param.grad = gradient.clone()
    optimizer = optim.make_optimizer(module, config)
    t = torch.tensor(t - 1.0, device=param.device)
    past = {"step": t, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[module.param].update(past)
    optim.set_learning_rate(optimizer, torch.tensor(learning_rate, dtype=torch.float64))
    optimizer.step()
    return module.param, past["exp_avg"], past["exp_avg_sq"]


def adam(param, gradient, m, v, t, learning_rate, beta1, beta2, epsilon):
    config = TrainConfig(optimizer="adam", weight_decay=0.0, beta1=beta1, beta2=beta2, epsilon=epsilon)
    return _step(param, gradient, m, v, t, learning_rate, config)


def adamw(param, gradient, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    config = TrainConfig(weight_decay=weight_decay, beta1=beta1, beta2=beta2, epsilon=epsilon)
    return _step(param, gradient, m, v, t, learning_rate, config)


def clip_by_global_norm(gradients, limit):
    module = _holding(gradients)
    for name, parameter in module.named_parameters():
        parameter.grad = gradients[name].clone()
    norm = optim.clip_by_global_norm(module, limit)
    return {name: parameter.grad for name, parameter in module.named_parameters()}, norm


def generate(params, prompt, config, n_tokens, sampling, seed):
    model = Transformer(config, torch.float64).double().to(prompt.device)
    model.load_state_dict(params)
    return generation.generate(model, prompt, n_tokens, sampling, seed)
