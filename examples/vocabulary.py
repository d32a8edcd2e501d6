"""A small byte-pair vocabulary in CLIP's layout, learned from the captions.

CLIP's order of entries: 256 bytes, the same 256 ending a word, one entry per merge, then the two special tokens. So
the whole vocabulary follows from the list of merges, and ``vocab.json`` with ``merges.txt`` is all that
`transformers.CLIPTokenizer` needs.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77


def byte_alphabet() -> list[str]:
    """Return the 256 visible characters that stand for bytes, in CLIP's (GPT-2's) order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [*map(chr, plain), *(chr(256 + i) for i in range(256 - len(plain)))]


def learn_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Learn merges until every word of the texts is one token."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]


def write_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and their two small companions, as CLIP's tokenizer has them."""
    merges = learn_merges(texts)
    entries = byte_alphabet()
    entries += [f"{entry}</w>" for entry in entries]
    entries += ["".join(pair) for pair in merges]
    entries = [*dict.fromkeys(entries), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    settings = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load what `write_tokenizer` wrote."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))
