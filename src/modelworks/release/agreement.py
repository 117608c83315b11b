"""Whether llama.cpp, with the file that we publish, expects the same next tokens as the network that was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from modelworks.model.decoder import Decoder
from modelworks.release.llama_cpp import next_token_probabilities
from modelworks.release.quantization import Precision
from modelworks.spec.errors import OperationError

LIMITS: dict[Precision, float] = {"f32": 2e-3, "f16": 5e-3, "bf16": 3e-2, "q8_0": 6e-2, "q4_k": 2.5e-1}
"""The largest difference of a probability at which a file is still published.

Three to four times (in fp32, where llama.cpp's GELU table decides, more) what trained networks were seen to lose. The
first run's network, in this order: 6e-5, 6e-4, 8e-3, 1.4e-2, 8e-2. The same file with two of its tensors exchanged, or
with query rows in another order, is off by 0.27 to 0.9, and with one norm's weights 5 % too large by 2.5e-2: what the
limits of the coarse precisions let pass, that of f32 or f16 would not."""
PROMPTS = 32
_MOST_TOKENS = 48
_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it runs back into the forest.",
    "def add(first, second):\n    return first + second\n\nprint(add(1, 2))\n",
    "In the beginning there was a list of numbers: 1, 2, 3, 5, 8, 13, 21, 34, 55.",
    "<|im_start|>user\nWhat is a dictionary in Python?<|im_end|>\n<|im_start|>assistant\n",
)


@dataclass(frozen=True)
class Agreement:
    """Next-token probabilities of llama.cpp against PyTorch's, over some prompts."""

    prompts: int
    largest_difference: float
    """Of one token's probability."""
    mean_difference: float
    """Total variation: half the sum of a prompt's differences, averaged over the prompts."""
    same_first_choice: float
    """The share of prompts after which both find the same token likeliest."""
    limit: float
    """What `largest_difference` may be."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def fixed_prompts(tokenizer: Path, context: int) -> list[list[int]]:
    """32 prompts of different lengths, cut from fixed texts."""
    loaded = Tokenizer.from_file(str(tokenizer))
    encoded = [loaded.encode(text, add_special_tokens=False).ids for text in _TEXTS]
    longest = max(1, min(_MOST_TOKENS, context - 1))
    prompts = []
    for number in range(PROMPTS):
        ids = encoded[number % len(encoded)]
        length = 1 + (number * 7) % max(1, min(len(ids), longest))
        prompts.append(ids[:length])
    return prompts


def measure_agreement(
    model: Path, decoder: Decoder, prompts: Sequence[Sequence[int]], precision: Precision
) -> Agreement:
    """Compare a GGUF file under llama.cpp with the network in fp32.

    Raises
    ------
    OperationError
        If llama.cpp can't run the file, or a probability differs by more than the precision's limit.
    """
    theirs = next_token_probabilities(model, prompts, decoder.spec.vocab)
    decoder.eval()
    with torch.inference_mode():
        ours = np.stack([decoder(torch.tensor([list(ids)]))[0, -1].double().softmax(-1).numpy() for ids in prompts])
    difference = np.abs(theirs - ours)
    found = Agreement(
        prompts=len(prompts),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.sum(-1).mean() / 2),
        same_first_choice=float((theirs.argmax(-1) == ours.argmax(-1)).mean()),
        limit=LIMITS[precision],
    )
    if not found.largest_difference <= found.limit:
        raise OperationError(
            f"{model.name}: llama.cpp's next-token probabilities differ from PyTorch's by up to "
            f"{found.largest_difference:.3g}, and {found.limit:g} is accepted for {precision}"
        )
    return found
