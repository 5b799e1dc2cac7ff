"""CERTIFY for many images: counts in a folder that survive a kill, images shared by the processes of a job."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.certification.bounds import ABSTAIN, certified_radii, lower_bounds, statistics
from cmap_defense.certification.results import CertificationResult
from cmap_defense.certification.settings import CertificationSettings
from cmap_defense.certification.smoothed import ESTIMATION, SELECTION, SmoothedClassifier
from cmap_defense.common.files import (
    locked,
    refuse_evaluations_below,
    refuse_other_settings,
    tensor_checksum,
    write_json,
)
from cmap_defense.common.passes import counting_passes
from cmap_defense.common.paths import expanded
from cmap_defense.common.progress import OnProgress, Progress
from cmap_defense.common.ranks import ranks
from cmap_defense.errors import EvaluationError, SettingsError

FORMAT = 1

EVERY = 30.0
"""Seconds after which the counts of an image that is not done are written."""

TIMED = 64
"""Copies that are timed, at most."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What is left to do.

    Attributes:
        copies: noisy copies, of all images.
        passes: network passes of backbones.
        seconds: of all processes together, at the speed of one batch on this machine.
    """

    copies: int
    passes: int
    seconds: float


def certify(
    smoothed: SmoothedClassifier,
    images: Tensor,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    batch_size: int | None = None,
    seed: int = 0,
    indices: Tensor | Sequence[int] | None = None,
    out: str | Path | None = None,
    progress: OnProgress = None,
) -> CertificationResult:
    """The l2 radius within which the smoothed classifier keeps its class (CERTIFY of arXiv 1902.02918).

        result = certify(SmoothedClassifier(my_resnet, "cifar10-edm-small"), images, out="runs/certificates")
        print(result.accuracy(labels, 0.25))

    Counts are added up batch by batch, so that memory does not depend on n. The noise of a copy belongs to (seed, index
    of the image, number of the copy): counts depend on the batch size, the device and the number of processes by
    rounding alone. (Those of a classifier that draws from torch's generators depend on the batch size.) Under
    torchrun the ranks share the images, and each returns all of them.

    Args:
        smoothed: the smoothed classifier.
        images: float [B, C, H, W] in [0, 1], on the model's device.
        n0: noisy copies of an image by which its class is chosen.
        n: fresh copies by which the probability of that class is bounded. The largest radius is 2.46, 3.20 and 3.81
            sigma with 1,000, 10,000 and 100,000 of them, at this alpha.
        alpha: the largest probability that the certificate of an image is wrong.
        batch_size: copies at the same time; None for what fits, 256 at most.
        seed: of the noise.
        indices: [B] integers, all different, which image of its data set each one is; None for 0, 1, ...
        out: a folder for the counts; killed and called again with it, the same call goes on, and ends with the same
            counts. More images may be added. None for no folder.
        progress: True for a bar on standard error, or a function of (done, total): copies of this process.

    Raises:
        SettingsError: an option is out of its range.
        InputTypeError, InputValueError, DeviceError: the images are no float [B, C, H, W] in [0, 1] of the backbone's
            size on the model's device.
        ClassifierError: the classifier is in training mode, or an image of a batch influences another.
        EvaluationError: another job has the folder, or it holds certificates of other settings.
        MissingExtraError: scipy is not installed.
    """
    settings = CertificationSettings(n0=n0, n=n, alpha=alpha, batch_size=batch_size, seed=seed)
    return _Certification(smoothed, images, settings, indices, out).run(progress)


def expected_cost(
    smoothed: SmoothedClassifier,
    images: Tensor,
    *,
    indices: Tensor | Sequence[int] | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> Cost:
    """What ``certify`` with the same arguments would cost; it raises the same errors. One small batch is timed, and
    nothing is written."""
    return _Certification(smoothed, images, CertificationSettings(**settings), indices, out).expected()


@dataclasses.dataclass
class _Tally:
    """What is known of an image: counts [classes] of both kinds of copies, and their cost."""

    selection: Tensor
    counts: Tensor
    passes: int = 0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return int(self.selection.sum() + self.counts.sum())


class _Certification:
    """The arguments of ``certify``, checked."""

    def __init__(self, smoothed: Any, images: Any, settings: CertificationSettings, indices: Any, out: Any) -> None:
        statistics()
        if not isinstance(smoothed, SmoothedClassifier):
            raise SettingsError(
                "certify takes a SmoothedClassifier(classifier, backbone, sigma=...), not "
                f"{type(smoothed).__name__}: the certificate is that of a smoothed classifier."
            )
        self.smoothed, self.images, self.settings = smoothed, images, settings
        self.indices = smoothed.check(images, indices)
        if len(self.indices.unique()) < len(self.indices):
            raise SettingsError("certify.indices must all be different: the noise of an image depends on its own.")
        self.batch_size = smoothed.batch_size(images, settings.batch_size)
        self.classes = smoothed.count_classes(images, self.batch_size)
        self.folder = None if out is None else expanded(out)
        self.each = settings.n0 + settings.n
        self.keys = [smoothed.keys(self.indices, settings.seed, stream) for stream in (SELECTION, ESTIMATION)]

    def expected(self) -> Cost:
        self._agree(write=False)
        copies = sum(self.each - self._tally(row).done for row in range(len(self.images)))
        if not copies:
            return Cost(0, 0, 0.0)
        timed = min(TIMED, self.batch_size, copies)
        begun = time.perf_counter()
        with counting_passes() as passes:
            self.smoothed.count(self.images[0], 0, 0, timed, self.classes)
        return Cost(copies, passes.total * copies // timed, (time.perf_counter() - begun) * copies / timed)

    def run(self, progress: OnProgress) -> CertificationResult:
        rows = range(len(self.images))
        with ranks() as team, contextlib.ExitStack() as stack:
            if self.folder is not None:
                stack.enter_context(locked(self.folder, "certification", EvaluationError, team))
                team.by_first(functools.partial(self._agree, write=True))
            found = [self._tally(row) for row in rows]
            missing = team.shared([row for row in rows if found[row].done < self.each])
            own = missing[team.rank :: team.world]
            done, total = 0, sum(self.each - found[row].done for row in own)
            shown = stack.enter_context(Progress(total, "certifying", wanted=progress, shown=team.rank == 0))
            for row in own:
                for copies in self._certify(row, found[row]):
                    done += copies
                    shown.at(done)
            for row in rows:  # each is known to one rank, for the sum
                if row not in own and (team.rank or row in missing):
                    found[row] = self._empty()
            selection, counts = (torch.stack([getattr(tally, n) for tally in found]) for n in ("selection", "counts"))
            passes = torch.tensor([tally.passes for tally in found], device="cpu")
            seconds = torch.tensor([tally.seconds for tally in found], dtype=torch.float64, device="cpu")
            team.add_up([selection, counts, passes])
            team.add_up([seconds])
        settings, sigma, chosen = self.settings, self.smoothed.sigma, selection.argmax(dim=1)
        bounds = lower_bounds(counts.gather(1, chosen[:, None])[:, 0], settings.n, settings.alpha)
        abstained = bounds < 0.5
        prediction, radius = torch.where(abstained, ABSTAIN, chosen), certified_radii(bounds, sigma)
        return CertificationResult(
            prediction, radius, bounds, counts, abstained, passes, seconds, self.indices, sigma, settings
        )

    def _certify(self, row: int, tally: _Tally) -> Any:
        """Complete the counts of an image; yields after each batch the number of its copies."""
        written = time.perf_counter()
        for counts, keys, end in (
            (tally.selection, self.keys[0], self.settings.n0),
            (tally.counts, self.keys[1], self.settings.n),
        ):
            while (first := int(counts.sum())) < end:
                last, begun = min(first + self.batch_size, end), time.perf_counter()
                with counting_passes() as passes:
                    counts += self.smoothed.count(self.images[row], keys[row], first, last, self.classes)
                now = time.perf_counter()
                tally.passes += passes.total
                tally.seconds += now - begun
                if self.folder is not None and (tally.done == self.each or now - written > EVERY):
                    written = now
                    plain = {"selection": tally.selection.tolist(), "counts": tally.counts.tolist()}
                    spent = {"passes": tally.passes, "seconds": round(tally.seconds, 3)}
                    write_json(self._path(row), {"image": self._checksum(row), **plain, **spent})
                yield last - first

    def _tally(self, row: int) -> _Tally:
        """What the folder knows of an image."""
        path = None if self.folder is None else self._path(row)
        if path is None or not path.exists():
            return self._empty()
        found = _read(path)
        if found.get("image") != self._checksum(row):
            raise EvaluationError(
                f"{path} is the certificate of another image with this index. Give the indices in the data set, or "
                "another folder."
            )
        selection, counts = (
            torch.tensor(found[name], dtype=torch.int64, device="cpu") for name in ("selection", "counts")
        )
        return _Tally(selection, counts, found["passes"], found["seconds"])

    def _empty(self) -> _Tally:
        selection, counts = torch.zeros((2, self.classes), dtype=torch.int64, device="cpu")
        return _Tally(selection, counts)

    def _path(self, row: int) -> Path:
        assert self.folder is not None
        return self.folder / "images" / f"{int(self.indices[row]):06d}.json"

    def _checksum(self, row: int) -> str:
        return tensor_checksum([("image", self.images[row])])

    def _agree(self, *, write: bool) -> None:
        """The folder belongs to these settings. Raises ``EvaluationError`` where not."""
        if self.folder is None:
            return
        path, settings = self.folder / "settings.json", self.settings.replace(batch_size=None).to_dict()
        now = {"format": FORMAT, "settings": settings, "model": self.smoothed.describe(self.images)}
        if not path.exists():
            refuse_evaluations_below(self.folder, EvaluationError)
            if write:
                write_json(path, now)
            return
        refuse_other_settings(
            _read(path),
            now,
            EvaluationError,
            what=f"{self.folder} holds other certificates",
            remedy="Give the same settings to go on with them, or another folder. (More copies after seeing the "
            "result would void alpha.)",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} is not what a certification writes: {error}") from error
