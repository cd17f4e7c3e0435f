"""Tables of flags: each flag of diffusers or kohya, and the option of a scheme that it sets."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ...noising import LOSSES, NOISES, TIMESTEPS, WEIGHTINGS
from ...noising.utils.items import make_named, parse_item
from ...noising.utils.registry import Registry
from .options import Option, Said, contradiction


@dataclass(frozen=True)
class Flag:
    """A flag that sets one option of a scheme.

    Args:
        names: all names of the flag; the first one is alphabar's.
        schemes: schemes that have the option. If the user names no scheme, the first one is used.
        field: name of the option; None if the flag only selects the scheme.
        type: type of the value; bool for a switch.
        help: help text.
        needs: another flag that must select the scheme, if this flag selects none in any trainer.
        for_v: scheme to use instead of the first one if the network predicts v.
        zero_is_none: 0 means "not set".

    >>> Flag(("--snr_gamma",), ("min_snr",), "gamma").key
    'snr_gamma'
    """

    names: tuple[str, ...]
    schemes: tuple[str, ...]
    field: str | None = None
    type: Callable[[str], Any] = float
    help: str = ""
    needs: str | None = None
    for_v: str | None = None
    zero_is_none: bool = False
    instead_of: str | None = None
    """A scheme that the flag's own scheme replaces; the two are not combined."""

    @property
    def option(self) -> Option:
        """The flag as an :class:`Option` of a parser."""
        return Option(self.names, self.type, self.help, zero_is_none=self.zero_is_none)

    @property
    def key(self) -> str:
        """The key of the value in :class:`Said`."""
        return self.option.key

    def scheme(self, prediction: str | None) -> str:
        """Return the scheme to use if the user names none."""
        return self.for_v if self.for_v and prediction == "v_prediction" else self.schemes[0]


@dataclass
class Named:
    """A scheme under construction, its options, and the flags that selected it and set them."""

    name: str
    options: dict[str, Any]
    said: str
    words: dict[str, str]
    """How the user wrote each option."""
    by_item: bool = False

    def take(self, field: str, value: Any, written: str) -> None:
        """Set an option.

        Raises:
            ValueError: the option is already set to another value.
        """
        if field in self.options and self.options[field] != value:
            what = f"and {{}} say the same option, {field} of {self.name}, differently"
            raise contradiction(written, self.words[field], what)
        self.options.setdefault(field, value)
        self.words.setdefault(field, written)


@dataclass(frozen=True)
class Kind:
    """A kind of scheme, with the flag that names a scheme and the flags of its options.

    Args:
        flag: the flag that names a scheme.
        what: the kind's name in the help.
        registry: the schemes by name.
        default: the scheme to use without flags.
        flags: the flags of the options.
        several: whether schemes can be combined.
        also: names of other trainers for a scheme.

    >>> import argparse
    >>> from alphabar.training.flags.options import add_options, read_options
    >>> parser = argparse.ArgumentParser()
    >>> add_options(WEIGHTING.options, parser, parser)
    >>> args = parser.parse_args(["--loss_weighting", "soft_min_snr", "--snr_gamma", "3"])
    >>> WEIGHTING.chosen(read_options(args, WEIGHTING.options))
    [SoftMinSNR(floor=0.0, gamma=3.0)]
    """

    flag: str
    what: str
    registry: Registry[Any]
    default: str
    flags: tuple[Flag, ...]
    several: bool = False
    also: Mapping[str, str] | None = None

    @property
    def key(self) -> str:
        """The key of the value in :class:`Said`."""
        return self.option.key

    @property
    def option(self) -> Option:
        """The flag that names schemes, as an :class:`Option` of a parser."""
        usage = "NAME or NAME:option=value,...; names: {names}"
        help = f"{self.what}, {usage} (default: {self.default})"
        return Option(
            (self.flag,),
            str,
            help,
            names_of=ChainMap(dict(self.also or {}), cast(Any, self.registry)),
            several=self.several,
            metavar="ITEM",
        )

    @property
    def options(self) -> tuple[Option, ...]:
        """The flag that names schemes, and the flags of their options."""
        return (self.option, *(flag.option for flag in self.flags))

    def chosen(
        self, said: Said, prediction: str | None = None, common: Mapping[str, str] | None = None
    ) -> list[Any]:
        """Return the schemes that the flags describe, as objects.

        Args:
            said: the options of the command line.
            prediction: prediction type; some flags of kohya depend on it.
            common: options that every scheme has: keys of their flags, mapped to option names.

        Raises:
            ValueError: flags contradict each other; the message names both.
        """
        schemes = self.named(said, prediction)
        for key, field in (common or {}).items():
            for scheme in schemes if key in said.given else ():
                scheme.take(field, said.given[key], said.written(key))
        return [self._made(scheme) for scheme in schemes]

    def named(self, said: Said, prediction: str | None = None) -> list[Named]:
        """Return the schemes that the flags select, with their options; at least one."""
        schemes = self._items(said.given.get(self.key), said)
        count = len(schemes)
        for flag in self._in_order(said.given):
            self._place(flag, said.given[flag.key], schemes, said, prediction)
        if not schemes:
            schemes += self._items(said.weak.get(self.key), said)
            count = len(schemes)
        for flag in self._in_order(said.weak):
            self._fill(flag, said.weak[flag.key], schemes, count, said, prediction)
        order = list(self.registry)
        made_of_flags = sorted(schemes[count:], key=lambda scheme: order.index(scheme.name))
        return [*schemes[:count], *made_of_flags] or [Named(self.default, {}, "", {})]

    def _made(self, scheme: Named) -> Any:
        try:
            return make_named(scheme.name, scheme.options, self.registry)
        except ValueError as error:
            flags = dict.fromkeys([scheme.said, *scheme.words.values()])
            raise ValueError(f"{', '.join(filter(None, flags))}: {error}") from error

    def _items(self, text: str | None, said: Said) -> list[Named]:
        schemes = []
        for item in [] if text is None else text.split() if self.several else [text]:
            name, options = parse_item(item)
            written = f"{said.names.get(self.key, self.flag)} {item}"
            known = (self.also or {}).get(name, name)
            schemes.append(
                Named(known, dict(options), written, dict.fromkeys(options, written), by_item=True)
            )
        return schemes

    def _in_order(self, values: Mapping[str, Any]) -> list[Flag]:
        # flags with the fewest possible schemes come first
        return sorted(
            (flag for flag in self.flags if flag.key in values), key=lambda flag: len(flag.schemes)
        )

    def _place(
        self, flag: Flag, value: Any, schemes: list[Named], said: Said, prediction: str | None
    ) -> None:
        """Set the flag's option on the first scheme that has it; else add the flag's own scheme."""
        written = said.written(flag.key)
        scheme = next((scheme for scheme in schemes if scheme.name in flag.schemes), None)
        if scheme is None:
            refused = next((other for other in schemes if other.name == flag.instead_of), None)
            if refused is not None:
                what = f"makes another {refused.name} noise beside {{}}"
                raise contradiction(written, refused.said, what)
            # the default scheme cannot be combined
            if schemes and (not self.several or schemes[0].name == self.default):
                what = f"is an option of {flag.scheme(prediction)} and contradicts {{}}"
                raise contradiction(written, schemes[0].said, what)
            if flag.needs is not None and said.value(flag.needs.lstrip("-")) is None:
                raise ValueError(
                    f"{written} is an option of {flag.needs} and says nothing alone; give "
                    f"{flag.needs} as well"
                )
            scheme = Named(flag.scheme(prediction), {}, written, {})
            schemes.append(scheme)
        if flag.field is not None:
            scheme.take(flag.field, value, written)

    def _fill(
        self,
        flag: Flag,
        value: Any,
        schemes: list[Named],
        count: int,
        said: Said,
        prediction: str | None,
    ) -> None:
        """Set a weak value on the scheme that has the option, unless the option is already set.

        If no other scheme is selected, the weak value selects one.
        """
        scheme = next((scheme for scheme in schemes if scheme.name in flag.schemes), None)
        nothing_else = not schemes or (self.several and schemes[0].name != self.default)
        if (
            scheme is None
            and nothing_else
            and (flag.needs is None or flag.needs.lstrip("-") in said.weak)
        ):
            scheme = Named(flag.scheme(prediction), {}, said.written(flag.key), {})
            schemes.append(scheme)
        if scheme is not None and flag.field is not None and flag.field not in scheme.options:
            scheme.take(flag.field, value, said.written(flag.key))


WEIGHTING = Kind(
    "--loss_weighting",
    "weighting",
    WEIGHTINGS,
    "uniform",
    (
        Flag(
            ("--snr_gamma", "--min_snr_gamma"),
            (
                "min_snr",
                "soft_min_snr",
                "diffusers_min_snr_plus_one_v",
                "diffusers_pixart_min_snr_v",
            ),
            "gamma",
            help="min-SNR weighting with this gamma (2303.09556; the paper uses 5)",
        ),
        Flag(
            ("--p2_gamma",),
            ("p2",),
            "gamma",
            help="P2 weighting with this gamma (2204.00227; the paper uses 0.5, 1)",
        ),
        Flag(
            ("--p2_k",),
            ("p2",),
            "k",
            help="k of the P2 weighting (the paper uses 1)",
            needs="--p2_gamma",
        ),
        Flag(
            ("--sigmoid_bias",),
            ("sigmoid",),
            "bias",
            help="sigmoid weighting with this bias (2303.00848, 2410.19324)",
        ),
        Flag(
            ("--debiased_estimation_loss",),
            ("kohya_debiased_epsilon", "kohya_debiased_v"),
            type=bool,
            for_v="kohya_debiased_v",
            help="as in kohya: 1 / sqrt(SNR), where v is predicted 1 / (SNR + 1), SNR at most "
            "1000; the paper's "
            "(2310.08442) is --loss_weighting debiased",
        ),
        Flag(
            ("--scale_v_pred_loss_like_noise_pred",),
            ("kohya_scale_v_pred",),
            type=bool,
            help="as in kohya: weigh the v loss as the plain epsilon loss, SNR at most 1000; for "
            "every prediction type and "
            "without the limit --loss_weighting snr",
        ),
        Flag(
            ("--v_pred_like_loss",),
            ("kohya_v_pred_like",),
            "strength",
            zero_is_none=True,
            help="as in kohya: add this much of the plain v loss to the epsilon loss, SNR at most "
            "1000",
        ),
    ),
)

_THRESHOLD = ("pseudo_huber", "smooth_l1", "huber")

LOSS = Kind(
    "--loss_type",
    "loss",
    LOSSES,
    "l2",
    (
        Flag(
            ("--huber_c",),
            _THRESHOLD,
            "c",
            help="threshold of the Huber losses",
            needs="--loss_type",
        ),
        Flag(
            ("--huber_schedule",),
            _THRESHOLD,
            "schedule",
            type=str,
            help="how the threshold follows the noise level: constant, exponential, snr",
            needs="--loss_type",
        ),
        Flag(
            ("--huber_scale",),
            _THRESHOLD,
            "scale",
            help="factor of the threshold",
            needs="--loss_type",
        ),
    ),
    # "huber" has the meaning of sd-scripts and diffusers
    also={"huber": "pseudo_huber", "torch_huber": "huber"},
)

_LOGNORMAL = ("lognormal_sigma", "stratified_lognormal_sigma")

TIMESTEP = Kind(
    "--timestep_density",
    "timestep density",
    TIMESTEPS,
    "uniform",
    (
        Flag(
            ("--p_mean",),
            _LOGNORMAL,
            "mean",
            help="mean of ln sigma (2206.00364; EDM -1.2, EDM2 -0.4)",
        ),
        Flag(("--p_std",), _LOGNORMAL, "std", help="spread of ln sigma (EDM 1.2, EDM2 1.0)"),
    ),
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
            zero_is_none=True,
            help="strength of offset noise (0: none)",
        ),
        Flag(
            ("--noise_offset_random_strength",),
            ("offset", "adaptive_offset"),
            "random_strength",
            bool,
            "draw the strength of the offset from 0 ... noise_offset for each sample",
            needs="--noise_offset",
        ),
        Flag(
            ("--noise_offset_probability",),
            ("offset", "adaptive_offset"),
            "probability",
            help="share of samples that get an offset",
            needs="--noise_offset",
        ),
        Flag(
            ("--adaptive_noise_scale",),
            ("adaptive_offset",),
            "scale",
            zero_is_none=True,
            help="add this times the mean of the sample's channel to the strength of the offset",
            needs="--noise_offset",
            instead_of="offset",
        ),
        Flag(
            ("--multires_noise_iterations",),
            ("pyramid",),
            "iterations",
            int,
            "octaves of pyramid noise (0: none)",
            zero_is_none=True,
        ),
        Flag(
            ("--multires_noise_discount",),
            ("pyramid",),
            "discount",
            help="factor from one octave to the next",
            needs="--multires_noise_iterations",
        ),
        Flag(
            ("--input_perturbation", "--ip_noise_gamma"),
            ("input_perturbation",),
            "strength",
            zero_is_none=True,
            help="strength of input perturbation (2301.11706; 0: none, the paper uses 0.1)",
        ),
        Flag(
            ("--ip_noise_gamma_random_strength",),
            ("input_perturbation",),
            "random_strength",
            bool,
            "draw that strength from 0 ... input_perturbation for each sample",
            needs="--input_perturbation",
        ),
        Flag(
            ("--input_perturbation_steps",),
            ("input_perturbation",),
            "decay_steps",
            int,
            "optimizer steps over which input perturbation decays to 0",
            needs="--input_perturbation",
        ),
        Flag(
            ("--immiscible",),
            ("immiscible",),
            type=bool,
            help="assign noises to the nearest samples (2406.12303)",
        ),
        Flag(
            ("--optimal_transport",),
            ("optimal_transport",),
            type=bool,
            help="couple noises and samples by optimal transport (2302.00482)",
        ),
    ),
    several=True,
    also={"multires": "pyramid"},
)

KINDS: Sequence[Kind] = (WEIGHTING, LOSS, TIMESTEP, NOISE)
"""Every kind of scheme that has flags."""
