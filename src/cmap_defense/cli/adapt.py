"""``cmap-defense adapt``."""

from __future__ import annotations

from typing import Any

import torch

from cmap_defense.adaptation import AdaptationConfig, adapt
from cmap_defense.adaptation.run import RECORD_FILE, WEIGHTS_FILE
from cmap_defense.cli.build import (
    Options,
    Printed,
    classifier_of,
    device_of,
    normalize_of,
    purifier_of,
    settings_of,
    threat_of,
)
from cmap_defense.cli.output import listed
from cmap_defense.cli.train import training_set, write_loss_chart
from cmap_defense.common.ranks import ranks
from cmap_defense.purifiers import Purifier
from cmap_defense.purifiers.choice import loaded_with
from cmap_defense.threat import ThreatModel
from cmap_defense.training.loop import LOG_FILE


def run_adapt(options: dict[str, Any]) -> Printed:
    """Carry out the command."""
    out, classifier, normalize = options["out"], classifier_of(options, trained=True), normalize_of(options)
    config = settings_of(AdaptationConfig, options | {"device": str(device_of(options)), "weights": "float32"})
    backbone: Any
    backbone, purifier = loaded_with(options["backbone"], _purifier(options), None)
    chosen = training_set(options, backbone.image_shape[0])
    left = sorted(set(range(len(chosen.source))) - set(chosen.positions))
    held_out = chosen.source.select(torch.tensor(left)) if left else None
    with ranks() as team:
        done = adapt(
            classifier,
            backbone,
            purifier,
            chosen.loaded(),
            out=out,
            adversarial=options["adversarial"],
            threat=threat_of(options) if options["adversarial"] or threat_of(options) != ThreatModel() else None,
            held_out=held_out,
            config=config,
            progress=True,
            normalize=normalize,
            resize=options["resize"],
        )
        if team.rank != 0:
            return None
    charts = write_loss_chart(out / LOG_FILE, out / "loss.png")
    files = [out / WEIGHTS_FILE, out / RECORD_FILE, *([] if charts is None else [charts])]
    lines = [] if done.finished else ["Stopped early: the same command continues."]
    scores = done.record["held_out_scores"]
    if scores:
        lines.append(f"Score on {options['hold_out']} held-out images: {max(scores):.3f} (the best of {len(scores)}).")
    lines.append(f"{done.record['images_seen']:,} images seen. {listed(files)}")
    return dict(done.record) | {"finished": done.finished, "files": [str(file) for file in files]}, lines


def _purifier(options: Options) -> Purifier:
    """The purifier of the options; of those that have a number of versions, with one unless another is given."""
    given = {name: options[name] for name in ("purifier", "purifier_set")}
    purifier = purifier_of(given)
    keys = {text.partition("=")[0].strip() for text in given["purifier_set"]}
    if "n_latents" in keys or "n_latents" not in purifier.to_dict():
        return purifier
    return purifier_of(given | {"n_latents": 1})
