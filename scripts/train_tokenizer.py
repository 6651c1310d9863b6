"""Train the built-in model's byte-level BPE tokenizer on the training half of the corpus.

    python scripts/train_tokenizer.py --out build/builtin

Part of making the built-in model; see scripts/train_builtin.py.
"""
import argparse
import json
from pathlib import Path

from source_corpus import read_split
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# A line break travels with the indentation that follows it, a word with the one space before it: the model spends no
# tokens on layout, and no token holds parts of two words.
SPLIT = Regex(r"(?:\r?\n)+[ \t]*|[ ]?[A-Za-z_][A-Za-z0-9_]*|[ ]?\p{L}+|[ ]?\d{1,3}|[ ]?[^\s\w]+|[ \t]+|.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=4096)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, held_out = read_split()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=10,
        show_progress=False,
    )
    tokenizer.train_from_iterator((f.text for f in train), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(args.out)
    sample = train[0].text
    assert wrapped.decode(wrapped(sample)["input_ids"]) == sample, "the tokenizer must be lossless"
    (args.out / "held_out.json").write_text(json.dumps([f.name for f in held_out], indent=0))
    counts = sum(len(tokenizer.encode(f.text).ids) for f in held_out)
    print(f"{len(train)} training files, {len(held_out)} held out, {wrapped.vocab_size} tokens, "
          f"{sum(len(f.text.encode()) for f in held_out) / counts:.2f} bytes a token held out")


if __name__ == "__main__":
    main()
