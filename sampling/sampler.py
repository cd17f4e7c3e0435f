"""The sampler: a schedule, a method and a grid, compiled to a table and run on a network."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..noising import NoiseSchedule
from ..noising.io.files import CONFIG_NAME, EXACT_NAME, read_configs
from ..noising.io.hub import schedule_folder
from ..noising.utils.identity import exact
from ..noising.utils.registry import lookup
from .clipping import Change
from .grids import Grid, counts_evaluations, make_knots, split_options
from .guidance import Network
from .inference import Run, SeededNoise, Times, prepare_run, without_gradients
from .interop.diffusers_configs import nearest_config, sampler_config
from .interop.diffusers_reading import SamplerArguments, sampler_arguments
from .interop.presets import preset_arguments
from .kernel import Beside, Evaluate, Noise, Plan, Progress, Resolved, final, run
from .knots import Knot, start_scale
from .methods.base import Method
from .methods.given_table import OwnKnots, Replay, table_method
from .names import RUN_OPTIONS, resolve, resolve_settings
from .noise_sources import BrownianNoise
from .rollouts.actions import require_stochastic
from .rollouts.rollout import Rollout, roll_out
from .standalone import StandaloneEntry
from .table import Table, compile_table

DEFAULT_STEPS = 20
_CACHED = "_identity", "_compiled", "_plan", "_times", "_integer_timesteps"


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draw samples with a network that was trained on ``schedule``.

    Frozen and picklable; a pickle contains no tensor.

    Args:
        schedule: The NoiseSchedule of training.
        method: A known name ('dpmpp_2m', 'DPM++ 2M Karras', 'DPMSolverMultistepScheduler') or a
            Method. The name of a standalone sampler ('DPM adaptive') creates an object of its own
            class, which is called in the same way.
        steps: An integer in 1 ... T, by default 20.
        grid: A name of GRIDS or a function; by default the grid that the name implies, or the
            method's own.
        options: Options of the method (``eta``) or the grid (``rho``, ``final``).
            ``timesteps=[...]`` or ``sigmas=[...]`` replace steps and grid. ``init_noise="sigma"``
            starts from σ z instead of sqrt(α² + σ²) z, the standard deviation of the marginal;
            k-diffusion and the Euler family of diffusers start from σ z. "unit" starts from z, as
            the DPM-Solver classes of diffusers on flows.

    Raises:
        ValueError: A name or option is unknown, or steps are out of range.

    >>> schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    >>> sampler = Sampler(schedule, "DPM++ 2M Karras", steps=20)
    >>> sampler(lambda x, t: -x, (2, 4, 8, 8), seeds=[0, 1]).shape
    torch.Size([2, 4, 8, 8])
    """

    schedule: NoiseSchedule
    method: Method
    steps: int
    grid: str | Grid
    options: tuple[tuple[str, Any], ...]

    def __new__(
        cls,
        schedule: Any = None,
        method: str | Method | StandaloneEntry = "dpmpp_2m",
        steps: int | None = None,
        grid: str | Grid | None = None,
        **options: Any,
    ) -> Any:
        if schedule is not None and not isinstance(method, Method):
            entry, implied = resolve(method)
            if isinstance(entry, StandaloneEntry):
                given = {"steps": steps, "grid": grid} if grid is not None else {"steps": steps}
                return _make_standalone(entry, schedule, implied, given | options)
        return super().__new__(cls)  # copy and pickle call this without arguments

    def __init__(
        self,
        schedule: NoiseSchedule,
        method: str | Method = "dpmpp_2m",
        steps: int | None = None,
        grid: str | Grid | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {type(schedule).__name__}; e.g. "
                "NoiseSchedule.scaled_linear()"
            )
        settings = resolve_settings(method, steps, grid, options)
        values = {
            "schedule": schedule,
            "method": settings.method,
            "steps": DEFAULT_STEPS if settings.steps is None else settings.steps,
            "grid": settings.grid,
            "options": tuple(sorted(settings.options.items())),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        _ = self.table  # invalid input fails here, before any work

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, Sampler) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    def __getstate__(self) -> dict[str, Any]:
        return {k: value for k, value in vars(self).items() if k not in _CACHED}

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        return self.schedule, self.method, self.steps, exact(self.grid), exact(self.options)

    @property
    def name(self) -> str:
        """The name of its method."""
        return self.method.name

    @property
    def table(self) -> Table:
        """The compiled table, made once per sampler value."""
        return self._compiled

    @cached_property
    def _compiled(self) -> Table:
        return _compile(self)

    @cached_property
    def _plan(self) -> Plan:
        return Plan(self.table)

    @cached_property
    def _times(self) -> Times:
        return Times([knot.timestep for knot in self._plan.evaluated])

    @cached_property
    def _integer_timesteps(self) -> bool:
        whole = all(time.is_integer() for time in self._times.timesteps)
        return self.schedule.curve.is_discrete and whole

    @property
    def knots(self) -> tuple[Knot, ...]:
        """The steps + 1 visited points, the last one clean.

        DPM fast has fewer, because its steps count evaluations.
        """
        return self.table.knots

    @property
    def timesteps(self) -> list[float]:
        """The timesteps given to the network, one for each step."""
        return [knot.timestep for knot in self.knots[:-1]]

    @property
    def sigmas(self) -> list[float]:
        """The noise level at every knot, in the form of the ``sigmas=`` option.

        σ / α (infinite where α is 0), or σ on a flow path.
        """
        alpha, sigma = (
            torch.tensor([getattr(k, n) for k in self.knots], dtype=torch.float64)
            for n in ("alpha", "sigma")
        )
        return self.schedule.curve.grid_coordinate(alpha, sigma).tolist()

    @property
    def init_noise_scale(self) -> float:
        """The standard deviation of x at the first knot for data of unit variance, sqrt(α² + σ²).

        It is 1 on variance preserving paths. With ``init_noise="sigma"`` it is σ, with "unit" 1.
        """
        return start_scale(self.knots[0], dict(self.options).get("init_noise", "marginal"))

    @property
    def method_options(self) -> dict[str, Any]:
        """The options of the method, defaults included."""
        _, others = split_options(self.grid, dict(self.options))
        return self.method.options | {k: v for k, v in others.items() if k not in RUN_OPTIONS}

    def __call__(
        self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any
    ) -> Tensor:
        """Return samples, shape (batch, ...), float32 or better, on the network's device.

        Arguments as in :meth:`iterate`.
        """
        with torch.no_grad():
            steps, x, evaluate, noise, beside = self._begun(network, shape_or_noise, **arguments)
            start = [x]
            del x
            return final(steps, start, evaluate, noise, beside)

    def iterate(
        self,
        network: Network,
        shape_or_noise: Sequence[int] | Tensor,
        *,
        seeds: int | Sequence[int] | None = None,
        conditioning: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        clip: float | Change | None = None,
        noise: str = "independent",
    ) -> Iterator[Progress]:
        """Sample step by step, as a generator.

        The caller's loop can show progress and previews, and can cancel. Runs without gradients and
        does not change the network's train / eval mode.

        Args:
            network: ``network(x, timesteps, **conditioning)`` returns a tensor or an object with
                ``.sample``. It must leave x as it is, and return a new tensor at each call: methods
                of several steps keep the outputs of earlier calls.
            shape_or_noise: The shape (batch, ...), or standard normal noise to start from.
            seeds: One for each image, or one int, counted up; used for the first noise and all
                later draws, so an image does not depend on its batch. None: fresh seeds; the global
                generators are not used.
            conditioning: Values of any kind, passed to the network.
            unconditional: The same keys, for guidance. Both halves share one call with twice the
                batch if tensors have a row for each image or are equal for all images. Values that
                cannot be joined need two calls.
            guidance_scale: w in the guided output u + w (c - u). Methods with CFG++ use
                ``unconditional`` at w = 1 too; without it they take c for u.
            guidance_rescale: φ of :func:`guide`, between 0 and 1.
            device, dtype: Of the network's input; by default those of the network's parameters.
            clip: A limit for |x_0|, applied at every evaluation, or a ``DynamicThreshold``; for
                pixels, not latents.
            noise: 'independent' draws, or 'brownian', one path for each image that does not depend
                on the number of steps (needs torchsde).
        """
        arguments = {
            "seeds": seeds,
            "conditioning": conditioning,
            "unconditional": unconditional,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "device": device,
            "dtype": dtype,
            "clip": clip,
        }
        begun = self._begun(network, shape_or_noise, noise=noise, **arguments)
        return without_gradients(run(*begun))

    def _begun(
        self,
        network: Network,
        shape_or_noise: Sequence[int] | Tensor,
        *,
        noise: str = "independent",
        **arguments: Any,
    ) -> tuple[Sequence[Resolved], Tensor, Evaluate, Noise, Beside]:
        """Return the arguments of ``kernel.run``."""
        this = self._prepared(network, shape_or_noise, **arguments)
        source = lookup("noise", noise, NOISE_SOURCES)(this.noise, self.knots)
        steps = self._plan.steps_for(this.x, this.input_dtype)
        return steps, this.x, this.evaluate, source, this.beside

    def _require_guidance(self, guidance_scale: float, guidance_rescale: float) -> None:
        """Raise ValueError if the table is fitted with another guidance."""
        if self.table.provenance is not None:
            self.table.provenance.require_guidance(guidance_scale, guidance_rescale)

    def _prepared(
        self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any
    ) -> Run:
        plan = self._plan
        self._require_guidance(
            arguments.get("guidance_scale", 1.0), arguments.get("guidance_rescale", 0.0)
        )
        return prepare_run(
            self.schedule,
            self.knots[0],
            network,
            shape_or_noise,
            scale=self.init_noise_scale,
            times=self._times,
            draws=plan.draws,
            integer_timesteps=self._integer_timesteps,
            halves=plan.has_halves,
            **arguments,
        )

    def rollout(
        self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any
    ) -> Rollout:
        """Sample, and return the samples with the Gaussian transition of every stochastic step.

        For policy gradients (DDPO, Flow-GRPO); see :class:`Rollout` and docs/rollouts.md. The
        samples are those of a call with the same arguments. Runs without gradients.

        Args:
            network, shape_or_noise, arguments: as in :meth:`iterate`, without ``noise``: the draws
                are independent.

        Raises:
            ValueError: no step draws noise, or a step is not Gaussian.

        >>> sampler = Sampler(NoiseSchedule.flow(), "flow_sde", steps=4)
        >>> rollout = sampler.rollout(lambda x, t: -x, (2, 3), seeds=0)
        >>> len(rollout), rollout.samples.shape, rollout.log_prob.shape
        (3, torch.Size([2, 3]), torch.Size([2]))
        >>> weight = torch.tensor(-1.0, requires_grad=True)
        >>> for old, new in zip(rollout, rollout.replay(lambda x, t: weight * x)):
        ...     ratio = (new.log_prob - old.log_prob).exp()
        ...     ratio.mean().backward()
        >>> bool(weight.grad != 0)
        True
        """
        require_stochastic(self.table, self.method.options)
        if "noise" in arguments:
            raise ValueError(
                f"a rollout needs independent draws, got noise={arguments['noise']!r}; leave it out"
            )
        this = self._prepared(network, shape_or_noise, **arguments)

        def prepare(network: Network, start: Tensor) -> Run:
            return self._prepared(network, start, **{**arguments, "seeds": 0})

        return roll_out(self.table, this, prepare)

    def to_diffusers(self, nearest: bool = False) -> dict[str, Any]:
        """Return the scheduler_config.json of the sampler: its diffusers class and all its options.

        The class, loaded by diffusers and run with the same number of steps on the same noise,
        gives the same samples. With ``nearest`` the nearest class is returned if none is equal, and
        the differences are logged as a warning. The number of steps is not in a config.

        Raises:
            ValueError: No class gives the same samples; the error names the nearest class and the
                differences.

        >>> sampler = Sampler(NoiseSchedule.scaled_linear(), "DPM++ 2M Karras", rounding="nearest")
        >>> sampler.to_diffusers()["use_karras_sigmas"]
        True
        >>> Sampler(
        ...     NoiseSchedule.scaled_linear(), "res_multistep"
        ... ).to_diffusers()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: no scheduler class of diffusers is this sampler (res_multistep, 20 steps on ...
        """
        return sampler_config(self, nearest)

    @classmethod
    def from_diffusers(
        cls, config: Any, steps: int | None = None, tokens: int | None = None
    ) -> Any:
        """Return the sampler of a scheduler of diffusers, or of its config.

        Keys that the config leaves out have the defaults of its class. The number of steps is not
        in a config. What the class does and the sampler does not, clipping above all, is a warning.

        Args:
            config: a scheduler object, or the content of scheduler_config.json with
                ``_class_name``.
            steps: sampling steps, 20 by default.
            tokens: number of image tokens, for a shift that depends on it.

        Raises:
            ValueError: for a class that is not known, and for a config that is damaged.

        >>> config = {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True}
        >>> sampler = Sampler.from_diffusers(config, steps=10)
        >>> sampler.method.name, sampler.grid, sampler.steps
        ('unipc', 'karras', 10)
        """
        return cls._of_arguments(
            sampler_arguments(config, DEFAULT_STEPS if steps is None else steps, tokens)
        )

    @classmethod
    def preset(cls, name: str, steps: int | None = None, tokens: int | None = None) -> Any:
        """Return the sampler of a published model's pipeline.

        ``docs/presets.md`` lists the models. What the pipeline does and the sampler does not,
        clipping above all, is a warning.

        Args:
            name: a name of ``PRESETS``.
            steps: sampling steps, by default the pipeline's.
            tokens: image tokens, for a shift that depends on them.

        Raises:
            ValueError: for an unknown name, and for an expert, which samples a part of the way.

        >>> sampler = Sampler.preset("sd3", steps=4)
        >>> sampler.method.name, [round(t, 1) for t in sampler.timesteps]
        ('euler', [1000.0, 857.7, 602.2, 8.9])
        """
        return cls._of_arguments(preset_arguments(name, steps, tokens))

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        subfolder: str | None = None,
        steps: int | None = None,
        tokens: int | None = None,
        **hub_options: Any,
    ) -> Any:
        """Return the sampler of a diffusers pipeline, or of a folder of :meth:`save_pretrained`.

        Args:
            path_or_repo: a folder, or a repository of the Hugging Face hub ('owner/name').
            subfolder: a folder inside it; by default the folder itself, else its 'scheduler'.
            steps, tokens: as in :meth:`from_diffusers`.
            hub_options: as in :meth:`NoiseSchedule.from_pretrained`.

        Raises:
            FileNotFoundError: there is no scheduler_config.json.
            ValueError: as in :meth:`from_diffusers`, and for files that contradict each other.

        >>> import tempfile
        >>> folder = Sampler(NoiseSchedule.scaled_linear(), "dpmpp_2m").save_pretrained(
        ...     tempfile.mkdtemp()
        ... )
        >>> Sampler.from_pretrained(folder, steps=8).steps
        8
        """
        place = schedule_folder(path_or_repo, subfolder, **hub_options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the config leaves out is told below
            schedule = NoiseSchedule.from_pretrained(place, tokens=tokens)
        configs = read_configs(place)
        if CONFIG_NAME not in configs:
            raise FileNotFoundError(
                f"no {CONFIG_NAME} in {str(place)!r}, only {EXACT_NAME}, which says a schedule and "
                "no sampler; make it with Sampler(NoiseSchedule.from_pretrained(...), name)"
            )
        steps = DEFAULT_STEPS if steps is None else steps
        try:
            made = sampler_arguments(configs[CONFIG_NAME], steps, tokens)
            exact_one = schedule if EXACT_NAME in configs else made.schedule
            return cls._of_arguments(replace(made, schedule=exact_one))
        except ValueError as error:
            raise ValueError(f"{str(place / CONFIG_NAME)!r}: {error}") from error

    @classmethod
    def _of_arguments(cls, made: SamplerArguments) -> Any:
        sampler = cls(made.schedule, made.method, made.steps, made.grid, **made.options)
        for words in made.remarks:
            warnings.warn(words, stacklevel=3)
        return sampler

    def save_pretrained(self, folder: str | os.PathLike[str], nearest: bool = False) -> Path:
        """Write the schedule's two files, scheduler_config.json naming the sampler's class.

        The class, loaded by diffusers and set to the same number of steps, gives the same samples.

        Args:
            folder: the folder to write to.
            nearest: as in :meth:`to_diffusers`.

        Returns:
            The folder.

        Raises:
            ValueError: no class gives the same samples; nothing is written.
            OSError: the folder cannot be written.

        >>> import tempfile
        >>> Sampler(NoiseSchedule.linear(), "res_multistep").save_pretrained(
        ...     tempfile.mkdtemp()
        ... )  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: no scheduler class of diffusers is this sampler (res_multistep, 20 steps on ...
        """
        return self.schedule.save_pretrained(folder, sampler=self, nearest=nearest)

    @classmethod
    def from_table(cls, table: Table, schedule: NoiseSchedule | None = None) -> Sampler:
        """Return the sampler that runs a table of ``fit_table``.

        Calls must have the guidance of the fit, other values are an error. A pipeline of diffusers
        guides by itself: with :meth:`as_scheduler`, give the pipeline the same guidance.

        Args:
            table: The table.
            schedule: The schedule of the network; by default that of the fit.

        Raises:
            ValueError: The table is not fitted, or ``schedule`` is another one.

        >>> from alphabar.sampling import fit_table
        >>> schedule = NoiseSchedule.flow()
        >>> table = fit_table(lambda x, t: torch.tanh(x), schedule, 4, shape=(8,), seeds=16)
        >>> Sampler.from_table(table)(lambda x, t: torch.tanh(x), (2, 8), seeds=[0, 1]).shape
        torch.Size([2, 8])
        """
        if table.provenance is None:
            raise ValueError(f"{table.name}: the table says no schedule; use a table of fit_table")
        if schedule is not None:
            table.provenance.require_schedule(schedule)
        own = table.provenance.schedule if schedule is None else schedule
        return cls(own, table_method(table), len(table.steps), OwnKnots(table))

    def as_scheduler(self) -> Any:
        """Return a scheduler object of diffusers that runs this sampler in a pipeline.

        ``pipeline.scheduler = sampler.as_scheduler()``. Needs diffusers.

        Raises:
            ValueError: for methods that a pipeline cannot run, see :class:`TableScheduler`.

        >>> scheduler = Sampler(NoiseSchedule.linear(), "heun", steps=3).as_scheduler()
        >>> scheduler.timesteps.tolist()
        [999, 666, 666, 332, 332]
        """
        from .interop.scheduler import TableScheduler

        return TableScheduler(self)

    def nearest_config(self) -> dict[str, Any]:
        """Return the config of the scheduler class of diffusers that is nearest to this sampler.

        Raises ValueError where none is near. See :meth:`to_diffusers`.

        >>> Sampler(NoiseSchedule.linear(), "res_multistep").nearest_config()["_class_name"]
        'DPMSolverMultistepScheduler'
        """
        return nearest_config(self)[0]

    def table_from(self, step: int) -> Table:
        """Return the table that starts at a later step, with nothing remembered.

        >>> len(Sampler(NoiseSchedule.linear(), "dpmpp_2m", steps=5).table_from(2).steps)
        3
        """
        return _table(self, self.knots[step:])


def make_sampler(
    schedule: Any, name: str = "dpmpp_2m", steps: int | None = None, **options: Any
) -> Any:
    """Return the sampler of a name, typed for every kind of sampler.

    Equal to ``Sampler(schedule, name, steps, **options)``. ``schedule`` is a NoiseSchedule (VQ
    diffusion: a TokenSchedule).

    Raises:
        ValueError: A name or an option is unknown.

    >>> make_sampler(NoiseSchedule.linear(), "DPM adaptive", steps=20).order
    3
    >>> make_sampler(NoiseSchedule.linear(), "Euler a", steps=20).method.name
    'euler_ancestral'
    """
    return Sampler(schedule, name, steps, **options)


def _make_standalone(
    entry: StandaloneEntry, schedule: Any, implied: Mapping[str, Any], given: dict[str, Any]
) -> Any:
    """Return an object of the entry's class.

    ``steps`` is not passed if the class has no number of steps, or none is given.
    """
    steps = given.pop("steps", None)
    for option in given:
        lookup(f"option of {entry.name}", option, entry.options)
    if steps is not None and "steps" in entry.options:
        given["steps"] = steps
    return entry.factory(
        schedule, **({k: v for k, v in implied.items() if k in entry.options} | given)
    )


def _independent(drawn: SeededNoise, knots: Sequence[Knot]) -> Callable[[float, float], Tensor]:
    return lambda start, end: drawn()


def _brownian(drawn: SeededNoise, knots: Sequence[Knot]) -> Callable[[float, float], Tensor]:
    return BrownianNoise(drawn, knots)


NOISE_SOURCES: Mapping[
    str, Callable[[SeededNoise, Sequence[Knot]], Callable[[float, float], Tensor]]
] = {"independent": _independent, "brownian": _brownian}
"""The noise sources of stochastic steps, by name."""


@lru_cache(maxsize=128)
def _compile(sampler: Sampler) -> Table:
    of_grid, _ = split_options(sampler.grid, dict(sampler.options))
    knots = make_knots(
        sampler.schedule, sampler.steps, sampler.grid, ascending=sampler.method.inverse, **of_grid
    )
    if not counts_evaluations(sampler.grid):
        knots = sampler.method.boundaries(knots)
    return _table(sampler, knots)


def _table(sampler: Sampler, knots: Sequence[Knot]) -> Table:
    of_method = sampler.method_options
    if sampler.method.steps_option:
        of_method[sampler.method.steps_option] = sampler.steps

    def formula(*arguments: Any) -> Any:
        return sampler.method.formula(*arguments, **of_method)

    table = compile_table(
        sampler.method.name, formula, knots, sampler.schedule, sampler.method.point_mass
    )
    given = sampler.method.formula
    return replace(table, provenance=given.table.provenance) if isinstance(given, Replay) else table
