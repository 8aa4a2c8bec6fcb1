"""The encoder-decoder: parity, agreement with torch's own, and who sees whom."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parity_tests.strategies import dropout_keys, model_configs, model_params, seeds
from ref_numpy.config import ModelConfig
from ref_numpy.seq2seq import seq2seq_forward
from torch_impl.seq2seq import Seq2Seq, make_model
from torch_impl.transformer import Transformer


@st.composite
def cases(draw):
    config = draw(model_configs(architectures=("encoder-decoder",)))
    B, S, T = draw(st.sampled_from([(1, 4, 3), (2, 3, 5), (3, 7, 2), (2, 1, 1)]))
    random = np.random.default_rng(draw(seeds))
    return {
        "params": model_params(config, draw(seeds)),
        "source": random.integers(config.vocab_size, size=(B, S)),
        "present": np.arange(S) < random.integers(1, S + 1, size=(B, 1)),
        "target": random.integers(config.vocab_size, size=(B, T)),
        "config": config,
        "key": draw(st.none() | dropout_keys()),
    }


@settings(max_examples=settings().max_examples // 3)  # a model of three layers on each side takes its time
@given(arguments=cases(), seed=seeds)
def test_parity(agree, arguments, seed):
    agree("seq2seq", seed, judge_rounding=arguments["config"].activation != "relu", **arguments)


@given(arguments=cases(), place=st.integers(0, 6))
def test_a_target_feels_the_whole_source_and_its_own_past(arguments, place):
    source, present, target = (arguments[name] for name in ("source", "present", "target"))
    vocab_size = arguments["config"].vocab_size
    y, _ = seq2seq_forward(*arguments.values())

    def changed(name, where):
        ids = np.where(where, (arguments[name] + 1) % vocab_size, arguments[name])
        return np.abs(seq2seq_forward(*(arguments | {name: ids}).values())[0] - y).max(axis=-1)

    place = min(place, target.shape[1] - 1)
    assert changed("target", np.arange(target.shape[1]) == place)[:, :place].max(initial=0) <= 1e-10
    assert changed("source", ~present).max() <= 1e-10, "padding has no say"
    assert (changed("source", np.arange(source.shape[1]) == 0).max(axis=1) > 1e-12).all()


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_it_is_torchs_transformer(norm_placement, activation):
    """torch.nn.Transformer with our weights copied in: logits, and the gradients of every weight."""
    config = ModelConfig(
        architecture="encoder-decoder", n_layer=2, n_head=2, d_model=8, d_ff=12, vocab_size=13,
        positions="none", norm_placement=norm_placement, activation=activation, context_length=6,
    )  # fmt: skip
    params = model_params(config, 1)
    ours = Seq2Seq(config, torch.float64).double()
    ours.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    theirs = nn.Transformer(
        8, 2, 2, 2, 12, 0.0, activation, batch_first=True, norm_first=norm_placement == "pre",
    ).double()  # fmt: skip
    if norm_placement == "post":  # their post-norm stacks end with one norm more
        theirs.encoder.norm = theirs.decoder.norm = None
    names = {
        "self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.proj.",
        "multihead_attn.out_proj.": "cross_attention.proj.", "linear1.": "ffn.up.", "linear2.": "ffn.down.",
        "layers.": "blocks.",
    }  # fmt: skip

    def our_name(name):
        for their, our in names.items():
            name = name.replace(their, our)
        return name

    def ours_of(name, source):
        """Their cross-attention has q, k and v in one."""
        if "multihead_attn.in_proj_" not in name:
            return source[our_name(name)]
        name = our_name(name).replace("multihead_attn.in_proj_", "cross_attention.{}.")
        return torch.cat([source[name.format("q")], source[name.format("kv")]])

    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.copy_(ours_of(name, weights))
    random = np.random.default_rng(0)
    source, target = (torch.from_numpy(random.integers(13, size=(2, T))) for T in (6, 5))
    present = torch.arange(6) < torch.tensor([[6], [4]])
    table = weights["token_embedding.weight"].detach()
    y = theirs(
        table[source], table[target], tgt_mask=torch.ones(5, 5, dtype=torch.bool).triu(1),
        src_key_padding_mask=~present, memory_key_padding_mask=~present,
    )  # fmt: skip
    want, got = y @ table.T, ours(source, present, target)
    np.testing.assert_allclose(got.detach(), want.detach(), rtol=0, atol=1e-12)
    by_hand, _ = seq2seq_forward(params, source.numpy(), present.numpy(), target.numpy(), config)
    np.testing.assert_allclose(by_hand, want.detach(), rtol=0, atol=1e-12)
    cotangent = torch.from_numpy(random.standard_normal(want.shape))
    want.backward(cotangent)
    got.backward(cotangent)
    gradients = {name: value.grad for name, value in weights.items()}
    for name, value in theirs.named_parameters():
        np.testing.assert_allclose(ours_of(name, gradients), value.grad, rtol=0, atol=1e-11, err_msg=name)


def test_sequences_beyond_the_context_are_refused():
    config = ModelConfig(architecture="encoder-decoder", vocab_size=5, context_length=3, n_head=1, d_model=4)
    params, short, long = model_params(config, 0), np.zeros((1, 2), int), np.zeros((1, 4), int)
    for source, target, name in ((long, short, "source"), (short, long, "target")):
        with pytest.raises(ValueError, match=f"a {name} of 4 is longer than the context length of 3"):
            seq2seq_forward(params, source, np.ones(source.shape, bool), target, config)


def test_a_model_is_made_of_the_kind_that_its_config_names():
    kinds = {"decoder": Transformer, "encoder": Transformer, "encoder-decoder": Seq2Seq}
    for architecture, kind in kinds.items():
        assert type(make_model(ModelConfig(architecture, n_head=1, d_model=4))) is kind
