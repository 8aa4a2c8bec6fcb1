"""Agreement with transformers: the same function, the same gradients, the same ten steps of training.

Models are made and written by transformers, with every weight random (at their initial 0 and 1 a forgotten
bias or norm would not be missed), read here, and compared on both sides. A Llama in float64 is rounded to
float32 on its way through transformers (norms, rotation); what it computes without is asked of it by giving
its modules another float32.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig
from transformers import modeling_rope_utils as rope
from transformers.models.llama import modeling_llama as llama

from parity_tests import tolerances
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.conversation import Message, to_record
from ref_numpy.loss import IGNORE
from ref_numpy.optim import zero_moments
from ref_numpy.train import loss_and_gradients
from ref_numpy.train import train_step as ref_train_step
from ref_numpy.transformer import transformer_forward
from torch_impl.bpe import BPETokenizer, train
from torch_impl.interop import from_hf, to_hf
from torch_impl.loss import cross_entropy
from torch_impl.train import start, train_step
from torch_impl.training.dialogue import Dialogue
from torch_impl.training.files import InputError
from torch_impl.training.growth import with_chat_tokens
from torch_impl.training.hf_tensors import from_hf_tensors
from torch_impl.training.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
)
from torch_impl.transformer import Transformer, initialised

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

GPT2 = {"vocab_size": 19, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 3}
LLAMA = {
    "vocab_size": 19,
    "max_position_embeddings": 8,
    "hidden_size": 24,
    "intermediate_size": 13,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CASES = {
    "gpt2": GPT2Config(**GPT2, **NO_DROPOUT),
    "gpt2, another width, exact gelu, untied": GPT2Config(
        **GPT2, **NO_DROPOUT, n_inner=17, activation_function="gelu", tie_word_embeddings=False
    ),
    "gpt2, silu, another epsilon": GPT2Config(
        **GPT2, **NO_DROPOUT, activation_function="silu", layer_norm_epsilon=1e-2
    ),
    "llama": LlamaConfig(**LLAMA),
    "llama, grouped queries, tied": LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True),
    "llama, one key head, biases, linear scaling": LlamaConfig(
        **LLAMA,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0},
    ),
}


class _Double:
    """torch, as a module of transformers sees it, where float32 means float64."""

    def __getattr__(self, name: str) -> object:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


def written(folder: Path, config: transformers.PretrainedConfig, **options) -> Path:
    """A folder with a model of random weights, of a scale that keeps activations near 1, as transformers
    saves it."""
    config.bos_token_id = config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        values = torch.randn(param.shape, generator=generator)
        is_norm = param.ndim == 1 and name.endswith("weight")
        param.data = 1 + 0.3 * values if is_norm else values * (0.5 if param.ndim == 1 else 0.3)
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(params=CASES)
def folder(request, tmp_path):
    return written(tmp_path / "hf", CASES[request.param])


@pytest.fixture
def in_double(monkeypatch):
    for module in (llama, rope):
        monkeypatch.setattr(module, "torch", _Double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def loaded(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def some_ids(config: ModelConfig, shape: tuple[int, ...] = (3, 7)) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def next_ids(ids: torch.Tensor) -> torch.Tensor:
    """Targets: what follows; nothing counts after the last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)


def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("transformer.").removeprefix("model."): value for name, value in tensors.items()
    }


def result(logits: torch.Tensor, loss: torch.Tensor, gradients: dict[str, torch.Tensor]) -> dict:
    named = {"logits": logits, "loss": loss} | {f"gradient of {k}": v for k, v in gradients.items()}
    return {name: value.detach().double().numpy() for name, value in named.items()}


def theirs(model: transformers.PreTrainedModel, config: ModelConfig, ids: torch.Tensor) -> dict:
    """Logits, loss and gradients under our names. (Their own loss rounds the logits to float32.)"""
    logits = model(ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    named = dict(model.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    return result(logits, loss, from_hf_tensors(bare(gradients), config))


def ours(model: Transformer, ids: torch.Tensor) -> dict:
    logits = model(ids)
    loss = cross_entropy(logits, next_ids(ids))
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    return result(logits, loss, dict(zip(named, gradients, strict=True)))


def reference(model: Transformer, ids: torch.Tensor) -> dict:
    """The model's weights in the NumPy half."""
    params = {name: value.numpy() for name, value in model.state_dict().items()}
    batch, targets = ids.numpy()[None], next_ids(ids).numpy()[None]
    loss, gradients = loss_and_gradients(params, (batch, targets), 0, model.config, TrainConfig())
    logits, _ = transformer_forward(params, batch[0], model.config)
    as_tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in gradients.items()}
    return result(torch.from_numpy(logits), torch.tensor(loss, dtype=torch.float64), as_tensors)


def test_logits_loss_and_every_gradient_agree(folder, in_double):
    model = from_hf(folder, torch.float64)
    ids = some_ids(model.config)
    want = theirs(loaded(folder, torch.float64), model.config, ids)
    for got in (ours(model, ids), reference(model, ids)):
        assert set(got) == set(want) and len(want) == 2 + len(model.state_dict())
        for name, value in want.items():
            np.testing.assert_allclose(
                got[name], value, rtol=0, atol=1e-9 * np.abs(value).max(), err_msg=name
            )


def test_both_sides_round_as_well_as_transformers(folder, monkeypatch):
    """Question 2 of tolerances.py, with transformers in float32 as the plain implementation, and its float64
    as the oracle: on the case and two neighbours, whose weights moved by a rounding or two."""
    model = from_hf(folder)
    ids, precision = some_ids(model.config), tolerances.PRECISIONS["float32"]

    def exact(source: transformers.PreTrainedModel) -> dict:
        with monkeypatch.context() as patch:
            for module in (llama, rope):
                patch.setattr(module, "torch", _Double())
            double = loaded(folder, torch.float64)
            double.load_state_dict({name: value.double() for name, value in source.state_dict().items()})
            return theirs(double, model.config, ids)

    plain = loaded(folder, torch.float32)
    want = exact(plain)
    uncertainty = dict.fromkeys(want, 0.0)
    generator = torch.Generator().manual_seed(2)
    for size in (0.0, 2 * precision.u, 2 * precision.u):
        moved = loaded(folder, torch.float32)
        for param in moved.parameters():
            param.data *= 1 + size * (2.0 * torch.randint(2, param.shape, generator=generator) - 1)
        here, rounded = exact(moved), theirs(moved, model.config, ids)
        for name in want:
            error, change = np.abs(rounded[name] - here[name]).max(), np.abs(here[name] - want[name]).max()
            uncertainty[name] = max(uncertainty[name], error + change)

    inputs = [value.abs().max().item() for value in model.state_dict().values()]
    scale = max(*inputs, *(np.abs(value).max() for value in want.values()))
    for got in (ours(model, ids), reference(model, ids)):
        for name, value in want.items():
            bound = tolerances.rounding(
                value, uncertainty[name], scale, precision, is_gradient=name.startswith("gradient")
            )
            assert np.abs(got[name] - value).max() <= bound, name


def test_what_is_written_is_what_was_read(folder, tmp_path):
    """Tensor by tensor, name by name; and transformers computes the same with it."""
    to_hf(from_hf(folder), tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert set(before) == set(after)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    one, two = loaded(folder, torch.float32), loaded(tmp_path / "back", torch.float32)
    assert type(one) is type(two)
    ids = some_ids(from_hf(folder).config)
    torch.testing.assert_close(two(ids).logits, one(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["gpt2", "llama, grouped queries, tied"])
def test_a_sharded_model_is_the_model(case, tmp_path):
    whole, parts = (written(tmp_path / name, CASES[case], **options) for name, options in SHARDING.items())
    assert len(list(parts.glob("*.safetensors"))) > 3
    want = from_hf(whole).state_dict()
    for name, value in from_hf(parts).state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0)


SHARDING = {"whole": {}, "parts": {"max_shard_size": "2KB"}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_exactly(dtype, tmp_path):
    folder = written(tmp_path / "hf", CASES["llama"])
    path = folder / "model.safetensors"
    rounded = {name: value.to(dtype) for name, value in load_file(path).items()}
    save_file(rounded, path, metadata={"format": "pt"})
    assert {value.dtype for value in from_hf(folder).state_dict().values()} == {torch.float32}
    to_hf(from_hf(folder, torch.float64), tmp_path / "back")
    for name, value in load_file(tmp_path / "back/model.safetensors").items():
        torch.testing.assert_close(value, rounded[name].double(), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["gpt2", "llama, grouped queries, tied"])
def test_ten_steps_here_are_ten_steps_there(case, tmp_path, in_double):
    """One checkpoint, AdamW with decay on matrices alone: trained there, here and in NumPy."""
    folder = written(tmp_path / "hf", CASES[case])
    training = TrainConfig(
        steps=10, batch_size=4, learning_rate=1e-2, schedule="constant", warmup_steps=0, clip=0.0
    )
    model = from_hf(folder, torch.float64)
    batches = some_ids(model.config, (10, 4, 8))

    other = loaded(folder, torch.float64)
    decayed = [param for param in other.parameters() if param.ndim > 1]
    others = [param for param in other.parameters() if param.ndim < 2]
    settings = {
        "lr": training.learning_rate,
        "betas": (training.beta1, training.beta2),
        "eps": training.epsilon,
    }
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **settings)
    state = start(model, training)
    params = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    moments = zero_moments(params)
    for step, batch in enumerate(batches):
        loss = F.cross_entropy(other(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        inputs, targets = batch[None], next_ids(batch)[None]
        metrics = train_step(state, (inputs, targets), torch.tensor(step), training)
        params, moments, reference_metrics = ref_train_step(
            params, moments, (inputs.numpy(), targets.numpy()), step, model.config, training
        )
        assert metrics.loss.item() == pytest.approx(loss.item(), rel=1e-9)
        assert reference_metrics.loss == pytest.approx(loss.item(), rel=1e-9)

    to_hf(model, tmp_path / "trained")
    start_of = bare(load_file(folder / "model.safetensors"))
    trained = bare(load_file(tmp_path / "trained/model.safetensors"))
    want = bare(dict(other.named_parameters()))
    for name, value in trained.items():
        assert (value - start_of[name]).abs().max() > 1e-3
        torch.testing.assert_close(value, want[name].detach(), rtol=0, atol=1e-8)
    for name, value in from_hf_tensors(trained, model.config).items():
        np.testing.assert_allclose(params[name], value.numpy(), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False, "activation": "relu", "dropout": 0.1},
        {"tied_embeddings": False, "d_ff": 20},
        {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2},
        {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "rope_scale": 4.0},
    ],
)
def test_a_model_from_here_is_the_same_there(options, tmp_path):
    """Also without biases, which GPT-2 always has: there they are 0."""
    model = initialised(ModelConfig(**{"vocab_size": 19, "context_length": 8, "d_model": 16} | options), 0)
    to_hf(model, tmp_path / "hf")
    ids = some_ids(model.config)
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert there.dtype == torch.float32
    torch.testing.assert_close(there(ids).logits, model(ids), rtol=1e-5, atol=1e-6)


TEXT = "The quick brown fox — so they say — jumps over 1234 lazy dogs\n\n  don't café\t北京 "


def tokenizers() -> list[Tokenizer]:
    return [
        ByteTokenizer(),
        CharacterTokenizer.train([TEXT]),
        WordTokenizer.train([TEXT], 12),
        BPETokenizer(train([TEXT * 3], 280)),
        BPETokenizer(train([TEXT * 3], 280, ["<|endoftext|>"])),
    ]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda tokenizer: type(tokenizer).__name__)
def test_the_tokenizer_goes_along(tokenizer, tmp_path):
    """AutoTokenizer gives the same ids, and what it saves is read here."""
    model = initialised(ModelConfig(vocab_size=tokenizer.vocab_size, context_length=8, n_layer=1), 0)
    to_hf(model, tmp_path / "hf", tokenizer)
    there = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert there(TEXT).input_ids == tokenizer.encode(TEXT).tolist()
    assert len(there) == tokenizer.vocab_size and there.model_max_length == 8
    spaced = "Why not ? I 'm here , and you are n't ."
    assert there.decode(there(spaced).input_ids) == tokenizer.decode(tokenizer.encode(spaced).tolist())
    end = getattr(tokenizer, "special_tokens", {}).get("<|endoftext|>")
    assert there.eos_token_id == end
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.eos_token_id == end
    there.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved/tokenizer.json")
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    for size in (tokenizer.vocab_size - 1, tokenizer.vocab_size + 1):
        other = initialised(ModelConfig(vocab_size=size, context_length=8, n_layer=1), 0)
        with pytest.raises(InputError, match="they do not belong together"):
            to_hf(other, tmp_path / "other", tokenizer)


def test_a_chat_model_goes_along_with_its_turns(tmp_path):
    """Its template makes the prompt that torch_impl.chat does, and the end of a turn ends what it writes."""
    tokenizer = with_chat_tokens(BPETokenizer(train([TEXT * 3], 280, ["<|endoftext|>"])))
    model = initialised(ModelConfig(vocab_size=tokenizer.vocab_size, context_length=128, n_layer=1), 0)
    to_hf(model, tmp_path / "hf", tokenizer)
    there = AutoTokenizer.from_pretrained(tmp_path / "hf")
    turns = [
        Message("system", "Be kind."),
        Message("user", TEXT),
        Message("assistant", " A\n"),
        Message("user", "?"),
    ]
    messages = to_record(turns)["messages"]
    prompt = there.apply_chat_template(messages, add_generation_prompt=True)
    ids = prompt if isinstance(prompt, list) else prompt["input_ids"]
    assert ids == Dialogue(model, tokenizer).prompt(turns, 1)[0]
    end = tokenizer.special_tokens["<end_of_turn>"]
    assert there.eos_token_id == end
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.eos_token_id == end
