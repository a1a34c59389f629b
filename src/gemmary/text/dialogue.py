"""Conversations to ids, once, with the loss mask: the only file that knows how turns are written.

    <bos><start_of_turn>user\\n…<end_of_turn>\\n<start_of_turn>model\\n…<end_of_turn>\\n

Turns are assembled from ids; what people and tools wrote goes through the tokenizer's safe encoder, which cannot emit a
structural id, so no text becomes structure however it is spelled or split. Source: the chat templates published with
Gemma 1 and Gemma 3, whose ids these are wherever no text holds a mark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gemmary.errors import GemmaryError
from gemmary.text.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer

__all__ = ["Dialogue", "chat_template", "encode_dialogue", "turns_of"]

_USER, _MODEL, _SYSTEM = "user", "model", "system"
_ROLES = {_USER: _USER, _MODEL: _MODEL, "assistant": _MODEL, _SYSTEM: _SYSTEM}


class Dialogue(NamedTuple):
    """A conversation as ids. `loss_mask` is true on what the model said and on the end-of-turn mark after it."""

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
    Gemma 1 and 2 and put before for Gemma 3). Content is stripped at both ends, but the system's is not, as there.

    Raises GemmaryError, naming the message, where roles do not alternate from user on or content is empty or no text.
    """
    start, end = tokenizer.start_of_turn, tokenizer.end_of_turn
    if start is None or end is None:
        raise GemmaryError("this vocabulary has no turn tokens: it can continue text, not hold a conversation")
    turns = turns_of(messages, system or ("refuse" if generation < 3 else "prefix"))
    if open_turn and turns[-1][0] == _MODEL:
        raise GemmaryError(f"message {len(messages) - 1}, the last, is the model's: add what the user says next")
    newline, opening = tokenizer.encode("\n"), [start, *tokenizer.encode(f"{_MODEL}\n")]
    ids, mask = [tokenizer.bos], [False]

    def add(new: list[int], learned: bool) -> None:
        ids.extend(new)
        mask.extend([learned] * len(new))

    for role, content in turns:
        if role == _MODEL:
            add(opening, False)
            add([*tokenizer.encode(content), end], True)
        else:  # in one piece: a system message may begin with line breaks, which join the one after the role
            add([start, *tokenizer.encode(f"{role}\n{content}"), end], False)
        add(newline, False)
    if open_turn:
        add(opening, False)
    return Dialogue(ids, mask)


def turns_of(messages: Sequence[Mapping[str, Any]], system: str) -> list[tuple[str, str]]:
    """(user | model, content) in turn, the system message dealt with. Raises GemmaryError as `encode_dialogue` does."""
    if system not in ("refuse", "prefix"):
        raise GemmaryError(f"system is {system!r}; it may be 'refuse' or 'prefix'")
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise GemmaryError("a conversation is a list of messages, and has at least one")
    read = [_message(i, message) for i, message in enumerate(messages)]
    prefix, first = "", 0
    if read[0][0] == _SYSTEM:
        if system == "refuse":
            raise GemmaryError("message 0: Gemma 1 and 2 have no system role; put it into the first user message")
        prefix, first = read[0][1] + "\n\n", 1
        if len(read) == 1:
            raise GemmaryError("message 0 is the system's and the only one: add what the user says")
    turns = []
    for i, (role, content) in enumerate(read[first:]):
        if role != (_USER if i % 2 == 0 else _MODEL):
            raise GemmaryError(f"message {i + first} is the {role}'s: turns go user, model, user, … from a user's on")
        turns.append((role, content if i else prefix + content))
    return turns


def _message(i: int, message: Any) -> tuple[str, str]:
    """The role as turns name it, and the content as they hold it."""
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise GemmaryError(f"message {i} needs a role and a content")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in _ROLES:
        raise GemmaryError(
            f"message {i} has the role {str(role)[:40]!r}; roles are system, user and assistant (or model)"
        )
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts: list[Any] = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise GemmaryError(
            f"message {i}: its content must be text, or a list of text parts; gemmary's models read text"
        )
    text = "".join(part if role == _SYSTEM else part.strip() for part in texts)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GemmaryError(f"message {i}: its content has a lone surrogate: it is not Unicode") from None
    if not text.strip():
        raise GemmaryError(f"message {i}: its content is empty")
    return _ROLES[role], text


def chat_template(generation: int) -> str:
    """The same turns as a Jinja template, for the programs that our exports are opened with.

    Those render text and then encode it, so there a mark that a user types is structure: our own paths never use this.
    """
    said = (
        "{%- macro said(content, bare) -%}"
        "{%- if content is string -%}{{ content if bare else content | trim }}{%- else -%}"
        "{%- for part in content -%}{{ part['text'] if bare else part['text'] | trim }}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}"
    )
    opening = (
        "{%- if messages[0]['role'] == 'system' -%}"
        + (
            "{{ raise_exception('this model has no system role') }}"
            if generation < 3
            else "{%- set system = said(messages[0]['content'], true) + '\\n\\n' -%}{%- set turns = messages[1:] -%}"
        )
        + "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
    )
    return (
        said + "{{ bos_token }}" + opening + "{%- for turn in turns -%}"
        "{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('turns alternate, the user first') }}{%- endif -%}"
        f"{{{{ '{START_OF_TURN}' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' }}}}"
        f"{{{{ (system if loop.first else '') + said(turn['content'], false) + '{END_OF_TURN}\\n' }}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ '{START_OF_TURN}model\\n' }}}}{{%- endif -%}}"
    )
