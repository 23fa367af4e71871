"""Keras in a process of its own, since it takes its backend from the environment when it is imported."""

from __future__ import annotations

import runpy
import sys
from typing import Any


def check_file(scope: dict[str, Any], path: str) -> None:
    """Print the metrics of a new network with the weights of the file."""
    model = scope["network"]()
    model.load_weights(path)
    model.compile(loss=scope["loss"], metrics=["accuracy"])
    loss, accuracy = model.evaluate(*scope["held_out"], verbose=0)
    print(f"file: loss {loss:.4f}, accuracy {accuracy:.4f}")


def compare_with_own(scope: dict[str, Any]) -> None:
    """Print the largest difference between the average of Keras's optimizer and ours."""
    keras, model = scope["keras"], scope["network"]()
    optimizer = keras.optimizers.Adam(1e-3, use_ema=True, ema_momentum=0.9)
    model.compile(optimizer, scope["loss"])
    average = scope["Average"]("exponential(0.9)", scope["held_out"])
    model.fit(scope["images"][:400], scope["labels"][:400], verbose=0, callbacks=[average])
    ours = average.averager.average()
    theirs = zip(
        optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True
    )
    gaps = [
        (ours[f"_functional._torch_params.{variable.path}"] - mean.value).abs().max().item()
        for variable, mean in theirs
    ]
    assert len(gaps) == 6
    print(f"own: {max(gaps)}")


def count_steps(scope: dict[str, Any]) -> None:
    """Print the updates of 10 accumulated batches of 32, twice 5 steps: the second `fit` goes on."""
    keras, model = scope["keras"], scope["network"]()
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), scope["loss"])
    average = scope["Average"]("uniform()", scope["held_out"])
    for _ in range(2):
        model.fit(scope["images"][:320], scope["labels"][:320], verbose=0, callbacks=[average])
    print(f"steps: {average.averager.count}")


if __name__ == "__main__":
    example, folder = sys.argv[1:]
    sys.argv = [example, "3", folder]
    ran = runpy.run_path(example)
    check_file(ran, f"{folder}/ema.weights.h5")
    count_steps(ran)
    compare_with_own(ran)
