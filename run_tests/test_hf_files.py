"""Folders in Hugging Face's layout: what is not here, does not fit or is hostile is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ref_numpy.config import ModelConfig
from torch_impl.interop import from_hf, to_hf
from torch_impl.training.files import InputError
from torch_impl.training.tokenizer import ByteTokenizer, WordTokenizer
from torch_impl.transformer import Transformer, initialised

SHAPE = {"vocab_size": 19, "context_length": 8, "n_layer": 2}
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
MODELS = {
    "gpt2": ModelConfig(**SHAPE, n_head=3, d_model=12),
    "llama": ModelConfig(**SHAPE, **LLAMA, n_head=4, d_model=24),
}
INDEX = "model.safetensors.index.json"


def written(kind: str) -> Path:
    to_hf(initialised(MODELS[kind], 0), "hf")
    return Path("hf")


def sharded() -> Path:
    """The weights in three files, and the index that says what is where."""
    folder = written("gpt2")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, folder / file)
        places |= dict.fromkeys(names[number::3], file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return folder


def change(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | settings), encoding="utf-8")


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false, but must be true"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true"),
        (
            "gpt2",
            {"activation_function": "mish"},
            'activation_function is "mish", but must be one of gelu_new',
        ),
        ("gpt2", {"model_type": "bloom"}, "model_type is 'bloom', but must be one of gpt2, llama"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config: quantised weights are not read"),
        ("gpt2", {"n_head": 5}, "d_model 12 does not divide into n_head 5 heads"),
        ("gpt2", {"n_embd": "wide"}, 'n_embd is "wide", but must be of type int'),
        ("gpt2", {"n_layer": 10**9}, "has 1000000000 layers, but there are 28 tensors"),
        ("gpt2", {"n_layer": 1}, "tensor h.1.attn.c_attn.bias and 11 more: unknown"),
        ("gpt2", {"n_layer": 3}, "tensor h.2.attn.c_attn.bias and 11 more: missing"),
        ("gpt2", {"n_positions": 9}, r"wpe.weight is F32 \[8, 12\], but must be \[9, 12\]"),
        ("gpt2", {"tie_word_embeddings": False}, "tensor lm_head.weight: missing"),
        (
            "llama",
            {"attention_bias": True},
            "attention_bias is True and mlp_bias False, but a model here has both",
        ),
        ("gpt2", {"n_inner": 12.5}, "n_inner is 12.5, but must be of type int"),
        ("gpt2", {"tie_word_embeddings": None}, "tie_word_embeddings is null, but must be of type bool"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu", but must be "silu"'),
        ("llama", {"head_dim": 8}, "head_dim is 8, but must be 6"),
        ("llama", {"num_key_value_heads": 3}, "n_head 4 does not divide into n_kv_head 3 groups"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn"}},
            'rope_type is "yarn", but must be default or linear',
        ),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5, but must",
        ),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, 'rope_type is "dynamic"'),
        ("llama", {"rope_parameters": 3}, "rope_parameters is 3, but must be an object"),
    ],
)
def test_what_is_not_here_is_named(case, settings, message):
    folder = written(case)
    change(folder, **settings)
    with pytest.raises(InputError, match=message) as error:
        from_hf(folder)
    assert "\n" not in str(error.value)


def test_rope_settings_as_they_were_before_transformers_5():
    folder = written("llama")
    for name in ("type", "rope_type"):
        change(folder, rope_parameters=None, rope_theta=500, rope_scaling={name: "linear", "factor": 2})
        assert (from_hf(folder).config.rope_base, from_hf(folder).config.rope_scale) == (500, 2)


def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("transformer."): value for name, value in tensors.items()}


def test_names_of_older_files():
    """Without the model's prefix, with masks beside the weights, or with a tied head written out."""
    folder = written("gpt2")
    path = folder / "model.safetensors"
    tensors, want = bare(load_file(path)), from_hf(folder).state_dict()
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"].clone()}, path)
    for name, value in from_hf(folder).state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0)
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"] + 1}, path)
    with pytest.raises(
        InputError, match=r"tie_word_embeddings is true, but lm_head\.weight is not the token"
    ):
        from_hf(folder)
    save_file(tensors | {"transformer.wte.weight": tensors["wte.weight"].clone()}, path)
    with pytest.raises(InputError, match=r"wte\.weight is there twice"):
        from_hf(folder)
    save_file(tensors | {"h.0.attn.rotary": torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"tensor h\.0.attn.rotary: unknown"):
        from_hf(folder)
    save_file(tensors | {"wpe.weight": torch.ones(8, 12, dtype=torch.int64)}, path)
    with pytest.raises(InputError, match=r"wpe\.weight is I64"):
        from_hf(folder)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "C:x.safetensors", "x.bin", 3, ".."],
)
def test_an_index_cannot_lead_out_of_its_folder(name):
    folder = sharded()
    path = folder / INDEX
    listed = json.loads(path.read_bytes())
    listed["weight_map"]["transformer.wte.weight"] = name
    path.write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(
        InputError, match=r"transformer\.wte\.weight lies in .* no \.safetensors file of this folder"
    ):
        from_hf(folder)


def test_an_index_that_does_not_fit():
    folder = sharded()
    path = folder / INDEX
    listed = json.loads(path.read_bytes())
    moved = listed["weight_map"].pop("transformer.wte.weight")
    path.write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(InputError, match=f"does not fit {moved}: tensor transformer.wte.weight"):
        from_hf(folder)
    (folder / moved).unlink()
    with pytest.raises(InputError, match=f"is incomplete: no {moved}"):
        from_hf(folder)
    for content in (b"{", b"[]", b"{}", b'{"weight_map": 1}', b"[" * 100000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"index\.json is damaged"):
            from_hf(folder)
    path.unlink()
    with pytest.raises(
        InputError, match=r"incomplete: no model\.safetensors and no model\.safetensors\.index"
    ):
        from_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="could execute: save them as safetensors"):
        from_hf(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"[" * 100000, None])
def test_a_config_that_is_none(content):
    folder = written("gpt2")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        from_hf(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "sinusoidal"}, "positions are sinusoidal, but .* --positions learned"),
        ({"norm": "rmsnorm"}, "norm is rmsnorm, but Hugging Face's gpt2 layout"),
        ({"norm_placement": "post"}, "norm_placement is post, but"),
        ({"activation": "swiglu"}, "activation is swiglu, but"),
        ({"architecture": "encoder"}, "architecture is encoder, but"),
        ({"n_kv_head": 2}, "n_kv_head is 2, but"),
        ({"attention_pattern": "local", "window": 3}, "attention_pattern is local, window is 3, but"),
        ({"qk_norm": True}, "qk_norm is True, but .*; train one with --no-qk-norm$"),
        (
            {"positions": "rope"},
            "norm is layernorm, activation is gelu_tanh, but Hugging Face's llama layout, which goes with "
            "rope positions, has no such model; train one with --norm rmsnorm --activation swiglu$",
        ),
        (
            {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "rope_layout": "interleaved"},
            "rope_layout is interleaved, but",
        ),
    ],
)
def test_a_model_that_no_layout_can_express_is_not_written(options, message, tmp_path):
    model = Transformer(ModelConfig(vocab_size=19, context_length=8, d_model=16, **options))
    with pytest.raises(InputError, match=message):
        to_hf(model, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    model = initialised(ModelConfig(context_length=8, d_model=16), 0)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        with pytest.raises(InputError, match=f"{name} exists, and is not overwritten"):
            to_hf(model, tmp_path / name)
    with pytest.raises(InputError, match="the tokenizer has 4 tokens, but the model 256"):
        to_hf(model, tmp_path / "hf", WordTokenizer.train(["a few words"], 12))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ByteTokenizer, "save", full)
    with pytest.raises(OSError, match="No space left"):
        to_hf(model, tmp_path / "hf", ByteTokenizer())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
    monkeypatch.undo()
    (tmp_path / "hf.being-replaced").mkdir()  # what looks like another writer's leftovers may be the user's
    to_hf(model, str(tmp_path / "hf"), ByteTokenizer())
    shutil.rmtree(tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf.being-replaced", "link", "there"]
