"""What each gradient mode costs, and whether it points somewhere.

    python benchmarks/gradients.py

On the embedded model, for each mode: the time of a forward and backward pass relative to a forward pass alone, the
backbone passes per latent that the backward pass adds, the peak memory above what the process had, and how well the
gradient predicts wide finite differences of the loss (h = 1e-2 along random directions): the correlation over
directions, for the shipped objective with its noise held fixed. One process per mode, so that peaks do not mix.
"""

import argparse
import json
import multiprocessing
import resource
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from cmap_defense import CMAPSettings, PurifiedClassifier, load_backbone
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.gradients import GradientMode, Implicit, StraightThrough, Surrogate, Unrolled

MODES = {
    "StraightThrough()": StraightThrough(),
    "Surrogate()": Surrogate(),
    "Surrogate(steps=5)": Surrogate(steps=5),
    "Implicit()": Implicit(),
    "Implicit(damping=10)": Implicit(damping=10.0),
    "Unrolled(last=5)": Unrolled(last=5),
    "Unrolled()": Unrolled(),
    "Unrolled(checkpoint=False)": Unrolled(checkpoint=False),
    "Unrolled(max_growth=1)": Unrolled(max_growth=1.0),
    "Unrolled(l1_smoothing=0.2)": Unrolled(l1_smoothing=0.2),
}


Options = argparse.Namespace


def wrapped(mode: GradientMode, options: Options) -> tuple[PurifiedClassifier, list[int]]:
    """The embedded model behind the defence, and a count of the latents that pass through its network."""
    torch.set_num_threads(options.threads)
    backbone, passes = load_backbone("fashion-mnist-ct"), [0]
    network = backbone.network.forward

    def counting(x: Tensor, *rest: Tensor) -> Tensor:
        passes[0] += len(x)
        return network(x, *rest)

    backbone.network.forward = counting  # pyright: ignore[reportAttributeAccessIssue]
    settings = CMAPSettings(n_latents=options.latents, iterations=options.iterations, learning_rate=0.1)
    chosen = {"settings": settings, "gradient": mode, "vote": "soft", "seed": 0, "max_parallel": options.parallel}
    return PurifiedClassifier(load_classifier(), backbone, **chosen), passes


def data(options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and the directions [D, B, C, H, W] along which the loss is evaluated."""
    images, labels = (part[: options.images] for part in load_test_images())
    generator = torch.Generator().manual_seed(1)
    return images, labels, torch.randn((options.directions, *images.shape), generator=generator).sign()


def loss(model: PurifiedClassifier, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels, reduction="none")


@torch.no_grad()
def wide_differences(options: Options) -> Tensor:
    """[D, B]: how the loss of each image changes over steps of h along each direction."""
    model, _ = wrapped(StraightThrough(), options)
    images, labels, directions = data(options)
    rows = []
    for direction in directions:
        ends = [loss(model, (images + sign * options.h * direction).clamp(0, 1), labels) for sign in (1, -1)]
        rows.append((ends[0] - ends[1]) / (2 * options.h))
    return torch.stack(rows)


def measure(name: str, mode: GradientMode, options: Options, wide: Tensor) -> dict[str, float | str]:
    """One row of the table."""
    model, passes = wrapped(mode, options)
    images, labels, directions = data(options)
    with torch.no_grad():
        loss(model, images, labels)  # warm up
        begun, passes[0] = time.perf_counter(), 0
        loss(model, images, labels)
        forward, plain = time.perf_counter() - begun, passes[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    leaf = images.clone().requires_grad_()
    begun, passes[0] = time.perf_counter(), 0
    (gradient,) = torch.autograd.grad(loss(model, leaf, labels).sum(), leaf)
    both, added = time.perf_counter() - begun, passes[0] - plain
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    predicted = (gradient * directions).flatten(2).sum(2)
    pairs = [torch.stack([wide[:, i], predicted[:, i]]) for i in range(len(images))]
    agreement = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).nan_to_num()
    return {
        "mode": name,
        "time_of_forward_and_backward_in_forwards": both / forward,
        "backbone_passes_added_per_latent": added / (len(images) * options.latents),
        "peak_memory_mib": peak / 1024,
        "agreement_with_wide_differences": agreement.mean().item(),
        "agreement_standard_error": (agreement.std() / len(images) ** 0.5).item(),
        "gradient_norm": gradient.flatten(1).norm(dim=1).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--latents", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--parallel", type=int, default=32, help="max_parallel")
    parser.add_argument("--directions", type=int, default=16)
    parser.add_argument("--h", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=MODES, help="some of the modes")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        wide = pool.apply(wide_differences, (options,))
    for name in options.only or MODES:
        with context.Pool(1) as pool:
            print(json.dumps(pool.apply(measure, (name, MODES[name], options, wide))), flush=True)


if __name__ == "__main__":
    main()
