"""A conversation with a model in the terminal, or through a pipe.

    python -m torch_impl.chat --model RUN_FOLDER

Each line that is typed is a message, and the answer appears as it is written. Answers go to stdout, all else
to stderr: a program that pipes messages in reads nothing but answers.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ref_numpy.config import ConfigError, SamplingConfig
from ref_numpy.conversation import Conversation, Message, to_record, well_formed
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError, find_checkpoint, refusal, write_new_file
from torch_impl.training.flags import parse_flags
from torch_impl.training.terminal import Lines, interrupt_only_noted, lead_nowhere
from torch_impl.training.visible import visible
from torch_impl.training.writing import ANSWERING, SamplingFlags, TextStream, check_forbidden, chosen

if TYPE_CHECKING:  # imports torch, which --help can do without
    from torch_impl.training.dialogue import Dialogue


@dataclass(frozen=True)
class ChatFlags:
    """The command line of this module."""

    model: str = ""
    """Run folder of train_gpu.py chat (its best/ is taken, else last/), or a checkpoint in one."""
    system: str = ""
    """System message that the conversation begins with."""
    max_new_tokens: int = 300
    """Length of an answer, in tokens, at most."""
    seed: int = 0
    """Decides the draws; the same seed and messages get the same answers."""
    device: str = "auto"
    """auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:1, mps."""
    sampling: SamplingFlags = ANSWERING


def parse(arguments: list[str]) -> tuple[ChatFlags, SamplingConfig]:
    """Raises InputError or ConfigError on a mistake; exits after --help."""
    flags = parse_flags(ChatFlags(), arguments, "python -m torch_impl.chat", "Talk to a model.")
    if not flags.model:
        raise InputError("--model is missing; name a run folder of train_gpu.py chat")
    if flags.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {flags.max_new_tokens}, but an answer has at least 1")
    if not 0 <= flags.seed < 2**64:
        raise InputError(f"--seed is {flags.seed}, but must lie in [0, 2**64)")
    return flags, SamplingConfig(**asdict(flags.sampling))


def open_dialogue(flags: ChatFlags) -> "Dialogue":
    """The model that the flags name. Raises InputError where there is none, or none that answers."""
    from torch_impl.training.checkpoint import load_model
    from torch_impl.training.config import read_config
    from torch_impl.training.device import place_to_read
    from torch_impl.training.dialogue import Dialogue

    checkpoint = find_checkpoint(Path(flags.model))
    place = place_to_read(read_config(checkpoint).run, flags.device)
    loaded = load_model(checkpoint, place.dtype, place.device)
    try:
        dialogue = Dialogue(loaded.model, loaded.tokenizer)
    except InputError as error:
        raise InputError(f"{flags.model}: {error}") from None
    special = tuple(dialogue.tokenizer.special_tokens.values())  # none begins an answer
    check_forbidden(flags.sampling.forbidden, loaded.config.model.vocab_size, special)
    return dialogue


def tell(text: str) -> None:
    """What is no part of the conversation."""
    print(f"({visible(text)})", file=sys.stderr, flush=True)


def path_of(file: str) -> Path:
    """Raises InputError for what no path can be."""
    if "\0" in file:
        raise InputError(f"{file} is no path: it has a NUL")
    try:
        return Path(file).expanduser()
    except RuntimeError as error:  # there is no such user
        raise InputError(f"{file} is no path: {error}") from None


class Chat:
    """What was said so far, who answers, and what the user can do."""

    def __init__(self, dialogue: "Dialogue", sampling: SamplingConfig, flags: ChatFlags) -> None:
        self.dialogue, self.sampling, self.flags = dialogue, sampling, flags
        self.system = well_formed(flags.system.strip())
        self.messages: Conversation = []  # user and assistant in turns; the last one is an answer
        self.attempts = 0  # answers so far: each draws from a stream of its own
        self.out_of_sight = 0  # exchanges that do not fit into the context any more

    def take(self, line: str) -> bool:
        """Carry out a command, or have a message answered; whether to go on after it."""
        if not line.startswith("/") or line.startswith("//"):
            if line.strip():
                self.say(well_formed(line.removeprefix("/") if line.startswith("//") else line))
            return True
        name, argument, *_ = [*line[1:].strip().split(maxsplit=1), "", ""]
        if name == "quit":
            return False
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, 1) or ["help"]
            tell(f"/{name} is no command: /{near[0]}? A message that begins with a slash is typed with two")
            return True
        act, wanted, _ = COMMANDS[name]
        if bool(argument) != (wanted == "FILE") and wanted != "[TEXT]":
            tell(f"/{name} needs the name of a file" if wanted else f"/{name} stands alone; nothing was done")
            return True
        try:
            act(self, argument)
        except InputError as error:
            tell(str(error))
        except OSError as error:
            tell(refusal(error))
        return True

    def conversation(self, *more: Message) -> Conversation:
        """All messages, the system's first."""
        return [*([Message("system", self.system)] if self.system else []), *self.messages, *more]

    def say(self, text: str) -> bool:
        """Have a message answered, and keep both; whether there was an answer. Raises InputError as answer
        does."""
        message = Message("user", text)
        try:
            prompt, hidden = self.dialogue.prompt(self.conversation(message), self.flags.max_new_tokens)
        except InputError as error:
            tell(str(error))
            return False
        if hidden > self.out_of_sight:
            count = len(self.messages) // 2
            tell(f"the oldest {hidden} of {count} exchanges no longer fit, and are not seen")
        self.out_of_sight = hidden
        answer, how = self.answer(prompt)
        if not answer.strip():
            tell(f"{how or 'the model said nothing'}; the message is taken back")
            return False
        if how:
            tell(how)
        self.messages += [message, Message("assistant", answer)]
        return True

    def answer(self, prompt: list[int]) -> tuple[str, str]:
        """Write the answer as it comes; all of it, and why it ended other than by itself.

        Raises InputError where the model's logits are not numbers.
        """
        n_tokens, limit = self.flags.max_new_tokens, self.dialogue.model.config.context_length
        tokens = self.dialogue.answer(prompt, n_tokens, self.sampling, self.flags.seed, self.attempts)
        self.attempts += 1
        written, stream, n, how = [], TextStream(self.dialogue.tokenizer), 0, ""

        def show(text: str) -> None:
            written.append(text)
            print(visible(text), end="", flush=True)

        with interrupt_only_noted() as interrupt:
            for token in chosen(tokens, self.flags.model):
                if interrupt.pressed:
                    how = "stopped"
                    break
                if token == self.dialogue.end:
                    show(stream.end())
                    break
                n += 1
                show(stream.feed(token))
            else:
                full = (
                    f"the context of {limit} is full" if n < n_tokens else "--max-new-tokens allows no more"
                )
                how = f"the answer is cut after {counted(n, 'token')}: {full}"
            print(flush=True)
        return "".join(written), how

    def set_system(self, text: str) -> None:
        self.system = well_formed(text)
        tell("the system message is set" if text else "there is no system message now")

    def undo(self, _: str) -> None:
        if not self.messages:
            tell("there is nothing to take back")
            return
        *self.messages, message, _answer = self.messages
        tell(f"taken back: {message.content}")

    def retry(self, _: str) -> None:
        if not self.messages:
            tell("there is no message to answer again")
            return
        before, (message, answer) = self.messages[:-2], self.messages[-2:]
        self.messages = before
        if not self.say(message.content):
            self.messages = [*before, message, answer]

    def save(self, file: str) -> None:
        if not self.messages:
            tell("nothing was said yet, so nothing is saved")
            return
        record = json.dumps(to_record(self.conversation()), ensure_ascii=False)
        write_new_file(path_of(file), record.encode("utf-8") + b"\n")
        tell(f"saved in {file}")

    def load(self, file: str) -> None:
        from torch_impl.training.conversation_file import read_conversations

        path = path_of(file)
        if not path.is_file():
            raise InputError(f"{file} is no file")
        found = read_conversations(path)
        if len(found) > 1:
            raise InputError(f"{file} holds {len(found)} conversations; name a file with one")
        conversation = found[0]
        if conversation[-1].role != "assistant":
            raise InputError(f"{file} ends with a message of the user; take it out, and type it here")
        begins = conversation[0].role == "system"
        self.system = conversation[0].content if begins else ""
        self.messages, self.out_of_sight = conversation[begins:], 0
        tell(f"{counted(len(self.messages) // 2, 'exchange')} from {file}" + " and a system message" * begins)
        for role, content in self.messages[-2:]:
            tell(f"{role}: {content}")

    def reset(self, _: str) -> None:
        self.messages, self.out_of_sight = [], 0
        tell("forgotten" + "; the system message stays" * bool(self.system))

    def help(self, _: str) -> None:
        for name, (_, wanted, meaning) in COMMANDS.items():
            print(f"  {f'/{name} {wanted}':15} {meaning}", file=sys.stderr)
        print(
            "  A line is a message; one that ends with \\ goes on in the next.\n"
            "  Ctrl-C stops an answer, Ctrl-D leaves.",
            file=sys.stderr,
        )


class Command(NamedTuple):
    act: Callable[[Chat, str], None]
    argument: str
    meaning: str


COMMANDS = {
    "system": Command(Chat.set_system, "[TEXT]", "set the system message; without TEXT, remove it"),
    "undo": Command(Chat.undo, "", "take the last exchange back"),
    "retry": Command(Chat.retry, "", "have the last message answered again"),
    "save": Command(Chat.save, "FILE", "keep the conversation in a new file, as train_gpu.py chat reads it"),
    "load": Command(Chat.load, "FILE", "go on with the conversation in a file"),
    "reset": Command(Chat.reset, "", "forget all messages; the system message stays"),
    "help": Command(Chat.help, "", "show this"),
    "quit": Command(Chat.help, "", "leave"),  # which `take` does before it would act
}


def converse(chat: Chat, lines: Lines) -> None:
    """Until the user leaves, or the pipe ends."""
    going_on = True
    while going_on:
        try:
            line = lines.read()
            going_on = line is not None and chat.take(line)
        except KeyboardInterrupt:
            if not lines.typed:
                raise
            print(file=sys.stderr)
            tell("Ctrl-D or /quit leaves")


def main(arguments: list[str]) -> int:
    """The exit code: 0; 2 for a request that cannot be met, 1 for a failure, each with one line on stderr."""
    if sys.stderr is None:  # as with 2>&-; what goes to None is printed among the answers
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (it is open to the end)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still shows the rest
    try:
        flags, sampling = parse(arguments)
        lines, dialogue = Lines(), open_dialogue(flags)
        if lines.typed:
            tell(f"a context of {dialogue.model.config.context_length} tokens; /help names the commands")
        converse(Chat(dialogue, sampling, flags), lines)
    except (InputError, ConfigError) as error:
        print(f"chat: error: {error}; see --help", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough
        lead_nowhere(sys.stdout)
    except (OSError, MemoryError) as error:
        reason = refusal(error) if isinstance(error, OSError) else str(error) or "out of memory"
        print(f"chat: error: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
