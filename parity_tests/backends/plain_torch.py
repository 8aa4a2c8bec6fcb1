"""The components in plain PyTorch: formulas written out, one operation at a time, gradients by autograd.

It is the yardstick of rounding: what it errs in a low precision, an honest implementation may err too.
"""

import math

import torch


def linear(x, weight, bias):
    y = x @ weight.T
    return y if bias is None else y + bias


def relu(x):
    return torch.where(x > 0, x, 0)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x * torch.sigmoid(x)


def layernorm(x, weight, bias, epsilon):
    centred = x - x.mean(-1, keepdim=True)
    y = weight * (centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + epsilon))
    return y if bias is None else y + bias


def rmsnorm(x, weight, epsilon):
    return weight * (x / torch.sqrt((x**2).mean(-1, keepdim=True) + epsilon))


def dropout(x, p, key):
    from torch_impl.dropout import dropout as masked  # which units go is no matter of rounding

    return masked(x, p, key)


def embedding(ids, weight):
    return torch.nn.functional.one_hot(ids.long(), weight.shape[0]).to(weight.dtype) @ weight


def learned_positions(weight, length):
    return weight[:length]


def attention(q, k, v, mask):
    return flash_attention(q, k, v, mask, None, None)


def flash_attention(q, k, v, mask, bias, tile):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    p = torch.softmax(scores, dim=-1) * mask
    return p @ v


def multi_head_attention(x, qkv_weight, qkv_bias, proj_weight, proj_bias, n_head, mask):
    B, T, C = x.shape
    q, k, v = (
        part.reshape(B, T, n_head, C // n_head).transpose(1, 2)
        for part in linear(x, qkv_weight, qkv_bias).split(C, dim=-1)
    )
    return linear(attention(q, k, v, mask).transpose(1, 2).reshape(B, T, C), proj_weight, proj_bias)


def ffn(x, up_weight, up_bias, down_weight, down_bias, activation):
    bend = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu}[activation]
    return linear(bend(linear(x, up_weight, up_bias)), down_weight, down_bias)


def _norm(x, params, name, config):
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    if config.norm == "rmsnorm":
        return rmsnorm(x, weight, config.norm_epsilon)
    return layernorm(x, weight, bias, config.norm_epsilon)


def block(x, params, config, mask, layer, key):
    def attend(x):
        names = ("attention.qkv.weight", "attention.qkv.bias", "attention.proj.weight", "attention.proj.bias")
        return multi_head_attention(x, *map(params.get, names), config.n_head, mask)

    def feed(x):
        names = ("ffn.up.weight", "ffn.up.bias", "ffn.down.weight", "ffn.down.bias")
        return ffn(x, *map(params.get, names), config.activation)

    def drop(x, site):
        return x if key is None else dropout(x, config.dropout, key._replace(site=2 * layer + site))

    if config.norm_placement == "pre":
        x = x + drop(attend(_norm(x, params, "norm1", config)), 1)
        return x + drop(feed(_norm(x, params, "norm2", config)), 2)
    x = _norm(x + drop(attend(x), 1), params, "norm1", config)
    return _norm(x + drop(feed(x), 2), params, "norm2", config)


def transformer(params, ids, config, key):
    table = params["token_embedding.weight"]
    T, C = ids.shape[1], config.d_model
    x = embedding(ids, table)
    if config.positions == "learned":
        x = x + params["position_embedding.weight"][:T]
    else:
        angle = torch.arange(T).double()[:, None] / 10000 ** (torch.arange(C) // 2 * 2 / C).double()
        even = torch.arange(C) % 2 == 0
        x = x * math.sqrt(C) + torch.where(even, angle.sin(), angle.cos()).to(x)
    if key is not None:
        x = dropout(x, config.dropout, key)
    mask = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
    for layer in range(config.n_layer):
        prefix = f"blocks.{layer}."
        own = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
        x = block(x, own, config, mask, layer, key)
    if config.norm_placement == "pre":
        x = _norm(x, params, "norm", config)
    return linear(x, table if config.tied_embeddings else params["head.weight"], None)


def cross_entropy(logits, targets, label_smoothing, count):
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    counted = targets != -100
    picked = log_p.gather(-1, targets.where(counted, 0)[..., None])[..., 0]
    each = -(1 - label_smoothing) * picked - label_smoothing * log_p.mean(-1)
    count = counted.sum() if count is None else count
    return (each * counted).sum() / max(int(count), 1)
