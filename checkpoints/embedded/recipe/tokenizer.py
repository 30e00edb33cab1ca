"""Fit the byte-level BPE on the words of the captions: every known word becomes one token, the rest falls to bytes.

The result is a `CLIPTokenizer` folder with `tokenizer.json` and, for older readers, `vocab.json` and `merges.txt`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from tiltopt.embedded.recipe.common import log, parser
from tiltopt.embedded.recipe.compose import Pool
from tiltopt.embedded.recipe.glyphs import load

LENGTH = 24
END = "</w>"
# words that prompts may use although no caption does
EXTRA = "photo realistic high low quality blurry best worst detailed colorful small large big cute complex texture"


def words_of(texts: Iterable[str]) -> list[str]:
    """The distinct words and digits of `texts`, sorted."""
    return sorted({w for t in texts for w in re.findall(r"[a-z]+|\d", t.lower())})


def fit(words: Iterable[str], limit: int = 6000) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges build every one of `words`."""
    model = Tokenizer(models.BPE(end_of_word_suffix=END))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=limit, min_frequency=1, initial_alphabet=letters, end_of_word_suffix=END, show_progress=False
    )
    model.train_from_iterator(words, trainer)
    merges = [
        tuple(m) if not isinstance(m, str) else tuple(m.split(" "))
        for m in json.loads(model.to_str())["model"]["merges"]
    ]
    tokens = [*letters, *(c + END for c in letters), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def save(tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write the folder, the classic two files included; nothing of how `tokenizer` was used before is kept."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=tokenizer.model_max_length).save_pretrained(out)
    (out / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(" ".join(m) for m in merges)
    (out / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--pool", default="train")
    options = args.parse_args()
    pool = Pool.open(options.work / "pools" / options.pool)
    nouns = [n for g in load(options.work / "glyphs.npz")[1] for n in (g.noun, g.specific)]
    tokenizer = fit(words_of([*pool.captions, *nouns, EXTRA]))
    save(tokenizer, options.work / "tokenizer")
    longest = max(len(ids) for ids in tokenizer(pool.captions[:20_000]).input_ids)
    log("tokenizer", vocabulary=len(tokenizer), longest_caption=longest, room=LENGTH)


if __name__ == "__main__":
    main()
