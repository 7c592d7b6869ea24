"""TAResSFL: target-aware ResSFL (Li et al., ICLR 2023; ResSFL: Li et al., CVPR 2022)."""

from __future__ import annotations

from mocosfl_priv.defending import AttackerAware


class TAResSFL(AttackerAware):
    """Clients receive a frozen model that was trained, at the server, against a simulated inversion attacker.

    The server pre-trains an expert on source images and its share of target images, with MoCo's loss plus
    alpha * max(0, SSIM - threshold) of a decoder that is trained along. Clients take the expert's client side and
    keep it: no gradient returns, nothing is synchronised; only the server side goes on learning.

    Parameters are those of :class:`AttackerAware`. Strengths and rates are by default what was published. In four other
    things the public code differs from the defaults, and `preset: paper` repeats them: a step has 128 target and 128
    source images, the simulated attacker is `ressfl_N4C64`, the penalty is computed with it in eval mode, and the
    checkpoint with the best kNN accuracy is handed out. Beyond the paper: several decoders that are restarted in turn
    (decoder, refresh), a score that includes colours (objective: mse+ssim), an imported expert (expert), and clients
    that go on learning as ResSFL's do (transfer: low_lr).
    """

    uses_target_data = True
