"""diffusers' scheduler classes as data (0.42): method, grid and options of each class.

An entry of CLASSES contains the config keys of a class and its grids. ``read_config`` converts a
scheduler config to the arguments of ``Sampler``; ``config_of_class`` writes a config. If a class
deviates from the grid that it names, ``Reading.lay`` reproduces the deviation, or ``Reading.slips``
describes it in words. diffusers is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from ...noising import Discrete, NoiseSchedule
from ...noising.utils.registry import lookup
from ..grids import grid_options, make_knots, split_options
from ..knots import Knot, start_scale

SPACINGS = ("linspace", "leading", "trailing")
FLAGS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}
"""The grids that a config selects by a flag."""

Lays = Mapping[str, Mapping[str, Any]]
"""The grids of a class, with the options that make our grids equal to its grids."""

WHOLE: Lays = {"linspace": {"rounded": True}, "leading": {}, "trailing": {}}
BETWEEN: Lays = {"linspace": {"interpolation": "sigma"}, "leading": {}, "trailing": {}}
DROPPED: Lays = {
    "linspace": {"rounded": True, "drop_last": True},
    "leading": {"drop_last": True},
    "trailing": {},
}
ROUNDED_SIGMAS: Lays = {
    "karras": {"rounding": "nearest"},
    "exponential": {"rounding": "down"},
    "beta": {"rounding": "down"},
}
PLAIN_SIGMAS: Lays = {"karras": {}, "exponential": {}, "beta": {}}


@dataclass(frozen=True)
class Key:
    """A config key: our option, the class's default, and our names for its values.

    ``replaced``: values of another class's config, and what the class takes in their place.
    """

    option: str
    default: Any
    values: Mapping[Any, Any] = field(default_factory=dict)
    replaced: Mapping[Any, Any] = field(default_factory=dict)

    def ours(self, value: Any) -> Any:
        """Return our value for a value of the config."""
        value = tuple(value) if isinstance(value, list) else value
        value = self.replaced.get(value, value)
        return self.values.get(value, value)

    def theirs(self, value: Any) -> Any:
        """Return the config's value for a value of ours; raise ValueError if there is none."""
        if not self.values:
            return list(value) if isinstance(value, tuple) else value
        return next(theirs for theirs, ours in self.values.items() if ours == value)

    def has(self, value: Any) -> bool:
        """Return whether the config can express this value."""
        return not self.values or value in self.values.values()


ENDS = {"zero": "zero", "sigma_min": "stay"}
FINAL = Key("final", "zero", ENDS)
ALPHA_TO_ONE = Key("final", True, {True: "zero", False: "stay"})
ALWAYS_SIGMA_MIN = {"final": "stay"}
LOWER = Key("lower_order_final", True)
ALL = ("epsilon", "v_prediction", "sample")
EPSILON_V = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class SchedulerClass:
    """The method, grids and options of a scheduler class.

    Args:
        method: Our method.
        lays: The grids of the class.
        spacing: Its default ``timestep_spacing``, or its only grid if ``spaced`` is False.
        spaced: Whether it has the key ``timestep_spacing``.
        keys: The config keys that are options of ours.
        fixed: The options that have a fixed value in the class.
        step: The options that are arguments of its ``step()``, with their defaults there.
        switch: A key, its default and the method for each of its values, if the key selects the
            method.
        predictions: The supported prediction types.
        ranged: Its σ-spaced grids have the range of its timestep-spaced one.
        cut: On σ-spaced grids, except with ``rounding="nearest"``, and on flows, its times are
            truncated to integers after rounding errors.
        strides: It steps by T // N on every grid.
        clamped: At zero terminal SNR it sets ᾱ = 2^-24.
        in_sigma: Its x is x / α, and its start σ z (unless spacing is leading).
        flow: The key of FLOW_LAYS for its flow grid.
        off: Keys that must be False, so that nothing is clipped.
        written: Whether our configs may name it.
    """

    method: str
    lays: Lays
    spacing: str = "linspace"
    spaced: bool = True
    keys: Mapping[str, Key] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    switch: tuple[str, bool, Mapping[bool, str]] | None = None
    predictions: tuple[str, ...] = ALL
    ranged: bool = False
    cut: bool = False
    strides: bool = False
    clamped: bool = False
    in_sigma: bool = False
    flow: str | None = None
    off: tuple[str, ...] = ()
    written: bool = True

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the class can be."""
        return tuple(self.switch[2].values()) if self.switch else (self.method,)


_CLIP, _THRESHOLD = ("clip_sample", "thresholding"), ("thresholding",)
_DDIM = SchedulerClass(
    "ddim",
    WHOLE,
    "leading",
    keys={"set_alpha_to_one": ALPHA_TO_ONE},
    fixed={"use_clipped_model_output": False},
    step={"eta": 0.0},
    strides=True,
    off=_CLIP,
)
_DDPM = SchedulerClass(
    "ddpm", WHOLE, "leading", keys={"variance_type": Key("variance_type", "fixed_small")}, off=_CLIP
)
_EULERS = SchedulerClass("euler", {**BETWEEN, **PLAIN_SIGMAS}, ranged=True, in_sigma=True)
_KDPM2 = replace(
    _EULERS,
    method="dpm_2",
    lays={**_EULERS.lays, "karras": {"rounding": "nearest"}},
    predictions=EPSILON_V,
)
_SOLVERS = SchedulerClass("", {**DROPPED, **ROUNDED_SIGMAS}, cut=True, off=_THRESHOLD, flow="early")
_DPM: dict[str, Key] = {
    "solver_order": Key("order", 2),
    "algorithm_type": Key("algorithm", "dpmsolver++"),
    "solver_type": Key(
        "solver_type", "midpoint", replaced=dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")
    ),
}
_LAMBDA = {"lambda_min_clipped": Key("lambda_min", -math.inf)}
_DPM_MULTISTEP = {
    **_DPM,
    "lower_order_final": LOWER,
    "euler_at_final": Key("euler_at_final", False),
}
_LCM = SchedulerClass(
    "lcm",
    {"lcm": {}},
    "lcm",
    spaced=False,
    keys={
        "original_inference_steps": Key("original_steps", 50),
        "timestep_scaling": Key("timestep_scaling", 10.0),
    },
    off=_CLIP,
)
_FLOW_SIGMAS: Lays = {
    "flow": {"end_shifted": True},
    **{grid: {"range_from": "flow"} for grid in PLAIN_SIGMAS},
}
_FLOWS = SchedulerClass(
    "euler", _FLOW_SIGMAS, "flow", spaced=False, predictions=("flow_prediction",)
)
_OWN_LCM = {"timestep_scaling": 1e9}  # c_skip = 0, c_out = 1

CLASSES: Mapping[str, SchedulerClass] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": replace(_DDIM, written=False),
    "DDIMInverseScheduler": replace(
        _DDIM,
        method="ddim_inverse",
        lays={"leading": {}, "trailing": {}},
        step={},
        off=("clip_sample",),
    ),
    "CogVideoXDDIMScheduler": replace(_DDIM, fixed={}, step={}, off=(), written=False),
    "CogVideoXDPMScheduler": replace(
        _DDIM, method="dpmpp_2m_sde", fixed={}, step={}, off=(), written=False
    ),
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": replace(_DDPM, written=False),
    "UnCLIPScheduler": replace(
        _DDPM,
        lays={"linspace": {"rounded": True}},
        spacing="linspace",
        spaced=False,
        keys={"variance_type": Key("variance_type", "fixed_small_log")},
        off=("clip_sample",),
        written=False,
    ),
    "PNDMScheduler": SchedulerClass(
        "pndm",
        WHOLE,
        "leading",
        keys={"set_alpha_to_one": replace(ALPHA_TO_ONE, default=False)},
        fixed={"combine": "output"},
        switch=("skip_prk_steps", False, {False: "pndm", True: "plms"}),
        predictions=EPSILON_V,
        strides=True,
    ),
    "EulerDiscreteScheduler": replace(
        _EULERS,
        keys={
            "final_sigmas_type": FINAL,
            "sigma_min": Key("sigma_min", None),
            "sigma_max": Key("sigma_max", None),
        },
        clamped=True,
    ),
    "EulerAncestralDiscreteScheduler": replace(
        _EULERS, method="euler_ancestral", lays=BETWEEN, predictions=EPSILON_V, clamped=True
    ),
    "HeunDiscreteScheduler": replace(_EULERS, method="heun", off=("clip_sample",)),
    "KDPM2DiscreteScheduler": _KDPM2,
    "KDPM2AncestralDiscreteScheduler": replace(_KDPM2, method="dpm_2_ancestral"),
    "LMSDiscreteScheduler": replace(_EULERS, method="lms", step={"order": 4}),
    "DPMSolverSDEScheduler": replace(_EULERS, method="dpmpp_sde", predictions=EPSILON_V),
    "DPMSolverMultistepScheduler": replace(
        _SOLVERS,
        method="dpm_solver_multistep",
        lays={**_SOLVERS.lays, "lu": {"rounding": "nearest"}},
        keys={**_DPM_MULTISTEP, **_LAMBDA, "final_sigmas_type": FINAL},
        clamped=True,
    ),
    "DPMSolverMultistepInverseScheduler": SchedulerClass(
        "dpm_solver_inverse",
        {"linspace": {"rounded": True}},
        keys={**_DPM_MULTISTEP, **_LAMBDA},
        fixed={"final": "sigma_min"},
        off=_THRESHOLD,
    ),
    "DPMSolverSinglestepScheduler": replace(
        _SOLVERS,
        method="dpm_solver_singlestep",
        lays={"linspace": DROPPED["linspace"], **ROUNDED_SIGMAS},
        spaced=False,
        keys={**_DPM, **_LAMBDA, "final_sigmas_type": FINAL},
    ),
    "DEISMultistepScheduler": replace(
        _SOLVERS,
        method="deis",
        keys={"solver_order": Key("order", 2), "lower_order_final": LOWER},
        fixed=ALWAYS_SIGMA_MIN,
    ),
    "UniPCMultistepScheduler": replace(
        _SOLVERS,
        method="unipc",
        keys={
            "solver_order": Key("order", 2),
            "solver_type": Key(
                "solver_type", "bh2", replaced=dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")
            ),
            "predict_x0": Key("predict_x0", True),
            "lower_order_final": LOWER,
            "disable_corrector": Key("disable_corrector", ()),
            "final_sigmas_type": FINAL,
        },
        clamped=True,
        flow="top",
    ),
    "SASolverScheduler": replace(
        _SOLVERS,
        method="sa_solver",
        keys={
            "predictor_order": Key("predictor_order", 2),
            "corrector_order": Key("corrector_order", 2),
            "algorithm_type": Key(
                "predict_x0",
                "data_prediction",
                {"data_prediction": True, "noise_prediction": False},
            ),
            "lower_order_final": LOWER,
            **_LAMBDA,
        },
        fixed={**ALWAYS_SIGMA_MIN, "tau": 1.0, "tau_timesteps": (200.0, 800.0), "pece": False},
    ),
    "LCMScheduler": _LCM,
    "TCDScheduler": replace(
        _LCM,
        method="tcd",
        keys={"original_inference_steps": Key("original_steps", 50)},
        step={"eta": 0.3},
    ),
    "FlowMatchLCMScheduler": replace(_FLOWS, method="lcm", fixed=_OWN_LCM),
    "FlowMatchEulerDiscreteScheduler": replace(
        _FLOWS, switch=("stochastic_sampling", False, {False: "euler", True: "lcm"})
    ),
    "FlowMatchHeunDiscreteScheduler": replace(
        _FLOWS, method="flow_heun", lays={"flow": {"end_shifted": True}}
    ),
    "EDMEulerScheduler": SchedulerClass(
        "euler",
        {"karras": {}},
        "karras",
        spaced=False,
        keys={"final_sigmas_type": FINAL},
        written=False,
    ),
    "EDMDPMSolverMultistepScheduler": SchedulerClass(
        "dpm_solver_multistep",
        {"karras": {}},
        "karras",
        spaced=False,
        keys={**_DPM_MULTISTEP, "final_sigmas_type": FINAL},
        written=False,
    ),
    "CMStochasticIterativeScheduler": SchedulerClass(
        "consistency",
        {"trailing": {"whole_stride": True, "final": "sigma_min"}},
        "trailing",
        spaced=False,
        written=False,
    ),
}
"""All classes that correspond to a sampler with a fixed table.

Classes that are determined by their name alone are in ``Method.aliases``.
"""


CLIPPED = {
    *("DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler"),
    *("DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler"),
}
"""The classes whose ``clip_sample`` is True where a config does not say it."""


@dataclass(frozen=True)
class Reading:
    """A scheduler config as arguments of ``Sampler``.

    The class may deviate from the grid that the arguments name; see ``lay`` and ``slips``.
    """

    kind: SchedulerClass
    spacing: str
    method: str
    grid: str
    options: Mapping[str, Any]
    init_noise: str
    flow: bool = False

    @property
    def of_grid(self) -> dict[str, Any]:
        """The options that belong to the grid."""
        return split_options(self.grid, self.options)[0]

    @property
    def of_method(self) -> dict[str, Any]:
        """The options that belong to the method."""
        return split_options(self.grid, self.options)[1]

    def arguments(self, schedule: NoiseSchedule) -> dict[str, Any]:
        """Return the options of ``Sampler`` that are this reading on a schedule."""
        options = dict(self.options)
        if self.flow and self.kind.flow == "early":
            options["start"] = 1 - 1 / schedule.num_train_timesteps
        if self.init_noise != "marginal":
            options["init_noise"] = self.init_noise
        return options

    def left_out(
        self, config: Mapping[str, Any], schedule: NoiseSchedule, steps: int
    ) -> Iterator[str]:
        """Yield, in words, what the class does with a config that ``arguments`` do not say."""
        if config.get("clip_sample", config.get("_class_name") in CLIPPED):
            limit = config.get("clip_sample_range", 1.0)
            yield f"it clips the clean sample; for the same give clip={limit} to the sampler's call"
        if config.get("thresholding"):
            ratio = config.get("dynamic_thresholding_ratio", 0.995)
            limit = config.get("sample_max_value", 1.0)
            yield (
                "it clips dynamically; for the same give "
                f"clip=DynamicThreshold({ratio}, {limit}) to the call"
            )
        if self.kind.clamped and not self.flow and schedule.has_zero_terminal_snr:
            yield "it starts at alpha = 0.00024, and the sampler at 0"
        yield from self.slips(schedule, steps)

    def lay(self, schedule: NoiseSchedule, steps: int) -> tuple[Knot, ...]:
        """Return the knots of the class, with the timesteps that it gives the network."""
        options = self.of_grid
        if self.flow and self.kind.flow == "early":
            options["start"] = 1 - 1 / schedule.num_train_timesteps
        ascending = self.method.endswith("_inverse")
        knots = _knots(schedule, steps, self.grid, ascending, tuple(sorted(options.items())))
        if knots[0].alpha == 0 and self.kind.clamped and not self.flow:
            knots = (Knot(knots[0].timestep, CLAMPED, math.sqrt(1 - CLAMPED**2)), *knots[1:])
        return knots

    def start_scale(self, first: Knot) -> float:
        """Return the standard deviation of a pipeline's start x, in our coordinates."""
        return start_scale(first, self.init_noise)

    def end_scale(self, last: Knot) -> float:
        """Return the factor of the result of a run, for a class that ends in x / α."""
        return 1 / last.alpha if self.kind.in_sigma else 1.0

    def fails(self, schedule: NoiseSchedule, steps: int) -> str | None:
        """Return, in words, why the class cannot run this number of steps; None if it can."""
        name = schedule.prediction.name
        if name not in self.kind.predictions and not (self.flow and name == "flow_prediction"):
            return f"it does not know prediction_type {name!r}"
        return next(
            (words for applies, words in FAILURES if applies(self, self.options, steps)), None
        )

    def slips(self, schedule: NoiseSchedule, steps: int) -> Iterator[str]:
        """Yield, in words, how the class deviates from the reading with this number of steps."""
        kind, options = self.kind, self.options
        discrete = isinstance(schedule.curve, Discrete)
        if (
            discrete
            and "trailing" in (self.grid, options.get("range_from"))
            and not _trails(schedule, steps)
        ):
            yield f"its trailing spacing has another number of steps than {steps}"
        spaced = (self.grid, options.get("range_from"))
        if discrete and steps == 1 and "linspace" in spaced and not options.get("drop_last"):
            yield "its linspace of one step starts at timestep 0"
        if kind.cut and self.grid in FLAGS and not self._rounds(schedule):
            yield "its times are cut to whole ones, and rounding errors decide to which"
        if kind.cut and steps + 1 > schedule.num_train_timesteps and self.grid in SPACINGS:
            yield f"it shows a time twice in {steps} steps"
        first = self.lay(schedule, steps)[0]
        if kind.in_sigma and first.sigma_ve > ROUNDED_FROM:
            yield (
                f"its x / alpha from sigma = {first.sigma_ve:.3g} down loses the digits of float32"
            )
        if kind.strides and not self._strides(schedule, steps):
            yield f"it steps by T // N, which is not the gap between its timesteps in {steps} steps"
        if (
            self.method == "ddpm"
            and options["variance_type"] == "fixed_large"
            and self.lay(schedule, steps)[-2].timestep
        ):
            yield "it ends with the noise of fixed_large"

    def _rounds(self, schedule: NoiseSchedule) -> bool:
        """Return whether the times are rounded to integers, as for Karras sigmas."""
        cosine = getattr(schedule.curve, "beta_schedule", "") == "squaredcos_cap_v2"
        by_table = (
            cosine and self.method == "dpm_solver_multistep" and self.grid in ("karras", "lu")
        )
        return self.options.get("rounding") == "nearest" and not by_table

    def _strides(self, schedule: NoiseSchedule, steps: int) -> bool:
        times = [k.timestep for k in self.lay(schedule, steps)]
        times = times[::-1] if self.method.endswith("_inverse") else times
        gap = schedule.num_train_timesteps // steps
        even = all(s - n == gap for s, n in pairwise(times[:-1])) and times[-2] < gap
        return even and (self.method != "pndm" or (gap % 2 == 0 and steps >= 4))


CLAMPED = 2.0**-12
"""The α that replaces 0 at zero terminal SNR (ᾱ = 2^-24)."""
ROUNDED_FROM = 1000.0
"""From this σ / α on, classes that store x / α in float32 have an error above 1e-4.

Measured on the cosine betas.
"""


@lru_cache(maxsize=128)
def _knots(
    schedule: NoiseSchedule,
    steps: int,
    grid: str,
    ascending: bool,
    options: tuple[tuple[str, Any], ...],
) -> tuple[Knot, ...]:
    return make_knots(schedule, steps, grid, ascending=ascending, **dict(options))


def _trails(schedule: NoiseSchedule, steps: int) -> bool:
    count = schedule.num_train_timesteps
    return len(np.arange(count, 0, -count / steps)) == steps


def _is_sde(options: Mapping[str, Any]) -> bool:
    return str(options.get("algorithm", "")).startswith("sde")


_Applies = Callable[[Reading, Mapping[str, Any], int], bool]
FAILURES: tuple[tuple[_Applies, str], ...] = (
    (
        lambda r, o, n: _is_sde(o) and o["order"] == 3,
        "its SDE of order 3 has a wrong coefficient, or none",
    ),
    (
        lambda r, o, n: (
            r.method.startswith("dpm_solver")
            and o["algorithm"].endswith("dpmsolver")
            and o.get("final") == "zero"
        ),
        "it refuses the noise prediction with final_sigmas_type 'zero'",
    ),
    (
        lambda r, o, n: r.method == "dpm_solver_singlestep" and o["algorithm"] == "sde-dpmsolver",
        "it has no sde-dpmsolver",
    ),
    (
        lambda r, o, n: (
            r.method == "dpm_solver_singlestep" and o["final"] != "zero" and n % o["order"] != 0
        ),
        "it lowers its order at the end of so many steps",
    ),
    (
        lambda r, o, n: (
            r.method == "unipc"
            and o["final"] == "zero"
            and (o["solver_type"] == "bh1" or not o["predict_x0"] or not o["lower_order_final"])
        ),
        "it is not finite into final_sigmas_type 'zero' with these options",
    ),
    (lambda r, o, n: r.method == "sa_solver" and o["corrector_order"] == 0, "it needs a corrector"),
    (
        lambda r, o, n: r.method == "ddpm" and o["variance_type"] == "fixed_large_log",
        "it is not a number there",
    ),
)
"""Unsupported cases of the classes: (a test of the reading, its options and steps; the text)."""


def read_config(config: Mapping[str, Any]) -> Reading:
    """Return the contents of a scheduler config; missing keys have the class's own defaults.

    Raises:
        ValueError: The class is unknown.

    >>> reading = read_config({"_class_name": "DEISMultistepScheduler"})
    >>> reading.method, reading.grid, reading.options["order"], reading.options["drop_last"]
    ('deis', 'linspace', 2, True)
    """
    kind = lookup("scheduler class", config.get("_class_name", ""), CLASSES)
    method = kind.method
    if kind.switch:
        key, default, methods = kind.switch
        method = methods[bool(config.get(key, default))]
    spacing = config.get("timestep_spacing", kind.spacing) if kind.spaced else kind.spacing
    flow = kind.flow is not None and bool(config.get("use_flow_sigmas"))
    flagged = [grid for grid, flag in FLAGS.items() if grid in kind.lays and config.get(flag)]
    grid = next(iter(flagged), "flow" if flow else spacing)
    if grid not in kind.lays and not flow:
        raise ValueError(
            f"{config['_class_name']} on {grid!r} spacing is no grid here; use "
            f"{' or '.join(kind.lays)}"
        )
    options = {
        **kind.step,
        **{key.option: key.ours(config.get(name, key.default)) for name, key in kind.keys.items()},
    }
    options |= {**kind.fixed, **(FLOW_LAYS[str(kind.flow)] if flow else kind.lays[grid])}
    if method == "lcm" != kind.method:  # a class that only samples like LCM
        options |= _OWN_LCM
    if kind.spaced and kind.ranged and flagged:
        options["range_from"] = spacing
    if kind.spaced and spacing == "leading":
        options["steps_offset"] = int(config.get("steps_offset", 0))
    if options.get("final") == "stay":
        options["final"] = (
            "sigma_min" if method.endswith("_inverse") else "repeat" if flow else "stay"
        )
    options = {name: value for name, value in options.items() if not _unread(name, value, grid)}
    init_noise = "sigma" if kind.in_sigma and spacing != "leading" else "marginal"
    init_noise = "unit" if flow else init_noise
    return Reading(kind, spacing, method, grid, options, init_noise, flow)


_CUT = {"drop_last": True, "rounding": "down"}
FLOW_LAYS: Lays = {"early": {"end": 0.0, **_CUT}, "top": {"largest": 1 - 1e-6, **_CUT}}
"""The flow grids of the solvers.

"early" starts 1 / T below the noise (``Reading.lay`` knows T); "top", of UniPC, just below it.
"""
_OF_GRIDS = ("sigma_min", "sigma_max", "lambda_min", "original_steps", "steps_offset", "final")


def _unread(option: str, value: Any, grid: str) -> bool:
    """Return whether an option of some grids has no effect on this one."""
    return option in _OF_GRIDS and (option not in grid_options(grid) or value is None)


def config_of_class(
    name: str, grid: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a config of a class on one of its grids, and the options that it cannot express.

    ``options`` are our options; they may contain ``range_from``, which is the spacing of a flagged
    grid, and ``method``.

    >>> config_of_class("DDPMScheduler", "trailing", {"variance_type": "fixed_large", "eta": 0.5})[
    ...     0
    ... ]["variance_type"]
    'fixed_large'
    """
    kind = CLASSES[name]
    spacing = (options.get("range_from") or kind.spacing) if grid in FLAGS else grid
    config: dict[str, Any] = {"_class_name": name}
    if kind.spaced:
        config |= {
            "timestep_spacing": spacing,
            "steps_offset": options.get("steps_offset", 0 if spacing == "leading" else 1),
        }
    config |= {flag: False for flagged, flag in FLAGS.items() if flagged in kind.lays}
    if grid in FLAGS:
        config[FLAGS[grid]] = True
    if kind.switch:
        key, default, methods = kind.switch
        config[key] = next(
            (said for said, method in methods.items() if method == options.get("method")), default
        )
    missing = {
        k: v
        for k, v in {**kind.fixed, **kind.step}.items()
        if k in options and options[k] != v and k != "final"
    }
    for key_name, key in kind.keys.items():
        value = options.get(key.option, key.ours(key.default))
        value = "stay" if key.option == "final" and value in ("sigma_min", "repeat") else value
        if not key.has(value):
            missing[key.option] = value
            value = key.ours(key.default)
        config[key_name] = key.theirs(value)
    if not math.isfinite(config.get("lambda_min_clipped", 0.0)):
        del config["lambda_min_clipped"]  # the default is infinite, which JSON cannot express
    if name == "DPMSolverSinglestepScheduler":
        config["lower_order_final"] = config["final_sigmas_type"] == "zero"
    return config | dict.fromkeys(kind.off, False), {name: options[name] for name in missing}


@cache
def _names() -> dict[str, str]:
    return {name.casefold(): name for name in CLASSES}


def class_named(name: object) -> str | None:
    """Return the class that a name is or starts with (a grid may follow it), else None.

    >>> class_named("eulerdiscretescheduler karras"), class_named("Euler")
    ('EulerDiscreteScheduler', None)
    """
    words = str(name).strip().replace("_", " ").split()
    return _names().get(words[0].casefold()) if words else None


def settings_of_class(name: str, grid: str | None = None) -> dict[str, Any]:
    """Return ``grid`` and the options of a class with its default options.

    The grid is the class's own, or ``grid``.

    >>> settings_of_class("EulerDiscreteScheduler")
    {'grid': 'linspace', 'final': 'zero', 'interpolation': 'sigma', 'init_noise': 'sigma'}
    """
    kind = CLASSES[name]
    config: dict[str, Any] = {"_class_name": name}
    if grid in FLAGS and grid in kind.lays:
        config[FLAGS[grid]] = True
    elif grid in kind.lays:
        config["timestep_spacing"] = grid
    reading = read_config(config)
    options = dict(reading.options) | (
        {"init_noise": reading.init_noise} if reading.init_noise != "marginal" else {}
    )
    # the class does not have this grid: keep only its method's options
    if grid is not None and reading.grid != grid:
        options = {**reading.of_method, **{k: v for k, v in options.items() if k == "init_noise"}}
    return {"grid": reading.grid if grid is None else grid, **options}
