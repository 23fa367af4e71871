"""Theory: what an average averages, computed by the code that averages.

The *profile* of a rule is the coefficient of each step's live weights in the average. Half-life,
mean age, noise gain, cutoff and the equivalent learning-rate schedule are functions of that array.

>>> from polyak.rules import Exponential, Window
>>> c = profile("exponential(0.99)", 2000)
>>> round(half_life(c), 2), round(mean_age(c), 2), round(effective_window(c), 2)
(68.97, 99.0, 199.0)
>>> match(Window, like=Exponential(0.99))                 # the mean with the same lag
Window(size=199)
>>> equivalents("uniform()")["torch.optim.swa_utils.AveragedModel"]
'torch.optim.swa_utils.AveragedModel(model)'

Units are steps, and radians per step for frequencies. This package does not load torch.
"""

from __future__ import annotations

from polyak.theory._advice import Advice, Gain, advise
from polyak.theory._cadence import cadence, displacement
from polyak.theory._explaining import Explanation, explain
from polyak.theory._feedback import Feedback, feedback
from polyak.theory._libraries import CONVENTIONS, equivalents
from polyak.theory._matching import match
from polyak.theory._measures import (
    FrequencyResponse,
    cutoff,
    effective_window,
    frequency_response,
    half_life,
    initial_weight,
    learning_rate_profile,
    mean_age,
    noise_gain,
    ramp_lag,
    relative_std,
    step_response,
)
from polyak.theory._merging import learning_rate_decay, qam, wsm
from polyak.theory._migration import Migration, from_library
from polyak.theory._profiles import Profile, coefficients, profile
from polyak.theory._published import Published
from polyak.theory._quadratic import Moments, quadratic_moments
from polyak.theory._rates import learning_rates
from polyak.theory._synthesis import Column, Fit, fit

__all__ = [
    "CONVENTIONS", "Advice", "Column", "Explanation", "Feedback", "Fit", "FrequencyResponse",
    "Gain", "Migration", "Moments", "Profile", "Published", "advise", "cadence", "coefficients",
    "cutoff", "displacement", "effective_window", "equivalents", "explain", "feedback", "fit",
    "frequency_response", "from_library", "half_life", "initial_weight", "learning_rate_decay",
    "learning_rate_profile", "learning_rates", "match", "mean_age", "noise_gain", "profile",
    "qam", "quadratic_moments", "ramp_lag", "relative_std", "step_response", "wsm",
]  # fmt: skip
