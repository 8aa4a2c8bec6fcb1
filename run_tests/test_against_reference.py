"""--detect-anomaly: a component that departs from the reference, on the way forward or back, is named; a
sound one is not."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_impl.transformer
from parity_tests.strategies import model_configs
from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.transformer import embed_forward
from torch_impl.block import Block
from torch_impl.cross_attention import CrossAttention
from torch_impl.layernorm import LayerNorm
from torch_impl.linear import Linear, linear
from torch_impl.multi_head_attention import MultiHeadAttention
from torch_impl.seq2seq import make_model
from torch_impl.training import references
from torch_impl.training.against_reference import Comparison
from torch_impl.training.recompute import recompute_blocks
from torch_impl.transformer import Embedded

SCALE = 2.0**16
CONFIG = ModelConfig(vocab_size=31, context_length=8, n_layer=2, n_head=2, d_model=8, dropout=0.1)


def departures_of(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    documents: bool = False,
    micro_batches: int = 2,
    change: Callable[[Embedded], None] = lambda model: None,
) -> list[str]:
    model = make_model(config, dtype)
    model.initialise(0)
    change(model)
    generator = torch.Generator().manual_seed(1)
    comparison = Comparison(model)
    with comparison.watching():
        for m in range(micro_batches):
            ids = torch.randint(config.text_tokens, (3, config.context_length), generator=generator)
            present = torch.arange(config.context_length) < torch.tensor([[99], [3], [2]])
            inputs = (ids, present, ids) if config.architecture == "encoder-decoder" else (ids,)
            if documents:
                inputs = (*inputs, torch.arange(config.context_length).expand(3, -1) // 3)
            key = DropoutKey(1, torch.tensor(2), torch.tensor(4 + 3 * m))
            loss = model.loss((*inputs, ids.roll(1, 1)), key, 0.1, torch.tensor(2 * ids.numel()))
            (SCALE * loss).backward()
    return [*comparison.broken, *comparison.departures][:1]


@settings(max_examples=25, deadline=None)
@given(
    config=model_configs(architectures=("decoder", "encoder", "encoder-decoder")),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_component_of_a_sound_model_departs(config, dtype):
    assert departures_of(replace(config, n_layer=1), dtype, micro_batches=1) == []


def test_texts_that_do_not_see_each_other_are_compared_as_such():
    assert departures_of(CONFIG, documents=True) == []


@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_that_are_computed_again_are_compared_once(frozen):
    def change(model: Embedded) -> None:
        recompute_blocks(model)
        model.token_embedding.weight.requires_grad_(not frozen)

    assert departures_of(CONFIG, change=change) == []


@pytest.mark.parametrize("error", [1e-3, float("nan")])
@pytest.mark.parametrize(
    ("architecture", "kind", "name"),
    [
        ("decoder", MultiHeadAttention, "blocks.0.attention"),
        ("encoder-decoder", CrossAttention, "decoder.blocks.0.cross_attention"),
    ],
)
def test_the_smallest_component_that_departs_is_named(monkeypatch, error, architecture, kind, name):
    """Attention is off; its linear layers are right, and its block is off with it."""
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *a: forward(self, *a) * (1 + error))
    (found,) = departures_of(replace(CONFIG, architecture=architecture))
    assert found.startswith(f"{name} (")


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_gradient_that_departs_is_named_where_it_first_comes_back(monkeypatch, error):
    """The second block's is the first of its kind on the way back. Its projections pass on what they got."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return dx * (1 + error)

    forward = MultiHeadAttention.forward
    monkeypatch.setattr(MultiHeadAttention, "forward", lambda self, x, *a: forward(self, Off.apply(x), *a))
    (found,) = departures_of(CONFIG)
    assert found.startswith("blocks.1.attention, in the gradient of its input (")


@pytest.mark.parametrize("module", [Linear, LayerNorm])
def test_the_gradient_of_a_weight_that_departs_is_named(monkeypatch, module):
    """It was counted in one of the two micro-batches alone."""
    calls = []
    forward = module.forward

    def forgetful(self, x):
        calls.append(self)
        weight = self.weight
        if calls.count(self) == 2:
            del self.weight
            self.weight = torch.nn.Parameter(weight.detach())
        y = forward(self, x)
        self.weight = weight
        return y

    monkeypatch.setattr(module, "forward", forgetful)
    (found,) = departures_of(CONFIG)
    name = "blocks.0.attention.qkv" if module is Linear else "blocks.0.norm1"
    assert found.startswith(f"the gradient of {name}.weight (off by ")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_a_loss_that_departs_is_named(monkeypatch, tied, architecture):
    config = ModelConfig(
        architecture=architecture, vocab_size=31, context_length=8, n_head=2, d_model=8, tied_embeddings=tied
    )

    def change(model: Embedded, off: float) -> None:
        loss = model.loss
        model.loss = lambda *arguments: loss(*arguments) + off

    assert departures_of(config, change=partial(change, off=0.0)) == []
    (found,) = departures_of(config, change=partial(change, off=0.1))
    assert found.startswith("the loss (off by ")


def test_what_is_done_to_the_embedding_is_compared():
    def change(model: Embedded) -> None:
        embed = model.embed
        model.embed = lambda *arguments: 2 * embed(*arguments)

    (found,) = departures_of(CONFIG, change=change)
    assert found.startswith("the embedding (off by ")


def test_a_weight_without_a_gradient_is_named(monkeypatch):
    monkeypatch.setattr(Linear, "forward", lambda self, x: linear(x, self.weight.detach(), self.bias))
    (found,) = departures_of(CONFIG)
    assert found.startswith("the gradient of blocks.0.attention.qkv.weight (off by 1.0e+00 ")


def test_numbers_that_are_too_large_are_no_fault_of_the_component(monkeypatch):
    """A sound norm was accused: the square of its input overflows float32, in the reference as well."""
    monkeypatch.setattr(torch_impl.transformer, "dropout", lambda x, *a: x * 1e25)
    monkeypatch.setattr(references, "embed_forward", lambda *a: scaled(embed_forward(*a)))
    (found,) = departures_of(CONFIG)
    told = "its numbers are too large for float32 on the way, where the reference's are lost too"
    assert found == f"blocks.0.norm1 ({told})"


def scaled(computed: tuple) -> tuple:
    return computed[0] * 1e25, computed[1]


def test_a_gradient_that_breaks_between_components_is_told(monkeypatch):
    """It was found that all components do what the reference does."""
    forward = Block.forward

    def broken(self, *inputs):
        y = forward(self, *inputs) * 1.0
        y.register_hook(lambda gradient: gradient / 0.0)
        return y * 1.0

    monkeypatch.setattr(Block, "forward", broken)
    (found,) = departures_of(CONFIG)
    assert found == "blocks.1, in the gradient of its input (the reference's numbers are finite here)"


def test_what_is_lost_within_a_component_is_told_of_the_component(monkeypatch):
    """Scores overflow. The output projection gets what is not finite, and ends before its attention."""

    def change(model: Embedded) -> None:
        for name, parameter in model.named_parameters():
            if "qkv" in name:
                parameter.data.mul_(1e22)

    (found,) = departures_of(CONFIG, change=change)
    assert found.startswith("blocks.0.attention (")
