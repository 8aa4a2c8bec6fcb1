"""A model that gets tokens for conversations: in its tokenizer, and in its tables of token vectors."""

import torch
from torch import Tensor

from ref_numpy.bpe_format import TokenizerError, vocabulary_of
from ref_numpy.conversation import SPECIAL_TOKENS
from torch_impl.bpe import BPETokenizer
from torch_impl.training.files import InputError
from torch_impl.training.tokenizer import BYTES, ByteTokenizer, Tokenizer


def with_chat_tokens(tokenizer: Tokenizer) -> BPETokenizer:
    """The tokenizer with the special tokens of conversations, which come last where they are new.

    Raises InputError for one that cannot write every text, or has such a token as an ordinary one.
    """
    vocabulary = BYTES if isinstance(tokenizer, ByteTokenizer) else getattr(tokenizer, "vocabulary", None)
    if vocabulary is None:
        raise InputError(
            "conversations need a tokenizer that can write any text, of bytes or byte pairs; this one has "
            "characters or words: use --tokenizer bpe, or another --init-from"
        )
    special = [*vocabulary.special_tokens, *SPECIAL_TOKENS]
    tokens = dict(enumerate(vocabulary.tokens))
    try:
        return BPETokenizer(vocabulary_of(tokens, vocabulary.merges, special, vocabulary.split))
    except TokenizerError as error:
        raise InputError(f"the tokenizer cannot have the tokens of conversations: {error}") from None


def with_new_rows(params: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The parameters of a model with so many tokens; a new one's row is the mean of the old ones.

    At the output a mean is about as likely as tokens are on the whole, so what the model has learned of the
    others stays; random rows can be far likelier than all of them (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models").
    """
    grown = dict(params)
    for name in {"token_embedding.weight", "head.weight"} & params.keys():
        table = params[name]  # (V, C)
        new = table.mean(dim=0, keepdim=True).expand(vocab_size - len(table), -1)
        grown[name] = torch.cat([table, new])
    return grown
