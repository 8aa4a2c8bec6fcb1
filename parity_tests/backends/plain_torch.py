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


def learned_positions(places, weight):
    return weight[places]


def rope(x, places, config):
    """As complex numbers: a pair is one, and turns by a factor of size 1."""
    pairs = torch.arange(config.head_width // 2, dtype=torch.float64)  # on the CPU: MPS has no float64
    angle = (places.cpu().double() / config.rope_scale)[..., None] * config.rope_base ** (
        -2 * pairs / config.head_width
    )
    angle = angle[:, None] if places.ndim == 2 else angle
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    if config.rope_layout == "half":
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    else:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(turned, dim=-2 if config.rope_layout == "half" else -1).flatten(-2)


def _slopes(n):
    """ALiBi's, by the recursion of the paper's code for head counts that are no power of two."""
    if n & (n - 1) == 0:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]
    near = 1 << (n.bit_length() - 1)
    return _slopes(near) + _slopes(2 * near)[0::2][: n - near]


def attention(q, k, v, mask, slopes=None):
    bias = None
    if slopes is not None:
        T, S = q.shape[-2], k.shape[-2]
        distance = (torch.arange(S - T, S)[:, None] - torch.arange(S)).abs().to(q)
        bias = -torch.tensor(list(slopes), dtype=q.dtype, device=q.device)[:, None, None] * distance
    return flash_attention(q, k, v, mask, bias, None)


class _Attention(torch.autograd.Function):
    """Gradients as fused kernels take them (ref_numpy/flash_attention.py): the weights again from the
    log-sum-exp of their row, and sum p dp as dy y, of the y that was stored.

    Autograd would use the weights themselves. Where keys and values are nearly alike its roundings cancel,
    and those of dy y do not: that is no yardstick for a kernel that does not keep the weights.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, bias):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores if bias is None else scores + bias
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        y = torch.softmax(scores, dim=-1) * mask @ v
        precise = scores.to(torch.promote_types(scores.dtype, torch.float32))
        ctx.save_for_backward(q, k, v, mask, y, precise, precise.logsumexp(-1, keepdim=True))
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, mask, y, scores, log_sum_exp = ctx.saved_tensors
        p = torch.exp(scores - log_sum_exp).to(q.dtype) * mask
        delta = (dy * y).sum(-1, keepdim=True)
        ds = p * (dy @ v.transpose(-1, -2) - delta) / math.sqrt(q.shape[-1])
        return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dy, None, None


def flash_attention(q, k, v, mask, bias, tile):
    return _Attention.apply(q, k, v, mask, bias)


def _heads(x, n_head):
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def multi_head_attention(x, params, config, mask, places):
    H, K, D = config.n_head, config.kv_heads, config.head_width
    qkv = linear(x, params["qkv.weight"], params.get("qkv.bias"))
    q, k, v = (
        _heads(part, n) for part, n in zip(qkv.split([H * D, K * D, K * D], -1), (H, K, K), strict=True)
    )
    if config.qk_norm:
        q = rmsnorm(q, params["q_norm.weight"], config.norm_epsilon)
        k = rmsnorm(k, params["k_norm.weight"], config.norm_epsilon)
    if config.positions == "rope":
        q, k = rope(q, places, config), rope(k, places, config)
    readers = torch.arange(H) // (H // K)
    y = attention(q, k[:, readers], v[:, readers], mask, _slopes(H) if config.positions == "alibi" else None)
    return linear(y.transpose(1, 2).flatten(2), params["proj.weight"], params.get("proj.bias"))


def cross_attention(x, memory, params, n_head, mask):
    q = linear(x, params["q.weight"], params.get("q.bias"))
    k, v = linear(memory, params["kv.weight"], params.get("kv.bias")).chunk(2, -1)
    y = attention(*(_heads(part, n_head) for part in (q, k, v)), mask)
    return linear(y.transpose(1, 2).flatten(2), params["proj.weight"], params.get("proj.bias"))


def ffn(x, up_weight, up_bias, down_weight, down_bias, activation):
    bend = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu}[activation]
    return linear(bend(linear(x, up_weight, up_bias)), down_weight, down_bias)


def _norm(x, params, name, config):
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    if config.norm == "rmsnorm":
        return rmsnorm(x, weight, config.norm_epsilon)
    return layernorm(x, weight, bias, config.norm_epsilon)


def swiglu(x, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias):
    gate = silu(linear(x, gate_weight, gate_bias))
    return linear(gate * linear(x, up_weight, up_bias), down_weight, down_bias)


def _within(params, part):
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def _feed(x, params, config):
    up, down = ([params[f"ffn.{n}.weight"], params.get(f"ffn.{n}.bias")] for n in ("up", "down"))
    if config.activation == "swiglu":
        return swiglu(x, params["ffn.gate.weight"], params.get("ffn.gate.bias"), *up, *down)
    return ffn(x, *up, *down, config.activation)


def _sublayers(x, params, config, key, first_site, sublayers):
    for n, sublayer in enumerate(sublayers, start=1):

        def drop(x, n=n):
            return x if key is None else dropout(x, config.dropout, key._replace(site=first_site + n))

        if config.norm_placement == "pre":
            x = x + drop(sublayer(_norm(x, params, f"norm{n}", config)))
        else:
            x = _norm(x + drop(sublayer(x)), params, f"norm{n}", config)
    return x


def block(x, params, config, mask, places, layer, key):
    def attend(x):
        return multi_head_attention(x, _within(params, "attention"), config, mask, places)

    return _sublayers(x, params, config, key, 2 * layer, (attend, lambda x: _feed(x, params, config)))


def cross_block(x, memory, params, config, mask, memory_mask, places, site, key):
    def attend(x):
        return multi_head_attention(x, _within(params, "attention"), config, mask, places)

    def attend_memory(x):
        own = _within(params, "cross_attention")
        return cross_attention(x, memory, own, config.n_head, memory_mask)

    sublayers = (attend, attend_memory, lambda x: _feed(x, params, config))
    return _sublayers(x, params, config, key, site, sublayers)


def _embed(params, ids, places, config, key):
    C, x = config.d_model, embedding(ids, params["token_embedding.weight"])
    if config.positions == "learned":
        x = x + params["position_embedding.weight"][places]
    elif config.positions == "sinusoidal":
        features = torch.arange(C)
        angle = places.cpu().double()[..., None] / 10000 ** ((features // 2 * 2).double() / C)
        x = x * math.sqrt(C) + torch.where(features % 2 == 0, angle.sin(), angle.cos()).to(x)
    return x if key is None else dropout(x, config.dropout, key)


def _head(x, params, config):
    return linear(x, params["token_embedding.weight" if config.tied_embeddings else "head.weight"], None)


def transformer(params, ids, config, key, documents):
    T = ids.shape[1]
    age = torch.arange(T, device=ids.device)[:, None] - torch.arange(T, device=ids.device)
    places, together = torch.arange(T, device=ids.device), torch.ones_like(age, dtype=torch.bool)
    if documents is not None:
        together = (documents[:, :, None] == documents[:, None]) & (documents != -1)[:, None]
        together = together[:, None]
        places = torch.tensor(
            [
                [t - max(s for s in range(t + 1) if s == 0 or row[s] != row[s - 1]) for t in range(T)]
                for row in documents.tolist()
            ],
            device=ids.device,
        )
    x = _embed(params, ids, places, config, key)
    for layer in range(config.n_layer):
        window = config.window_of(layer) or T
        mask = (
            torch.ones_like(age, dtype=torch.bool)
            if config.architecture == "encoder"
            else (age >= 0) & (age < window)
        )
        x = block(x, _within(params, f"blocks.{layer}"), config, mask & together, places, layer, key)
    if config.norm_placement == "pre":
        x = _norm(x, params, "norm", config)
    return _head(x, params, config)


def seq2seq(params, source, present, target, config, key):
    L, seen = config.n_layer, present[:, None, None, :]
    places = torch.arange(source.shape[1], device=source.device)
    memory = _embed(params, source, places, config, key)
    for layer in range(L):
        memory = block(memory, _within(params, f"encoder.blocks.{layer}"), config, seen, places, layer, key)
    if config.norm_placement == "pre":
        memory = _norm(memory, params, "encoder.norm", config)
    places = torch.arange(target.shape[1], device=source.device)
    x = _embed(params, target, places, config, key and key._replace(site=2 * L + 1))
    mask = places[:, None] >= places
    for layer in range(L):
        own, site = _within(params, f"decoder.blocks.{layer}"), 2 * L + 1 + 3 * layer
        x = cross_block(x, memory, own, config, mask, seen, places, site, key)
    if config.norm_placement == "pre":
        x = _norm(x, params, "decoder.norm", config)
    return _head(x, params, config)


def cross_entropy(logits, targets, label_smoothing, count):
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    counted = targets != -100
    picked = log_p.gather(-1, targets.where(counted, 0)[..., None])[..., 0]
    each = -(1 - label_smoothing) * picked - label_smoothing * log_p.mean(-1)
    count = counted.sum() if count is None else count
    return (each * counted).sum() / max(int(count), 1)


def linear_cross_entropy(x, weight, targets, label_smoothing, count, at_once):
    return cross_entropy(linear(x, weight, None), targets, label_smoothing, count)


def adam(param, gradient, m, v, t, learning_rate, beta1, beta2, epsilon):
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    step = m / (1 - beta1**t) / (torch.sqrt(v / (1 - beta2**t)) + epsilon)
    return param - learning_rate * step, m, v


def adamw(param, gradient, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay):
    moved, m, v = adam(param, gradient, m, v, t, learning_rate, beta1, beta2, epsilon)
    return moved - learning_rate * weight_decay * param, m, v
