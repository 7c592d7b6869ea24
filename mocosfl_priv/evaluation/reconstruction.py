"""Score reconstructions against the true victims, image by image."""

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
    """Every metric of every image: name to (n,). Both arguments float (n, 3, h, w) in [0, 1].

    `ssim` needs at least 11 pixels a side, `lpips` its weights, and recognition its judge; they are NaN where they
    cannot be measured.
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
