"""--detect-anomaly: a component that departs from the reference is named, and a sound one is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.strategies import model_configs
from ref_numpy.config import ModelConfig
from ref_numpy.dropout import DropoutKey
from torch_impl.multi_head_attention import MultiHeadAttention
from torch_impl.seq2seq import make_model
from torch_impl.training.against_reference import compared


def departures_of(
    config: ModelConfig, dtype: torch.dtype = torch.float32, documents: bool = False
) -> list[str]:
    model = make_model(config, dtype)
    model.initialise(0)
    ids = torch.randint(
        config.text_tokens, (3, config.context_length), generator=torch.Generator().manual_seed(1)
    )
    inputs = (ids, ids > 0, ids) if config.architecture == "encoder-decoder" else (ids,)
    if documents:
        inputs = (*inputs, torch.arange(config.context_length).expand(3, -1) // 3)
    found: list[str] = []
    with compared(model, found), torch.no_grad():
        model(*inputs, key=DropoutKey(1, torch.tensor(2), torch.tensor(4)))
    return found


@settings(max_examples=25, deadline=None)
@given(
    config=model_configs(architectures=("decoder", "encoder", "encoder-decoder")),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_component_of_a_sound_model_departs(config, dtype):
    assert departures_of(config, dtype) == []


def test_texts_that_do_not_see_each_other_are_compared_as_such():
    config = ModelConfig(vocab_size=31, context_length=8, n_layer=2, n_head=2, d_model=8)
    assert departures_of(config, documents=True) == []


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_the_smallest_component_that_departs_is_named_first(monkeypatch, error):
    """Attention is off; its linear layers are right, and its block is off with it."""
    forward = MultiHeadAttention.forward
    monkeypatch.setattr(MultiHeadAttention, "forward", lambda self, *a: forward(self, *a) * (1 + error))
    config = ModelConfig(vocab_size=31, context_length=8, n_layer=2, n_head=2, d_model=8, dropout=0.1)
    found = [name.split(" ")[0] for name in departures_of(config)]
    assert (
        found == ["blocks.0.attention", "blocks.0", "blocks.1.attention", "blocks.1"][: 4 if error < 1 else 2]
    )
