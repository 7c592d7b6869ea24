"""How reconstructions are compared with the victims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from mocosfl_priv.evaluation.perceptual import Lpips
from mocosfl_priv.evaluation.recognition import RecognitionJudge
from mocosfl_priv.evaluation.reconstruction import score
from mocosfl_priv.experiment.victims import VictimSet
from mocosfl_priv.results import RECOGNITION_LEVELS, ROLES


@dataclass
class Scoring:
    """The metrics of an experiment.

    lpips: None where it cannot be measured; lpips_note says why, or with which weights.
    build_judge: trains what judges whether reconstructions are recognised; returns None where that is not measured.
        It is called at most once.
    """

    lpips: Lpips | None
    lpips_note: str
    build_judge: Callable[[], RecognitionJudge | None]
    _judge: RecognitionJudge | None = field(default=None, init=False)
    _built: bool = field(default=False, init=False)

    @property
    def judge(self) -> RecognitionJudge | None:
        """What judges recognition, trained at the first use; None where recognition is not measured."""
        if not self._built:
            self.use(self.build_judge())
        return self._judge

    @property
    def has_judge(self) -> bool:
        """Whether the judge has been trained or handed over."""
        return self._built

    def use(self, judge: RecognitionJudge | None) -> None:
        """Use a judge that was trained before; with None, measure no recognition."""
        self._judge, self._built = judge, True

    @property
    def recognition_levels(self) -> dict[str, float]:
        """Chance levels and ceilings of recognition, by column; NaN where it is not measured."""
        return self.judge.levels if self.judge else dict.fromkeys(RECOGNITION_LEVELS, float("nan"))

    def score(self, victims: VictimSet, reconstruction: Tensor) -> dict[str, np.ndarray]:
        """Every metric of every image: name to (n,). reconstruction: float (n, 3, h, w) in [0, 1]."""
        # the judge knows the labels and candidates of the victims of the data roles only
        judge = self.judge if victims.origin == ROLES else None
        found = score(reconstruction, victims.images, victims.floor, self.lpips, judge)
        return {name: value.numpy() for name, value in found.items()}
