"""What a model costs, as it is counted from its config, and what the model built from it really takes."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parity_tests.strategies import model_configs
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.transformer import attention_mask
from torch_impl import attention, flash_attention, linear_cross_entropy
from torch_impl.kv_cache import KVCache
from torch_impl.optim import make_optimizer
from torch_impl.seq2seq import Seq2Seq
from torch_impl.training import costs, footprint
from torch_impl.training.presets import PRESETS
from torch_impl.training.recompute import recompute_blocks
from torch_impl.transformer import Embedded, Transformer

configs = model_configs(architectures=("decoder", "encoder", "encoder-decoder"))
some = settings(deadline=None, max_examples=40)


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Embedded:
    model = (Seq2Seq if config.architecture == "encoder-decoder" else Transformer)(config, dtype)
    model.initialise(0)
    return model


def loss_of(model: Embedded, sequences: int, length: int) -> Tensor:
    """Of random tokens, with dropout where the config has it."""
    ids, targets, source = torch.randint(model.config.vocab_size, (3, sequences, length))
    ids, targets, source = ids.clone(), targets.clone(), source.clone()  # memory of their own
    key = DropoutKey(1, 2) if model.config.dropout else None
    if isinstance(model, Seq2Seq):
        return model.loss((source, torch.ones(source.shape, dtype=torch.bool), ids, targets), key)
    return model.loss((ids, targets), key)


@some
@given(config=configs)
def test_parameters_are_those_of_the_model(config):
    model = build(config)
    parts = costs.parameters_by_part(config)
    assert sum(parts.values()) == costs.parameter_count(config) == sum(p.numel() for p in model.parameters())
    of_type = {"attention": ".attention.", "cross-attention": ".cross_attention.", "ffn": ".ffn."}
    for part, name in of_type.items():
        assert parts[part] == sum(
            p.numel() for n, p in model.named_parameters() if name in n and "_norm" not in n
        )
    assert parts["embedding"] == model.token_embedding.weight.numel()
    assert (parts["positions"] > 0) == (config.positions == "learned")
    assert (parts["head"] > 0) == (not config.tied_embeddings)


def test_parameters_of_gpt2():
    """As its authors' code has them: 124 million, of them 85 without the tables."""
    model = replace(PRESETS["gpt2-124m"].model, vocab_size=50257)
    assert costs.parameter_count(model) == 124_439_808
    assert costs.non_embedding_count(model) == 85_056_000


def test_a_thousand_billion_layers_are_counted_at_once():
    one, many = ModelConfig(n_layer=1), ModelConfig(n_layer=10**12)
    block = costs.parameter_count(ModelConfig(n_layer=2)) - costs.parameter_count(one)
    assert costs.parameter_count(many) == costs.parameter_count(one) + (10**12 - 1) * block
    assert footprint.training_bytes(many, TrainConfig()).peak > 10**15


@some
@given(config=configs, sequences=st.integers(1, 3))
def test_flops_are_those_that_pytorch_counts(config, sequences):
    """Exactly, forward and backward, in plain attention: of the fused kernel the counter knows nothing on the
    CPU. It counts mm, addmm and bmm, and all scores, of which masks let a kernel leave out some.
    """
    model, T = build(config), config.context_length
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            loss_of(model, sequences, T)
        forward = counter.get_total_flops()
        loss_of(model, sequences, T).backward()
    assert forward == pytest.approx(
        sequences * T * costs.forward_flops(config, masked=False), rel=1e-12, abs=0
    )
    assert counter.get_total_flops() == 4 * forward


@some
@given(config=model_configs(), T=st.integers(1, 20))
def test_scores_that_are_seen_are_those_that_the_masks_leave(config, T):
    config = replace(config, context_length=T)
    masks = [attention_mask(config, layer, T, 0, None) for layer in range(config.n_layer)]
    assert costs.attention_pairs(config) == (sum(mask.sum() for mask in masks), sum(m.size for m in masks))


def kept_for_backward(model: Embedded, sequences: int) -> int:
    """Bytes of what autograd saves of a forward pass, parameters and tables aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # by storage; kept alive, so that no two have one address

    def see(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        loss_of(model, sequences, model.config.context_length)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def places_bytes(config: ModelConfig, size: int) -> int:
    """At most, of places and their angles' cosines and sines, which the count leaves out, in each stack, and
    of the loss' own two numbers."""
    T, D, stacks = config.context_length, config.head_width, 1 + (config.architecture == "encoder-decoder")
    copies = 1 if size == 4 else 1 + 4 * config.n_layer
    return 16 + stacks * 2 * (8 * T + (4 * T * D * copies if config.positions == "rope" else 0))


@some
@given(
    config=configs,
    sequences=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    by_products=st.booleans(),
)
def test_activations_are_those_that_autograd_keeps(config, sequences, dtype, by_products):
    """To the byte, but for places and angles, and for what fills dropout's masks up to a multiple of eight in
    each sequence."""
    # Turned halves of one feature have strides that the fused kernel does not take.
    assume(config.positions != "rope" or config.head_width > 2)
    kernels = footprint.Kernels(dtype.itemsize, by_products=by_products)
    estimated = footprint.activation_bytes(config, sequences, kernels)
    with patch.object(attention, "products_pay", return_value=by_products):
        left_out = kept_for_backward(build(config, dtype), sequences) - estimated
    masks = 5 * config.n_layer + 2 if config.architecture == "encoder-decoder" else 2 * config.n_layer + 1
    if config.dropout:
        left_out -= masks * sequences * (-config.context_length * config.d_model % 8)
    assert 0 <= left_out <= places_bytes(config, dtype.itemsize)


@some
@given(config=model_configs(architectures=("decoder", "encoder")), sequences=st.integers(1, 3))
def test_blocks_that_are_computed_again_keep_their_inputs(config, sequences):
    """And one of them, at a time, what it keeps: which is left out while there is only the forward pass."""
    assume(config.positions not in ("rope", "alibi") and config.window == 0)
    estimated = footprint.activation_bytes(config, sequences, footprint.Kernels(recomputed=True))
    model = build(config)
    recompute_blocks(model)
    meanwhile = estimated - kept_for_backward(model, sequences)
    one, two = (footprint.activation_bytes(replace(config, n_layer=n), sequences) for n in (1, 2))
    assert 0 <= meanwhile <= two - one


@some
@given(config=configs, sequences=st.integers(1, 3))
def test_half_precision_on_cuda_keeps_less(config, sequences):
    """Than on a CPU, whose kernels widen norms and attention; and more than half of what float32 keeps."""
    half, cpu, single = (
        footprint.activation_bytes(config, sequences, footprint.Kernels(*of))
        for of in ((2, False), (2, True), (4, False))
    )
    assert single / 2 <= half < cpu


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
@pytest.mark.parametrize("positions", ["none", "alibi"])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_activations_of_a_long_context(architecture, positions, window, qk_norm):
    """From here on masks are made for a block of queries at a time, and made again for the backward pass."""
    if window and architecture != "decoder":
        return
    config = ModelConfig(
        architecture,
        context_length=footprint.QUERIES_AT_ONCE + 1,
        d_model=8,
        n_head=2,
        vocab_size=5,
        positions=positions,
        window=window,
        qk_norm=qk_norm,
        attention_pattern="local, full" if window else "full",
    )
    left_out = kept_for_backward(build(config), 2) - footprint.activation_bytes(config, 2)
    assert 0 <= left_out <= places_bytes(config, 4)


def test_what_is_made_at_once_is_as_much_as_is_counted():
    assert footprint.QUERIES_AT_ONCE == flash_attention.QUERIES_AT_ONCE
    assert footprint.LOGITS_AT_ONCE == linear_cross_entropy.LOGITS_AT_ONCE


def test_logits_of_a_large_vocabulary_are_a_part_of_what_there_is_at_once():
    """On CUDA 268 million, less those that make no 64 places; of a small batch all."""
    large = ModelConfig(vocab_size=50_257, context_length=1024)
    on_cuda = footprint.Kernels(2, of_cpu=False)
    assert footprint.logits_bytes(large, 32, on_cuda) == 2 * 2 * 5312 * 50_257
    assert footprint.logits_bytes(large, 1, on_cuda) == 2 * 2 * 1024 * 50_257
    whole = footprint.training_bytes(large, TrainConfig(batch_size=32), on_cuda)
    assert whole.peak == whole.weights + whole.moments + whole.activations + whole.logits


@given(config=configs)
def test_keys_and_values_are_as_many_as_generation_keeps(config):
    """Of local layers a window's worth was counted, but room is taken for all; nothing in an encoder."""
    token, whole = footprint.kv_cache_bytes(config, size=2)
    model = build(config)
    keys_and_values = sum(
        2 * 2 * module.kv_heads * config.head_width
        for name, module in model.named_modules()
        if name.endswith(".attention") and not name.startswith("encoder.")
    )
    if config.architecture == "encoder":
        assert (token, whole) == (0, 0)
        return
    assert token == keys_and_values
    past = KVCache(config, 1, torch.bfloat16)
    source = 2 * 2 * config.d_model * config.n_layer if config.architecture == "encoder-decoder" else 0
    assert whole == past.k.nbytes + past.v.nbytes + source * config.context_length


@pytest.mark.parametrize("preset", ["char-fast", "dates"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_are_those_that_the_optimizer_keeps(preset, optimizer):
    config = PRESETS[preset]
    training = replace(config.training, optimizer=optimizer)
    model = build(replace(config.model, vocab_size=30))
    state = make_optimizer(model, training)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    state.step()
    kept = [value for each in state.state.values() for name, value in each.items() if name != "step"]
    assert footprint.training_bytes(model.config, training).moments == sum(value.nbytes for value in kept)
