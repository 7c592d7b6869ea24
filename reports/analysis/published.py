"""Numbers published in papers, to print beside ours.

MocoSFL and TAResSFL: Li et al., ICLR 2023, linear-probe accuracy in percent, with standard deviations if printed there.
The numbers of ResSFL's table of baselines (CVPR 2022) are not included.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published number, with its standard deviation if the paper gives one."""

    value: float
    deviation: float | None = None

    def text(self, digits: int) -> str:
        """Format the number, and its deviation if any, with `digits` decimals."""
        spread = f" ± {self.deviation:.{digits}f}" if self.deviation is not None else ""
        return f"{self.value:.{digits}f}{spread}"


IID, NON_IID = "IID", "non-IID"
METHODS = {1: "MocoSFL-1", 2: "MocoSFL-3"}  # by cut layer; the paper's names count the convolutions on the client
CLASSES_PER_CLIENT = {"cifar10": 2, "cifar100": 20}  # of the non-IID partition

# (method, data set, partition) -> clients -> accuracy in percent
_ACCURACIES: dict[tuple[str, str, str], dict[int, float]] = {
    ("MocoSFL-1", "cifar10", IID): {100: 87.29, 200: 87.38, 1000: 87.51},
    ("MocoSFL-3", "cifar10", IID): {100: 87.29, 200: 87.15, 1000: 87.25},
    ("MocoSFL-1", "cifar100", IID): {100: 58.91, 200: 59.15, 1000: 58.85},
    ("MocoSFL-3", "cifar100", IID): {100: 58.41, 200: 58.30, 1000: 58.80},
    ("MocoSFL-1", "cifar10", NON_IID): {100: 87.71, 200: 87.39, 1000: 86.46, 5: 87.81, 20: 85.84},
    ("MocoSFL-3", "cifar10", NON_IID): {100: 87.10, 200: 85.22, 1000: 84.75, 5: 87.29, 20: 85.32},
    ("MocoSFL-1", "cifar100", NON_IID): {100: 59.22, 200: 58.90, 1000: 56.75, 5: 58.78, 20: 57.80},
    ("MocoSFL-3", "cifar100", NON_IID): {100: 58.69, 200: 58.59, 1000: 56.88, 5: 57.70, 20: 57.52},
}

# (method, target fraction) -> accuracy in percent, MSE of the attack; CIFAR-10
TARESSFL: dict[tuple[str, float], tuple[Published, Published]] = {
    ("MocoSFL-1", 0.0): (Published(81.14, 0.47), Published(0.039, 0.005)),
    ("MocoSFL-1", 0.005): (Published(80.78, 1.34), Published(0.033, 0.014)),
    ("MocoSFL-1", 0.01): (Published(79.96, 2.96), Published(0.039, 0.002)),
    ("MocoSFL-3", 0.0): (Published(81.19, 2.32), Published(0.045, 0.003)),
    ("MocoSFL-3", 0.005): (Published(80.51, 1.49), Published(0.035, 0.003)),
    ("MocoSFL-3", 0.01): (Published(83.13, 2.40), Published(0.039, 0.002)),
}

# (method, with TAResSFL) -> MB of one client: 200 epochs, 50 images a client, float32
MEGABYTES: dict[tuple[str, bool], Published] = {
    ("MocoSFL-1", False): Published(5001.4),
    ("MocoSFL-3", False): Published(5057.9),
    ("MocoSFL-1", True): Published(39.1),
}


def accuracy(cut_layer: int, dataset: str, partition: str, clients: int) -> Published | None:
    """Return the published linear-probe accuracy in percent of an undefended system; None if there is none."""
    value = _ACCURACIES.get((METHODS.get(cut_layer, ""), dataset, partition), {}).get(clients)
    return Published(value) if value is not None else None
