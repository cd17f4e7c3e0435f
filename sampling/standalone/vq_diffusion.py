"""VQ-Diffusion: diffusion of discrete tokens by masking and replacing (Gu et al. 2111.14822).

A table cannot express it: x contains tokens, which have no linear combinations. There are K tokens
and [MASK], the class with index K. In a step of the forward chain a token stays with probability
α_t + β_t, becomes each other token with β_t and [MASK] with γ_t. [MASK] stays (eq. 7). So from x_0
to x_t, with ᾱ_t = Π α_i, γ̄_t = 1 - Π (1 - γ_i) and β̄_t = (1 - ᾱ_t - γ̄_t) / K (eq. 8),

    q(x_t = j | x_0) = ᾱ_t [j = x_0] + β̄_t for a token j,    q(x_t = [MASK] | x_0) = γ̄_t.

The chain from an earlier time n to s has the same form, with α = ᾱ_s / ᾱ_n and

    1 - γ = (1 - γ̄_s) / (1 - γ̄_n),

so steps can be skipped (eq. 13). All computations use logarithms. Times are 0 ... T - 1, as in
diffusers; -1 is clean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ...noising.utils.validation import require, require_same_shape, whole_number
from ..guidance import Network, guided_network
from ..inference import SeededNoise, checked_seeds, checked_shape, last, place, without_gradients
from .base import register_standalone

Levels = tuple[Tensor, Tensor, Tensor]
"""log α, log β, log γ of a part of the chain; the shapes broadcast to (batch, K, ...)."""


@dataclass(frozen=True)
class TokenSchedule:
    """The forward chain over tokens: ᾱ falls and γ̄ rises evenly over ``num_train_timesteps``.

    ``num_vec_classes`` counts the K tokens and [MASK], which is the last. The other arguments are
    those of VQDiffusionScheduler.

    Raises:
        ValueError: The levels are not in (0, 1), or a step cannot replace a token.

    >>> schedule = TokenSchedule(num_vec_classes=5)
    >>> schedule.add_noise(
    ...     torch.tensor([[0, 3]]),
    ...     torch.tensor([[0.0, 0.9]], dtype=torch.float64),
    ...     torch.tensor([99]),
    ... )
    tensor([[0, 4]])
    """

    num_vec_classes: int
    num_train_timesteps: int = 100
    alpha_cum_start: float = 0.99999
    alpha_cum_end: float = 0.000009
    gamma_cum_start: float = 0.000009
    gamma_cum_end: float = 0.99999

    def __post_init__(self) -> None:
        for name, least in (("num_vec_classes", 2), ("num_train_timesteps", 2)):
            value = getattr(self, name)
            require(value >= least, name, f"be at least {least}", value)
        falls = 1 > self.alpha_cum_start > self.alpha_cum_end > 0
        rises = 0 < self.gamma_cum_start < self.gamma_cum_end < 1
        if not (falls and rises):
            raise ValueError(
                "need 1 > alpha_cum_start > alpha_cum_end > 0 and the reverse for gamma_cum, got "
                f"{self}"
            )
        a, _, c = _cumulative(self)
        replaced = 1 - a - c
        if not bool((replaced[1:] > 0).all()) or not bool(
            (replaced[1:] * a[:-1] > replaced[:-1] * a[1:]).all()
        ):
            raise ValueError(
                "alpha_cum + gamma_cum must be below 1, to leave a chance for a replaced token, "
                f"got {self}"
            )

    @property
    def num_tokens(self) -> int:
        """K, which is also the index of [MASK]."""
        return self.num_vec_classes - 1

    def cumulative(self, t: Tensor, like: Tensor) -> Levels:
        """Return log ᾱ, log β̄, log γ̄ at times ``t`` of shape (batch,).

        They have the dtype of ``like`` (at least float32) and broadcast to its shape.
        """
        return self._shaped(self._at(t).log(), like)

    def between(self, n: Tensor, s: Tensor, like: Tensor) -> Levels:
        """Return log α, log β, log γ of the chain from times ``n`` to the later times ``s``."""
        early, late = self._at(n), self._at(s)
        alpha, unmasked = late[0] / early[0], (1 - late[2]) / (1 - early[2])
        beta = (unmasked - alpha) / self.num_tokens
        return self._shaped(torch.stack([alpha, beta, 1 - unmasked]).log(), like)

    def _at(self, t: Tensor) -> Tensor:
        table = _on_device(self, t.device)
        return table[:, t.to(table.device) + 1]

    def _shaped(self, levels: Tensor, like: Tensor) -> Levels:
        dtype = torch.promote_types(like.dtype, torch.float32)
        a, b, c = levels.to(like.device, dtype).view(3, -1, *[1] * (like.ndim - 1))
        return a, b, c

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t of q(x_t | x_0) (eq. 4 and 8).

        Args:
            x0: int64 tokens, (batch, ...).
            noise: Uniform in [0, 1), float64, in the shape of ``x0``.
            timesteps: Shape (batch,).

        Raises:
            ValueError: A shape, dtype, token or time is invalid.
        """
        self._check(x0, x0, timesteps)
        require_same_shape("noise", noise, "x0", x0)
        if noise.dtype != torch.float64:
            raise ValueError(
                f"noise must be float64, got {noise.dtype}: float32 is too coarse for the few "
                "tokens that are replaced"
            )
        a, b, c = (level.exp() for level in self.cumulative(timesteps, noise))
        replaced = ((noise - a) / b).floor().clamp(0, self.num_tokens - 1).long()
        x = torch.where(noise < a, x0, replaced)
        return torch.where(noise >= 1 - c, self.num_tokens, x)

    def posterior(
        self, log_p_x0: Tensor, x_t: Tensor, timesteps: Tensor, to: Tensor | None = None
    ) -> Tensor:
        """Return log p(x_n | x_t) = log Σ q(x_n | x_t, x_0) p(x_0) (eq. 5, 11 and 13).

        Args:
            log_p_x0: Normalized log probabilities, (batch, K, ...).
            x_t: int64 tokens, (batch, ...).
            timesteps: The times t, (batch,).
            to: The times n, (batch,); by default t - 1.

        Returns:
            Log probabilities, shape (batch, K + 1, ...).

        Raises:
            ValueError: The shapes do not fit.

        >>> schedule = TokenSchedule(num_vec_classes=3)
        >>> known = torch.tensor([[[0.0], [-torch.inf]]])  # x_0 is token 0
        >>> p = schedule.posterior(known, torch.tensor([[2]]), torch.tensor([50]))[0, :, 0].exp()
        >>> [round(value, 3) for value in p.tolist()]  # [MASK] mostly stays
        [0.02, 0.0, 0.98]
        """
        self._check(x_t, log_p_x0[:, 0], timesteps)
        to = timesteps - 1 if to is None else to
        a_s, b_s, c_s = self.cumulative(timesteps, log_p_x0)
        a_n, b_n, c_n = self.cumulative(to, log_p_x0)
        a, b, c = self.between(to, timesteps, log_p_x0)
        masked = (x_t == self.num_tokens).unsqueeze(1)
        same = _is_token(x_t, self.num_tokens)
        # q(x_s | x_0)
        log_q_s = torch.where(masked, c_s, torch.where(same, torch.logaddexp(a_s, b_s), b_s))
        log_q = torch.where(masked, c, torch.where(same, torch.logaddexp(a, b), b))  # q(x_s | x_n)
        u = log_p_x0 - log_q_s
        total = u.logsumexp(1, keepdim=True)
        # Σ_x_0 of q(x_s | x_n) q(x_n | x_0) / q(x_s | x_0) p(x_0)
        to_token = log_q + torch.logaddexp(u + a_n, total + b_n)
        to_mask = torch.where(masked, total + c_n, -torch.inf)
        return torch.cat([to_token, to_mask], 1)

    def losses(
        self,
        logits: Tensor,
        x0: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        auxiliary_weight: float = 5e-4,
    ) -> Tensor:
        """Return L_(t-1) + λ L_x0 of each sample, or L_0 at t = 0 (eq. 9 and 12, algorithm 1).

        In nats per token, shape (batch,). ``logits``: the network's output, (batch, K, ...), for
        the input ``x_t`` from :meth:`add_noise`. λ is ``auxiliary_weight``. With λ = 0, T times the
        mean over uniform times is the variational bound on -log p(x_0), without the constant L_T.

        >>> schedule, x0 = TokenSchedule(num_vec_classes=3), torch.tensor([[0, 1]])
        >>> schedule.losses(
        ...     100 * torch.tensor([[[1.0, 0], [0, 1]]]),
        ...     x0,
        ...     torch.tensor([[2, 1]]),
        ...     torch.tensor([50]),
        ... )
        tensor([0.])
        """
        self._check(x0, x_t, timesteps)
        log_p_x0 = log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
        known = torch.where(_is_token(x0, self.num_tokens), 0.0, -torch.inf).to(log_p_x0.dtype)
        log_q, log_p = (self.posterior(log_x0, x_t, timesteps) for log_x0 in (known, log_p_x0))
        # L_(t-1)
        kl = (
            torch.where(log_q > -torch.inf, log_q.exp() * (log_q - log_p), 0.0)
            .sum(1)
            .flatten(1)
            .mean(1)
        )
        # -L_x0, and at t = 0 also -L_0
        log_likelihood = log_p_x0.gather(1, x0.unsqueeze(1)).flatten(1).mean(1)
        return torch.where(timesteps == 0, -log_likelihood, kl - auxiliary_weight * log_likelihood)

    def prior(self, noise: SeededNoise, shape: tuple[int, ...]) -> Tensor:
        """Return tokens of p(x_T), nearly all [MASK] (eq. 10)."""
        _, b, c = _cumulative(self)[:, -1].tolist()
        # a number just below 1 gives num_tokens after rounding, which is [MASK]
        token = (noise.uniform(*shape[1:]) * self.num_tokens).long().clamp(max=self.num_tokens - 1)
        return torch.where(
            noise.uniform(*shape[1:]) < c / (c + self.num_tokens * b), self.num_tokens, token
        )

    def _check(self, x: Tensor, like: Tensor, timesteps: Tensor) -> None:
        if x.dtype != torch.int64 or x.ndim < 2:
            raise ValueError(
                f"tokens must be int64 of shape (batch, ...), got {x.dtype} of shape "
                f"{tuple(x.shape)}"
            )
        require_same_shape("tokens", x, "the tokens that the network speaks of", like)
        if timesteps.shape != x.shape[:1]:
            raise ValueError(
                f"timesteps must have shape ({x.shape[0]},), one for each sample, got "
                f"{tuple(timesteps.shape)}"
            )
        count = self.num_train_timesteps
        if (
            timesteps.device.type == "cpu"
            and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < count
        ):
            raise ValueError(
                f"timesteps must lie in 0 ... {count - 1}, got {int(timesteps.min())} ... "
                f"{int(timesteps.max())}"
            )
        if (
            x.device.type == "cpu"
            and x.numel()
            and not 0 <= int(x.min()) <= int(x.max()) <= self.num_tokens
        ):
            raise ValueError(
                f"tokens must lie in 0 ... {self.num_tokens}, got {int(x.min())} ... {int(x.max())}"
            )


@lru_cache(maxsize=16)
def _cumulative(schedule: TokenSchedule) -> Tensor:
    """Return ᾱ, β̄, γ̄ at the times -1, 0, ..., T - 1, in float64."""
    count = schedule.num_train_timesteps
    alpha = torch.linspace(
        schedule.alpha_cum_start, schedule.alpha_cum_end, count, dtype=torch.float64
    )
    gamma = torch.linspace(
        schedule.gamma_cum_start, schedule.gamma_cum_end, count, dtype=torch.float64
    )
    alpha, gamma = torch.cat([alpha.new_ones(1), alpha]), torch.cat([gamma.new_zeros(1), gamma])
    return torch.stack([alpha, (1 - alpha - gamma) / schedule.num_tokens, gamma])


@lru_cache(maxsize=16)
def _on_device(schedule: TokenSchedule, device: torch.device) -> Tensor:
    return _cumulative(schedule).to("cpu" if device.type == "mps" else device)  # MPS has no float64


def _is_token(x: Tensor, count: int) -> Tensor:
    return x.unsqueeze(1) == torch.arange(count, device=x.device).view(1, -1, *[1] * (x.ndim - 1))


class TokenProgress:
    """The state of a run over tokens: ``step`` of ``steps`` and the tokens ``x``.

    ``log_p_x0`` is log p(x_0 | x_t).
    """

    def __init__(self, step: int, steps: int, x: Tensor, log_p_x0: Tensor) -> None:
        self.step, self.steps, self.x, self.log_p_x0 = step, steps, x, log_p_x0

    @cached_property
    def denoised(self) -> Tensor:
        """The most probable clean tokens at this step."""
        return self.log_p_x0.argmax(1)


@register_standalone(
    "vq_diffusion", order=0, source="2111.14822", aliases={"VQDiffusionScheduler": {}}
)
@dataclass(frozen=True)
class VQDiffusion:
    """Draw tokens with a network that outputs logits of x_0.

    Called like a Sampler, with token indices for x. ``network(x, timesteps)`` takes int64 tokens
    (batch, ...) and int64 times, and returns logits or log probabilities (batch, K, ...).

    Args:
        schedule: The forward chain over tokens.
        steps: All T by default; fewer are spaced evenly from T - 1 on (eq. 13).

    Raises:
        ValueError: ``steps`` is out of range.

    >>> sampler = VQDiffusion(TokenSchedule(num_vec_classes=4), steps=10)
    >>> sampler(lambda x, t: torch.tensor([0.0, 50.0, 0.0]).expand(2, 6, 3).mT, (2, 6), seeds=0)[
    ...     0
    ... ]  # it knows x_0 = 1
    tensor([1, 1, 1, 1, 1, 1])
    """

    name: ClassVar[str]
    schedule: TokenSchedule
    steps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, TokenSchedule):
            got = type(self.schedule).__name__
            raise ValueError(
                f"vq_diffusion samples tokens on a TokenSchedule, got a {got}; take another sampler"
            )
        count = self.schedule.num_train_timesteps
        if self.steps is None:
            return
        try:
            steps = whole_number("steps", self.steps)
        except ValueError:
            steps = 0
        if not 1 <= steps <= count:
            raise ValueError(f"steps must be an integer between 1 and {count}, got {self.steps!r}")
        object.__setattr__(self, "steps", steps)

    @property
    def timesteps(self) -> list[int]:
        """The times given to the network, one for each step."""
        count = self.schedule.num_train_timesteps
        steps = self.steps or count
        return [round(count - i * count / steps) - 1 for i in range(steps)]

    def __call__(
        self, network: Network, shape_or_tokens: Sequence[int] | Tensor, **arguments: Any
    ) -> Tensor:
        """Return int64 tokens, shape (batch, ...). Arguments as in :meth:`iterate`."""
        return last(self.iterate(network, shape_or_tokens, **arguments)).x

    def iterate(
        self, network: Network, shape_or_tokens: Sequence[int] | Tensor, **arguments: Any
    ) -> Iterator[TokenProgress]:
        """Sample and yield after each step.

        Arguments as in ``Sampler.iterate``, without ``guidance_rescale`` and ``clip``. Guidance
        combines the logits (2205.16007, §3.1).

        Args:
            shape_or_tokens: The shape, to start from p(x_T), or the tokens x_T.

        Raises:
            ValueError: ``guidance_rescale`` or ``clip`` is set.
        """
        for name in ("guidance_rescale", "clip"):
            if arguments.get(name):
                raise ValueError(
                    f"{name} is for images of numbers, got {arguments.get(name)} for tokens; leave "
                    "it out"
                )
        shape = checked_shape(shape_or_tokens)
        device, _ = place(network, shape_or_tokens, arguments.get("device"), None)
        noise = SeededNoise(shape, checked_seeds(arguments.get("seeds")), device)
        given = isinstance(shape_or_tokens, Tensor)
        x = shape_or_tokens.to(device) if given else self.schedule.prior(noise, shape)
        guided = guided_network(
            network,
            arguments.get("conditioning") or {},
            arguments.get("unconditional"),
            arguments.get("guidance_scale", 1.0),
            0.0,
            shape[0],
        )
        return without_gradients(self._advance(x, guided, noise))

    def _advance(self, x: Tensor, network: Any, noise: SeededNoise) -> Iterator[TokenProgress]:
        times = [*self.timesteps, -1]
        for i, (s, n) in enumerate(pairwise(times)):
            s_in, n_in = (torch.full(x.shape[:1], t, device=x.device) for t in (s, n))
            logits = network(x, s_in)
            expected = (x.shape[0], self.schedule.num_tokens, *x.shape[1:])
            if tuple(logits.shape) != expected:
                raise ValueError(
                    f"the network must return logits of shape {expected}, got {tuple(logits.shape)}"
                )
            log_p_x0 = log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
            log_p = self.schedule.posterior(log_p_x0, x, s_in, n_in)
            # the largest of log p + Gumbel is drawn from p
            gumbel = -(-noise.uniform(*log_p.shape[1:]).log()).log()
            x = (log_p + gumbel).argmax(1)
            yield TokenProgress(i + 1, len(times) - 1, x, log_p_x0)
