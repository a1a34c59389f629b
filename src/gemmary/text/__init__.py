"""Text to ids and back, and conversations to ids.

`tokenizer` is the one encoder, `vocabulary` and `writers` the files it comes from and goes to, `dialogue` the turns.
Nothing above this room handles strings and ids at once but the face.
"""

from gemmary.text.dialogue import Dialogue, chat_template, encode_dialogue
from gemmary.text.tokenizer import Decoder, Tokenizer

__all__ = ["Decoder", "Dialogue", "Tokenizer", "chat_template", "encode_dialogue"]
