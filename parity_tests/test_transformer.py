"""The whole model: parity over the product of options, one initialiser, and no look into the future."""

from contextlib import nullcontext
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from parity_tests.strategies import documents, dropout_keys, model_configs, model_params, seeds
from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.masks import PADDING
from ref_numpy.parameters import init_params, parameter_shapes
from ref_numpy.rng import INIT, Key
from ref_numpy.transformer import embed_forward, transformer_forward
from torch_impl.rng import normal
from torch_impl.seq2seq import Seq2Seq, make_model
from torch_impl.transformer import Transformer, initialised


@st.composite
def cases(draw, architectures=("decoder", "encoder")):
    config = draw(model_configs(architectures=architectures))
    B, T = draw(st.sampled_from([(1, 3), (2, 5), (3, 7), (2, 1)]))
    return {
        "params": model_params(config, draw(seeds)),
        "ids": np.random.default_rng(draw(seeds)).integers(config.vocab_size, size=(B, T)),
        "config": config,
        "key": draw(st.none() | dropout_keys()),
        "documents": draw(documents(B, T)),
    }


@given(arguments=cases(), seed=seeds)
def test_parity(agree, arguments, seed):
    agree("transformer", seed, judge_rounding=arguments["config"].activation != "relu", **arguments)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "swiglu"])
def test_parity_of_every_combination_of_options(agree, norm, norm_placement, activation):
    """Cases that are drawn may leave one out. Two layers, so that the second's dropout masks count too."""
    shape = {"vocab_size": 7, "context_length": 5, "n_layer": 2, "n_head": 2, "d_model": 8, "d_ff": 9}
    ids = np.random.default_rng(0).integers(7, size=(2, 4))
    named = {"norm": norm, "norm_placement": norm_placement, "activation": activation}
    for positions, (bias, tied) in product(
        ("none", "learned", "sinusoidal", "rope", "alibi"), ((True, True), (False, False))
    ):
        config = ModelConfig(
            **shape, **named, positions=positions, bias=bias, tied_embeddings=tied, dropout=0.3
        )
        case = {"params": model_params(config, 1), "ids": ids, "config": config, "key": DropoutKey(5, 6, 7)}
        # With documents, sequences have places of their own, and so the learned vectors' gradients.
        texts = None if tied else np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
        agree("transformer", judge_rounding=False, **case, documents=texts)


def test_sinusoids_stand_beside_scaled_embeddings():
    """Vaswani et al., 3.4: the token vectors, and not their sum with the sinusoids, times sqrt C.

    If both sides forgot it, they would still agree.
    """
    config = ModelConfig(d_model=4, n_head=1, vocab_size=3, positions="sinusoidal")
    params = model_params(config, 0)
    x, _ = embed_forward(params, np.array([[2, 0]]), np.arange(2), config)
    at_1 = [np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)]
    want = 2 * params["token_embedding.weight"][[2, 0]] + np.array([[0, 1, 0, 1], at_1])
    np.testing.assert_allclose(x[0], want, rtol=1e-14)


ALL = ("decoder", "encoder", "encoder-decoder")


@given(config=model_configs(architectures=ALL))
def test_parameters_have_one_list_of_names_and_shapes(config):
    """In the same order too: the number of a parameter decides its initial values."""
    model = (Seq2Seq if config.architecture == "encoder-decoder" else Transformer)(config)
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == list(
        parameter_shapes(config).items()
    )
    assert list(model.state_dict()) == list(parameter_shapes(config))


@given(config=model_configs(), seed=st.integers(0, 2**64 - 1))
def test_both_sides_begin_with_the_same_weights(config, seed):
    want = init_params(config, seed)
    got = initialised(config, seed).state_dict()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name].numpy(), value)


def test_initial_weights_are_those_of_gpt2():
    """N(0, 0.02), residual projections smaller by sqrt(2 L), biases 0, norms 1; nothing alike by chance."""
    config = ModelConfig(
        vocab_size=300, context_length=100, n_layer=3, n_head=2, d_model=60, tied_embeddings=False
    )
    params = init_params(config, 7, np.float64)
    for name, value in params.items():
        if name.endswith("bias"):
            assert (value == 0).all()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            ends_branch = name.endswith(("attention.proj.weight", "ffn.down.weight"))
            std = 0.02 / np.sqrt(6) if ends_branch else 0.02
            assert value.std() == pytest.approx(std, rel=6 / np.sqrt(2 * value.size))
            assert abs(value.mean()) < 6 * std / np.sqrt(value.size)
    firsts = [float(value.flat[0]) for name, value in params.items() if value.std() > 0]
    assert len(set(firsts)) == len(firsts)


@given(config=model_configs(architectures=ALL), seed=st.integers(0, 2**64 - 1))
def test_initial_weights_are_the_normal_numbers_of_their_streams(config, seed):
    """Of all 64 bits of the seed, and with the tails of a normal: the draws are those of the other side."""
    for i, (name, value) in enumerate(init_params(config, seed, np.float64).items()):
        if value.ndim == 2:
            draws = normal(Key(seed, INIT, stream=i), value.size).reshape(value.shape).numpy()
            ends_branch = name.endswith(("attention.proj.weight", "ffn.down.weight"))
            branches = (3 if name.startswith("decoder.") else 2) * config.n_layer
            std = 0.02 / np.sqrt(branches) if ends_branch else 0.02
            np.testing.assert_allclose(value, std * draws, rtol=1e-11, atol=1e-14)


@given(arguments=cases(architectures=("decoder",)), place=st.integers(0, 6))
def test_the_future_leaves_the_past_alone(arguments, place):
    ids, config = arguments["ids"], arguments["config"]
    place = min(place, ids.shape[1] - 1)
    changed = ids.copy()
    changed[:, place] = (changed[:, place] + 1) % config.vocab_size
    y, _ = transformer_forward(*arguments.values())
    other, _ = transformer_forward(*(arguments | {"ids": changed}).values())
    np.testing.assert_allclose(other[:, :place], y[:, :place], rtol=0, atol=1e-10)
    assert np.abs(other - y).max() > 1e-9


def test_a_sequence_beyond_the_context_is_refused_on_both_sides():
    config = ModelConfig(vocab_size=5, context_length=3, n_layer=1, n_head=1, d_model=4)
    message = "a sequence of 4 is longer than the context length of 3"
    with pytest.raises(ValueError, match=message):
        transformer_forward(init_params(config, 0), np.zeros((1, 4), int), config)
    with pytest.raises(ValueError, match=message):
        initialised(config, 0)(torch.zeros(1, 4, dtype=torch.long))


@given(config=model_configs(), seed=seeds)
def test_packed_texts_are_what_each_is_alone(config, seed):
    """Three texts in one sequence, padding between them: each has the logits that it has by itself."""
    params, random = model_params(config, seed), np.random.default_rng(seed)
    model = Transformer(config, torch.float64).double().requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    numbers = np.array([[4, 4, PADDING, 0, 0, 0, 9]])
    ids = random.integers(config.vocab_size, size=(1, 7))
    packed, _ = transformer_forward(params, ids, config, documents=numbers)
    fast_packed = model(torch.from_numpy(ids), documents=torch.from_numpy(numbers)).numpy()
    for number in (4, 0, 9):
        own = numbers[0] == number
        alone, _ = transformer_forward(params, ids[:, own], config)
        np.testing.assert_allclose(packed[:, own], alone, rtol=0, atol=1e-10)
        np.testing.assert_allclose(fast_packed[:, own], alone, rtol=0, atol=1e-10)


def test_a_window_reaches_back_through_the_layers():
    """Two layers of window 3: a token feels what lies up to 2 + 2 places before it, and nothing older."""
    config = ModelConfig(
        context_length=9, n_head=2, d_model=8, attention_pattern="local", window=3, positions="none"
    )
    params, ids = model_params(config, 0), np.arange(9)[None]
    changed = ids.copy()
    changed[0, 1] = 100
    y, _ = transformer_forward(params, ids, config)
    other, _ = transformer_forward(params, changed, config)
    felt = np.abs(other - y).max(axis=-1)[0] > 1e-12
    assert felt.tolist() == [False, *[True] * 5, *[False] * 3]


def test_layers_take_their_windows_in_turn():
    config = ModelConfig(n_layer=4, attention_pattern="local, local, full", window=4)
    assert [config.window_of(layer) for layer in range(4)] == [4, 4, 0, 4]  # not the same backwards


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_is_torchs_encoder(norm_placement, activation):
    """torch.nn.TransformerEncoder with our weights copied in, padding and all: blocks and last norm."""
    config = ModelConfig(
        architecture="encoder", n_layer=3, n_head=2, d_model=8, d_ff=12, positions="none", vocab_size=13,
        norm_placement=norm_placement, activation=activation, context_length=6,
    )  # fmt: skip
    params = model_params(config, 1)
    pre = norm_placement == "pre"
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, activation, batch_first=True, norm_first=pre)
    last = nn.LayerNorm(8) if pre else None
    theirs = nn.TransformerEncoder(layer, 3, last, enable_nested_tensor=False).double()
    names = {
        "self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.proj.",
        "linear1.": "ffn.up.", "linear2.": "ffn.down.", "layers.": "blocks.",
    }  # fmt: skip
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            for their_name, our_name in names.items():
                name = name.replace(their_name, our_name)
            value.copy_(torch.from_numpy(params[name]))
    ids = np.random.default_rng(0).integers(13, size=(2, 6))
    documents = np.where(np.arange(6) < np.array([[6], [4]]), 0, PADDING)
    x = torch.from_numpy(params["token_embedding.weight"][ids])
    y = theirs(x, src_key_padding_mask=torch.from_numpy(documents == PADDING))
    want = (y.detach().numpy() @ params["token_embedding.weight"].T)[documents != PADDING]
    got, _ = transformer_forward(params, ids, config, documents=documents)
    np.testing.assert_allclose(got[documents != PADDING], want, rtol=0, atol=1e-12)


@given(arguments=cases())
def test_weights_that_are_cast_once_give_the_logits_of_weights_that_are_cast_each_time(arguments):
    model = Transformer(arguments["config"], torch.bfloat16).requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in arguments["params"].items()})
    ids = torch.from_numpy(arguments["ids"])
    want = model(ids)
    model.settle_precision()
    assert torch.equal(model(ids), want) and want.dtype == torch.bfloat16
    stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    cast = {name for name, dtype in stored.items() if dtype == torch.bfloat16}
    assert cast == {name for name in stored if "embedding" not in name} and cast


def test_of_the_last_place_alone_the_logits_are_the_same():
    """What generation asks for."""
    model = initialised(ModelConfig(vocab_size=7, context_length=5, n_layer=1, n_head=1, d_model=4), 0)
    ids = torch.arange(10).reshape(2, 5) % 7
    with torch.no_grad():
        whole, last = model(ids), model(ids, last_only=True)
    assert last.shape == (2, 1, 7)
    torch.testing.assert_close(last, whole[:, -1:])


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
def test_a_sequence_may_be_as_long_as_the_context_and_no_longer(architecture):
    model = make_model(
        ModelConfig(architecture, vocab_size=7, context_length=5, n_layer=1, n_head=1, d_model=4)
    )
    for length in (5, 6):
        ids = torch.ones(1, length, dtype=torch.long)
        inputs = (ids, ids.bool(), ids[:, :3]) if architecture == "encoder-decoder" else (ids,)
        with nullcontext() if length == 5 else pytest.raises(ValueError, match=r"of 6 is longer than .* 5"):
            model(*inputs)
