"""Local differential privacy: noise that is calibrated to an epsilon, with the number of messages accounted for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import DefenderContext, Defense, Guarantee, MessageKind, PreparedModel
from mocosfl_priv.defending import clip_mean_magnitude, clip_rms, gaussian_like, laplace_like

Mechanism = Literal["gaussian", "laplace"]


class LocalDP(Defense):
    """Clip each message and add the noise that makes it, or a whole training, (epsilon, delta)-locally private.

    In the local model any two images are neighbours, and their clipped messages differ by up to twice the clip, in L2
    for Gaussian and in L1 for Laplace noise: that is the sensitivity. What follows holds for adaptively chosen
    messages, whatever the client's weights are, since clipping does not depend on them.

    Not covered: what others than an image's own messages say of it. Clients that learn from an image hold it in
    their weights, which training averages in the clear, and which make the messages of other images; clients that
    are frozen do not. Nor are side channels of floating-point noise (Mironov, CCS 2012): noise is drawn in the
    messages' float32, also where the client computes in bfloat16.

    epsilon, delta: of one message, or of all the messages that training makes of one image (`per`); delta 0 takes
    Laplace noise. mechanism: the noise's distribution. per: what epsilon holds for, one message or the whole training.
    clip: of a message's size per element, which is its root mean square (gaussian) or mean absolute value (laplace),
    or of its whole norm, L2 or L1 (`clip_of`). clip_of: whether clip bounds a message's size per element or its norm.
    """

    randomised = True

    def __init__(
        self,
        epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0,
        delta: Annotated[float, Field(ge=0, lt=1)] = 1e-5,
        mechanism: Mechanism = "gaussian",
        per: Literal["message", "training"] = "message",
        clip: Annotated[float, Field(gt=0)] = 1.0,
        clip_of: Literal["element", "message"] = "element",
    ) -> None:
        if mechanism == "gaussian" and delta == 0:
            raise ValueError("delta: Gaussian noise has no epsilon at delta 0; use mechanism laplace or a larger delta")
        self.epsilon = epsilon
        self.delta = delta
        self.mechanism: Mechanism = mechanism
        self.per = per
        self.clip = clip
        self.clip_of = clip_of
        # of the noise, in units of the sensitivity; how many messages a training makes is known in `prepare`
        self.noise_multiplier = noise_multiplier(mechanism, epsilon, delta, 1) if per == "message" else None

    def prepare(self, context: DefenderContext) -> PreparedModel | None:
        """Calibrate to the experiment's number of messages; there is no model to start from."""
        if self.per == "training":
            self.noise_multiplier = noise_multiplier(
                self.mechanism, self.epsilon, self.delta, context.messages_per_image
            )
        return None

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: MessageKind = MessageKind.INFERENCE) -> Tensor:
        assert self.noise_multiplier is not None
        elements = smashed[0].numel()
        # the norm of a message whose elements are all 1: sizes per element times this are norms
        norm = elements**0.5 if self.mechanism == "gaussian" else elements
        clip = self.clip if self.clip_of == "element" else self.clip / norm
        noise = 2 * norm * self.noise_multiplier  # in units of the clip per element
        if self.mechanism == "gaussian":
            return clip_rms(smashed, clip) + noise * clip * gaussian_like(smashed, rng)
        return clip_mean_magnitude(smashed, clip) + noise * clip * laplace_like(smashed, rng)

    def guarantee(self, messages: int) -> Guarantee:
        assert self.noise_multiplier is not None
        epsilon = spent(self.mechanism, self.noise_multiplier, self.delta, messages)
        return Guarantee(epsilon, self.delta, messages, self._mu(messages))

    def _mu(self, messages: int) -> float | None:
        """Gaussian noise is mu-GDP with mu = sensitivity / deviation, and k messages with sqrt(k) mu (Dong et al.)."""
        assert self.noise_multiplier is not None
        return messages**0.5 / self.noise_multiplier if self.mechanism == "gaussian" else None


def noise_multiplier(mechanism: Mechanism, epsilon: float, delta: float, messages: int) -> float:
    """The noise, in units of the sensitivity, with which `messages` messages together are (epsilon, delta)-private.

    Standard deviation for gaussian, scale for laplace. See :func:`spent`.
    """
    import dp_accounting as dp  # takes seconds

    if mechanism == "gaussian":
        return float(dp.get_sigma_gaussian(epsilon, delta) * messages**0.5)
    sum_of_epsilons = messages / epsilon
    if _renyi_epsilon(sum_of_epsilons, delta, messages) >= epsilon:  # nothing to gain from delta
        return sum_of_epsilons
    return float(
        dp.calibrate_dp_mechanism(
            _renyi_accountant,
            lambda scale: dp.SelfComposedDpEvent(dp.LaplaceDpEvent(scale), messages),
            epsilon,
            delta,
            dp.ExplicitBracketInterval(1e-3 * min(1.0, sum_of_epsilons), sum_of_epsilons),
            tol=1e-6 * sum_of_epsilons,
        )
    )


def spent(mechanism: Mechanism, multiplier: float, delta: float, messages: int) -> float:
    """The epsilon, at `delta`, of `messages` messages with noise of `multiplier` times the sensitivity.

    gaussian: exact (Balle and Wang, ICML 2018); k messages are one with a deviation smaller by sqrt(k). laplace: the
    smaller of the sum of the messages' epsilons and the Renyi accountant's (Mironov, CSF 2017). The latter is right
    for vectors, too: the Renyi divergence of shifted Laplace noise is convex in the shift and 0 at none, so the worst
    of all shifts of one L1 norm moves a single element.
    """
    import dp_accounting as dp  # takes seconds

    if mechanism == "gaussian":
        return float(dp.get_epsilon_gaussian(multiplier / messages**0.5, delta))
    return min(messages / multiplier, _renyi_epsilon(multiplier, delta, messages))


def _renyi_epsilon(multiplier: float, delta: float, messages: int) -> float:
    import dp_accounting as dp

    event = dp.SelfComposedDpEvent(dp.LaplaceDpEvent(multiplier), messages)
    return float(_renyi_accountant().compose(event).get_epsilon(delta))


def _renyi_accountant() -> Any:
    """Neighbours differ by one sensitivity, which is the distance of two messages: it must not be doubled again."""
    from dp_accounting import NeighboringRelation, rdp

    return rdp.RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
