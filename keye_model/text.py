"""Tokens to text, as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one sample.

    Attributes:
        text: what was returned so far. stopped: a stop string was reached; the text ends before it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.stop, self.held, self.text, self.stopped = stop, "", "", False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is certain now."""
        self.held += self.decoder.step(self.tokenizer, token) or ""
        ends = [at for s in self.stop if (at := self.held.find(s)) >= 0]
        if ends:
            self.stopped = True
            return self.take(min(ends))
        longest = max((overlap(self.held, s) for s in self.stop), default=0)
        return self.take(len(self.held) - longest)

    def flush(self) -> str:
        """The rest, at the end: what might have become a stop string and did not."""
        return "" if self.stopped else self.take(len(self.held))

    def take(self, length: int) -> str:
        piece, self.held = self.held[:length], self.held[length:]
        self.text += piece
        return piece


def overlap(text: str, stop: str) -> int:
    """The longest end of the text that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)  # fmt: skip
