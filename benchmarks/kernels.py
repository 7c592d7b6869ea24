"""The measurements behind the engine's choices: layouts, norms, small convolutions, client kernels, kept memory.

uv run python -m benchmarks.kernels

Prints Markdown tables in milliseconds: the fastest of a few repetitions on two threads, ResNet-18's shapes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mocosfl_priv.config import ComputeConfig, ModelConfig
from mocosfl_priv.models.convolution import MatmulConvolution
from mocosfl_priv.models.normalisation import GroupNorm
from mocosfl_priv.models.split import build_split_model
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.clients import KERNELS, Kernel, encode_stacked

THREADS, REPETITIONS = 2, 5
VIEWS, CLIENTS = 200, 100
STAGES = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels, pixels per side
WITHOUT_KEPT_MEMORY = "--trunk-without-kept-memory"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fastest(task: Callable[[], object]) -> float:
    """Milliseconds of the fastest repetition, after a warm-up."""
    task()
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        task()
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def there_and_back(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Callable[[], object]:
    """Forward and backward pass with respect to both arguments."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    returned = torch.randn_like(function(x, weight))
    return lambda: torch.autograd.grad(function(x, weight), (x, weight), returned)


def convolutions() -> None:
    """3x3 convolutions in either layout, and as a matrix product."""
    print(
        "\n| 3x3 convolution, forward and backward | contiguous | channels last | matrix product |\n|---|---|---|---|"
    )
    for channels, side in STAGES:
        for name, precision in PRECISIONS.items():
            x = torch.randn(VIEWS, channels, side, side, dtype=precision)
            weight = torch.randn(channels, channels, 3, 3, dtype=precision)
            last = x.contiguous(memory_format=torch.channels_last)
            plain = fastest(there_and_back(lambda a, w: F.conv2d(a, w, padding=1), x, weight))
            turned = fastest(there_and_back(lambda a, w: F.conv2d(a, w, padding=1), last, weight))
            product = fastest(there_and_back(lambda a, w: MatmulConvolution.apply(a, w, 1, 1), last, weight))
            print(f"| {channels} channels, {side} px, {name} | {plain:.1f} | {turned:.1f} | {product:.1f} |")


def norms() -> None:
    """Torch's GroupNorm in either layout, and ours, which keeps channels last."""
    print("\n| GroupNorm, forward / both | contiguous | channels last | channels last, ours |\n|---|---|---|---|")
    for channels, side in STAGES:
        for name, precision in PRECISIONS.items():
            x = torch.randn(VIEWS, channels, side, side, dtype=precision)
            last = x.contiguous(memory_format=torch.channels_last)
            ours = GroupNorm(channels // 4, channels)
            weight, bias = ours.weight.detach().to(precision), ours.bias.detach().to(precision)

            def torchs(a: Tensor, w: Tensor, bias: Tensor = bias, groups: int = channels // 4) -> Tensor:
                return F.group_norm(a, groups, w, bias)

            def kept(a: Tensor, w: Tensor, module: GroupNorm = ours) -> Tensor:
                return torch.func.functional_call(module, {"weight": w}, (a,))

            cells = []
            for function, images, scale in ((torchs, x, weight), (torchs, last, weight), (kept, last, ours.weight)):
                with torch.no_grad():
                    forward = fastest(lambda f=function, a=images, w=scale: f(a, w))  # type: ignore[misc]
                cells.append(f"{forward:.1f} / {fastest(there_and_back(function, images, scale)):.1f}")
            print(f"| {channels} channels, {side} px, {name} | {' | '.join(cells)} |")


def client_kernels() -> None:
    """100 clients, two views each: online and momentum forward pass, backward pass."""
    print(f"\n| clients | {' | '.join(KERNELS)} |\n|---|{'---|' * len(KERNELS)}")
    for cut in (1, 2):
        client = build_split_model(ModelConfig(), cut, 32, [0.5] * 3, [0.25] * 3).client
        for name in PRECISIONS:
            compute = Compute.resolve(ComputeConfig.model_validate({"precision": name, "threads": THREADS}))
            cells = [f"{fastest(_client_pass(client, compute, kernel)):.0f}" for kernel in KERNELS]
            print(f"| cut {cut}, {name} | {' | '.join(cells)} |")


def _client_pass(client: torch.nn.Module, compute: Compute, kernel: Kernel) -> Callable[[], object]:
    parameters = {
        name: p.detach().unsqueeze(0).repeat(CLIENTS, *[1] * p.dim()).requires_grad_()
        for name, p in client.named_parameters()
    }
    images = torch.rand(CLIENTS, 2, 3, 32, 32)
    with compute.autocast(), torch.no_grad():
        returned = torch.randn_like(encode_stacked(client, parameters, images, kernel))

    def task() -> None:
        with compute.autocast():
            smashed = encode_stacked(client, parameters, images, kernel)
            with torch.no_grad():
                encode_stacked(client, parameters, images, kernel)
        torch.autograd.grad(smashed, list(parameters.values()), returned)

    return task


def trunk_milliseconds(name: str) -> float:
    """The server's trunk alone: 200 views, online forward and backward, momentum forward."""
    model = build_split_model(ModelConfig(), 1, 32, [0.5] * 3, [0.25] * 3)
    smashed = torch.rand(VIEWS, 64, 32, 32).contiguous(memory_format=torch.channels_last)

    def task() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "bfloat16"):
            out = model.trunk(smashed.requires_grad_())
            with torch.no_grad():
                model.trunk(smashed)
        out.float().sum().backward()

    return fastest(task)


def main() -> None:
    """Print all tables; in a process of its own, the trunk as it runs when freed memory goes back to the system."""
    torch.set_num_threads(THREADS)
    if WITHOUT_KEPT_MEMORY in sys.argv:
        print(" ".join(str(trunk_milliseconds(name)) for name in PRECISIONS))
        return
    command = [sys.executable, "-m", "benchmarks.kernels", WITHOUT_KEPT_MEMORY]
    without = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()  # noqa: S603 - own code
    Compute.resolve(ComputeConfig(threads=THREADS))  # from here on, freed memory is kept
    print("\n| server trunk, 200 views | freed memory returned | freed memory kept |\n|---|---|---|")
    for name, returned in zip(PRECISIONS, without, strict=True):
        print(f"| {name} | {float(returned):.0f} | {trunk_milliseconds(name):.0f} |")
    convolutions()
    norms()
    client_kernels()


if __name__ == "__main__":
    main()
