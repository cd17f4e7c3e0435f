"""Provenance: what a table was fitted to, and how far it is from its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...noising import NoiseSchedule
from ...noising.utils.config_reading import mapping, number, whole, word

FITTED = "fitted"
"""The name of a table whose coefficients are fitted."""


@dataclass(frozen=True)
class Provenance:
    """The record of a fit: for what a table holds, and its error beside that of known methods.

    An error is the geometric mean over seeds that the fit does not use of |x - teacher| /
    |teacher|, x and teacher from the same noise.

    Args:
        schedule: The schedule of the fit.
        guidance_scale, guidance_rescale: The guidance of the fit.
        teacher: The sampler whose results are approximated, in words.
        evaluations: The number of network calls.
        seeds: The number of seeds of the fit.
        held_out: The number of seeds of the errors.
        start: The method that the coefficients were shrunk towards.
        refined: The iterations of refinement that were kept.
        error: The error of the table.
        known: The error of each known method with the same number of calls, the best first.
        fitted_error: The error of the fitted coefficients, whether the table has them or not.
        training_step: The optimizer step of the network, if it is known.

    >>> record = Provenance(
    ...     NoiseSchedule.linear(),
    ...     1.0,
    ...     0.0,
    ...     "dpmpp_2m, 80 steps",
    ...     5,
    ...     24,
    ...     8,
    ...     "ipndm",
    ...     0,
    ...     0.02,
    ...     (("unipc, karras", 0.08),),
    ...     0.02,
    ... )
    >>> record.helps, record.best_known
    (True, ('unipc, karras', 0.08))
    """

    schedule: NoiseSchedule
    guidance_scale: float
    guidance_rescale: float
    teacher: str
    evaluations: int
    seeds: int
    held_out: int
    start: str
    refined: int
    error: float
    known: tuple[tuple[str, float], ...]
    fitted_error: float
    training_step: int | None = None

    @property
    def helps(self) -> bool:
        """Whether the table is fitted; otherwise it is the best known method's."""
        return self.error < self.best_known[1]

    @property
    def best_known(self) -> tuple[str, float]:
        """The name and the error of the best known method."""
        return self.known[0]

    def require_schedule(self, schedule: NoiseSchedule) -> None:
        """Raise ValueError unless ``schedule`` is that of the fit."""
        if schedule.fingerprint != self.schedule.fingerprint:
            raise ValueError(
                f"the table was fitted under the schedule {self.schedule}, and this is {schedule}; "
                "fit a table under this schedule"
            )

    def require_guidance(self, guidance_scale: float, guidance_rescale: float = 0.0) -> None:
        """Raise ValueError unless the guidance is that of the fit."""
        given, own = (
            (guidance_scale, guidance_rescale),
            (self.guidance_scale, self.guidance_rescale),
        )
        if given != own:
            raise ValueError(
                f"the table was fitted with {_guidance(*own)}, and this run has "
                f"{_guidance(*given)}; fit a table with this guidance"
            )

    def to_config(self) -> dict[str, Any]:
        """Return plain JSON; :meth:`from_config` makes an equal record from it."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "schedule": self.schedule.to_config(),
            "known": [list(pair) for pair in self.known],
        }

    @classmethod
    def from_config(cls, config: Any) -> Provenance:
        """Return the record of a config.

        Raises ValueError if a key is missing or a value has the wrong type.
        """
        values = mapping("the provenance of a table", config)
        for name in cls.__dataclass_fields__:
            if name not in values:
                raise ValueError(f"the provenance of a table has no {name!r}; fit the table anew")
        step = values["training_step"]
        known = values["known"]
        if not (
            isinstance(known, list)
            and known
            and all(isinstance(pair, list) and len(pair) == 2 for pair in known)
        ):
            raise ValueError(f"known must be pairs of a name and an error, got {known!r}")
        return cls(
            schedule=NoiseSchedule.from_config(values["schedule"]),
            **{name: word(name, values[name]) for name in ("teacher", "start")},
            **{
                name: whole(name, values[name])
                for name in ("evaluations", "seeds", "held_out", "refined")
            },
            **{
                name: number(name, values[name])
                for name in ("guidance_scale", "guidance_rescale", "error", "fitted_error")
            },
            known=tuple((word("known", n), number("known", e)) for n, e in known),
            training_step=None if step is None else whole("training_step", step),
        )


def _guidance(scale: float, rescale: float) -> str:
    more = f" and guidance_rescale={rescale:g}" if rescale else ""
    return f"guidance_scale={scale:g}{more}"
