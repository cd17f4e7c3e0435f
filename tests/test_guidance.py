"""Guidance: what is joined in one batch and what takes two calls come to the same; CFG++ does not
jump at scale 1.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alphabar.noising import NoiseSchedule
from alphabar.sampling import METHODS, Sampler, guide
from alphabar.sampling.guidance import guided_network
from alphabar.sampling.standalone.learned_variance import LearnedVariance
from alphabar.sampling.tracing import Unconditional

V = NoiseSchedule.scaled_linear(prediction="v_prediction")
SHAPE = (3, 2, 4)
START = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WORDS = {"": 0.0, "a cat": 0.4, "a dog": -0.3}


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-12)


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


@dataclass
class Prompt:
    text: str
    scale: Tensor


def total(value: Any) -> Any:
    """A number, or one for each image, of conditioning of any kind."""
    if isinstance(value, str):
        return WORDS[value]
    if isinstance(value, Prompt):
        return WORDS[value.text] + value.scale
    if isinstance(value, dict):
        return sum(total(part) for part in value.values())
    # a text for each image
    if isinstance(value, list | tuple) and value and isinstance(value[0], str):
        return rows(*(WORDS[text] for text in value))
    if isinstance(value, list | tuple):
        return sum(total(part) for part in value)
    return 0.0 if value is None else value


def network(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
    return torch.tanh(1.3 * x + total(conditioning)) * (0.5 + t.view(-1, 1, 1) / 2000)


EACH, OTHER = rows(0.1, 0.2, 0.3), rows(-0.5, 0.0, 0.5)
ONE, NONE = rows(0.7), rows(-0.2)
# the two halves, and whether one batch of twice the size can hold them
KINDS: dict[str, tuple[Any, Any, bool]] = {
    "a row for each image": (EACH, OTHER, True),
    "the same rows": (EACH, EACH, True),
    "one for all": (ONE, NONE, False),
    "the same for all": (ONE, ONE.clone(), True),
    "0-d": (torch.tensor(0.4), torch.tensor(-0.1), False),
    "the same 0-d": (torch.tensor(0.4), torch.tensor(0.4), True),
    "numbers": (0.4, -0.3, False),
    "the same number": (0.4, 0.4, True),
    "an int and a bool": (1, True, False),
    "texts": ("a cat", "", False),
    "None and a number": (0.5, None, False),
    "None": (None, None, True),
    "a list of tensors": ([EACH, 2 * EACH], [OTHER, OTHER], True),
    "a tuple of tensors": ((EACH, OTHER), (OTHER, OTHER), True),
    "a list that is as long as the batch": ([EACH, OTHER, EACH], [OTHER, OTHER, EACH], False),
    "lists of other lengths": ([EACH], [OTHER, OTHER], False),
    "a text for each image": (["a cat", "a dog", "a cat"], ["", "", ""], False),
    "the same texts for each image": (["a cat", "a dog", ""], ["a cat", "a dog", ""], False),
    "nested": (
        {"a": EACH, "deep": {"b": [OTHER], "c": 0.1}},
        {"a": OTHER, "deep": {"b": [EACH], "c": 0.1}},
        True,
    ),
    "nested with a number": (
        {"a": EACH, "deep": {"c": 0.1}},
        {"a": OTHER, "deep": {"c": 0.2}},
        False,
    ),
    "another kind of mapping": (OrderedDict(a=EACH), OrderedDict(a=OTHER), False),
    "objects": (Prompt("a cat", EACH), Prompt("", OTHER), False),
    "an object that is the same": (PROMPT := Prompt("a cat", EACH), PROMPT, False),
    "a tensor and a number": (EACH, 0.5, False),
    "dtypes": (EACH, OTHER.float(), False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside", [{}, {"more": (EACH, OTHER)}], ids=["alone", "mixed"])
def test_both_halves_get_their_own(kind: str, beside: dict[str, Any]) -> None:
    """Rows or not: the guided output is that of two plain calls, and of one batch where that can
    be.
    """
    one, other, joined = KINDS[kind]
    halves = {"y": (one, other), **beside}
    conditioning, unconditional = ({key: pair[i] for key, pair in halves.items()} for i in (0, 1))
    batches: list[int] = []

    def counted(x: Tensor, t: Tensor, **arguments: Any) -> Tensor:
        batches.append(len(x))
        return network(x, t, **arguments)

    t = torch.full((3,), 500)
    f = guided_network(counted, conditioning, unconditional, 3.0, 0.0, batch=3)
    without = network(START, t, **unconditional)
    assert close(f(START, t), guide(network(START, t, **conditioning), without, 3.0))
    assert f.unconditional is not None
    assert close(f.unconditional, without)
    assert batches == ([6] if joined else [3, 3])


@pytest.mark.parametrize(
    "kind", ["numbers", "texts", "a list of tensors", "objects", "one for all"]
)
def test_a_run_with_conditioning_of_any_kind(kind: str) -> None:
    one, other, _ = KINDS[kind]

    def mixed(x: Tensor, t: Tensor) -> Tensor:
        return guide(network(x, t, y=one), network(x, t, y=other), 3.0)

    for method in ("euler", "dpmpp_2m_cfg_pp"):
        guided, plain = (
            Sampler(V, method, 4)(network, START, conditioning={"y": one}, **arguments)
            for arguments in ({"unconditional": {"y": other}, "guidance_scale": 3.0}, {})
        )
        assert not torch.allclose(guided, plain, atol=1e-2)
    sampler = Sampler(V, "euler", 4)
    ours = sampler(
        network, START, conditioning={"y": one}, unconditional={"y": other}, guidance_scale=3.0
    )
    assert close(ours, sampler(mixed, START))


def test_one_image_is_a_batch() -> None:
    f = guided_network(network, {"y": ONE}, {"y": NONE}, 2.0, 0.0, batch=1)
    assert isinstance(f.both, dict)  # type: ignore[union-attr]
    longer = guided_network(
        lambda x, t, y: x + y.mean(), {"y": torch.ones(1, 5)}, {"y": torch.zeros(1, 3)}, 2.0, 0.0, 1
    )
    assert torch.equal(longer(torch.zeros(1, 2), torch.zeros(1)), torch.full((1, 2), 2.0))


def test_what_a_network_keeps_is_of_the_conditional_half() -> None:
    """The variance that is learned is read beside the prediction, also where the halves take two
    calls.
    """

    def double(x: Tensor, t: Tensor, y: Any) -> Tensor:
        return torch.cat([0.3 * x + y, torch.tanh(x + y)], 1)

    sampler = LearnedVariance(V, 4)
    numbers, tensors = (
        sampler(
            double,
            START,
            seeds=0,
            conditioning={"y": a},
            unconditional={"y": b},
            guidance_scale=2.0,
        )
        for a, b in ((0.4, -0.2), (rows(0.4, 0.4, 0.4), rows(-0.2, -0.2, -0.2)))
    )
    assert close(numbers, tensors)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            {"a": EACH},
            {"b": EACH},
            r"^conditioning 'y' has the keys \['a'\] and unconditional \['b'\]; give both the same$",
        ),
        (
            EACH,
            ONE,
            r"^conditioning 'y' has shape \(3, 1, 1\) and its unconditional one \(1, 1, 1\); give both the same$",
        ),
        ([EACH], [EACH[:2]], r"^conditioning 'y\[0\]' has shape "),
    ],
)
def test_halves_that_contradict(one: Any, other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(V, "euler", 2).iterate(
            network, SHAPE, conditioning={"y": one}, unconditional={"y": other}, guidance_scale=2.0
        )


# CFG++

CFG_PP = [
    name
    for name in METHODS
    if any(
        isinstance(op, Unconditional) for step in Sampler(V, name, 3).table.steps for op in step.ops
    )
]


def test_every_method_with_cfg_pp_is_found() -> None:
    assert {name for name in METHODS if "cfg_pp" in name or "cfgpp" in name} == {*CFG_PP}
    assert len(CFG_PP) >= 8


@pytest.mark.parametrize("method", CFG_PP)
@pytest.mark.parametrize("halves", [(EACH, OTHER), (0.4, -0.4)], ids=["joined", "apart"])
def test_the_scale_is_continuous_at_1(method: str, halves: tuple[Any, Any]) -> None:
    both = {"conditioning": {"y": halves[0]}, "unconditional": {"y": halves[1]}}
    sampler = Sampler(V, method, 5)
    at = {
        w: sampler(network, START, seeds=0, guidance_scale=w, **both)
        for w in (1 - 1e-6, 1, 1.0, 1 + 1e-6, 0.999, 1.001)
    }
    assert torch.equal(at[1], at[1.0])
    for w, x in at.items():
        assert float((x - at[1.0]).abs().max()) <= 100 * abs(w - 1), w
    # and the other half is of use there
    alone = sampler(network, START, seeds=0, conditioning={"y": halves[0]})
    assert float((at[1.0] - alone).abs().max()) > 1e-2


@pytest.mark.parametrize("method", CFG_PP)
def test_without_an_unconditional_input_the_halves_are_one(method: str) -> None:
    sampler = Sampler(V, method, 5)
    alone = sampler(network, START, seeds=0, conditioning={"y": EACH})
    same = sampler(network, START, seeds=0, conditioning={"y": EACH}, unconditional={"y": EACH})
    assert close(alone, same)


def test_other_methods_do_not_pay_for_a_half_that_they_do_not_use() -> None:
    batches: list[int] = []

    def counted(x: Tensor, t: Tensor, **arguments: Any) -> SimpleNamespace:
        batches.append(len(x))
        return SimpleNamespace(sample=network(x, t, **arguments))

    both = {"conditioning": {"y": EACH}, "unconditional": {"y": OTHER}}
    Sampler(V, "dpmpp_2m", 3)(counted, START, **both)
    assert batches == [3] * 3
    batches.clear()
    Sampler(V, "dpmpp_2m_cfg_pp", 3)(counted, START, **both)
    assert batches == [6] * 3
