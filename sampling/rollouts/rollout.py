"""Rollouts: sampling runs with the density of every stochastic step, for policy gradients.

A step that draws noise is a Gaussian transition: its mean is the step's row without the draws, its
standard deviation the draws' coefficient. A draw that enters an input of the network before the
end of the step (churn, stochastic solvers of two stages) makes that input a transition of its own.
What a run does between two transitions is a function of the weights and of the transitions before.
So the density of a run is the product of its transitions, for every table:

    log p(y_1 ... y_K | x_T) = Σ_k log N(y_k; mean_k(y_1 ... y_(k-1), x_T), std_k²).

DDPO (Black et al. 2305.13301) and Flow-GRPO (Liu et al. 2505.05470) train with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..guidance import Network
from ..inference import Run
from ..kernel import combine, perform
from ..knots import Knot
from ..table import Table
from .actions import actions_of, row_at, segments

Prepare = Callable[[Network, Tensor], Run]
Noise = Callable[[float, float], Tensor]


@dataclass(frozen=True, eq=False)
class Transition:
    """A Gaussian transition of a run: ``sample`` has the mean ``mean`` and the deviation ``std``.

    Args:
        index: Its number in the rollout.
        step: The sampling step, from 0.
        timestep: The network's time at the start of that step.
        mean: Shape (batch, ...).
        std: The standard deviation of every element.
        sample: The x at the end of the step, or the network's input inside it, shape (batch, ...).

    >>> step = Transition(0, 0, 999.0, torch.zeros(2, 3), 1.0, torch.zeros(2, 3))
    >>> [round(value, 4) for value in step.log_prob.tolist()]
    [-2.7568, -2.7568]
    """

    index: int
    step: int
    timestep: float
    mean: Tensor
    std: float
    sample: Tensor

    @property
    def log_prob(self) -> Tensor:
        """The log-density of each image, shape (batch,): the sum over its elements, in float64.

        float32 on devices without float64.
        """
        n = self.mean[0].numel()
        return -0.5 * _squares(self.sample - self.mean, self.std) - n * (
            math.log(self.std) + 0.5 * math.log(2 * math.pi)
        )

    @property
    def mean_log_prob(self) -> Tensor:
        """``log_prob`` divided by the number of elements, as in the code of Flow-GRPO and DDPO.

        Its ratios are the number-of-elements-th root of the densities' ratios; clip ranges of these
        papers (1e-4 and below) belong to it.
        """
        return self.log_prob / self.mean[0].numel()

    def kl(self, reference: Transition) -> Tensor:
        """Return KL(this || reference) of each image, shape (batch,): a sum over its elements.

        Both have the same standard deviation, so it is (mean - reference mean)² / (2 std²). The
        code of Flow-GRPO divides it by the number of elements.
        """
        return 0.5 * _squares(self.mean - reference.mean, self.std)


def _squares(difference: Tensor, std: float) -> Tensor:
    """Return the sum of (difference / std)² for each image; a ratio of densities needs float64."""
    wide = torch.float32 if difference.device.type == "mps" else torch.float64
    return (difference / std).square().flatten(1).sum(1, dtype=wide)


@dataclass(frozen=True, eq=False)
class Rollout:
    """A run of a sampler with its transitions; made by ``Sampler.rollout``.

    Iterating gives the transitions. :meth:`replay` gives them under other weights.

    Args:
        table: The sampler's table.
        start: The state at the first knot.
        transitions: One for each draw that is used, in order.
        samples: The result of the run, equal to the sampler's call with the same arguments.
        prepare: Returns a run of the network with the rollout's conditions, guidance and clipping.

    >>> from alphabar.noising import NoiseSchedule
    >>> from alphabar.sampling import Sampler
    >>> sampler = Sampler(NoiseSchedule.flow(), "euler_ancestral", steps=4)
    >>> rollout = sampler.rollout(lambda x, t: -x, (2, 3), seeds=0)
    >>> [(step.step, round(step.std, 3)) for step in rollout]
    [(0, 0.75), (1, 0.471), (2, 0.236)]
    >>> same = rollout.replay(lambda x, t: -x, indices=[1])
    >>> torch.equal(next(same).log_prob, rollout.transitions[1].log_prob)
    True
    """

    table: Table
    start: Tensor
    transitions: tuple[Transition, ...]
    samples: Tensor
    prepare: Prepare

    def __iter__(self) -> Iterator[Transition]:
        return iter(self.transitions)

    def __len__(self) -> int:
        return len(self.transitions)

    @property
    def log_prob(self) -> Tensor:
        """The log-density of each whole run given its start, shape (batch,)."""
        return torch.stack([transition.log_prob for transition in self]).sum(0)

    def replay(
        self, network: Network, indices: Sequence[int] | None = None
    ) -> Iterator[Transition]:
        """Yield the transitions of the same samples under other weights, in order.

        Means have gradients if they are enabled; samples are constants. The sum of ``log_prob``
        minus the rollout's is the log-weight of each run, exactly, for functions of the
        transitions' samples. The last step of most samplers is deterministic: the dependence of
        ``samples`` on its weights is in no density.

        In tables without memory (DDIM, Euler a, flow_sde) the steps are independent given the
        samples: each is computed when it is asked for, with a graph of its own, so a loop can call
        ``backward`` for each one and hold the memory of one step. Multistep tables use past outputs
        of the network; these are computed again under the new weights, and the transitions share
        one graph: add them up before ``backward``.

        Args:
            network: Called as in the rollout, with the same conditions, guidance and clipping.
            indices: The transitions to yield; default: all.

        Raises:
            IndexError: The rollout has no such transition.
        """
        chosen = set(range(len(self)) if indices is None else indices)
        if not chosen <= set(range(len(self))):
            raise IndexError(
                f"indices must be in 0 ... {len(self) - 1}, the transitions of the rollout, got "
                f"{sorted(chosen)}"
            )
        return self._replayed(network, chosen)

    def _replayed(self, network: Network, chosen: set[int]) -> Iterator[Transition]:
        run = self.prepare(network, self.start)
        for first, last in segments(self.table):
            inside = [t for t in self if first <= t.step < last]
            wanted = [t for t in inside if t.index in chosen]
            if not wanted:
                continue
            end = wanted[-1].step + 1
            x = self.start
            if first:
                x = next(t.sample for t in reversed(self.transitions) if t.step < first)
            made, _ = advance(self.table, range(first, end), x, run, _nothing, inside)
            yield from (transition for transition in made if transition.index in chosen)


def roll_out(table: Table, run: Run, prepare: Prepare) -> Rollout:
    """Run a table from ``run.x``, without gradients, and keep its transitions.

    Raises:
        ValueError: A step is not Gaussian, see :func:`actions_of`.
    """
    with torch.no_grad():
        every = range(len(table.steps))
        made, samples = advance(table, every, run.x, run, lambda start, end: run.noise())
    return Rollout(table, run.x, tuple(made), samples, prepare)


def advance(
    table: Table,
    steps: Sequence[int],
    x: Tensor,
    run: Run,
    noise: Noise,
    recorded: Sequence[Transition] | None = None,
) -> tuple[list[Transition], Tensor]:
    """Run ``steps`` of a table from ``x``, with nothing remembered; return transitions and x.

    Args:
        noise: As in ``kernel.run``.
        recorded: The transitions of these steps in a rollout, whose samples are taken instead of
            new ones. The draws are those that give these samples from the means.
    """
    made: list[Transition] = []
    state, actions = [x], actions_of(table)
    taken = iter(recorded or ())
    for i in steps:
        step, basis, done = table.steps[i], list(state), 0
        given: list[Tensor] = []

        def evaluate(x: Tensor, knot: Knot, given: list[Tensor] = given) -> Tensor:
            return run.evaluate(given.pop() if given else x, knot)

        for action in actions[i]:
            perform(step.ops[done : action.place], basis, evaluate, noise, run.beside)
            done, row = action.place, row_at(step, action.place)
            mean = combine(tuple(term for term in row if term[0] not in action.draws), basis)
            scales = [c for k, c in row if k in action.draws]
            if recorded is None:
                index, sample = len(made), combine(row, basis)
            else:
                index, sample = (found := next(taken)).index, found.sample
                if len(scales) == 1:
                    basis[action.draws[0]] = (sample - mean) / scales[0]
                given.append(sample)
            timestep = table.knots[i].timestep
            made.append(Transition(index, i, timestep, mean, math.hypot(*scales), sample))
        perform(step.ops[done:], basis, evaluate, noise, run.beside)
        state = [combine(row, basis) for row in step.carry]
        if given:  # x itself is the transition's sample
            state[0] = given.pop()
    return made, state[0]


def _nothing(start: float, end: float) -> Tensor:
    """Return the place of a draw that is not known yet: a replay computes it or does not use it."""
    return torch.zeros(())
