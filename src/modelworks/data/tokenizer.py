"""Tokenizers: byte-level BPE trained on the text itself, or one that is given.

Ours splits text as GPT-2's does, so that llama.cpp's ``gpt-2`` pre-tokenizer gives the same ids, and begins with three
special tokens: the document separator and the two marks of ChatML. Special tokens written out in a text are text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from modelworks.spec.errors import InputError

SEPARATOR = "<|endoftext|>"
SPECIAL_TOKENS = [SEPARATOR, "<|im_start|>", "<|im_end|>"]
"""In the order of their ids."""
SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256
_SEPARATORS = [SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "[SEP]"]
"""What given tokenizers call the end of a text."""


def train_tokenizer(texts: Iterable[str], vocab: int, marks: Sequence[str] = ()) -> Tokenizer:
    """Train byte-level BPE of at most `vocab` pieces, with further special tokens `marks`; less text gives fewer.

    Raises
    ------
    InputError
        If `vocab` has no room for the bytes and the special tokens.
    """
    special = [*SPECIAL_TOKENS, *marks]
    if vocab < 256 + len(special):
        raise InputError(
            f"model.vocab = {vocab} is not accepted: a byte-level tokenizer takes at least {256 + len(special)} pieces "
            f"(256 bytes and {len(special)} special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path, vocab: int) -> Tokenizer:
    """Read a ``tokenizer.json`` for a model of `vocab` pieces.

    Raises
    ------
    InputError
        If it can't be read, has ids beyond the model's, or no token that ends a text.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(
            f"data.tokenizer = {str(path)!r} is not accepted: neither 'bpe' nor a tokenizer.json that exists"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    # The library raises plain exceptions for whatever is wrong with the file.
    except Exception as error:  # noqa: BLE001
        raise InputError(f"data.tokenizer = {str(path)!r} is no tokenizer.json that can be read: {error}") from None
    pieces = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if pieces > vocab:
        raise InputError(
            f"data.tokenizer = {str(path)!r} has {pieces} pieces, more than model.vocab = {vocab}; a model.vocab of at "
            f"least {pieces} is accepted"
        )
    separator_id(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def separator_id(tokenizer: Tokenizer) -> int:
    """The id that ends each document."""
    for token in _SEPARATORS:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    raise InputError(f"data.tokenizer has no token that ends a text; one of {', '.join(_SEPARATORS)} is accepted")


def separator_of(file: Path) -> int:
    """The id that ends each document under the tokenizer of a prepared dataset."""
    return separator_id(Tokenizer.from_file(str(file)))


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of texts, without special tokens, on all cores."""
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
