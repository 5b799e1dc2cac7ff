"""Does the gradient of a mode point anywhere? The loss after one step along it.

    python benchmarks/directions.py

On the embedded model: gradients of a few evaluations with noise of their own are divided by their lengths, averaged,
and followed for one step of h along their signs; then the loss is taken with other noise. That is a wide finite
difference along the one direction that an attack takes, averaged over the noise that it cannot know. A random direction
and the gradient of the undefended classifier are there to compare with. "alike" is the mean cosine between the
gradients of one image under different noise.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from cmap_defense import PurifiedClassifier, load_backbone
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.gradients import GradientMode, Implicit, StraightThrough, Surrogate, Unrolled

MODES: dict[str, GradientMode] = {
    "StraightThrough()": StraightThrough(),
    "Surrogate()": Surrogate(),
    "Surrogate(sigma=0.5)": Surrogate(sigma=0.5),
    "Implicit(damping=1, l1_smoothing=0.3, iterations=8)": Implicit(damping=1.0, l1_smoothing=0.3, iterations=8),
    "Unrolled(last=1, l1_smoothing=0.1)": Unrolled(last=1, l1_smoothing=0.1),
    "Unrolled(last=3, l1_smoothing=0.3)": Unrolled(last=3, l1_smoothing=0.3),
    "Unrolled(last=5)": Unrolled(last=5),
    "Unrolled(l1_smoothing=0.3, max_growth=1)": Unrolled(l1_smoothing=0.3, max_growth=1.0),
    "Unrolled()": Unrolled(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--latents", type=int, default=4, help="K")
    parser.add_argument("--iterations", type=int, default=20, help="N")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--eot", type=int, default=4, help="gradients averaged, and evaluations of the loss")
    parser.add_argument("--h", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=MODES, help="some of the modes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels = (part[: options.images] for part in load_test_images())
    classifier, backbone = load_classifier(), load_backbone("fashion-mnist-ct")
    model = PurifiedClassifier(classifier, backbone, preset="paper", vote="soft")
    settings = model.settings.replace(
        n_latents=options.latents, iterations=options.iterations, learning_rate=options.learning_rate
    )
    model = model.variant(settings=settings)
    noise = torch.arange(options.images)

    @torch.no_grad()
    def report(name: str, direction: Tensor, **more: float) -> None:
        """The loss and the share of errors, with noise that no gradient was taken with."""
        moved = (images + options.h * direction).clamp(0, 1)
        logits = torch.stack([model(moved, seeds=noise + 1000 * (j + 1)) for j in range(options.eot)])
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(options.eot))
        errors = (logits.argmax(dim=2) != labels).float().mean()
        print(json.dumps({"direction": name, "loss": losses.item(), "errors": errors.item(), **more}), flush=True)

    def gradient(function: PurifiedClassifier, **seeds: Tensor) -> Tensor:
        leaf = images.clone().requires_grad_()
        loss = F.cross_entropy(function(leaf, **seeds), labels, reduction="sum")
        (found,) = torch.autograd.grad(loss, leaf)
        return found / found.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]

    report("none", torch.zeros_like(images))
    report("random signs", torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign())
    leaf = images.clone().requires_grad_()
    (bare,) = torch.autograd.grad(F.cross_entropy(classifier(leaf), labels, reduction="sum"), leaf)
    report("the undefended classifier's", bare.sign())
    for name in options.only or MODES:
        attacked, begun = model.variant(gradient=MODES[name]), time.perf_counter()
        found = torch.stack([gradient(attacked, seeds=noise + 77_777 * (e + 1)) for e in range(options.eot)])
        seconds = time.perf_counter() - begun
        flat = found.flatten(2)
        cosines = torch.einsum("ibp,jbp->bij", flat, flat)
        pairs = options.eot * (options.eot - 1)
        alike = (cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)).mean().item() / max(1, pairs)
        report(name, found.mean(dim=0).sign(), alike=alike, seconds=seconds)


if __name__ == "__main__":
    main()
