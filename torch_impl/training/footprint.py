"""What a model takes of memory, networks and disks: bytes, counted from its config alone, without torch.

B sequences of T tokens, C model width, H heads, K key/value heads, D head width, F feed-forward width,
V vocabulary, L layers. An encoder-decoder reads sources as long as its targets, T; what is said of a token is
said of one of the target together with one of the source.
Not here: buffers that come and go, and what compilation saves of them.
"""

from dataclasses import replace
from typing import NamedTuple

from ref_numpy.config import ModelConfig, TrainConfig
from torch_impl.training.costs import (
    local_layers,
    multiplied_weights,
    muons_count,
    parameter_count,
    parameters_by_part,
)

QUERIES_AT_ONCE = 256  # of torch_impl.flash_attention, which imports torch
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}  # of torch_impl.linear_cross_entropy


class Kernels(NamedTuple):
    """Whose kernels compute, with how many bytes per number, and what they compute twice."""

    size: int = 4
    of_cpu: bool = True  # these compute norms and attention in float32, whatever the precision
    recomputed: bool = False  # blocks, for the backward pass
    by_products: bool = False  # attention, which is then not in float32: see torch_impl/attention.py


def activation_bytes(model: ModelConfig, sequences: int, kernels: Kernels = Kernels()) -> int:  # noqa: B008
    """What autograd keeps of a forward pass for the backward one.

    Counted tensor by tensor, for a CPU as it is kept to the byte: the inputs of products and norms, q, k, v
    and the output of attention, both sides of the nonlinearity, the gradients that come with the loss,
    dropout's masks, the masks of attention and, with fewer bytes than the weights have, the weights
    converted. No scores and no logits: attention is fused, and so are output projection and loss. Left out is
    what neither the batch nor the width makes large: places and their angles. For CUDA it is what its kernels
    have to keep at least; no GPU was measured. Where blocks are computed again it is their inputs, and at
    least what one of them keeps meanwhile.
    """
    size, tokens, L = kernels.size, sequences * model.context_length, model.n_layer
    head = model.vocab_size * model.d_model
    kept = 4 * head  # the gradient of the output projection, made with the loss
    if kernels.recomputed:
        inputs = (L - 1) * (2 if model.architecture == "encoder-decoder" else 1) * size * model.d_model
        return kept + tokens * (_stack_bytes(model, kernels, 1) + inputs)
    kept += tokens * _stack_bytes(model, kernels, L) + _attending_bytes(model, sequences, kernels)
    if model.architecture == "encoder-decoder":
        kept += tokens * _stack_bytes(model, kernels, L, has_memory=True)
    if size < 4:
        kept += size * (multiplied_weights(model) - head + parameters_by_part(model)["norms"])
        if model.norm == "layernorm" and kernels.of_cpu:  # computes with its weights in float32
            kept += (4 - size) * parameters_by_part(replace(model, qk_norm=False))["norms"]
    return kept


def _stack_bytes(model: ModelConfig, kernels: Kernels, layers: int, has_memory: bool = False) -> int:
    """What a stack of so many blocks keeps, in bytes per token: from the token's id to the output of the last
    norm, which another stack reads, or in whose place the gradient stands that is made with the loss."""
    C, F, size = model.d_model, model.ffn_width, kernels.size
    dropped = C if model.dropout > 0 else 0  # a byte each
    is_layernorm = model.norm == "layernorm"  # which keeps its input, a mean and a deviation, RMSNorm a scale
    norm = (4 if kernels.of_cpu else size) * C + 8 if is_layernorm else size * C + 4
    sublayer = norm + size * C + dropped  # and the sublayer's own input
    wide = {"relu": 1, "swiglu": 4}.get(model.activation, 2)
    block = 2 * sublayer + _attention_bytes(model, kernels) + size * wide * F
    if has_memory:
        block += sublayer + _attention_bytes(model, kernels, across=True)
    last = (norm if model.norm_placement == "pre" else 0) + size * C
    return 8 + dropped + layers * block + last  # 8: the token's id


def _attention_bytes(model: ModelConfig, kernels: Kernels, across: bool = False) -> int:
    """What a layer's attention, or its cross-attention, keeps in bytes per token: what the kernel reads and
    finds, and the q, k and v that the projections made, where something still refers to them.

    What the kernel reads are parts of these, or copies: normalised, turned with their place, converted to
    float32, or repeated for a group's heads.
    """
    C, size = model.d_model, kernels.size
    H, K = model.n_head, model.n_head if across else model.kv_heads
    normed = model.qk_norm and not across
    turned = normed or (model.positions == "rope" and not across)
    widened = kernels.of_cpu and size < 4 and not kernels.by_products
    repeated = kernels.by_products and K < H
    copied = {"q": turned or widened, "k": turned or widened or repeated, "v": widened or repeated}
    keys = C if repeated else K * model.head_width
    width = {"q": C, "k": keys, "v": keys}

    exact = 4 if widened else size
    kept = exact * C + widened * size * C  # what was found, and the next projection's input
    kept += sum(exact * width[name] for name in copied if copied[name])
    if normed or not all(copied.values()):  # made, as one tensor, of which any part keeps the whole
        kept += size * (C + 2 * K * model.head_width)
    return kept + 4 * (H + K) * normed  # a scale for each head's q and k


def _attending_bytes(model: ModelConfig, sequences: int, kernels: Kernels) -> int:
    """What attention keeps in all layers beside its inputs and its output, in bytes; the masks decide.

    Without a mask and with one of no more than QUERIES_AT_ONCE rows, the log-sum-exps, the mask as numbers,
    and the output once more where zeros are put in a copy, because padding may leave a query nothing to see.
    With a larger mask nothing, since attention goes by blocks, which are computed again. Products keep no
    log-sum-exps. CUDA's kernels keep them, and make masks as they go.
    """
    T, C, H, L = model.context_length, model.d_model, model.n_head, model.n_layer
    if not kernels.of_cpu:
        return sequences * T * 4 * H * L * (3 if model.architecture == "encoder-decoder" else 1)
    alibi, in_one_piece = model.positions == "alibi", T <= QUERIES_AT_ONCE
    # What is copied is converted anyway in half precision, and not kept by products.
    output = sequences * 4 * T * C if kernels.size == 4 and not kernels.by_products else 0
    number = kernels.size if kernels.by_products else 4  # of a mask
    sums = 0 if kernels.by_products else sequences * T * 4 * H
    table = number * T * T * (H if alibi else 1)
    masked = L if alibi else local_layers(model)
    kept = (L - masked) * sums + masked * in_one_piece * (sums + table)
    if model.architecture != "encoder-decoder":
        return kept
    padded = sums + output + sequences  # one byte says whether a source has any token
    padding = sequences * number * T  # one row of a mask
    encoder = in_one_piece * (padded + sequences * table) if alibi else padded + padding
    return kept + L * (encoder + padded + padding)  # the decoder, the encoder, cross-attention


def logits_bytes(model: ModelConfig, sequences: int, kernels: Kernels = Kernels()) -> int:  # noqa: B008
    """Bytes of the logits that there are at once, and of their gradients: they go before the backward pass.

    In float32 the gradients take the logits' place. With half as many bytes they stand beside them; not here
    are the probabilities between, in float32, which compiled kernels do not write.
    """
    V, limit = model.vocab_size, LOGITS_AT_ONCE["cpu" if kernels.of_cpu else "cuda"]
    places = min(sequences * model.context_length, max(limit // V // 64 * 64, 64))
    return 4 * places * V


class TrainingBytes(NamedTuple):
    """Memory of a training step. Weights, gradients and moments are float32."""

    weights: int
    gradients: int
    moments: int  # AdamW's or Adam's two, Muon's one
    activations: int  # of one micro-batch
    logits: int  # that come and go while the activations are there
    peak: int  # at least


def training_bytes(
    model: ModelConfig,
    training: TrainConfig,
    kernels: Kernels = Kernels(),  # noqa: B008 (it is immutable)
) -> TrainingBytes:
    """What a training step holds.

    At the peak there are activations and logits beside gradients only where an earlier micro-batch left some:
    the first one's come while its activations go.
    """
    count = parameter_count(model)
    frozen = parameters_by_part(model)["embedding"] if training.freeze_embeddings else 0
    weights, gradients, moments = 4 * count, 4 * (count - frozen), 8 * (count - frozen)
    if training.optimizer == "muon":
        moments -= 4 * muons_count(model)
    sequences = training.batch_size // training.micro_batches
    activations = activation_bytes(model, sequences, kernels)
    logits = logits_bytes(model, sequences, kernels)
    forward = activations + logits
    at_once = forward + gradients if training.micro_batches > 1 else max(forward, gradients)
    return TrainingBytes(weights, gradients, moments, activations, logits, weights + moments + at_once)


def process_bytes(
    model: ModelConfig, training: TrainConfig, kernels: Kernels, processes: int, shard: bool
) -> TrainingBytes:
    """What one of several processes holds: its rows of each micro-batch, and of the rest all or, sharded, its
    part. Left out are the buffers in which a block's weights are put together."""
    own = replace(training, batch_size=training.batch_size // processes)
    held = training_bytes(model, own, kernels)
    if not shard or processes == 1:
        return held
    weights, gradients, moments = (-(-part // processes) for part in held[:3])
    peak = weights + gradients + moments + held.activations + held.logits
    return TrainingBytes(weights, gradients, moments, held.activations, held.logits, peak)


def sent_bytes(model: ModelConfig, training: TrainConfig, size: int, processes: int, shard: bool) -> int:
    """What each of several processes sends in a step, by rings, and receives as much.

    To add up n bytes so that everybody has the sum (DDP), 2 n (P - 1) / P, once. Sharded, n (P - 1) / P for
    each micro-batch three times: to put the weights together for the forward pass and for the backward one,
    with `size` bytes per number, and to add up the gradients in float32, of which each keeps its part. Muon
    has its matrices put together once more.
    """
    held = training_bytes(model, training)
    if shard:
        n = training.micro_batches * (2 * held.weights * size // 4 + held.gradients)
        n += 4 * muons_count(model) if training.optimizer == "muon" else 0
    else:
        n = 2 * held.gradients
    return n * (processes - 1) // processes


class CacheBytes(NamedTuple):
    """Keys and values that generation keeps, per sequence."""

    token: int
    whole: int  # of context_length tokens, which a KVCache takes at once; with the source's


def kv_cache_bytes(model: ModelConfig, size: int = 4) -> CacheBytes:
    """2 K D numbers per layer and token, local layers as all others, and 2 C per layer and token of an
    encoder-decoder's source.

    An encoder writes nothing, and has none.
    """
    if model.architecture == "encoder":
        return CacheBytes(0, 0)
    T, L, layer = model.context_length, model.n_layer, size * 2 * model.kv_heads * model.head_width
    whole = L * layer * T
    if model.architecture == "encoder-decoder":
        whole += size * L * 2 * model.d_model * T
    return CacheBytes(L * layer, whole)


def checkpoint_bytes(model: ModelConfig, training: TrainConfig) -> tuple[int, int]:
    """Tensors in model.safetensors and in optimizer.safetensors; lists of names and other files are small."""
    held = training_bytes(model, training)
    return held.weights, held.moments
