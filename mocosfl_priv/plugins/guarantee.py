"""What a defense may promise of any attacker, in the unit that attacks are measured in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

QUADRATURE_POINTS = 4001
LARGEST_NORMAL = 12.0  # beyond, the normal density is below 1e-31
LARGEST_EXPONENT = 80.0  # 1 / cosh is below 1e-34 there


@dataclass(frozen=True)
class Guarantee:
    r"""A lower bound on the mean squared error of every attacker, whatever it computes and whatever else it knows.

    The promise is about everything that an attacker saw of an image x, M(x), in the local model, where any two images
    x, y are neighbours. It is (epsilon, delta)-differential privacy and, where `mu` is given, mu-Gaussian differential
    privacy: telling M(x) from M(y) is at least as hard as telling N(0, 1) from N(mu, 1) (Dong, Roth and Su, "Gaussian
    Differential Privacy", JRSS B 2022, https://arxiv.org/abs/1905.02383).

    The prior is any distribution of images that the attacker knows, for example the uniform one over the victims. The
    victims are independent draws from it, and their order tells nothing. The blind guess is the mean of the prior, so
    its MSE is the prior's variance per number. Write m_x for the density of M(x) and m for its mean over the prior.

    1. *The best attacker.* It returns the mean of the posterior. Its MSE is the mean variance of the posterior, and a
       variance is half the mean squared distance of two independent draws. So with x, y independent from the prior

           MSE >= 1/2 E |x - y|^2 J(x, y),   J(x, y) = integral of m_x m_y / m,

       where \|.\|^2 is a mean over numbers. 1/2 E |x - y|^2 is the MSE of the blind guess. So a lower bound of J that
       is the same for all pairs is a share of the blind guess's error that no attacker can take away.

    2. *Whatever the prior is.* By the inequality of Cauchy and Schwarz, J is at least the square of the Bhattacharyya
       coefficient, the integral of sqrt(m_x m_y). Processing cannot make this smaller, and by Blackwell's theorem
       (Dong et al., theorem 2) M(x), M(y) are processed from the pair that the promise names. For N(0, 1), N(mu, 1)

           J >= exp(-mu^2 / 4).

       For (epsilon, delta) the pair is randomised response that tells the truth at once with probability delta
       (Kairouz, Oh and Viswanath, "The Composition Theorem for Differential Privacy", ICML 2015,
       https://arxiv.org/abs/1311.0776), and

           J >= (1 - delta)^2 / cosh(epsilon / 2)^2.

    3. *With the attacker told two candidates.* Draw y from the prior too, and tell the attacker both x and y, but not
       which is which. It can ignore this, so its MSE with it is a lower bound of its MSE without. With p the posterior
       probability of one of them, the MSE is E |x - y|^2 p (1 - p). The mean of p (1 - p) does not fall by processing
       either, so it is at least that of N(0, 1) and N(mu, 1), which is S(mu) / 4. With E |x - y|^2 = 2 blind,

           MSE >= 1/2 S(mu) blind,   S(mu) = exp(-mu^2 / 8) E[1 / cosh(mu Z / 2)],   Z ~ N(0, 1).

       This is the larger one from about mu = 3.15 on.

    How tight it is: of two equally frequent images, whose messages have the largest distance, the best attacker's MSE
    is S(mu) blind. No bound that is a share of the blind guess can be higher. The larger one of 2 and 3 is at least
    half of it for every mu, and at least .97 of it up to mu = 1. Whether S(mu) blind holds for all priors is not proven
    here. With delta = 0, the bound from epsilon is attained by
    randomised response.

    What it replaces: exp(-epsilon) (blind - delta), which is never higher where the blind guess's MSE is at most 1/2;
    of numbers in [0, 1] it is at most 1/4. Reconstruction robustness (Hayes, Mahloujifar and Balle, "Bounding Training
    Data Reconstruction in DP-SGD", NeurIPS 2023, https://arxiv.org/abs/2302.07225; Kaissis et al., "Bounding data
    reconstruction attacks with the hypothesis testing interpretation of differential privacy", 2023,
    https://arxiv.org/abs/2307.03928) bounds the probability of an error below a threshold. Integrated over thresholds,
    with the trade-off function f and its convexity, it says MSE >= f(1 - blind), which is lower for errors in [0, 1].

    A defense that promises another way (a Cramer-Rao bound, say) overrides `bound` and `claim`.

    messages: how many messages of an image the attacker saw.
    mu: of all these messages together; None if only epsilon and delta are known.

    >>> promise = Guarantee(epsilon=8.0, delta=1e-5, messages=1, mu=1.666)
    >>> f"{promise.remaining:.2f} {Guarantee(epsilon=8.0, delta=1e-5, messages=1).remaining:.4f}"
    '0.50 0.0013'
    """

    epsilon: float
    delta: float
    messages: int
    mu: float | None = None

    @property
    def claim(self) -> str:
        """For people: what is promised, without the bound that follows."""
        return f"local DP, eps {self.epsilon:.3g}, delta {self.delta:.3g} for {count(self.messages)}"

    @property
    def remaining(self) -> float:
        """The share of the blind guess's MSE that remains for every attacker, in [0, 1]."""
        shrunk = math.exp(-self.epsilon)  # 1 / cosh(epsilon / 2)^2 in a form that does not overflow
        from_epsilon = (1 - self.delta) ** 2 * 4 * shrunk / (1 + shrunk) ** 2
        if self.mu is None:
            return from_epsilon
        return max(from_epsilon, math.exp(-(self.mu**2) / 4), two_candidates(self.mu) / 2)

    def bound(self, blind: np.ndarray) -> np.ndarray:
        """From the errors of the best blind guess, per image, terms whose mean no attacker's mean MSE is below.

        The single terms bound nothing: a guess may be right by chance.
        """
        return self.remaining * blind

    def as_json(self) -> dict[str, Any]:
        """For run.json; an epsilon without end is None there."""
        epsilon = self.epsilon if math.isfinite(self.epsilon) else None
        return {"claim": self.claim, "epsilon": epsilon, "delta": self.delta, "mu": self.mu, "messages": self.messages}


def two_candidates(mu: float) -> float:
    """The best attacker's MSE between two equally frequent images, in units of the blind guess's.

    mu: distance of their messages in units of the deviation of Gaussian noise, at least 0. The result is in [0, 1]:
    S(mu) of :class:`Guarantee`, by the trapezoidal rule, which is exact to rounding for such a smooth and fast falling
    function.
    """
    largest = min(LARGEST_NORMAL, 2 * LARGEST_EXPONENT / mu) if mu > 0 else LARGEST_NORMAL
    z = np.linspace(-largest, largest, QUADRATURE_POINTS)
    decay = np.exp(-np.abs(mu * z / 2))
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return math.exp(-(mu**2) / 8) * float(np.trapezoid(density * 2 * decay / (1 + decay**2), z))


def count(messages: int) -> str:
    """`messages` in words."""
    return f"{messages} message{'s' if messages != 1 else ''}"
