"""Conversations to ids, once, with the loss mask: the only file that knows how turns are written.

    <bos><start_of_turn>user\\n…<end_of_turn>\\n<start_of_turn>model\\n…<end_of_turn>\\n

Turns are assembled from ids; what people and tools wrote goes through the tokenizer's safe encoder, which cannot emit a
structural id, so no text becomes structure however it is spelled or split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gemmary.errors import GemmaryError
from gemmary.text.tokenizer import Tokenizer

__all__ = ["Dialogue", "chat_template", "encode_dialogue"]

_MODEL_ROLES = ("assistant", "model")


class Dialogue(NamedTuple):
    """A conversation as ids. `loss_mask` is true on what the model said and on the <end_of_turn> after it."""

    ids: list[int]
    loss_mask: list[bool]


def encode_dialogue(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    generation: int,
    open_turn: bool,
    system: Literal["refuse", "prefix"] | None = None,
) -> Dialogue:
    """Messages (`role`, and `content` as a string or text parts) as ids behind exactly one BOS.

    `open_turn` begins the model's next turn, for generation; the last message is then the user's. A system message is
    refused or put before the first user turn, a blank line between (default: as the published templates do, refused for
    Gemma 1 and 2 and put before for Gemma 3). Content is stripped at both ends, as there.

    Raises GemmaryError, naming the message, where roles do not alternate from user on or content is empty or no text.
    """
    if tokenizer.start_of_turn is None or tokenizer.end_of_turn is None:
        raise GemmaryError("this vocabulary has no turn tokens: it can continue text, not hold a conversation")
    turns = _turns(messages, system or ("prefix" if generation == 3 else "refuse"))
    if open_turn and turns[-1][0] == "model":
        raise GemmaryError("the last message is the model's: add what the user says next")
    newline = tokenizer.encode("\n")
    ids, mask = [tokenizer.bos], [False]

    def add(new: list[int], learned: bool) -> None:
        ids.extend(new)
        mask.extend([learned] * len(new))

    for role, content in turns:
        said = role == "model"
        add([tokenizer.start_of_turn, *tokenizer.encode(f"{role}\n")], False)
        add([*tokenizer.encode(content), tokenizer.end_of_turn], said)
        add(newline, False)
    if open_turn:
        add([tokenizer.start_of_turn, *tokenizer.encode("model\n")], False)
    return Dialogue(ids, mask)


def _turns(messages: Sequence[Mapping[str, Any]], system: str) -> list[tuple[str, str]]:
    """(user | model, content) in turn, the system message dealt with."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise GemmaryError("a conversation is a list of messages, and has at least one")
    read = [_message(i, message) for i, message in enumerate(messages)]
    prefix = ""
    if read[0][0] == "system":
        if system == "refuse":
            raise GemmaryError("message 0: Gemma 1 and 2 have no system role; put it at the head of the first user message")
        prefix = read.pop(0)[1] + "\n\n"
        if not read:
            raise GemmaryError("a conversation needs a user message after the system one")
    turns = []
    offset = len(messages) - len(read)
    for i, (role, content) in enumerate(read):
        expected = "user" if i % 2 == 0 else "model"
        if role != expected:
            raise GemmaryError(f"message {i + offset} is the {role}'s: turns go user, model, user, … from a user's on")
        turns.append((role, prefix + content if i == 0 else content))
    return turns


def _message(i: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise GemmaryError(f"message {i} needs a role and a content")
    role, content = message["role"], message["content"]
    if role in _MODEL_ROLES:
        role = "model"
    elif role not in ("user", "system"):
        raise GemmaryError(f"message {i} has the role {role[:40]!r}; roles are system, user and assistant (or model)")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise GemmaryError(f"message {i}: every part of its content must be text; gemmary's models read nothing else")
        content = "".join(part.strip() for part in parts if part)
    if not isinstance(content, str):
        raise GemmaryError(f"message {i}: its content must be text")
    if not content.strip():
        raise GemmaryError(f"message {i}: its content is empty")
    return role, content.strip()


def chat_template(generation: int) -> str:
    """The same turns as a Jinja template, for the programs that our exports are opened with."""
    opening = (
        "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] | trim + '\\n\\n' -%}"
        "{%- set turns = messages[1:] -%}"
        if generation == 3
        else "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('this model has no system role') }}"
    )
    return (
        "{{ bos_token }}" + opening + "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
        "{%- for turn in turns -%}"
        "{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('turns alternate, the user first') }}{%- endif -%}"
        "{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' }}"
        "{{ (system if loop.first else '') + (turn['content'] | trim) + '<end_of_turn>\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
    )
