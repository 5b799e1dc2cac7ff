"""An attack of a user's, made of public names alone, counts in an evaluation as the package's own do."""

import dataclasses
from typing import Any

from torch import Tensor

from attack_toys import labelled
from cmap_defense import ThreatModel, evaluate
from cmap_defense.attacks import Attack, Candidates, CrossEntropy, Goal, Oracle, random_point
from cmap_defense.evaluation import Protocol, Report
from evaluated import Shaky

THREAT = ThreatModel(eps=0.02)
PROTOCOL = Protocol(predictions=4, reevaluations=6, seeds=(0, 1), group=12, sanity_images=12, gradient_samples=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignSteps(Attack):
    """Three steps of eps / 2 along the sign of the gradient, from a random start."""

    steps: int = 3

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        images = random_point(self.threat, oracle.draws, clean)
        for _ in range(self.steps):
            feedback = oracle.feedback(images, goal, CrossEntropy(), samples=2)
            images = self.threat.project(images + self.first_step() * feedback.gradient.sign(), clean)
        return Candidates(images[:, None])

    def differentiates_defence(self, model: object) -> bool:
        return True

    def first_step(self) -> float:
        return self.threat.eps / 2


class Undeclared(SignSteps):
    """The same attack, which does not say what it does."""

    differentiates_defence = Attack.differentiates_defence


def report_of(attack: Attack) -> Report:
    given: dict[str, Any] = {"attacks": {"sign-steps": attack}, "protocol": PROTOCOL, "threads": 1}
    return evaluate(Shaky(0.3), labelled(12), **given)


def test_an_attack_of_a_user_earns_a_headline() -> None:
    report = report_of(SignSteps(THREAT))
    assert report.refused == []
    assert report.headline is not None
    assert set(report.headline.chosen) == {"sign-steps"}
    assert report.headline.accuracy.value < report.row("clean").reevaluated.value


def test_an_attack_that_declares_nothing_is_taken_for_one_that_does_not_differentiate_the_defence() -> None:
    report = report_of(Undeclared(THREAT))
    assert report.headline is None
    assert any("a gradient attack goes through the defence itself" in reason for reason in report.refused)


class InPlace(SignSteps):
    """One that changes the images that it is given."""

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        return Candidates(clean.mul_(0.5)[:, None])


def test_an_attack_that_changes_its_images_in_place_stays_in_its_ball() -> None:
    images, labels = labelled(3)
    before = images.clone()
    result = InPlace(THREAT)(Shaky(), images, labels)
    assert images.equal(before)
    assert ((result.images - before).abs() <= THREAT.eps + 1e-6).all()
    assert result.distance.min() > 0
