"""What a run on conversations teaches its model: to answer. The other objectives are in objectives.py."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.conversation import Conversation
from ref_numpy.loss import IGNORE
from ref_numpy.masks import PADDING
from torch_impl.bpe import BPETokenizer
from torch_impl.packing import Packed, evaluate_packed, pack, sample_packed
from torch_impl.training.config import RunConfig
from torch_impl.training.conversation_file import Conversations, encode_conversations
from torch_impl.training.counting import counted
from torch_impl.training.dialogue import Dialogue
from torch_impl.training.files import InputError
from torch_impl.training.ranks import Ranks
from torch_impl.training.telemetry import Row, faces_of_loss
from torch_impl.training.visible import visible
from torch_impl.training.writing import ANSWERING
from torch_impl.transformer import Embedded

_SHOWN = 3  # exchanges in sample.txt


@dataclass
class Answering:
    """A decoder: what the assistant says."""

    config: ModelConfig
    training: TrainConfig
    tokenizer: BPETokenizer
    train: Packed
    valid: Packed
    held_out: list[Conversation]
    told: str

    def __post_init__(self) -> None:
        self.sample = partial(sample_packed, self.train)
        self.train_tokens: Tensor = self.train.ids.flatten()
        self.tokens_per_sequence = self.config.context_length

    def describe(self) -> str:
        sequences, passes = len(self.train.ids), self.training.steps * self.training.batch_size
        answers = counted(_tokens(self.train), "token")
        return (
            f"{self.told}\n"
            f"{answers} of answers to train on, {_tokens(self.valid):,} held out\n"
            f"packed into {counted(sequences, 'sequence')} of {self.config.context_length} tokens; "
            f"in {counted(self.training.steps, 'step')} each is seen about {passes / sequences:.1f} times"
        )

    def evaluate(self, model: Embedded, max_tokens: int | None, ranks: Ranks) -> Row:
        loss = evaluate_packed(model, self.valid, max_tokens=max_tokens, ranks=ranks)
        return faces_of_loss(loss, None)

    def example(self, model: Embedded, length: int) -> str:
        """The first held-out questions, what the model answers, and what the file does."""
        dialogue, shown = Dialogue(model, self.tokenizer), []
        for conversation in self.held_out:
            last = next(n for n, message in enumerate(conversation) if message.role == "assistant")
            try:
                prompt, _ = dialogue.prompt(conversation[:last], length)
            except InputError:
                continue  # too long for the context, and so left out of the evaluation too
            ids = [id for id in dialogue.answer(prompt, length, ANSWERING, seed=0) if id != dialogue.end]
            said = [f"{role}: {content}" for role, content in conversation[:last]]
            answer, wanted = self.tokenizer.decode(ids), conversation[last].content
            shown.append("\n".join([*said, f"assistant: {answer}", f"(in the file: {wanted})"]))
            if len(shown) == _SHOWN:
                break
        return visible("\n\n".join(shown))

    def passage(self, length: int) -> tuple[Tensor, ...]:
        """Of the first sequence, as conversations are packed into it, without padding."""
        packed = self.valid.documents[0] != PADDING
        return tuple(side[:1, packed][:, :length].long() for side in (self.valid.ids, self.valid.documents))


def _tokens(packed: Packed) -> int:
    return int((packed.targets != IGNORE).sum())


def make_answering(
    corpus: Conversations, tokenizer: BPETokenizer, config: RunConfig, device: torch.device
) -> Answering:
    """Raises InputError where no exchange of a file fits into the context."""
    length, told, sides = config.model.context_length, [], []
    for name, conversations in (("to train on", corpus.training), ("held out", corpus.held_out)):
        found, left_out = encode_conversations(conversations, tokenizer, length)
        told.append(f"{counted(len(conversations), 'conversation')} {name}")
        if left_out:
            told[-1] += (
                f" ({counted(len(found), 'piece')} of them; exchanges left out, longer than the context of "
                f"{length}: {left_out:,})"
            )
        if not found:
            fixed = config.start.init_from and config.model.positions == "learned"
            mend = "begin with a model of a larger one" if fixed else "use a larger --context-length"
            raise InputError(
                f"of {counted(len(conversations), 'conversation')} {name} none has an exchange that fits "
                f"into the context of {counted(length, 'token')}; shorten them, or {mend}"
            )
        sides.append(
            pack([(torch.from_numpy(ids), torch.from_numpy(counts)) for ids, counts in found], length, device)
        )
    return Answering(config.model, config.training, tokenizer, *sides, corpus.held_out, ", ".join(told))
