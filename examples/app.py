"""A web page: attack an image, choose a purifier, watch the purification, see the votes.

    pip install 'cmap-defense[app]'
    python examples/app.py

Models and images are those of the package: nothing is fetched, neither by the page nor by the program. The attack is
PGD on the undefended classifier, which does not know the defence.
"""

import argparse
import functools
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cmap_defense import CMAP, CMAPSettings, PurifiedClassifier, ThreatModel, load_backbone
from cmap_defense.attacks import PGD
from cmap_defense.embedded import CLASS_NAMES, load_classifier, load_test_images
from cmap_defense.purifiers import DiffPure, OneStep

BACKBONES = ("fashion-mnist-ct", "fashion-mnist-edm")
SHOWN = 12  # test images to pick from
SCALE = 4  # pixels of the page per pixel of an image


@functools.cache
def purifiers() -> dict[str, PurifiedClassifier]:
    """Defended classifiers by name: four purifiers, then the presets that the backbones' records name."""
    classifier, (consistency, denoiser) = load_classifier(), map(load_backbone, BACKBONES)
    near = CMAPSettings(n_latents=4, iterations=6, learning_rate=0.1, level=1.0)
    found = {
        "one-step, noise level 0.8": _defended(classifier, denoiser, purifier=OneStep(level=0.8, n_latents=8)),
        "DiffPure, t = 80, 8 steps": _defended(classifier, denoiser, purifier=DiffPure(t=80, step=0.01, n_latents=8)),
        "CMAP, as in the paper (slow)": _defended(classifier, consistency, preset="paper"),
        "CMAP, latents at level 1.0": _defended(classifier, denoiser, purifier=CMAP(near)),
    }
    for backbone in (consistency, denoiser):
        for preset in sorted(backbone.record.presets):
            found[f'preset "{preset}" of {backbone.record.name}'] = _defended(classifier, backbone, preset=preset)
    return found


def _defended(classifier: Any, backbone: Any, **options: Any) -> PurifiedClassifier:
    return PurifiedClassifier(classifier, backbone, **options).eval()


def example_pictures() -> list[tuple[Image.Image, str]]:
    """The first test images with the names of their classes."""
    images, labels = load_test_images()
    pairs = zip(images[:SHOWN], labels[:SHOWN], strict=True)
    return [(picture(image), CLASS_NAMES[label]) for image, label in pairs]


def as_input(image: Image.Image) -> Tensor:
    """A picture as [1, 1, 28, 28] in [0, 1]: grey, cut to a square, on black as in Fashion-MNIST."""
    grey = ImageOps.fit(image.convert("L"), (28, 28), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)
    corners = torch.stack([pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]])
    return (1 - pixels if corners.median() > 0.5 else pixels)[None, None]


def picture(image: Tensor) -> Image.Image:
    """An image [1, H, W] in [0, 1], enlarged."""
    pixels = (image[0].clamp(0, 1) * 255).round().byte().numpy()
    return ImageOps.scale(Image.fromarray(pixels), SCALE, Image.Resampling.NEAREST)


def probabilities(image: Tensor) -> dict[str, float]:
    """What the undefended classifier makes of an image [1, 1, 28, 28], by class."""
    with torch.no_grad():
        found = load_classifier()(image).softmax(dim=1)[0]
    return dict(zip(CLASS_NAMES, found.tolist(), strict=True))


def attack(image: Tensor, eps: float, steps: int) -> Tensor:
    """PGD in linf on the undefended classifier, away from the class that it sees now."""
    classifier = load_classifier()
    with torch.no_grad():
        label = classifier(image).argmax(dim=1)
    return PGD(ThreatModel(eps=eps), steps=int(steps))(classifier, image, label).images if eps else image


def purify(image: Tensor, name: str, seed: int) -> Iterator[tuple[float, Tensor]]:
    """The share of the work that is done, and the versions [K, 1, 28, 28] in [0, 1] so far; 1.0 comes last.

    The purification runs in a thread of its own, and hands its states over as they come.
    """
    model = purifiers()[name]
    purifier: Any = model.purifier
    total = purifier.settings.iterations if isinstance(purifier, CMAP) else purifier.steps
    states: queue.Queue[Any] = queue.Queue()

    def watch(state: Any) -> None:
        shown, number = (state.generated, state.iteration) if isinstance(purifier, CMAP) else (state.images, state.step)
        states.put((number / (total + 1), (shown[0].detach().float() + 1) / 2))

    def work() -> None:
        try:
            with torch.no_grad():
                found = purifier(model.backbone, image, seeds=torch.tensor([seed]), callback=watch)
            states.put((1.0, found.images[0]))
        except Exception as error:  # is raised where the states are read
            states.put(error)

    threading.Thread(target=work, daemon=True).start()
    share = 0.0
    while share < 1:
        state = states.get()
        if isinstance(state, Exception):
            raise state
        share, versions = state
        yield share, versions


def votes(versions: Tensor) -> tuple[list[str], dict[str, float]]:
    """The class of each version, and the share of the versions that are classified so."""
    with torch.no_grad():
        found = load_classifier()(versions).argmax(dim=1).tolist()
    names = [CLASS_NAMES[label] for label in found]
    return names, {name: names.count(name) / len(names) for name in CLASS_NAMES}


def theme() -> Any:
    """A theme with fonts of the system; those of gradio's own themes are fetched."""
    import gradio as gr

    return gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))


def build() -> Any:
    """The page, as ``gradio.Blocks``."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported, which sends a message otherwise
    import gradio as gr

    examples = example_pictures()
    choices = list(purifiers())

    def choose(event: gr.SelectData) -> tuple[Image.Image, Tensor]:
        image = load_test_images()[0][event.index : event.index + 1]
        return picture(image[0]), image

    def upload(image: Image.Image | None) -> Tensor | None:
        return None if image is None else as_input(image)

    def on_attack(image: Tensor | None, eps: float, steps: float) -> tuple[Any, ...]:
        if image is None:
            raise gr.Error("Pick a test image or upload one first.")
        attacked = attack(image, eps, int(steps))
        return attacked, picture(attacked[0]), probabilities(image), probabilities(attacked)

    def on_purify(attacked: Tensor | None, image: Tensor | None, name: str, seed: float) -> Iterator[tuple[Any, ...]]:
        if (shown := image if attacked is None else attacked) is None:
            raise gr.Error("Pick a test image or upload one first.")
        for share, versions in purify(shown, name, int(seed)):
            names, counts = votes(versions) if share == 1 else ([""] * len(versions), None)
            yield f"{share:.0%} done", [*zip(map(picture, versions), names, strict=True)], counts

    with gr.Blocks(title="cmap-defense", analytics_enabled=False) as page:
        gr.Markdown(
            "# Adversarial purification\nPick a test image of Fashion-MNIST or upload a picture, attack it, purify it, "
            "and see what the classifier makes of the versions. The attack does not know the defence, so this shows "
            "how it works, not how robust it is."
        )
        image, attacked = gr.State(None), gr.State(None)
        with gr.Row():
            with gr.Column():
                gallery = gr.Gallery(examples, label="1. Test images", columns=6, height=220, elem_id="images")
                source = gr.Image(type="pil", label="or your own", sources=["upload"], height=160, elem_id="input")
            with gr.Column():
                eps = gr.Slider(0, 0.2, 0.05, step=0.01, label="Largest change of a pixel (eps, images in [0, 1])")
                steps = gr.Slider(1, 50, 20, step=1, label="Steps of PGD")
                attack_button = gr.Button("2. Attack the undefended classifier", elem_id="attack")
                attacked_picture = gr.Image(type="pil", label="Attacked", height=160, interactive=False)
                before = gr.Label(num_top_classes=3, label="Undefended classifier, before the attack")
                after = gr.Label(num_top_classes=3, label="Undefended classifier, after it", elem_id="after")
            with gr.Column():
                name = gr.Dropdown(choices, value=choices[0], label="Purifier or preset", elem_id="purifier")
                seed = gr.Number(0, label="Seed of the noise", precision=0)
                purify_button = gr.Button("3. Purify", variant="primary", elem_id="purify")
                progress = gr.Markdown("", elem_id="progress")
                versions = gr.Gallery(label="Versions, with their classes", columns=4, height=260, elem_id="versions")
                vote = gr.Label(num_top_classes=3, label="Votes", elem_id="votes")
        gallery.select(choose, None, [source, image])
        source.upload(upload, source, image)
        source.clear(lambda: None, None, image)
        image.change(lambda: None, None, attacked)
        attack_button.click(on_attack, [image, eps, steps], [attacked, attacked_picture, before, after])
        purify_button.click(
            on_purify, [attacked, image, name, seed], [progress, versions, vote], show_progress="hidden"
        )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, help="of the local server; a free one from 7860 on without")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    options = parser.parse_args()
    build().queue().launch(server_port=options.port, inbrowser=options.open, ssr_mode=False, theme=theme())


if __name__ == "__main__":
    main()
