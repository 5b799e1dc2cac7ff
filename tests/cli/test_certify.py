"""``cmap-defense certify``, and its folder in a report."""

import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from certified import small
from cmap_defense import SmoothedClassifier, certify
from cmap_defense.certification.results import RADII
from cmap_defense.certification.summary import FILE, PUBLISHED, read_summary, summary_of, table
from cmap_defense.common.files import write_json
from cmap_defense.embedded import ASSETS, load_classifier, load_test_images
from cmap_defense.errors import EvaluationError
from cmap_defense.evaluation import Report
from cmap_defense.evaluation.report import load_report
from cmap_defense.evaluation.report.tables import markdown
from cmap_defense.plots.comparison import certified_plot
from example_report import example_report

from .conftest import Run

TINY = ["certify", "-c", "embedded", "-d", "embedded", "-n", 2, "--sigma", "0.25,0.5", "--n0", 5, "--samples", 30]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a summary, made without the command."""
    certificates = summary_of({"edm-0.25": ("edm", small())}, torch.tensor([1, 0, 1]))
    data = {"name": "embedded", "count": 3, "checksum": "abc"}
    write_json(tmp_path / "certified" / FILE, {"data": data, "certificates": certificates, "published": {}})
    return tmp_path / "certified"


def test_as_text_with_files_continued_with_more_images(tmp_path: Path, run: Run) -> None:
    text = run(*TINY, "-b", "fashion-mnist-edm", "--undefended", "-o", tmp_path)
    assert "4 smoothed classifiers, 2 images, 5 + 30 noisy copies of each.\n280 copies and 140 network passes" in text
    rows = [line.split()[:3] for line in text.splitlines() if line.startswith(("fashion-mnist-edm", "none"))]
    assert [row[:2] for row in rows] == [
        [name, sigma] for name in ("fashion-mnist-edm", "none") for sigma in ("0.25", "0.5")
    ]
    assert "lower bound, of the smoothed classifier, in l2 alone" in text
    names = [f"{name}-{sigma}" for name in ("fashion-mnist-edm", "undefended") for sigma in ("0.25", "0.5")]
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"certified.json", "certified.svg", *(f"{name}.tsv" for name in names)}
    images, labels = load_test_images()
    expected = certify(SmoothedClassifier(load_classifier(), None, 0.5), images[:2], n0=5, n=30)
    lines = (tmp_path / "undefended-0.5.tsv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines, delimiter="\t"))
    assert [int(row["predict"]) for row in rows] == expected.prediction.tolist()
    assert [int(row["label"]) for row in rows] == labels[:2].tolist()

    arguments = ["-b", "fashion-mnist-edm", "--undefended", "-o", tmp_path, "-n", 3]
    cost = json.loads(run(*TINY, *arguments, "--dry-run", "--json"))
    assert (cost["copies"], cost["passes"]) == (140, 70)
    assert not (tmp_path / names[0] / "images" / "000002.json").exists()
    found = json.loads(run(*TINY, *arguments, "--json"))
    assert [one["images"] for one in found["certificates"]] == [3] * 4
    assert [one["passes"] for one in found["certificates"]] == [105, 105, 0, 0]
    assert [at["radius"] for at in found["certificates"][0]["accuracy"]] == list(RADII)
    assert found["published"] == {}
    assert "All certificates are there." in run(*TINY, *arguments)
    assert " n: 30 before, 31 now" in run(*TINY, *arguments, "--samples", 31, status=1)


def test_without_matplotlib_there_is_no_plot(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = json.loads(run(*TINY, "--undefended", "--json", "-o", tmp_path))
    assert "cmap-defense[report]" in found["lacking"]
    assert not (tmp_path / "certified.svg").exists()


def test_without_scipy_nothing_is_begun(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert "cmap-defense[certify]" in run(*TINY, "--undefended", "-o", tmp_path / "out", status=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("", 2, "nothing to certify: give --backbone NAME, --undefended, or both"),
        ("-b fashion-mnist-emd", 1, "Did you mean 'fashion-mnist-edm'"),
        ("-b fashion-mnist-edm -b fashion-mnist-edm", 2, "the same backbone is given twice"),
        ("--undefended --sigma 0", 2, "--sigma must be above 0"),
        ("--undefended --sigma none", 2, "one number at least"),
        ("--undefended --sigma a", 2, "not a list of numbers"),
        ("-b fashion-mnist-edm --sigma 41", 2, "--sigma must be at most 40"),
        ("--undefended --alpha 1", 2, "--alpha"),
        ("--undefended --samples 0", 2, "--samples"),
        ("--undefended --mean 0.5", 2, "--mean and --std go together"),
        ("--undefended --mean 0.5,0.4 --std 1,1", 1, "--mean must be 1 number"),
        ("-b cifar10-edm-small", 1, "denoises images [3, 32, 32], not [1, 28, 28]. Take a backbone"),
        ("--undefended -n 300", 1, "Take 256 at most: --count 256"),
    ],
)
def test_mistakes(arguments: str, status: int, message: str, tmp_path: Path, run: Run) -> None:
    assert message in run(*TINY, *arguments.split(), "-o", tmp_path / "out", status=status)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- table, plot and report


def test_an_evaluation_refuses_a_folder_without_certificates_at_once(tmp_path: Path, run: Run) -> None:
    model = ["-b", "fashion-mnist-ct", "-c", "embedded", "-d", "embedded", "-o", tmp_path / "out"]
    assert "certified.json cannot be read" in run("evaluate", *model, "--certified", tmp_path, status=1)
    assert not (tmp_path / "out").exists()


def test_published_figures_stand_below_the_own_ones_and_in_the_plot(folder: Path) -> None:
    summary = read_summary(folder) | {"published": PUBLISHED["cifar10"]}
    rows = table(summary)
    assert {len(row) for row in rows} == {len(rows[0])}
    assert rows[-2][0] == "published: denoiser, full access (Salman et al. 2020)"
    assert rows[-2][-4:] == ["56", "41", "28", "19"]
    points = {name: {0.25: values[0] / 100} for name, values in PUBLISHED["cifar10"].items()}
    curves = {("a", 0.25): [0.3, 0.1], ("b", 0.5): [], ("b", 0.25): [0.4]}
    drawn = certified_plot(curves, 4, "4 images", points).decode()
    for text in ("a, σ = 0.25", "b, σ = 0.5", "published: none, trained with noise (Cohen et al. 2019)", "4 images"):
        assert text in drawn
    assert drawn == certified_plot(curves, 4, "4 images", points).decode()


def small_report() -> Report:
    return example_report(attacks=("transfer", "pgd"), baselines=(), images=8, seeds=(0,), iterations=4)


def test_a_report_shows_them_beside_the_accuracy_under_attacks(folder: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "report.json").write_text(json.dumps(small_report().to_dict()))
    run("report", tmp_path, "--certified", folder)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.index("## Certified accuracy") > text.index("## Accuracy")
    assert "| edm | 0.25 |" in text
    assert "for other images" in text
    assert "Accuracy under attacks, above, is an upper bound" in text
    assert "lower bound" in text
    assert "Certified accuracy" in (tmp_path / "report.html").read_text(encoding="utf-8")
    kept = load_report(tmp_path)
    assert markdown(kept) == text
    checksum = read_summary(folder)["data"]["checksum"]
    same = dataclasses.replace(
        kept, settings={**kept.settings, "data": {**kept.settings["data"], "checksum": checksum}}
    )
    assert "for the same images" in markdown(same)
    assert "Certified" not in markdown(Report.from_dict(small_report().to_dict()))
    assert "cannot be read" in run("report", tmp_path, "--certified", tmp_path, status=1)


def test_what_is_no_summary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "certified.json").write_text('{"certificates": [{}]}')
    with pytest.raises(EvaluationError, match="cmap-defense certify"):
        read_summary(tmp_path)


def test_a_device_and_threads_are_restored(tmp_path: Path, run: Run) -> None:
    threads = torch.get_num_threads()
    run(*TINY, "--undefended", "--threads", 1, "--device", "cpu", "--dry-run", "-o", tmp_path / "out")
    assert torch.get_num_threads() == threads
    assert not (tmp_path / "out").exists()


CLASSIFIERS = """
from torch import nn

two = nn.Sequential(nn.Flatten(), nn.Linear(784, 2))
large = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [("two", "from 0 to 1, the classes of the model"), ("large", "The classifier of 'the certification' raised")],
)
def test_a_classifier_that_does_not_fit_is_refused_before_any_work(
    name: str, message: str, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "models.py").write_text(CLASSIFIERS)
    command = ["certify", "-c", f"{tmp_path / 'models.py'}:{name}", *TINY[3:], "--undefended", "-o", tmp_path / "out"]
    assert message in run(*command, "--dry-run", status=1)
    assert message in run(*command, status=1)
    assert not (tmp_path / "out").exists()


def test_this_folder_is_named_by_its_whole_path(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ASSETS.parent / "fashion-mnist-edm", tmp_path / "mine")
    shutil.copytree(ASSETS.parent / "fashion-mnist-edm", tmp_path / "undefended")
    monkeypatch.chdir(tmp_path / "mine")
    found = json.loads(run(*TINY, "-b", ".", "--undefended", "-n", 1, "-o", tmp_path / "out", "--json"))
    assert [one["denoiser"] for one in found["certificates"]] == ["mine", "mine", None, None]
    assert "rename it" in run(*TINY, "-b", "../undefended", "-o", tmp_path / "other", status=2)


def test_two_backbones_in_folders_of_one_name_have_names_of_their_own(tmp_path: Path, run: Run) -> None:
    for name in ("one", "two"):
        shutil.copytree(ASSETS.parent / "fashion-mnist-edm", tmp_path / name / "backbone")
    backbones = [word for name in ("one", "two") for word in ("-b", tmp_path / name / "backbone")]
    run(*TINY, "--sigma", "1/4", *backbones, "-o", tmp_path / "out")
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"one-backbone-0.25", "two-backbone-0.25"}
    assert "is given twice" in run(*TINY, *backbones[:2], *backbones[:2], "-o", tmp_path / "b", status=2)
