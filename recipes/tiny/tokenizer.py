"""The tokenizer of the tiny base: one token per UTF-8 byte, three specials, no merges.

Owns the vocabulary and the chat template. Any text is representable, and a letter outside ASCII really is split over
several tokens.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIALS = (PAD, BOS, EOS)
CONTEXT = 512

# A conversation reads as the training text does: what the user says is a prompt, what the assistant says completes it.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ ' ' + message['content'] | trim + eos_token }}"
    "{%- elif message['role'] == 'user' -%}{{ bos_token + message['content'] | trim }}"
    "{%- elif message['role'] == 'system' -%}{{ bos_token + message['content'] | trim + eos_token }}"
    "{%- else -%}{{ raise_exception('the roles are system, user and assistant') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: specials are ids 0 to 2, byte b is id 3 + b, and <bos> opens every encoding."""
    ids = {token: index for index, token in enumerate(SPECIALS)}
    ids |= {letter: len(SPECIALS) + byte for byte, letter in _byte_letters().items()}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def _byte_letters() -> dict[int, str]:
    """Map each byte to the printable letter that byte-level tokenizers write for it.

    Semantics: printable Latin-1 bytes stand for themselves, the other 68 for the letters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + place) for place, byte in enumerate(hidden)}
