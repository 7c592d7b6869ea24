"""Scores of reconstructions, compared with the victims image by image."""

from __future__ import annotations

import torch
from torch import Tensor

from mocosfl_priv.evaluation.floor import Floor
from mocosfl_priv.evaluation.image_metrics import WINDOW, mse, psnr, ssim, ssim_zeropad
from mocosfl_priv.evaluation.perceptual import Lpips
from mocosfl_priv.evaluation.recognition import RecognitionJudge

JUDGED = ("recognised", "reidentified")


def score(
    reconstruction: Tensor, victims: Tensor, floor: Floor, lpips: Lpips | None, recognition: RecognitionJudge | None
) -> dict[str, Tensor]:
    """Compute all metrics per image, as float (n,) by name.

    reconstruction, victims: float (n, c, h, w) in [0, 1].
    A metric is NaN where it cannot be measured: `ssim` for images with fewer than 11 pixels a side, `lpips` without
    its weights, `recognised` and `reidentified` without a judge.
    """
    absent = torch.full((len(victims),), float("nan"))
    judged = recognition(reconstruction) if recognition is not None else dict.fromkeys(JUDGED, absent)
    return {
        "mse": mse(reconstruction, victims),
        "psnr": psnr(reconstruction, victims),
        "ssim": ssim(reconstruction, victims) if min(victims.shape[-2:]) >= WINDOW else absent,
        "ssim_zeropad": ssim_zeropad(reconstruction, victims),
        "lpips": lpips(reconstruction, victims) if lpips is not None else absent,
        **judged,
        "mse_floor": floor.mse,
    }
