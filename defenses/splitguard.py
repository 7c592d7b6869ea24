"""SplitGuard: clients test whether the server trains what they send (Erdogan, Küpçü and Çiçek, WPES 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import DefenderContext, Detection, Detector, State

Policy = Literal["fast", "average", "voting"]
FALSE, FIRST_HALF, SECOND_HALF, UNUSED = 0, 1, 2, -1  # what a message is to its client
ON_DEVICE = ("last_key", "direction", "magnitude")  # the rest is bookkeeping, on the CPU
VOTES = 5
SMALLEST = 1e-12


class SplitGuard(Detector):
    """A detector: some messages carry false labels, to which the gradient of an honest server reacts.

    A client keeps its messages' gradients in three groups: those of false messages F, and those of true ones, each
    in one of two random halves R1, R2. After every false message it computes the published score
    (:func:`splitguard_score`), near 1 where F stands out of R as the halves do not, and low where a server such as
    FSHA's does not look at labels. A score below `threshold` is suspicious. It drops the gradients of false messages.

    Self-supervised training has no labels, so the following is ours. A query's label is which key is its positive: a
    false message pairs all its queries with the key of another image, the last one of that client's last message. It
    reaches the feature memory, as a true key of that client. A message's gradient is the one with respect to the
    smashed data, averaged over the message's rows (the authors' code takes that of the client's first layer). One
    key for all rows moves this mean more than a key for each; but a server that compares keys with those of the
    step before can tell false messages, and hijack the true ones only.

    What the paper calls an attack ends a client's training; here it is recorded, and training goes on, so that runs
    stay comparable. An alarm is not taken back. The run alarms when more than half of the clients that could judge do.

    fake_probability: share of the messages that are false. warmup: steps before which nothing is false and nothing
    collected. alpha, beta: of the published score. threshold: a score below it is suspicious. window: scores that
    `policy` looks at. wait: scores that a client has before it judges: the first ones say little. policy: what is
    then held against the threshold: the last score (fast), the mean of the last `window` (average), or each mean of
    five groups of these, of which most must be below (voting).
    """

    def __init__(
        self,
        fake_probability: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        warmup: Annotated[int, Field(ge=0)] = 20,
        alpha: Annotated[float, Field(gt=0)] = 5.0,
        beta: Annotated[float, Field(gt=0)] = 2.0,
        threshold: Annotated[float, Field(gt=0, lt=1)] = 0.9,
        policy: Policy = "average",
        window: Annotated[int, Field(ge=1)] = 10,
        wait: Annotated[int, Field(ge=1)] = 30,
    ) -> None:
        if wait < window:
            raise ValueError("wait must not be shorter than window")
        if policy == "voting" and window % VOTES:
            raise ValueError(f"window must be a multiple of {VOTES} where {VOTES} groups of scores vote")
        self.fake_probability = fake_probability
        self.warmup = warmup
        self.alpha = alpha
        self.beta = beta
        self.threshold = threshold
        self.policy: Policy = policy
        self.window = window
        self.wait = wait
        self._clients, self._device = 0, torch.device("cpu")
        self._sent: _Sent | None = None
        self._kept: State = {}

    def prepare(self, context: DefenderContext) -> None:
        self._clients, self._device = context.training.clients, context.compute.device

    def replace_keys(self, keys: Tensor, client_ids: Tensor, step: int, rng: torch.Generator) -> Tensor:
        if not self._kept:
            self._kept = self._nothing_yet(keys)
        kept = self._kept
        clients, rows = torch.unique_consecutive(client_ids, return_counts=True)
        # one draw for both choices: false or not, and of the rest which half
        draw = torch.rand(len(clients), generator=rng, device=rng.device).cpu()
        share = self.fake_probability
        group = torch.where(draw < (1 + share) / 2, FIRST_HALF, SECOND_HALF)
        group[(draw < share) & kept["has_sent"][clients]] = FALSE
        if step < self.warmup:
            group.fill_(UNUSED)
        self._sent = _Sent(step, clients, tuple(rows.tolist()), group)
        false = self._sent.false_rows(keys)
        disguised = torch.where(false, kept["last_key"][client_ids], keys)
        kept["last_key"][clients] = keys[rows.cumsum(0) - 1]
        kept["has_sent"][clients] = True
        return disguised

    def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
        sent, kept = self._sent, self._kept
        assert sent is not None, "a gradient came in before anything went out"
        if sent.step >= self.warmup:
            place = (sent.group, sent.clients)  # all different: a client sends one message in a pass
            means = torch.stack([rows.mean(0) for rows in gradient.split(sent.rows)])
            kept["direction"][place] += means
            kept["magnitude"][place] += means.flatten(1).norm(dim=1)
            kept["messages"][place] += 1
            complete = (kept["messages"][:, sent.clients] > 0).all(0)
            self._judge(sent.clients[(sent.group == FALSE) & complete], sent.step)
        return gradient.masked_fill(sent.false_rows(gradient), 0)

    def _judge(self, clients: Tensor, step: int) -> None:
        """A new score for each of `clients`, and an alarm where it is due."""
        kept = self._kept
        messages = kept["messages"][:, clients]
        magnitude = kept["magnitude"][:, clients].double().cpu() / messages
        score = splitguard_score(kept["direction"][:, clients], magnitude, self.alpha, self.beta)
        scores = torch.cat([kept["scores"][clients, 1:], score[:, None]], dim=1)
        kept["scores"][clients] = scores
        kept["judged"][clients] += 1
        alarm = (kept["judged"][clients] >= self.wait) & self._suspicious(scores)
        kept["alarm_step"][clients[alarm & (kept["alarm_step"][clients] < 0)]] = step

    def _suspicious(self, scores: Tensor) -> Tensor:
        """By the policy, for the last `window` scores (n, window) of each client; bool (n,)."""
        if self.policy == "fast":
            return scores[:, -1] < self.threshold
        if self.policy == "average":
            return scores.mean(1) < self.threshold
        votes = scores.unflatten(1, (VOTES, -1)).mean(2) < self.threshold
        return 2 * votes.sum(1) > VOTES

    def detection(self) -> Detection:
        if not self._kept:
            return Detection(0, 0, 0)
        judging = self._kept["judged"] >= self.wait
        alarms = self._kept["alarm_step"][self._kept["alarm_step"] >= 0].sort().values
        majority = int(judging.sum()) // 2
        return Detection(
            fakes_judged=int(self._kept["judged"].sum()),
            clients_judging=int(judging.sum()),
            clients_alarmed=len(alarms),
            first_alarm_step=int(alarms[majority]) if len(alarms) > majority else None,
            score=float(self._kept["scores"][judging].mean()),
        )

    def state(self) -> State:
        return self._kept

    def load_state(self, state: State) -> None:
        """Go on where :meth:`state` was taken. What was judged stays judged, also on the way back to a better model."""
        if state and int(state["judged"].sum()) >= self.detection().fakes_judged:
            places = {name: self._device if name in ON_DEVICE else torch.device("cpu") for name in state}
            self._kept = {name: value.to(places[name], copy=True) for name, value in state.items()}

    def _nothing_yet(self, keys: Tensor) -> State:
        """What is kept of every client, before its first message."""
        clients, shape = self._clients, keys.shape[1:]
        return {
            "last_key": keys.new_zeros(clients, *shape),
            "has_sent": torch.zeros(clients, dtype=torch.bool),
            "direction": keys.new_zeros(3, clients, *shape),  # sums; angles do not see the difference to means
            "magnitude": keys.new_zeros(3, clients),
            "messages": torch.zeros(3, clients, dtype=torch.long),
            "scores": torch.ones(clients, self.window, dtype=torch.float64),
            "judged": torch.zeros(clients, dtype=torch.long),
            "alarm_step": torch.full((clients,), -1),
        }


@dataclass(frozen=True)
class _Sent:
    """One pass: which clients sent how many rows, and what their messages are to them."""

    step: int
    clients: Tensor
    rows: tuple[int, ...]
    group: Tensor

    def false_rows(self, like: Tensor) -> Tensor:
        """Bool (n, 1, ...) beside `like` (n, ...)."""
        false = (self.group == FALSE).repeat_interleave(torch.tensor(self.rows))
        return false.view(-1, *[1] * (like.dim() - 1)).to(like.device)


def splitguard_score(direction: Tensor, magnitude: Tensor, alpha: float, beta: float) -> Tensor:
    """sigmoid(alpha S) ** beta in (0, 1), float64 (n,) on the CPU, of n clients.

    S = (angle(F, R) d(F, R) - angle(R1, R2) d(R1, R2)) / (d(F, R) + d(R1, R2)), with R all of R1 and R2; angles between
    the groups' sums, in radians; d the distance of their mean magnitudes, that of R being the mean of its halves'.

    direction: (3, n, ...), the sums of F, R1, R2; magnitude: (3, n), their mean magnitudes.
    """
    false, first, second = direction.flatten(2).double().cpu()
    false_size, first_size, second_size = magnitude.double().cpu()
    between = (false_size - (first_size + second_size) / 2).abs()
    within = (first_size - second_size).abs()
    difference = _angle(false, first + second) * between - _angle(first, second) * within
    return torch.sigmoid(alpha * difference / (between + within + SMALLEST)) ** beta


def _angle(some: Tensor, others: Tensor) -> Tensor:
    """In [0, pi], row by row; a right one where a row is zero."""
    return torch.nn.functional.cosine_similarity(some, others, eps=SMALLEST).clamp(-1, 1).acos()
