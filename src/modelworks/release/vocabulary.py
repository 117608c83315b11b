"""A tokenizer in GGUF and in Hugging Face's ``tokenizer.json``: byte-level BPE, in both directions; and a SentencePiece
model, such as Grok-1's ``tokenizer.model``, in GGUF.

llama.cpp doesn't read a tokenizer's pre-tokenizer (the pattern that splits text before BPE): it knows some by name.
`PRE_TOKENIZERS` pairs the names with what they stand for; a tokenizer with another pattern would give other ids
there, and is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from modelworks.spec.chatml import CHATML
from modelworks.spec.errors import InputError, OperationError

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PLAIN_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_LLAMA3_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _PLAIN_BYTES]}


PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    "llama-bpe": _split(_LLAMA3_PATTERN),
    "qwen2": _split(_QWEN2_PATTERN),
}
"""llama.cpp's names of pre-tokenizers, and what ``tokenizer.json`` says for each."""

_PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
CHATML_SEEING = CHATML.replace("'\n' + message['content'] }}", f"'\n' }}}}{_PARTS}")
"""The same with images among a message's parts. To llama.cpp they come as text, a mark that it then replaces."""
SMOLVLM = (
    "{{ BEGIN }}{% for message in messages %}{{ message['role'] | capitalize + ':' }}"
    "{% if message['content'] is string %}{% set first = message['content'] %}{% else %}"
    "{% set first = message['content'][0]['text'] or '<__media' %}{% endif %}"
    "{% if not first.startswith('<__media') %}{{ ' ' }}{% endif %}"
    + _PARTS
    + "{{ '<end_of_utterance>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""SmolVLM's chat template, which has no space before an image that begins a message, for transformers and llama.cpp
alike; `BEGIN` stands for the token that begins a text."""
_NORMAL, _UNUSED, _CONTROL = (
    int(kind) for kind in (gguf.TokenType.NORMAL, gguf.TokenType.UNUSED, gguf.TokenType.CONTROL)
)


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as GGUF holds it: byte-level BPE, or SentencePiece where its pieces have scores."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    """Two pieces with a space between, the earliest first."""
    pre: str
    bos: int
    eos: int
    eot: int | None
    """What ends a turn of a conversation."""
    chat_template: str
    add_bos: bool = False
    scores: list[float] | None = None


def read_sentencepiece(path: Path, size: int) -> Vocabulary:
    """Read a SentencePiece ``tokenizer.model`` for a network of `size` pieces; ids beyond its own are unused.

    Its user-defined pieces are written as normal ones: llama.cpp would cut text at them before it looks for longer
    pieces, and give other ids. One of several characters is then found only where merges lead to it.

    Raises
    ------
    InputError
        If it can't be read, or has more pieces than the network's vocabulary.
    OperationError
        If the package `sentencepiece` isn't installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise OperationError(f"{path}: reading it takes the package sentencepiece: pip install sentencepiece") from None
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a SentencePiece model: {error}") from None
    pieces = len(model)
    if pieces > size:
        raise InputError(f"{path}: the tokenizer has {pieces} pieces and the network's vocabulary {size}")
    tokens = [model.id_to_piece(index) for index in range(pieces)] + [f"[PAD{index}]" for index in range(pieces, size)]
    types = [_sentencepiece_type(model, index) for index in range(pieces)] + [_UNUSED] * (size - pieces)
    scores = [model.get_score(index) for index in range(pieces)] + [0.0] * (size - pieces)
    bos, eos = max(model.bos_id(), 0), max(model.eos_id(), 0)
    return Vocabulary(tokens, types, [], "default", bos, eos, None, CHATML, scores=scores)


def _sentencepiece_type(model: Any, index: int) -> int:
    if model.is_control(index):
        return _CONTROL
    if model.is_unknown(index):
        return int(gguf.TokenType.UNKNOWN)
    return int(gguf.TokenType.BYTE) if model.is_byte(index) else _NORMAL


def read_vocabulary(path: Path, size: int) -> Vocabulary:
    """Read a ``tokenizer.json`` for a network of `size` pieces; ids that it doesn't use are filled in as unused.

    Raises
    ------
    InputError
        If it can't be read, isn't byte-level BPE, has another pre-tokenizer than those of `PRE_TOKENIZERS`, or has
        pieces beyond the network's vocabulary.
    """
    tokenizer = refuse_larger(path, size)
    values = json.loads(tokenizer.to_str())
    model = values["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or values.get("normalizer"):
        raise InputError(
            f"{path}: is {model.get('type')} with a normalizer or fallback; plain byte-level BPE is accepted"
        )
    pieces = tokenizer.get_vocab(with_added_tokens=True)
    tokens, types = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
    for piece, index in pieces.items():
        tokens[index], types[index] = piece, _NORMAL
    for added in values.get("added_tokens", []):
        types[added["id"]] = _CONTROL if added.get("special") else int(gguf.TokenType.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    bos = pieces.get("<|endoftext|>", 0)
    return Vocabulary(
        tokens, types, merges, _pre_name(values.get("pre_tokenizer"), path), bos, bos, pieces.get("<|im_end|>"), CHATML
    )


def seeing(vocabulary: Vocabulary) -> Vocabulary:
    """A vocabulary with the chat template of a network that sees: SmolVLM's where the vocabulary ends turns as it does,
    else ChatML with images."""
    if "<end_of_utterance>" not in vocabulary.tokens:
        return replace(vocabulary, chat_template=CHATML_SEEING)
    begin = next((mark for mark in ("<|im_start|>", "<|begin_of_text|>") if mark in vocabulary.tokens), "")
    template = SMOLVLM.replace("BEGIN", repr(begin))
    return replace(vocabulary, chat_template=template, eot=vocabulary.tokens.index("<end_of_utterance>"))


def refuse_larger(path: Path, size: int) -> Tokenizer:
    """A ``tokenizer.json``; an `InputError` if it can't be read or has ids beyond a network's vocabulary."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises nothing more precise)
        raise InputError(f"{path}: cannot be read as a tokenizer.json: {error}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= size:
        raise InputError(
            f"{path}: the tokenizer has {largest + 1} pieces and the network's vocabulary {size}: "
            "at most that many are accepted"
        )
    return tokenizer


def write_tokenizer(vocabulary: Vocabulary, folder: Path, context: int) -> list[Path]:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` of a vocabulary; returns the files."""
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(index, vocabulary) for index, kind in enumerate(vocabulary.types) if kind not in (_NORMAL, _UNUSED)
        ],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[vocabulary.pre],
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
            "merges": vocabulary.merges,
            # llama.cpp takes a word whole where it is a piece (only these tokenizers want it).
            "ignore_merges": vocabulary.pre == "llama-bpe",
        },
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return [path, write_tokenizer_config(vocabulary, folder, context)]


def write_tokenizer_config(vocabulary: Vocabulary, folder: Path, context: int) -> Path:
    """Write ``tokenizer_config.json``, which carries the chat template."""
    eot = vocabulary.eos if vocabulary.eot is None else vocabulary.eot
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.tokens[vocabulary.bos],
        "eos_token": vocabulary.tokens[eot],
        "add_bos_token": vocabulary.add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": vocabulary.chat_template,
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return path


def vocabulary_of(metadata: dict[str, Any], where: str) -> Vocabulary:
    """The vocabulary in a GGUF file's metadata.

    Raises
    ------
    InputError
        If it isn't byte-level BPE with a known pre-tokenizer, or its lists don't fit each other.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise InputError(f"{where}: its tokenizer is {str(kind)[:40]!r}; 'gpt2' (byte-level BPE) is accepted")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{where}: its pre-tokenizer is {str(pre)[:40]!r}; one of {', '.join(PRE_TOKENIZERS)} is accepted"
        )
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if not tokens or not isinstance(merges, list) or not _strings(tokens) or not _strings(merges):
        raise InputError(f"{where}: tokenizer.ggml.tokens or tokenizer.ggml.merges is missing or damaged")
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise InputError(f"{where}: its tokenizer has {len(tokens)} pieces that don't fit their types, or some twice")
    bos = metadata.get("tokenizer.ggml.bos_token_id", 0)
    eos = metadata.get("tokenizer.ggml.eos_token_id", bos)
    for index in (bos, eos):
        if type(index) is not int or not 0 <= index < len(tokens):
            raise InputError(f"{where}: the token id {index!r} is not one of the tokenizer's {len(tokens)}")
    return Vocabulary(
        tokens,
        types,
        merges,
        pre,
        bos,
        eos,
        eos,
        str(metadata.get("tokenizer.chat_template", CHATML)),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token") is True,
    )


def _strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _added(index: int, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "id": index,
        "content": vocabulary.tokens[index],
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": vocabulary.types[index] == _CONTROL,
    }


def _pre_name(given: Any, path: Path) -> str:
    """llama.cpp's name for a pre-tokenizer, judged without its settings that don't change the ids."""
    for name, known in PRE_TOKENIZERS.items():
        if _essence(given) == _essence(known):
            return name
    raise InputError(
        f"{path}: its pre-tokenizer is {str(given)[:80]}, which llama.cpp has no name for; "
        f"that of {', '.join(PRE_TOKENIZERS)} is accepted"
    )


def _essence(given: Any) -> Any:
    if isinstance(given, dict):
        return {key: _essence(value) for key, value in given.items() if key != "trim_offsets"}
    return [_essence(value) for value in given] if isinstance(given, list) else given
