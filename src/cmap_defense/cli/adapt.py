"""``cmap-defense adapt``."""

from __future__ import annotations

from typing import Any

import click
import torch

from cmap_defense.adaptation import AdaptationConfig, adapt
from cmap_defense.adaptation.run import RECORD_FILE, WEIGHTS_FILE
from cmap_defense.cli.build import device_of, imported_model, purifier_of, settings_of, threat_of, using_threads
from cmap_defense.cli.output import print_json
from cmap_defense.cli.train import write_loss_chart
from cmap_defense.cli.train_options import training_set
from cmap_defense.common.ranks import ranks
from cmap_defense.data import FolderImages
from cmap_defense.threat import ThreatModel
from cmap_defense.training.loop import LOG_FILE


def run_adapt(options: dict[str, Any]) -> None:
    """Carry out the command with its options."""
    device, out = device_of(options), options["out"]
    given = options["classifier"], options["weights"]
    classifier: Any = imported_model(*given, device, "--classifier", trained=True)
    if (options["mean"] is None) != (options["std"] is None):
        raise click.UsageError("--mean and --std go together: give both, or neither.")
    config = settings_of(AdaptationConfig, options | {"device": str(device), "weights": "float32"})
    chosen = training_set(options)
    if options["hold_out"] and isinstance(chosen.source, FolderImages):
        left = sorted(set(range(len(chosen.source))) - set(chosen.positions))
    else:
        left = range(len(chosen.positions), len(chosen.source))
    held_out = chosen.source.select(torch.tensor(list(left))) if options["hold_out"] else None
    with using_threads(options["threads"]), ranks() as team:
        done = adapt(
            classifier,
            options["backbone"],
            purifier_of({name: options[name] for name in ("purifier", "purifier_set")}),
            chosen.loaded(),
            out,
            adversarial=options["adversarial"],
            threat=threat_of(options) if options["adversarial"] or threat_of(options) != ThreatModel() else None,
            held_out=held_out,
            config=config,
            progress=True,
            normalize=None if options["mean"] is None else (options["mean"], options["std"]),
            resize=options["resize"],
        )
        if team.rank != 0:
            return
    files = [out / WEIGHTS_FILE, out / RECORD_FILE, write_loss_chart(out / LOG_FILE, out / "loss.png")]
    if options["as_json"]:
        print_json(dict(done.record) | {"finished": done.finished, "files": [str(file) for file in files if file]})
        return
    if not done.finished:
        click.echo("Stopped early: the same command continues.")
    scores = done.record["held_out_scores"]
    if scores:
        click.echo(f"Score on {options['hold_out']} held-out images: {max(scores):.3f} (the best of {len(scores)}).")
    click.echo(f"{done.record['images_seen']:,} images seen. " + ", ".join(str(file) for file in files if file))
