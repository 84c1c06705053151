"""The tokenizer that came with a base, as admission uses it."""

from __future__ import annotations

from pathlib import Path

import motley_bases
import pytest
from motley_server.asked import ChatTurn
from motley_server.errors import FailedPreconditionError, InvalidArgumentError
from motley_server.tokenizer import CheckpointTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

TINY = Path(motley_bases.__path__[0]) / "assets" / "tiny"


@pytest.fixture
def checkpoint() -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TINY, local_files_only=True)
    return tokenizer


def test_text_goes_there_and_back(checkpoint: PreTrainedTokenizerBase) -> None:
    tokenizer = CheckpointTokenizer(checkpoint)
    ids = tokenizer.encode("upper: cat = ", add_special_tokens=False)
    assert tokenizer.decode(ids) == "upper: cat = "
    assert tokenizer.encode("upper: cat = ", add_special_tokens=True) == [checkpoint.bos_token_id, *ids]


def test_a_stored_truncation_does_not_cut_prompts(checkpoint: PreTrainedTokenizerBase) -> None:
    checkpoint.backend_tokenizer.enable_truncation(4)
    tokenizer = CheckpointTokenizer(checkpoint)
    assert len(tokenizer.encode("upper: cat = ", add_special_tokens=False)) == 13


def test_a_conversation_is_rendered_up_to_the_answer(checkpoint: PreTrainedTokenizerBase) -> None:
    tokenizer = CheckpointTokenizer(checkpoint)
    rendered = tokenizer.render_chat([ChatTurn("user", "upper: cat =")])
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    assert ids.count(checkpoint.bos_token_id) == 1
    assert "upper: cat =" in rendered


def test_a_template_that_refuses_is_the_callers_fault(checkpoint: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        CheckpointTokenizer(checkpoint).render_chat([ChatTurn("nobody", "x")])
    assert (caught.value.reason, caught.value.field) == ("CHAT_TEMPLATE_REFUSED", "prompt.chat")


def test_a_base_without_a_template_takes_no_conversation(checkpoint: PreTrainedTokenizerBase) -> None:
    checkpoint.chat_template = None
    with pytest.raises(FailedPreconditionError) as caught:
        CheckpointTokenizer(checkpoint).render_chat([ChatTurn("user", "x")])
    assert caught.value.reason == "NO_CHAT_TEMPLATE"
