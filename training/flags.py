"""The tables of flags: which option of which scheme a flag that diffusers' and kohya's users know stands for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..noising import LOSSES, NOISES, TIMESTEPS, WEIGHTINGS
from ..noising.items import make, parse_item

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """A flag that is one option of a scheme.

    ``names``: how it is written, the first one is ours. ``schemes``: those that have the option; the first is meant where none
    is named. ``field``: the option, or none, where the flag only says the scheme. ``type``: of its value; bool for a switch.

    >>> Flag(("--snr_gamma",), ("min_snr",), "gamma").key
    'snr_gamma'
    """

    names: tuple[str, ...]
    schemes: tuple[str, ...]
    field: str | None = None
    type: Callable[[str], Any] = float
    help: str = ""

    @property
    def key(self) -> str:
        """The name under which argparse keeps the value."""
        return self.names[0].lstrip("-")

    def add_to(self, group: Any) -> None:
        """Add the flag to an argparse group."""
        how: dict[str, Any] = {"action": "store_const", "const": True} if self.type is bool else {"type": self.type}
        group.add_argument(*self.names, dest=self.key, default=None, help=self.help, **how)


@dataclass(frozen=True)
class Kind:
    """A kind of scheme: the flag that names it, the registry, what is meant without flags, and the flags of its options.

    ``several``: whether schemes can be combined. ``also``: names of other trainers for a scheme.

    >>> parser = argparse.ArgumentParser()
    >>> WEIGHTING.add_to(parser)
    >>> WEIGHTING.chosen(parser.parse_args(["--loss_weighting", "soft_min_snr", "--snr_gamma", "3"]))
    [SoftMinSNR(floor=0.0, gamma=3.0)]
    """

    flag: str
    what: str
    registry: Mapping[str, Callable[..., Any]]
    default: str
    flags: tuple[Flag, ...]
    several: bool = False
    also: Mapping[str, str] | None = None

    @property
    def key(self) -> str:
        """The name under which argparse keeps what was named."""
        return self.flag.lstrip("-")

    def add_to(self, group: Any) -> None:
        """Add the flag and those of the options to an argparse group."""
        help = (
            f"{self.what}, NAME or NAME:option=value,...; names: {', '.join(self.registry)} (default: {self.default})"
        )
        group.add_argument(self.flag, default=None, nargs="+" if self.several else None, metavar="ITEM", help=help)
        for flag in self.flags:
            flag.add_to(group)

    def chosen(self, args: argparse.Namespace, **more: Any) -> list[Any]:
        """Return what the flags say, made; ``more`` are options that every scheme has. Contradictions are a ValueError."""
        named = getattr(args, self.key) or []
        items = [parse_item(item) for item in ([named] if isinstance(named, str) else named)]
        schemes = [(self._registered(name), dict(options), f"{self.flag} {name}") for name, options in items]
        given = [flag for flag in self.flags if getattr(args, flag.key) is not None]
        for flag in sorted(given, key=lambda flag: len(flag.schemes)):  # those that leave least choice come first
            self._place(flag, getattr(args, flag.key), schemes)
        schemes = schemes or [(self.default, {}, "")]
        return [make(self.what, name, {**options, **more}, self.registry) for name, options, _ in schemes]

    def _registered(self, name: str) -> str:
        return (self.also or {}).get(name, name)

    def _place(self, flag: Flag, value: Any, schemes: list[tuple[str, dict[str, Any], str]]) -> None:
        """Give the flag's value to the first scheme that has its option; where none does, add the flag's own scheme."""
        options = next((options for name, options, _ in schemes if name in flag.schemes), None)
        if options is None:
            if schemes and (not self.several or schemes[0][0] == self.default):  # the default says: nothing else
                raise ValueError(
                    f"{flag.names[0]} is an option of {flag.schemes[0]} and contradicts {schemes[0][2]}; give one of the two"
                )
            options = {}
            schemes.append((flag.schemes[0], options, flag.names[0]))
        if flag.field is not None:
            options[flag.field] = value


def _or_none(text: str) -> float | None:
    """A strength, of which 0 means that there is none."""
    return float(text) or None


WEIGHTING = Kind(
    "--loss_weighting",
    "weighting",
    WEIGHTINGS,
    "uniform",
    (
        Flag(
            ("--snr_gamma", "--min_snr_gamma"),
            ("min_snr", "soft_min_snr"),
            "gamma",
            help="min-SNR weighting with this gamma (2303.09556; the paper uses 5)",
        ),
        Flag(
            ("--p2_gamma",), ("p2",), "gamma", help="P2 weighting with this gamma (2204.00227; the paper uses 0.5, 1)"
        ),
        Flag(("--p2_k",), ("p2",), "k", help="k of the P2 weighting (the paper uses 1)"),
        Flag(
            ("--sigmoid_bias",), ("sigmoid",), "bias", help="sigmoid weighting with this bias (2303.00848, 2410.19324)"
        ),
        Flag(
            ("--debiased_estimation_loss",),
            ("debiased",),
            type=bool,
            help="debiased weighting (2310.08442), for every prediction type as the paper has it",
        ),
        Flag(
            ("--scale_v_pred_loss_like_noise_pred",),
            ("snr",),
            type=bool,
            help="weigh as the plain epsilon loss does, whatever is predicted",
        ),
        Flag(
            ("--v_pred_like_loss",),
            ("v_like",),
            "strength",
            help="add this much of the plain v loss to the epsilon loss",
        ),
    ),
)

LOSS = Kind(
    "--loss_type",
    "loss",
    LOSSES,
    "l2",
    (
        Flag(("--huber_c",), ("pseudo_huber", "smooth_l1", "huber"), "c", help="threshold of the Huber losses"),
        Flag(
            ("--huber_schedule",),
            ("pseudo_huber", "smooth_l1", "huber"),
            "schedule",
            type=str,
            help="how the threshold follows the noise level: constant, exponential, snr",
        ),
        Flag(("--huber_scale",), ("pseudo_huber", "smooth_l1", "huber"), "scale", help="factor of the threshold"),
    ),
    # a script that says huber means what sd-scripts and diffusers call so
    also={"huber": "pseudo_huber", "torch_huber": "huber"},
)

_LOGIT_NORMAL = ("logit_normal", "stratified_logit_normal")
_LOGNORMAL = ("lognormal_sigma", "stratified_lognormal_sigma")

TIMESTEP = Kind(
    "--timestep_sampling",
    "timestep density",
    TIMESTEPS,
    "uniform",
    (
        Flag(("--logit_mean",), _LOGIT_NORMAL, "mean", help="mean of logit-normal timesteps; positive is more noise"),
        Flag(("--logit_std", "--sigmoid_scale"), _LOGIT_NORMAL, "std", help="spread of logit-normal timesteps"),
        Flag(
            ("--mode_scale",), ("mode", "stratified_mode"), "scale", help="scale of mode timesteps (2403.03206, eq. 20)"
        ),
        Flag(("--p_mean",), _LOGNORMAL, "mean", help="mean of ln sigma (2206.00364; EDM -1.2, EDM2 -0.4)"),
        Flag(("--p_std",), _LOGNORMAL, "std", help="spread of ln sigma (EDM 1.2, EDM2 1.0)"),
    ),
    also={"sigmoid": "logit_normal", "shift": "logit_normal", "sigma": "uniform"},  # the shift is the schedule's
)

NOISE = Kind(
    "--noise",
    "noise",
    NOISES,
    "gaussian",
    (
        Flag(
            ("--noise_offset",),
            ("offset", "adaptive_offset"),
            "strength",
            _or_none,
            "strength of offset noise (0: none)",
        ),
        Flag(
            ("--noise_offset_random_strength",),
            ("offset",),
            "random_strength",
            bool,
            "draw the strength of the offset from 0 ... noise_offset for each sample",
        ),
        Flag(("--noise_offset_probability",), ("offset",), "probability", help="share of samples that get an offset"),
        Flag(
            ("--adaptive_noise_scale",),
            ("adaptive_offset",),
            "scale",
            help="let the offset follow the mean of the sample's channel by this factor",
        ),
        Flag(("--multires_noise_iterations",), ("pyramid",), "iterations", int, "octaves of pyramid noise"),
        Flag(("--multires_noise_discount",), ("pyramid",), "discount", help="factor from one octave to the next"),
        Flag(
            ("--input_perturbation", "--ip_noise_gamma"),
            ("input_perturbation",),
            "strength",
            _or_none,
            "strength of input perturbation (2301.11706; 0: none, the paper uses 0.1)",
        ),
        Flag(
            ("--ip_noise_gamma_random_strength",),
            ("input_perturbation",),
            "random_strength",
            bool,
            "draw that strength from 0 ... input_perturbation for each sample",
        ),
        Flag(
            ("--input_perturbation_steps",),
            ("input_perturbation",),
            "decay_steps",
            int,
            "optimizer steps over which input perturbation decays to 0",
        ),
        Flag(("--immiscible",), ("immiscible",), type=bool, help="assign noises to the nearest samples (2406.12303)"),
    ),
    several=True,
    also={"multires": "pyramid"},
)

KINDS: Sequence[Kind] = (WEIGHTING, LOSS, TIMESTEP, NOISE)
"""Every kind of scheme that has flags."""
