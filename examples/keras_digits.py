"""Keras 3 on torch, on sklearn's digits: a callback that averages, and judges the average after every epoch.

    python examples/keras_digits.py 10 run             so many epochs; writes run/ema.weights.h5

A Keras model is a torch module. `val_ema_loss` stands beside `val_loss`, and EarlyStopping can look at it.
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
from sklearn.datasets import load_digits

from polyak import Averager


class Average(keras.callbacks.Callback):
    def __init__(self, rule, judged):
        super().__init__()
        self.rules, self.judged, self.averager = {"ema": rule}, judged, None

    def on_train_begin(self, *_):
        if self.averager is None:  # a second `fit` goes on
            # BatchNormalization's statistics are parameters that do not train.
            self.averager = Averager(self.model, self.rules, buffers={"*/moving_*": "average"})
        self.steps = int(self.model.optimizer.iterations)

    def on_train_batch_end(self, *_, **__):
        before, self.steps = self.steps, int(self.model.optimizer.iterations)
        if self.steps > before:  # accumulated batches are one step
            self.averager.update()

    def on_epoch_end(self, _, logs):
        with self.averager.applied():
            found = self.model.evaluate(*self.judged, verbose=0, return_dict=True)
        logs |= {f"val_ema_{name}": value for name, value in found.items()}


def network():
    hidden = [keras.layers.Dense(64), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])


images, labels = (load_digits().data / 16).astype("float32"), load_digits().target
held_out = images[1200:], labels[1200:]
keras.utils.set_random_seed(0)
model, average = network(), Average("exponential(half_life=40)", held_out)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.SGD(0.3), loss, metrics=["accuracy"])
stop = keras.callbacks.EarlyStopping("val_ema_loss", mode="min", patience=3)
options = {"batch_size": 32, "epochs": int(sys.argv[1]), "callbacks": [average, stop], "verbose": 0}
found = model.fit(images[:1200], labels[:1200], validation_data=held_out, **options).history
for name, key in {"live": "val_", "ema": "val_ema_"}.items():
    print(f"{name}: loss {found[key + 'loss'][-1]:.4f}, accuracy {found[key + 'accuracy'][-1]:.4f}")
with average.averager.applied():
    model.save_weights(Path(sys.argv[2]) / "ema.weights.h5")
