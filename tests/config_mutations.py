"""Configs of every kind, damaged at random: keys dropped, values of other types, numbers out of
range, nests, repeats.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from alphabar.noising import Discrete, NoiseSchedule
from alphabar.noising.prediction import Consistency

ZERO = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
EXACT = [
    NoiseSchedule.scaled_linear(),
    ZERO,
    ZERO.shifted(2.0),
    NoiseSchedule.from_betas([0.01, 0.02, 0.1, 0.3], "sample"),
    NoiseSchedule(Discrete("laplace_diffusers")),
    NoiseSchedule.flow(shift=3.0),
    NoiseSchedule.flow().truncated(t_max=0.5),
    ZERO.truncated(t_max=199),
    NoiseSchedule.cosine(),
    NoiseSchedule.karras(),
    NoiseSchedule.variance_exploding(),
    NoiseSchedule.variance_preserving(),
    NoiseSchedule.sub_variance_preserving(),
    NoiseSchedule.karras(prediction=Consistency(sigma_min=0.002)),
]
CLASSES = (
    "DDIMScheduler",
    "HeunDiscreteScheduler",
    "CogVideoXDDIMScheduler",
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "EDMEulerScheduler",
    "LCMScheduler",
)
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, -0.5, 0.5, 1e-8, 1e-300, 1e300, 1e999, -1e999, float("nan"), 10**6, 10**6 + 1, 10**8,
    10**12, 10**400, "", "linear", "v_prediction", "karras", "x" * 1000, "0.01", [], [0.1, 0.2], [0.5] * 2000, [0.1, "a"],
    [[0.1]], [None], {}, {"name": "karras", "sigma_data": -1}, {"kind": "flow"}, {"kind": "flow", "shift": "a"}, {"a": {"b": 1}},
]  # fmt: skip
KEYS = [
    "bogus",
    "predicton_type",
    "beta_schedule",
    "use_flow_sigmas",
    "shift",
    "trained_betas",
    "kind",
    "num_train_timesteps",
]


def configs() -> list[tuple[bool, dict[str, Any]]]:
    """(whether it is our own, the config) of every kind."""
    found: list[tuple[bool, dict[str, Any]]] = [(True, schedule.to_config()) for schedule in EXACT]
    found += [
        (True, {k: v for k, v in config.items() if k != "fingerprint"}) for _, config in list(found)
    ]
    found += [(False, schedule.scheduler_config()) for schedule in EXACT[:4]]
    found += [(False, NoiseSchedule.flow(3.0).scheduler_config())]
    found += [
        (False, ZERO.scheduler_config() | {"_class_name": name, "shift": 2.0}) for name in CLASSES
    ]
    return found


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a nested value, as far as a few entries of each list."""
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from places(value[key])
    elif isinstance(value, list):
        for i in range(min(len(value), 3)):
            yield value, i
            yield from places(value[i])


def mutated(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return a copy with one to three damages."""
    config = copy.deepcopy(config)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(config))
        if not found:
            return config
        holder, key = rng.choice(found)
        damage = rng.choice(
            ("drop", "replace", "replace", "replace", "scale", "add", "nest", "swap")
        )
        value = holder[key]
        if damage == "drop":
            del holder[key]
        elif damage == "replace":
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif damage == "scale" and isinstance(value, int | float) and abs(value) < 1e300:
            holder[key] = rng.choice((value * 1000.0, value * 1e-9, -value, value * 10, int(value)))
        elif damage == "add" and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
        elif damage == "nest":
            holder[key] = [value] if rng.random() < 0.5 else {"value": value}
        elif damage == "swap":
            other, name = rng.choice(found)
            if other is not value and name in (
                other if isinstance(other, dict) else range(len(other))
            ):
                holder[key] = copy.deepcopy(other[name])
    return config


def text_of(config: dict[str, Any], rng: random.Random) -> bytes:
    """Return the file: the JSON, at times cut off, with a byte order mark, a key twice, or nested
    without end.
    """
    text = json.dumps(config)
    damage = rng.random()
    if damage < 0.02:
        return text[: rng.randrange(len(text))].encode()
    if damage < 0.04:
        return b"\xef\xbb\xbf" + text.encode()
    if damage < 0.06:
        return ('{"version": 1, ' + text[1:]).encode()
    if damage < 0.07:
        return (text[:-1] + ', "deep": ' + "[" * 3000 + "]" * 3000 + "}").encode()
    if damage < 0.08:
        content = bytearray(text.encode())
        content[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(content)
    return text.encode()
