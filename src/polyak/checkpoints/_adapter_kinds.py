"""Kinds of adapters: of which the mean of the tensors does not add the mean of what they add to a weight.

The other kinds are linear in their tensors, so they are averaged as weights are: IA3, LN tuning, BEFT, MiSS,
C3A, FourierFT, WaveFT, SHiRA, FRoD, TinyLoRA, SuperTuning, trainable tokens, prompt tuning. Some of those add
`values x constants`, so the constants, which lie beside or follow from a seed in the settings, must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class AdapterKind(NamedTuple):
    """How its tensors are named, what its authors call it, and what it does to a weight W."""

    names: re.Pattern[str]
    title: str
    does: str


def _kind(names: str, title: str, does: str) -> AdapterKind:
    return AdapterKind(re.compile(rf"(?<![a-z])({names})", re.IGNORECASE), title, does)


LORA = _kind(
    r"lora(_(a|b|embedding_[ab]|down|up)\b|\w*\.(up|down|a|b)\b)", "LoRA", "adds a product B A"
)
# Variants of LoRA come before it, since they have its tensors too.
NOT_LINEAR = (
    _kind(r"lora_magnitude_vector|dora_scale", "DoRA", "makes m (W + B A) / |W + B A|"),
    _kind(r"lora_e\b", "AdaLoRA", "adds a product B E A"),
    _kind(r"poly_lora_[ab]\b", "Poly", "adds a product B A, chosen by a router"),
    LORA,
    _kind(r"lokr_w", "LoKr", "adds a Kronecker product"),
    _kind(r"hada_w", "LoHa", "adds a product of two products"),
    _kind(r"p?vera_lambda", "VeRA", "adds a product b B d A"),
    _kind(r"randlora_(lambda|gamma)\b", "RandLoRA", "adds products B l A g"),
    _kind(r"vblora_(vector_bank|logits)", "VB-LoRA", "adds a product B A"),
    _kind(r"unilora_theta_d\b", "Uni-LoRA", "adds a product B A"),
    _kind(r"gralora_[ab]\b", "GraLoRA", "adds products B A"),
    _kind(r"hira_[ab]\b", "HiRA", "adds W * (B A)"),
    _kind(r"delora_(lambda|[ab])\b", "DeLoRA", "adds a product B A of a given norm"),
    _kind(r"glora_[a-e]\.", "GLoRA", "adds products"),
    _kind(r"deft_[pr]\b", "DEFT", "projects W"),
    _kind(r"adamss_(newb|[ab])\b", "AdaMSS", "adds a product B A"),
    _kind(r"lily_([ab]|router)\b", "Lily", "adds a product B A, chosen by a router"),
    _kind(r"peanut_[ab]\b", "PEANuT", "adds what a network makes of W"),
    _kind(r"osf_svd_params\b", "OSF", "makes a product U S V"),
    _kind(r"oft_(r\b|blocks|diag)", "OFT", "rotates W"),
    _kind(r"boft_[rs]\b", "BOFT", "rotates W"),
    _kind(r"psoft_r\b", "PSOFT", "rotates a part of W"),
    _kind(r"hra_u\b", "HRA", "reflects W"),
    _kind(r"road_(theta|alpha)\b", "RoAd", "rotates the outputs"),
    _kind(r"adaption_gate\b", "LLaMA-Adapter", "adds a gate times a prompt's attention"),
    _kind(r"prefix_task_(cols|rows)\b", "multitask prompt tuning", "multiplies the prompt by a product"),
)  # fmt: skip
CONSTANTS = re.compile(r"(shira|supertuning)_indices\b|frod_(v|s_indices|s_size)\b|tinylora_[abp]\b", re.I)  # fmt: skip
"""Tensors of linear kinds that are not trained: a mean exists only where they are equal."""


def of_adapter(names: Iterable[str]) -> str:
    """Why adapters with these tensors are not averaged as weights are, and what to do; "" if they are."""
    names = list(names)
    for kind in NOT_LINEAR:
        if name := next(filter(kind.names.search, names), ""):
            instead = "; or write one adapter whose rank is the sum of theirs (offline.concatenate, polyak "
            return (
                f"{name} belongs to an adapter ({kind.title}) that {kind.does}, so the mean of its tensors does "
                "not add the mean of what they add. Merge each adapter into its model (peft: merge_and_unload), "
                "and average those"
            ) + (f"{instead}average ... --lora concatenate)" if kind is LORA else "")
    return ""
