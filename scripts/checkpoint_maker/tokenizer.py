"""A byte-level BPE tokenizer of 512 tokens with DeepSeek-V4's special tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint_maker.geometry import MIN_VOCAB

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BOS_ID, EOS_ID = 0, 1
# vLLM's tokenizer_mode deepseek_v4 writes these into a chat.
_SPECIAL = [BOS, EOS, PAD, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>"]

# What a model is asked and told, so that common words of English are one to three tokens.
_TEXT = """
Hello world, the quick brown fox jumps over the lazy dog. You are a helpful assistant. What is the answer to this
question? The answer is in the following text. Please write a short story about a mountain, a river and the sea, then
explain each step with care. Reasoning effort: think before you answer, check every case, and state all assumptions,
intermediate results and rejected alternatives, so that nothing is left unchecked. Numbers such as 0123456789 and code
such as def main(): return [x for x in range(10) if x % 2 == 0] appear here as well as {"name": "value", "other": null}.
There is more than one way of doing it, and when some of them are not right, others can be made from what we have.
"""


def write(directory: Path, max_positions: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; the same bytes every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MIN_VOCAB,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": max_positions,
    }
    text = json.dumps(config, ensure_ascii=False, indent=1)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
