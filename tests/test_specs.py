"""Specs: rules as text and back, every error message, and no text that does anything else."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from polyak.decays import SCHEDULES, InversePower, Ratio
from polyak.rules import RULES, Bema, Exponential, Power, Rule, Tail, Uniform, Window
from polyak.specs import as_rule, parse

SPECS: list[tuple[str, Rule]] = [
    ("exponential(0.999)", Exponential(0.999)),
    ("  exponential ( decay = 0.999 )\n", Exponential(0.999)),
    ("exponential(0.9, True)", Exponential(0.9, debias=True)),
    ("exponential(half_life=5000, debias=True)", Exponential.from_half_life(5000, debias=True)),
    ("exponential(span=19)", Exponential.from_span(19)),
    ("exponential(inverse_power(power=2/3))", Exponential(InversePower(power=2 / 3))),
    ("exponential(ratio(0.9999))", Exponential(Ratio(0.9999))),
    ("power(relative_std=0.1)", Power.from_relative_std(0.1)),
    ("power(-1/4)", Power(-0.25)),
    ("uniform()", Uniform()),
    ("window(1000)", Window(1000)),
    ("bema(eta=1e-1)", Bema(eta=0.1)),
    ("tail(tail(uniform(), 5), start=1.5)", Tail(Tail(Uniform(), 5), 1.5)),
]


@pytest.mark.parametrize(("spec", "rule"), SPECS, ids=[spec for spec, _ in SPECS])
def test_a_spec_is_its_rule(spec: str, rule: Rule) -> None:
    assert parse(spec) == rule == as_rule(spec) == as_rule(rule)


@given(decay=st.floats(0, 1, exclude_max=True), gamma=st.floats(-1, 1e300, exclude_min=True))
def test_numbers_survive_to_the_last_bit(decay: float, gamma: float) -> None:
    for rule in (Exponential(decay), Power(gamma), Exponential(InversePower(max_decay=decay))):
        assert parse(str(rule)) == rule


@given(text=st.text(max_size=60))
@example(text="-" * 900 + "1")
@example(text="power(" + "9" * 500 + "/3)")
@example(text="\x00")
def test_any_text_is_a_rule_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse(text), Rule)


KNOWN = "rules: {}; schedules for exponential: {}".format(
    *(", ".join(cls.spec_name() for cls in classes) for classes in (RULES, SCHEDULES))
)
SYNTAX = "does not read as name(arguments)"
ERRORS = [
    ("exponential(", f"spec 'exponential(' {SYNTAX}: '(' was never closed"),
    ("", f"spec '' {SYNTAX}: invalid syntax"),
    ("ema(0.9)", f"'ema' in spec 'ema(0.9)' is unknown; {KNOWN}"),
    ("uniform", f"'uniform' in spec 'uniform' is not a number or a call; {KNOWN}"),
    ("window('3')", f"\"'3'\" in spec \"window('3')\" is not a number or a call; {KNOWN}"),
    ("window(1+1)", f"'1 + 1' in spec 'window(1+1)' is not a number or a call; {KNOWN}"),
    ("os.system(1)", f"'os.system(1)' in spec 'os.system(1)' is not a number or a call; {KNOWN}"),
    ("0.5", f"spec '0.5' is 0.5, wanted a rule; {KNOWN}"),
    ("ratio(0.9)", f"spec 'ratio(0.9)' is Ratio(max_decay=0.9), wanted a rule; {KNOWN}"),
    ("power(1/0)", "1/0 in spec 'power(1/0)': division by zero"),
    ("power(-uniform())", "'uniform()' in spec 'power(-uniform())' is not a number"),
    ("power(True/2)", "'True' in spec 'power(True/2)' is not a number"),
    (
        "window(3, 4)",
        "window in spec 'window(3, 4)': too many positional arguments; it takes (size)",
    ),
    (
        "power()",
        "Power takes exactly one of gamma, relative_std, got none",
    ),
    (
        "exponential(half_life=3, span=4)",
        "Exponential takes exactly one of decay, half_life, span, got half_life and span",
    ),
    (
        "exponential(steps=3, half_life=2)",
        "exponential in spec 'exponential(steps=3, half_life=2)': got an unexpected keyword"
        " argument 'steps'; it takes (decay, debias, half_life, span)",
    ),
    (
        "exponential(span=3, n=2)",
        "exponential in spec 'exponential(span=3, n=2)': got an unexpected keyword argument 'n';"
        " it takes (decay, debias, half_life, span)",
    ),
    (
        "power(s=0.2, relative_std=0.1)",
        "power in spec 'power(s=0.2, relative_std=0.1)': got an unexpected keyword argument 's'; it"
        " takes (gamma, relative_std)",
    ),
    (
        "exponential(0.999, 1000)",
        "Exponential.debias is 1000, wanted True or False: whether to correct for a start at zero",
    ),
    (
        "article_ema(update_after_step=True)",
        "EMA update_after_step is True, wanted an integer >= 0",
    ),
    (
        "bema(eta=1, eta=2)",
        "spec 'bema(eta=1, eta=2)' gives eta twice; wanted each option once, by name",
    ),
    (
        "bema(**1)",
        "spec 'bema(**1)' unpacks options by **; wanted each option once, by name",
    ),
    ("x" * 1001, "a spec of 1001 characters, wanted at most 1000"),
    ("-" * 900 + "1", f"spec {'-' * 900 + '1'!r} is nested too deep"),
]


@pytest.mark.parametrize(("spec", "message"), ERRORS, ids=[spec[:40] for spec, _ in ERRORS])
def test_errors(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(spec)
    assert str(caught.value) == message


WANTED = "wanted a polyak rule such as"
TYPE_ERRORS = [
    (0.999, f"a rule is 0.999, {WANTED} Exponential(0.999), or its spec"),
    (Ratio(0.9), f"a rule is Ratio(max_decay=0.9), {WANTED} Exponential(ratio(0.9)), or its spec"),
    (None, f"a rule is None, {WANTED} Exponential(0.999), or its spec"),
]


@pytest.mark.parametrize(("value", "message"), TYPE_ERRORS, ids=["float", "schedule", "none"])
def test_what_is_no_rule(value: object, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        as_rule(value)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_what_is_no_text() -> None:
    with pytest.raises(TypeError) as caught:
        parse(3)  # type: ignore[arg-type]
    assert str(caught.value) == 'a spec is 3, wanted text such as "exponential(0.999)"'


PRINTED: list[tuple[Rule, str, str]] = [
    (Exponential(0.999), "exponential(0.999)", "Exponential(decay=0.999)"),
    (Exponential(half_life=30), "exponential(half_life=30)", "Exponential(half_life=30)"),
    (
        Exponential(half_life=2.5, debias=True),
        "exponential(half_life=2.5, debias=True)",
        "Exponential(half_life=2.5, debias=True)",
    ),
    (Exponential.from_half_life(1e16), "exponential(half_life=1e+16)", "Exponential(half_life=1e+16)"),
    (Exponential(span=19), "exponential(span=19)", "Exponential(span=19)"),
    (Power(relative_std=0.1), "power(relative_std=0.1)", "Power(relative_std=0.1)"),
    (Power(3), "power(3)", "Power(gamma=3)"),
    (Window(5), "window(5)", "Window(size=5)"),
    (Tail(Bema(), 3), "tail(bema(), 3)", f"Tail(rule={Bema()!r}, start=3)"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "spec", "typed"), PRINTED, ids=[spec for _, spec, _ in PRINTED])
def test_a_rule_prints_as_it_was_typed(rule: Rule, spec: str, typed: str) -> None:
    assert (str(rule), repr(rule)) == (spec, typed)
    assert parse(spec) == rule


def test_a_rule_is_replaced_and_pickled_with_what_was_typed() -> None:
    rule = Exponential(half_life=30)
    again = dataclasses.replace(rule, debias=True)
    assert str(again) == "exponential(half_life=30, debias=True)"
    assert pickle.loads(pickle.dumps(rule)) == rule == copy.copy(rule)
    with pytest.raises(ValueError, match="takes exactly one of decay, half_life, span"):
        dataclasses.replace(rule, half_life=60)
