"""Text to token ids and back, as admission needs it, over the tokenizer that came with the base.

Long texts are encoded on one thread of its own, so that the event loop stays free; that thread and the engine's share
the tokenizer, which only reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from motley_server.asked import ChatTurn
from motley_server.errors import FailedPreconditionError, InvalidArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG_TEXT_CHARACTERS = 4096

T = TypeVar("T")


class Tokenizer(Protocol):
    """What admission asks of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text."""

    def render_chat(self, turns: Sequence[ChatTurn]) -> str:
        """Return the text that a conversation becomes, special tokens written out, ready for the assistant's answer.

        Raises: FailedPreconditionError (reason=NO_CHAT_TEMPLATE); InvalidArgumentError (reason=CHAT_TEMPLATE_REFUSED).
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens written out."""


class CheckpointTokenizer:
    """The base's own tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # The first call switches a stored truncation or padding off; later ones change nothing: threads may share it.
        self.encode("a", add_special_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text."""
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return cast("list[int]", ids)

    def render_chat(self, turns: Sequence[ChatTurn]) -> str:
        """Return the text that a conversation becomes."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            message = "this base has no chat template; send text or token ids"
            raise FailedPreconditionError(message, reason="NO_CHAT_TEMPLATE", field="prompt.chat")
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            message = f"the base's chat template refuses this conversation: {error}"
            raise InvalidArgumentError(message, reason="CHAT_TEMPLATE_REFUSED", field="prompt.chat") from error
        return cast(str, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens written out."""
        return cast(
            str, self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )


class TokenizerThread:
    """Run tokenizer calls here when they are short, on one thread when they are long."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def run(self, size: int, call: Callable[[], T]) -> T:
        """Return what `call` returns; `size` is the length of what it works on."""
        if size < LONG_TEXT_CHARACTERS:
            return call()
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def close(self) -> None:
        """End the thread once its calls are done."""
        self._executor.shutdown(wait=True, cancel_futures=True)
