"""What a conversation is: who speaks when, how files write it down, and the tokens that it becomes.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"instruction": "Add these.", "input": "2 and 3", "output": "5"}

A system message may come first; then user and assistant take turns, beginning with the user. A record of the
second kind is a user's message, of instruction, line end and input (which may be missing), and its answer.

    <system> ... <end_of_turn> <user> ... <end_of_turn> <assistant> ... <end_of_turn> <user> ...

A turn is the token of its role, its content as plain text, and the token that ends it. These four are special
tokens, which plain text never becomes, whatever it spells. Half of a surrogate pair, which is no character
and has no bytes, becomes U+FFFD. What counts in the loss are the tokens of the assistant's content and the
end of its turns. Keys that stand beside those above are left alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer
from numpy import ndarray as Array

ROLE_TOKENS = {"system": "<system>", "user": "<user>", "assistant": "<assistant>"}
END_OF_TURN = "<end_of_turn>"
SPECIAL_TOKENS = (*ROLE_TOKENS.values(), END_OF_TURN)
_USER, _ASSISTANT = '{"role": "user", "content": "Hi"}', '{"role": "assistant", "content": "Hello"}'
RECORD = f'{{"messages": [{_USER}, {_ASSISTANT}]}} or {{"instruction": "Hi", "output": "Hello"}}'
"""What a record looks like, for whoever has another."""

Encode = Callable[[str], Integer[Array, "_"]]  # plain text to ids


class ConversationError(ValueError):
    """A conversation that cannot be. The message is one line: the value and the mend."""


class Message(NamedTuple):
    role: str
    content: str


Conversation = list[Message]


class Tokens(NamedTuple):
    """A conversation, or a part of one that the context holds."""

    ids: Int[Array, "n"]
    counts: Bool[Array, "n"]  # whether a token is one that the model is to write


def well_formed(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair; two halves that meet are their character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _shown(value: object) -> str:
    """A value in a message: on one line, and not for ever."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConversationError(message)


def from_record(record: object) -> Conversation:
    """The conversation that a record of a file holds. Raises ConversationError where it is malformed."""
    _require(
        isinstance(record, dict),
        f"{_shown(record)} is no object; a record is {RECORD}",
    )
    if "messages" in record:
        messages = record["messages"]
        _require(
            isinstance(messages, list),
            f"messages is {_shown(messages)}, but must be a list of role and content",
        )
        conversation = [_message(value, number) for number, value in enumerate(messages, 1)]
    else:
        conversation = _from_instruction(record)
    check_turns(conversation)
    return conversation


def _from_instruction(record: dict) -> Conversation:
    for name in ("instruction", "output"):
        _require(name in record, f"{_shown(record)} has no {name}, and no messages; a record is {RECORD}")
    parts = {name: record.get(name) or "" for name in ("instruction", "input", "output")}
    for name, text in parts.items():
        _require(isinstance(text, str), f"{name} is {_shown(text)}, but must be text")
        _require(
            text.strip() != "" or name == "input",
            f"{name} is {_shown(record.get(name))}, and so empty; give it text, or take the record out",
        )
    question = "\n".join(filter(None, (parts["instruction"], parts["input"])))
    return [Message("user", well_formed(question)), Message("assistant", well_formed(parts["output"]))]


def _message(value: object, number: int) -> Message:
    _require(
        isinstance(value, dict),
        f"message {number} is {_shown(value)}, but must be an object such as {_USER}",
    )
    for name in ("role", "content"):
        _require(name in value, f"message {number} has no {name}; one is {_USER}")
    role, content = value["role"], value["content"]
    _require(
        isinstance(role, str) and role in ROLE_TOKENS,
        f"message {number} has the role {_shown(role)}; use {', '.join(ROLE_TOKENS)}",
    )
    _require(isinstance(content, str), f"message {number}: content is {_shown(content)}, but must be text")
    return Message(role, well_formed(content))


def check_turns(conversation: Conversation) -> None:
    """Raises ConversationError for turns out of order, empty content, and an assistant that says nothing."""
    before, expected = "", ("system", "user")
    for number, (role, content) in enumerate(conversation, 1):
        if role not in expected:
            place = f"after the {before}" if before else "at first"
            raise ConversationError(
                f"message {number} is by the {role}, but {place} speaks the {' or the '.join(expected)}"
            )
        if not content.strip():
            raise ConversationError(
                f"message {number}, by the {role}, is {_shown(content)}, and so empty; give it text, or take "
                "it out"
            )
        before, expected = role, ("assistant",) if role == "user" else ("user",)
    _require(
        any(role == "assistant" for role, _ in conversation),
        "the assistant says nothing, so there is nothing to learn; add an answer, or take the record out",
    )


def to_record(conversation: Conversation) -> dict[str, list[dict[str, str]]]:
    """The record of messages that from_record reads."""
    return {"messages": [message._asdict() for message in conversation]}


def turn_tokens(message: Message, encode: Encode, special: Mapping[str, int]) -> Tokens:
    """A turn: the token of the role, the content, the end. `special` has the ids of SPECIAL_TOKENS."""
    content = encode(message.content)
    ids = np.concatenate([[special[ROLE_TOKENS[message.role]]], content, [special[END_OF_TURN]]])
    counts = np.full(ids.size, message.role == "assistant")
    counts[0] = False
    return Tokens(ids.astype(np.int64), counts)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Parts one after the other."""
    return Tokens(
        np.concatenate([part.ids for part in parts]), np.concatenate([part.counts for part in parts])
    )


def pieces(
    conversation: Conversation, encode: Encode, special: Mapping[str, int], limit: int
) -> tuple[list[Tokens], int]:
    """The conversation as pieces of at most `limit` tokens, and how many exchanges had to be left out.

    An exchange is a user's message and its answer. A piece begins with the system message, and goes on with
    as many exchanges in a row as it has room for; so each answer stands in one piece. An exchange is left out
    where it is too long even with nothing but the system message before it. A last message that nobody
    answers teaches nothing, and falls away.
    """
    turns = [turn_tokens(message, encode, special) for message in conversation]
    opening = turns[: conversation[0].role == "system"]
    rest = turns[len(opening) :]
    size = sum(part.ids.size for part in opening)
    found, current, room, left_out = [], [], limit - size, 0
    for exchange in map(joined, zip(rest[::2], rest[1::2], strict=False)):
        if current and exchange.ids.size > room:
            found.append(joined(opening + current))
            current, room = [], limit - size
        if exchange.ids.size > room:
            left_out += 1
            continue
        current.append(exchange)
        room -= exchange.ids.size
    if current:
        found.append(joined(opening + current))
    return found, left_out
