"""The sampler: a schedule, a method and a grid, compiled to a table and run on a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..noising import NoiseSchedule
from ..noising.registry import lookup
from ..noising.schedule import require_same_shape
from .grids import Grid, grid_options, make_knots
from .guidance import Network, guided_network
from .kernel import Progress, run
from .knots import Knot
from .methods import Method
from .names import resolve_method
from .table import Table, compile_table


@dataclass(frozen=True)
class Sampler:
    """Draw samples with a network that was trained on ``schedule``.

    ``method``: a name of the field ('dpmpp_2m', 'DPM++ 2M Karras', 'DPMSolverMultistepScheduler') or a Method. ``steps``: an
    integer in 1 ... T. ``grid``: a name of GRIDS or a function; by default what the name implies, or 'trailing'. Further
    options belong to the method (``eta``) or the grid (``rho``, ``steps_offset``). Frozen and picklable; holds no tensor.
    Raises ValueError for unknown names and options, and steps out of range.

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

    def __init__(
        self,
        schedule: NoiseSchedule,
        method: str | Method = "dpmpp_2m",
        steps: int = 20,
        grid: str | Grid | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {type(schedule).__name__}; e.g. NoiseSchedule.scaled_linear()"
            )
        resolved, implied = resolve_method(method)
        implied_grid: str = implied.pop("grid", "trailing")
        grid = implied_grid if grid is None else grid
        known = resolved.options | grid_options(grid)
        for name in options:
            lookup(f"option of {resolved.name} on the {grid} grid", name, known)
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in (implied | options).items()}
        values = {
            "schedule": schedule,
            "method": resolved,
            "steps": steps,
            "grid": grid,
            "options": tuple(sorted(given.items())),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        _ = self.table  # bad input fails here, before any work

    @property
    def table(self) -> Table:
        """The compiled table, made once per sampler value."""
        return _compiled(self)

    @property
    def knots(self) -> tuple[Knot, ...]:
        """The steps + 1 points that are visited, the last one clean."""
        return self.table.knots

    @property
    def timesteps(self) -> list[float]:
        """The times that the network is given, one for each step."""
        return [knot.timestep for knot in self.knots[:-1]]

    @property
    def sigmas(self) -> list[float]:
        """σ / α at every knot, in k-diffusion's convention (infinite where α is 0)."""
        return [knot.sigma_ve for knot in self.knots]

    @property
    def init_noise_scale(self) -> float:
        """The spread of x at the first knot for data of unit variance, sqrt(α² + σ²): 1 on variance preserving paths."""
        first = self.knots[0]
        return (first.alpha**2 + first.sigma**2) ** 0.5

    def __call__(self, network: Network, shape_or_noise: Sequence[int] | Tensor, **arguments: Any) -> Tensor:
        """Return samples, shape (batch, ...), float32 or better, on the network's device. Arguments as in :meth:`iterate`."""
        x = None
        for progress in self.iterate(network, shape_or_noise, **arguments):
            x = progress.x
        assert x is not None  # there is at least one step
        return x

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
    ) -> Iterator[Progress]:
        """Sample step by step: a generator, so that progress, previews and cancelling live in the caller's loop.

        ``network(x, timesteps, **conditioning)`` returns a tensor or an object with ``.sample``. ``shape_or_noise``: the shape
        (batch, ...), or standard normal noise to start from. ``seeds``: one for each image (or one int, counted up), for
        the first noise and all later draws, so an image does not depend on its batch; none: fresh ones, without touching the
        global generators. ``device`` and ``dtype`` (of the network's input) default to those of the network's parameters.
        Runs without gradients and leaves the network's train / eval flags alone.
        """
        device, dtype = _place(network, shape_or_noise, device, dtype)
        shape = tuple(shape_or_noise.shape if isinstance(shape_or_noise, Tensor) else shape_or_noise)
        if len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"the shape must be (batch, ...) of positive integers, got {shape}")
        noise = _SeededNoise(shape, seeds, device)
        evaluate = guided_network(network, conditioning or {}, unconditional, guidance_scale, guidance_rescale)
        start = shape_or_noise.to(device) if isinstance(shape_or_noise, Tensor) else noise()
        x = start.to(torch.promote_types(start.dtype, torch.float32)) * self.init_noise_scale
        whole = all(knot.timestep.is_integer() for knot in self.knots) and self.schedule.curve.is_discrete
        time_dtype = torch.int64 if whole else torch.promote_types(x.dtype, torch.float32)

        def call(x_in: Tensor, knot: Knot) -> Tensor:
            t = torch.full(
                (x_in.shape[0],), int(knot.timestep) if whole else knot.timestep, dtype=time_dtype, device=device
            )
            out = evaluate(x_in.to(dtype or x_in.dtype), t)
            require_same_shape("the network's output", out, "its input", x_in)  # it would broadcast silently
            return out

        steps = run(self.table, x, call, lambda start, end: noise())
        while True:
            with torch.no_grad():  # entered anew for each step: a generator must not leave its caller without gradients
                progress = next(steps, None)
            if progress is None:
                return
            yield progress

    def to_diffusers(self) -> dict[str, Any]:
        """Return what scheduler_config.json says of the sampler: its class, spacing and solver options.

        >>> Sampler(NoiseSchedule.scaled_linear(), "DPM++ 2M Karras").to_diffusers()["use_karras_sigmas"]
        True
        """
        spacing = self.grid if self.grid in ("linspace", "leading", "trailing") else "trailing"
        offset = dict(self.options).get("steps_offset", 0)
        karras = {"use_karras_sigmas": True} if self.grid == "karras" else {}
        return {**self.method.diffusers, "timestep_spacing": spacing, "steps_offset": offset, **karras}


@lru_cache(maxsize=128)
def _compiled(sampler: Sampler) -> Table:
    options = dict(sampler.options)
    of_grid = {k: v for k, v in options.items() if k in grid_options(sampler.grid)}
    of_method = {k: v for k, v in options.items() if k not in of_grid}
    knots = make_knots(sampler.schedule, sampler.steps, sampler.grid, **of_grid)

    def formula(*arguments: Any) -> Any:
        return sampler.method.formula(*arguments, **of_method)

    return compile_table(sampler.method.name, formula, knots, sampler.schedule.prediction, sampler.method.point_mass)


class _SeededNoise:
    """Standard normal noise in which every image has a CPU generator of its own."""

    def __init__(self, shape: tuple[int, ...], seeds: int | Sequence[int] | None, device: torch.device) -> None:
        batch = shape[0]
        if seeds is None:
            seeds = [torch.Generator().seed() for _ in range(batch)]
        elif isinstance(seeds, int):
            seeds = range(seeds, seeds + batch)
        if len(seeds) != batch:
            raise ValueError(f"need one seed for each of {batch} images, got {len(seeds)}")
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        noise = torch.empty(self.shape, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self.device, non_blocking=True)


def _place(
    network: Network, start: Any, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype | None]:
    parameter = (
        next((p for p in network.parameters() if p.is_floating_point()), None)
        if isinstance(network, nn.Module)
        else None
    )
    if device is None:
        device = parameter.device if parameter is not None else start.device if isinstance(start, Tensor) else "cpu"
    if dtype is None and parameter is not None:
        dtype = parameter.dtype
    return torch.device(device), dtype
