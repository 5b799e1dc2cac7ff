"""The deep kernel of Liu et al. 2020 (arXiv 2002.09116), trained to distinguish two samples:

    k(x, y) = [(1 - e) kappa(phi(x), phi(y)) + e] q(x, y)                                                  (eq. 1)

with Gaussian kernels kappa on the features of a small network phi, and q on the samples themselves. It is trained to
maximise MMD^2_u / std, to which the power of a test grows (eq. 3 to 5).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmap_defense.attacks.steps import PGD
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.modules import building, evaluating
from cmap_defense.common.progress import OnProgress, Progress
from cmap_defense.common.rng import derived_seeds, generator_for, isolated
from cmap_defense.common.settings import Settings, setting
from cmap_defense.detection.eps import EPS, model_scores
from cmap_defense.detection.mmd import Kernel, squared_distances
from cmap_defense.errors import InputValueError
from cmap_defense.threat import ThreatModel, require_linf_size

CLEAN, FGSM = 0x7C1EA, 0x7F65
"""Streams of the noise of training images and of their FGSM samples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepKernelSettings(Settings):
    """How a deep kernel is made.

    Args:
        width: channels of the first convolution.
        features: of phi.
        mixing: e at the start, in (0, 1); it is learned.
        steps: of Adam.
        batch_size: each batch is drawn from either sample by itself.
        learning_rate: of Adam.
        regulariser: what is added to the variance under the root (lambda in eq. 5 there).
        fgsm_eps: size of the FGSM samples that ``deep_kernel`` trains against, linf, of images in [0, 1].
        seed: of the weights and of the batches.

    Raises:
        SettingsError: a value is out of its range.
    """

    width: int = setting(16, minimum=1)
    features: int = setting(32, minimum=1)
    mixing: float = setting(0.1, above=0.0, below=1.0)
    steps: int = setting(200, minimum=0)
    batch_size: int = setting(64, minimum=2)
    learning_rate: float = setting(1e-3, above=0.0)
    regulariser: float = setting(1e-8, above=0.0)
    fgsm_eps: float = setting(1 / 255, above=0.0)
    seed: int = setting(0, minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_linf_size(type(self).__name__, "fgsm_eps", self.fgsm_eps)


class DeepKernel(nn.Module):
    """k(x, y) of eq. 1; a ``Kernel`` of samples [N, C, H, W].

    phi is three convolutions of stride 2, each with a leaky ReLU, and a linear layer, on samples divided by ``scale``.
    ``train_deep_kernel`` makes one; ``ratios`` are MMD^2_u / std on the batch of each step of its training.
    """

    scale: Tensor

    def __init__(self, image_shape: tuple[int, int, int], scale: float, settings: DeepKernelSettings) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.settings = settings
        self.ratios: tuple[float, ...] = ()
        self.convolutions = nn.ModuleList()
        for outputs in (settings.width, 2 * settings.width, 2 * settings.width):
            self.convolutions.append(nn.Conv2d(channels, outputs, 3, stride=2, padding=1))
            channels, height, width = outputs, (height + 1) // 2, (width + 1) // 2
        self.head = nn.Linear(channels * height * width, settings.features)
        self.log_bandwidths = nn.Parameter(torch.zeros(2, device="cpu"))  # of kappa, of q
        self.mixing_logit = nn.Parameter(torch.logit(torch.tensor(settings.mixing, device="cpu")))
        self.register_buffer("scale", torch.tensor(float(scale), device="cpu"))

    def phi(self, samples: Tensor) -> Tensor:
        """Features [N, F] of samples [N, C, H, W]."""
        hidden = samples.to(self.scale) / self.scale
        for convolution in self.convolutions:
            hidden = F.leaky_relu(convolution(hidden), 0.2)
        return self.head(hidden.flatten(1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Samples [N, C, H, W] and [M, C, H, W] to float64 [N, M] in (0, 1], differentiably."""
        features = squared_distances(self.phi(first), self.phi(second))
        plain = squared_distances(first.to(self.scale) / self.scale, second.to(self.scale) / self.scale)
        kappa, q = (
            torch.exp(-squares / (2 * (2 * log).exp()))
            for squares, log in zip((features, plain), self.log_bandwidths.double(), strict=True)
        )
        mixing = self.mixing_logit.double().sigmoid()
        return ((1 - mixing) * kappa + mixing) * q

    def to_dict(self) -> dict[str, object]:
        """What it became, as JSON: its settings, the bandwidths and mixing weight found, the first and last ratio."""
        kappa, q = self.log_bandwidths.exp().tolist()
        return {
            "name": "deep",
            "settings": self.settings.to_dict(),
            "scale": self.scale.item(),
            "feature_bandwidth": kappa,
            "sample_bandwidth": q,
            "mixing": self.mixing_logit.sigmoid().item(),
            "ratios": [*self.ratios[:1], *self.ratios[-1:]],
        }


def mmd_ratio(kernel: Kernel, first: Tensor, second: Tensor, regulariser: float = 1e-8) -> Tensor:
    """MMD^2_u / std of two samples of one size n, a float64 number, differentiable (Liu et al. 2020, eq. 3 to 5):

        H_ij    = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j)
        MMD^2_u = sum_{i != j} H_ij / (n (n - 1))
        std^2   = (4 / n^3) sum_i (sum_j H_ij)^2 - (4 / n^4) (sum_ij H_ij)^2 + regulariser

    It is 0 for a sample and itself. Raises ``InputValueError`` for samples of other sizes, or of fewer than two.
    """
    count = len(first)
    if len(second) != count or count < 2:
        raise InputValueError(
            f"The ratio is of two samples of one size, 2 at least, but these are {count} and {len(second)}."
        )
    across = kernel(first, second)
    h = kernel(first, first) + kernel(second, second) - across - across.T
    mmd2 = (h.sum() - h.diagonal().sum()) / (count * (count - 1))
    variance = 4 / count**3 * h.sum(dim=1).square().sum() - 4 / count**4 * h.sum().square()
    return mmd2 / (variance.clamp_min(0) + regulariser).sqrt()


def train_deep_kernel(
    clean: Tensor, attacked: Tensor, settings: DeepKernelSettings | None = None, *, progress: OnProgress = None
) -> DeepKernel:
    """A deep kernel that distinguishes ``attacked`` from ``clean``; a function of the two and the settings alone.

    Args:
        clean: [n, C, H, W], EPS of clean training images; both bandwidths start from their median heuristic.
        attacked: [m, C, H, W], EPS of attacked ones.
        settings: None for the defaults.
        progress: True for a bar on standard error, or a function of (done, total): steps.

    Returns:
        The kernel, in eval mode, where the samples are, without gradients.

    Raises:
        InputValueError: the samples are no images of one shape, fewer than two, or all the same.
    """
    settings = settings or DeepKernelSettings()
    if clean.ndim != 4 or clean.shape[1:] != attacked.shape[1:] or min(len(clean), len(attacked)) < 2:
        raise InputValueError(
            "A deep kernel is trained on two samples [n, C, H, W] of one shape, n at least 2, but these are "
            f"{list(clean.shape)} and {list(attacked.shape)}."
        )
    with torch.inference_mode(False):
        clean, attacked = clean.detach().float().clone(), attacked.detach().float().clone()
    scale = clean.square().mean().sqrt().item()
    if not 0 < scale < float("inf"):
        raise InputValueError("The clean samples must be finite and not all 0.")
    shape: tuple[int, int, int] = tuple(clean.shape[1:])  # pyright: ignore[reportAssignmentType]
    bar = Progress(settings.steps, "training the kernel", wanted=progress)
    with building(), isolated(settings.seed, 0), torch.enable_grad(), bar:
        kernel = DeepKernel(shape, scale, settings).to(clean.device)
        some = clean[:256]
        pairs = torch.triu_indices(len(some), len(some), 1, device=some.device)
        with torch.no_grad():
            for place, values in enumerate((kernel.phi(some), some / kernel.scale)):
                middle = squared_distances(values, values)[pairs[0], pairs[1]].median().sqrt()
                if middle == 0:
                    raise InputValueError("Half of the clean samples are the same: there is nothing to train on.")
                kernel.log_bandwidths[place] = middle.log()
        optimiser = torch.optim.Adam(kernel.parameters(), settings.learning_rate)
        ratios = []
        count = min(settings.batch_size, len(clean), len(attacked))

        def drawn(part: Tensor) -> Tensor:
            return part[torch.randperm(len(part), generator=generator, device="cpu")[:count].to(part.device)]

        for step in range(settings.steps):
            generator = generator_for(settings.seed, step + 1)
            ratio = mmd_ratio(kernel, drawn(clean), drawn(attacked), settings.regulariser)
            optimiser.zero_grad()
            (-ratio).backward()
            optimiser.step()
            ratios.append(ratio.item())
            bar.step()
    kernel.ratios = tuple(ratios)
    return kernel.eval().requires_grad_(False)


def deep_kernel(
    model: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: EPS | None = None,
    settings: DeepKernelSettings | None = None,
    max_parallel: int = 64,
    progress: OnProgress = None,
) -> DeepKernel:
    """The paper's deep kernel: trained on EPS of training images and of their FGSM samples.

    The FGSM samples (Goodfellow et al. 2015, arXiv 1412.6572) are one sign step of ``fgsm_eps`` against the undefended
    classifier. The two samples share no noise.

    Args:
        model: its classifier and its backbone are used, in eval mode.
        images: float [n, C, H, W] in [0, 1], neither measured later nor references then.
        labels: int64 [n].
        eps: the score; that of ``detect``, to which the kernel goes.
        settings: None for the defaults.
        max_parallel: images at a time.
        progress: as for ``train_deep_kernel``.

    It raises the errors of ``EPS``, of the attack, and of ``train_deep_kernel``.
    """
    eps, settings = eps or EPS(), settings or DeepKernelSettings()
    model = model.on_unit_images()
    size = settings.fgsm_eps
    attack = PGD(ThreatModel(norm="linf", eps=size), steps=1, step_size=size, random_start=False, seed=settings.seed)
    index = torch.arange(len(images), device="cpu")
    parts = index.split(max_parallel)
    with evaluating(model.classifier):
        found = [attack(model.undefended, images[rows], labels[rows], indices=rows).images for rows in parts]
    clean, attacked = (
        model_scores(model, eps, part, derived_seeds(index, stream), max_parallel)
        for stream, part in ((CLEAN, images), (FGSM, torch.cat(found)))
    )
    return train_deep_kernel(clean, attacked, settings, progress=progress)
