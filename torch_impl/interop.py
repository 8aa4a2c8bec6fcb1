"""Models from and to Hugging Face's layouts of GPT-2 and Llama: transformers loads what was trained here.

    python -m torch_impl.interop --model RUN_FOLDER --out HF_FOLDER

writes a trained model's config.json, model.safetensors and tokenizer files. The way back needs no command:
train_gpu.py --init-from and torch_impl.generate --model take a folder in either layout.

Not here: the computation (transformers is not imported), pickled weights, quantised weights, other layouts.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ref_numpy.conversation import END_OF_TURN, ROLE_TOKENS
from torch_impl.training.checkpoint import load_model
from torch_impl.training.files import InputError, find_checkpoint, new_folder, refusal
from torch_impl.training.flags import check_text, parse_flags
from torch_impl.training.hf_config import hf_config, read_hf_config
from torch_impl.training.hf_tensors import read_hf_tensors, to_hf_tensors
from torch_impl.training.memory import refuse_context_beyond_memory
from torch_impl.training.tensor_files import write_tensors
from torch_impl.training.terminal import lasting_output, show_what_can_be_shown
from torch_impl.training.tokenizer import Tokenizer
from torch_impl.transformer import Transformer

_END_OF_TEXT = "<|endoftext|>"
# Turns as ref_numpy/conversation.py lays them out. There a template makes text of them first, and so cannot
# keep what is said from spelling the tokens of roles.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    f"{END_OF_TURN}{{% endfor %}}{{% if add_generation_prompt %}}{ROLE_TOKENS['assistant']}{{% endif %}}"
)


def from_hf(folder: Path | str, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of a folder with config.json and model.safetensors, or its shards and their index.

    Parameters and computation are in dtype, whatever the files hold (float64, float32, float16 or bfloat16).
    Raises InputError that names the setting, tensor or file that is missing, unknown or damaged.
    """
    config = read_hf_config(Path(folder))
    tensors = read_hf_tensors(Path(folder), config, dtype)
    refuse_context_beyond_memory(Path(folder), config, dtype.itemsize)
    model = Transformer(config, dtype).to(dtype)
    model.load_state_dict(tensors)
    return model


def to_hf(model: Transformer, folder: Path | str, tokenizer: Tokenizer | None = None) -> None:
    """Write a model, in the precision of its parameters, to a new folder, in one piece.

    Raises InputError for a model that no layout can express, naming the option, for a tokenizer of another
    vocabulary and for a folder that exists; OSError where it cannot be written.
    """
    params = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    dtype = str(params["token_embedding.weight"].dtype).removeprefix("torch.")
    special = getattr(tokenizer, "special_tokens", {})
    described = hf_config(model.config) | {
        "torch_dtype": dtype,
        "bos_token_id": special.get(_END_OF_TEXT),
        "eos_token_id": special.get(END_OF_TURN, special.get(_END_OF_TEXT)),
    }
    if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {model.config.vocab_size}: "
            "they do not belong together"
        )
    with new_folder(Path(folder)) as new:
        _write_json(new / "config.json", described)
        write_tensors(new / "model.safetensors", to_hf_tensors(params, model.config))
        if tokenizer is not None:
            tokenizer.save(new / "tokenizer.json")
            _write_json(new / "tokenizer_config.json", _tokenizer_config(model, special))


def _tokenizer_config(model: Transformer, special: Mapping[str, int]) -> dict[str, object]:
    ends = {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT} if _END_OF_TEXT in special else {}
    if END_OF_TURN in special:
        ends = ends | {"eos_token": END_OF_TURN, "chat_template": _CHAT_TEMPLATE}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.context_length,
        "clean_up_tokenization_spaces": False,
        **ends,
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ExportFlags:
    """The command line of this module."""

    model: str = ""
    """Run folder (its best/ is taken, else last/), or a checkpoint in one."""
    out: str = ""
    """Folder to write, which must not exist yet."""


def export(arguments: list[str]) -> None:
    """Carry out a command line. Raises InputError on a mistake; exits after --help."""
    flags = parse_flags(
        ExportFlags(), arguments, "python -m torch_impl.interop", "Write a model in Hugging Face's layout."
    )
    for name in ("model", "out"):
        if not getattr(flags, name):
            raise InputError(f"--{name} is missing; see --help")
    check_text("--out", flags.out)
    loaded = load_model(find_checkpoint(Path(flags.model)), torch.float32, torch.device("cpu"))
    if loaded.config.quantisation is not None:
        raise InputError(f"{flags.model} is quantised; export the run that it was made from")
    to_hf(loaded.model, Path(flags.out), loaded.tokenizer)
    print(f"{flags.out}: transformers.AutoModelForCausalLM.from_pretrained loads it")


def main(arguments: list[str]) -> int:
    """The exit code: 0; 2 for a request that cannot be met, 1 for a failure, each with one line on stderr."""
    show_what_can_be_shown()
    try:
        with lasting_output():  # who reads what was written need not read what is said
            export(arguments)
    except InputError as error:
        print(f"interop: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interop: error: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (OSError, MemoryError) as error:
        reason = refusal(error) if isinstance(error, OSError) else str(error) or "out of memory"
        print(f"interop: error: {reason}; nothing was written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
