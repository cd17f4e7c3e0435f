"""Samplers and methods are equal exactly where they sample alike, and tables are cached by that."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from alphabar.noising import NoiseSchedule
from alphabar.noising.utils.identity import exact
from alphabar.sampling import (
    METHODS,
    STANDALONE,
    Clip,
    DynamicThreshold,
    Knot,
    Method,
    Sampler,
    make_knots,
)
from alphabar.sampling.methods.euler import euler_ancestral

SCALED = NoiseSchedule.scaled_linear()


def gained(
    trace: Any, knots: Sequence[Knot], i: int, x: Any, *, mode: Any = 1, level: Any = 0.0
) -> list[Any]:
    """A method whose options are of no declared kind: True is another mode than 1, and -0.0 another
    level than 0.0.
    """
    trace.keeps_marginals = False
    gain = {(True, bool): 0.9, (1, int): 1.0, (1.0, float): 1.1}.get((mode, type(mode)), 0.5)
    return [gain * trace.denoise(x, knots[i]) + (0.1 if str(level) == "-0.0" else 0.0) * x]


@dataclass(frozen=True)
class Laid:
    """A grid that is an object; ``unseen`` is left out of its comparison."""

    rho: float = 7.0

    def __call__(self, schedule: NoiseSchedule, steps: int) -> tuple[Knot, ...]:
        return make_knots(schedule, steps, "karras", rho=self.rho)


def laid(schedule: NoiseSchedule, steps: int, *, rho: float = 7.0) -> tuple[Knot, ...]:
    return make_knots(schedule, steps, "karras", rho=rho)


OWN = Method("own", gained, order=0, source="")


def all_different() -> list[Sampler]:
    """Samplers of which no two give the same images."""
    ancestral = Method("a", euler_ancestral, order=1, source="")
    return [
        Sampler(SCALED, replace(ancestral, defaults={"eta": 1.0}), 4),
        Sampler(SCALED, replace(ancestral, defaults={"eta": 0.0}), 4),
        Sampler(SCALED, replace(ancestral, defaults={"eta": 0.5}), 4),
        *(Sampler(SCALED, OWN, 4, mode=mode) for mode in (1, True, 1.0)),
        *(Sampler(SCALED, OWN, 4, level=level) for level in (-0.0, [0.0])),
        *(Sampler(SCALED, replace(OWN, defaults={"mode": mode}), 4) for mode in (True, 1.0)),
        Sampler(SCALED, "heun", 4, partial(laid, rho=5.0)),
        Sampler(SCALED, "heun", 4, partial(laid, rho=6.0)),
        Sampler(SCALED, "heun", 4, Laid(4.0)),
        Sampler(SCALED, "heun", 4, Laid(3.0)),
        Sampler(
            SCALED, "heun", 4, lambda schedule, steps: make_knots(schedule, steps, "exponential")
        ),
        Sampler(SCALED, "heun", 4, lambda schedule, steps: make_knots(schedule, steps, "linspace")),
        Sampler(SCALED, "heun", 4, "karras"),
        Sampler(SCALED, "heun", 5, "karras"),
        Sampler(SCALED.with_prediction("v_prediction"), "heun", 4, "karras"),
        Sampler(SCALED, "unipc", 4, disable_corrector=[1]),
        Sampler(SCALED, "unipc", 4),
    ]


def test_samplers_that_differ_are_never_equal() -> None:
    samplers = all_different()
    for a, b in combinations(samplers, 2):
        assert a != b, (a, b)
        assert a.table is not b.table
    assert len({*samplers}) == len(samplers)


def test_the_cache_tells_the_defaults_of_methods_apart() -> None:
    for eta, draws in ((1.0, 2), (0.0, 0), (0.3, 2)):
        method = Method("a", euler_ancestral, order=1, source="", defaults={"eta": eta})
        assert Sampler(SCALED, method, 3).table.draws == draws


def test_the_cache_tells_kinds_of_option_values_apart() -> None:
    gains = [
        Sampler(SCALED.with_prediction("sample"), OWN, 2, mode=mode).table
        for mode in (1, True, 1.0)
    ]
    assert [table.steps[0].carry[0][-1][1] for table in gains] == [1.0, 0.9, 1.1]
    for level, rows in ((0.0, 1), (-0.0, 2), (0.0, 1)):
        assert (
            len(
                Sampler(SCALED.with_prediction("sample"), OWN, 2, level=level)
                .table.steps[0]
                .carry[0]
            )
            == rows
        )


def test_a_bad_option_is_refused_whatever_was_made_before() -> None:
    """1 == True: the table of a right option must not stand in for a wrong one."""
    Sampler(SCALED, "unipc", 4, order=1)
    Sampler(SCALED, "heun", 4, "karras", rho=1.0, drop_last=True)
    for arguments, message in (
        ((SCALED, "unipc", 4), "order must be an integer, got True"),
        ((SCALED, "ddim", 4, "karras"), "rho must be a number, got True"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            Sampler(*arguments, **{message.split()[0]: True})
    with pytest.raises(ValueError, match=r"^drop_last must be True or False, got 1$"):
        Sampler(SCALED, "heun", 4, "karras", drop_last=1)


def test_the_same_sampler_said_in_other_ways_is_equal_and_has_one_table() -> None:
    first = Sampler(SCALED, "euler_ancestral", 4, "karras", rho=7.0, eta=0.0)
    for same in (
        Sampler(SCALED, "euler_ancestral", np.int64(4), "karras", rho=7, eta=-0.0),
        Sampler(SCALED, "Euler a Karras", torch.tensor(4), rho=np.float32(7), eta=np.float64(0)),
        pickle.loads(pickle.dumps(first)),
    ):
        assert same == first
        assert hash(same) == hash(first)
        assert same.table is first.table
        assert [type(value) for _, value in same.options] == [float, float]
    given = Sampler(SCALED, "heun", sigmas=[14.0, 1.0, 0.0])
    assert (
        given
        == Sampler(SCALED, "heun", sigmas=np.array([14.0, 1.0, 0.0]))
        == pickle.loads(pickle.dumps(given))
    )


@pytest.mark.parametrize(
    "sampler", [s for s in all_different() if "lambda" not in repr(s)], ids=lambda s: s.method.name
)
def test_pickles_are_equal(sampler: Sampler) -> None:
    hash(sampler)  # what a hash keeps is no part of the pickle
    twin = pickle.loads(pickle.dumps(sampler))
    assert twin == sampler
    assert hash(twin) == hash(sampler)


def test_methods_are_equal_in_every_fact() -> None:
    ancestral = METHODS["euler_ancestral"]
    changes = {
        "name": "other", "order": 2, "source": "", "evaluations": 2, "stochastic": False, "point_mass": False,
        "inverse": True, "reaches": (2, {"eta": 0.0}), "block": 2, "rewrites": (1,), "defaults": {"eta": 0.0},
        "grid": "karras", "grid_options": {"rho": 5.0}, "steps_option": "eta", "blocks": len, "aliases": {"x": {}},
        "formula": METHODS["ddim"].formula,
    }  # fmt: skip
    assert {*changes} == {*Method.__dataclass_fields__}
    for name, value in changes.items():
        assert replace(ancestral, **{name: value}) != ancestral, name
    assert replace(ancestral) == ancestral
    assert hash(replace(ancestral)) == hash(ancestral)
    assert ancestral != "euler_ancestral"
    for entry in (*METHODS.values(), *STANDALONE.values()):
        assert hash(entry) == hash(replace(entry))
        assert entry == replace(entry)


def test_clips_are_equal_where_they_clip_alike() -> None:
    clips = [
        Clip(1.0),
        Clip(0.5),
        DynamicThreshold(),
        DynamicThreshold(0.9),
        DynamicThreshold(0.9, 2.0),
    ]
    for a, b in combinations(clips, 2):
        assert a != b
    assert all(pickle.loads(pickle.dumps(clip)) == clip for clip in clips)


def test_exact() -> None:
    values: list[Any] = [
        1, True, 1.0, np.float32(1), "1", b"1", None, 0.0, -0.0, (1,), [1], (True,), {"a": 1}, {"a": 1.0}, {1}, {1.0},
        torch.ones(1), torch.ones(1, dtype=torch.int64), torch.ones(1, 1), np.ones(1), {"a": {}}, partial(print, 1),
        partial(print, True), Clip(1.0), Clip(2.0), print, len,
    ]  # fmt: skip
    for a, b in combinations(values, 2):
        assert exact(a) != exact(b), (a, b)
    for value in values:
        assert exact(value) == exact(pickle.loads(pickle.dumps(value)))
        hash(exact(value))
    assert exact(float("nan")) == exact(float("nan"))
    unhashable = type("Unhashable", (), {"__hash__": None})()
    assert exact(unhashable) == exact(unhashable) != exact(type(unhashable)())
