"""Modules of Hugging Face's transformers under the reference's names: GPT-2's and Llama's.

An example of a backend that declines: what these modules do not do raises NotImplementedError, and is listed.
"""

import torch
from torch.func import functional_call
from transformers import GPT2Config, LlamaConfig
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, eager_attention_forward
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

_NAMES = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}


def relu(x):
    return ACT2FN["relu"](x)


def gelu(x):
    return ACT2FN["gelu"](x)


def gelu_tanh(x):
    return ACT2FN["gelu_new"](x)


def silu(x):
    return ACT2FN["silu"](x)


def rmsnorm(x, weight, epsilon):
    if x.dtype == torch.float64:
        raise NotImplementedError("LlamaRMSNorm computes in float32, whatever it is given")
    return functional_call(LlamaRMSNorm(x.shape[-1], epsilon), {"weight": weight}, (x,))


def linear(x, weight, bias):
    if bias is None:
        raise NotImplementedError("Conv1D always has a bias")
    layer = Conv1D(*weight.shape)
    return functional_call(layer, {"weight": weight.T, "bias": bias}, (x,))


def rope(x, places, config):
    """Theirs turns; the angles are made here, since theirs come in float32 alone."""
    pairs = torch.arange(config.head_width // 2).double()  # on the CPU: MPS has no float64
    scaled = places[..., None].cpu().double() / config.rope_scale
    angles = scaled / config.rope_base ** (2 * pairs / config.head_width)
    angles = angles.expand(x.shape[0], *angles.shape[-2:])  # (B, T, D / 2)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    if config.rope_layout == "interleaved":  # its heads stand behind the places
        return modeling_gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2)
    cos, sin = (torch.cat([half, half], dim=-1) for half in (cos, sin))
    return modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0]


def attention(q, k, v, mask, slopes):
    if slopes is not None:
        raise NotImplementedError("GPT-2 has no ALiBi")
    if not mask.any(-1).all():
        raise NotImplementedError("a query that sees nothing looks at everything there")
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(
        ~mask, torch.finfo(q.dtype).min
    )
    module = GPT2Attention(GPT2Config(n_embd=q.shape[-1], n_head=1), layer_idx=0).eval()
    return eager_attention_forward(module, q, k, v, hidden)[0].transpose(1, 2)


def ffn(x, up_weight, up_bias, down_weight, down_bias, activation):
    if up_bias is None:
        raise NotImplementedError("GPT2MLP always has biases")
    hidden, width = up_weight.shape
    module = GPT2MLP(
        hidden, GPT2Config(n_embd=width, n_head=1, activation_function=_NAMES[activation])
    ).eval()
    weights = {"c_fc.weight": up_weight.T, "c_fc.bias": up_bias}
    weights |= {"c_proj.weight": down_weight.T, "c_proj.bias": down_bias}
    return functional_call(module, weights, (x,))


def swiglu(x, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias):
    hidden, width = gate_weight.shape
    biased = gate_bias is not None
    module = LlamaMLP(
        LlamaConfig(hidden_size=width, intermediate_size=hidden, mlp_bias=biased, num_attention_heads=1)
    )
    weights = {"gate_proj.weight": gate_weight, "up_proj.weight": up_weight, "down_proj.weight": down_weight}
    if biased:
        weights |= {"gate_proj.bias": gate_bias, "up_proj.bias": up_bias, "down_proj.bias": down_bias}
    return functional_call(module, weights, (x,))


def cross_entropy(logits, targets, label_smoothing, count):
    if label_smoothing:
        raise NotImplementedError("their loss smooths no labels")
    count = int((targets != -100).sum()) if count is None else count
    rows = logits.reshape(-1, logits.shape[-1])
    return fixed_cross_entropy(rows, targets.reshape(-1), num_items_in_batch=max(count, 1))
