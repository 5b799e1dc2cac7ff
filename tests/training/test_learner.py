"""One optimiser step: what it does not wait for, and that its state can be taken out and put back."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmap_defense.training.learner import Learner
from cmap_defense.training.objectives import CD, CT, ECT, EDM, ICT, Objective
from training.trained import NETWORK, RICH
from training.trained import learner as learner_of


def learner(objective: Objective, *, classes: int | None = 2, dropout: float = 0.0, **changes: Any) -> Learner:
    """Of the tiny network, with two averages."""
    return learner_of(objective, RICH.replace(**changes), NETWORK.replace(num_classes=classes, dropout=dropout))


def teacher(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A denoiser of images that are all zero."""
    return noisy * 0.01 / (0.01 + sigma[:, None, None, None] ** 2)


OBJECTIVES: list[Objective] = [EDM(), CT(), ICT(), ECT(), CD(teacher=teacher, teacher_source={"name": "none"})]


class Reading(TorchDispatchMode):
    """Counts how often a number is read off a tensor, which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_a_step_reads_nothing_from_the_device(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the backbone's own check of the noise levels, one for each call. What is read on the CPU wherever the
    network is stays out of it: the steps that Adam counts there, where it is not fused, and iCT's table of levels."""
    made = learner(objective, classes=None)
    made.step(0)
    calls = []
    for model in {made.model, made.target.model}:
        model.network.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(made.optimiser, "step", lambda: None)
    with Reading() as reading:
        loss = made.step(1)
    assert loss.shape == ()
    assert len(calls) == (1 if objective.name == "edm" else 2)
    assert reading.count <= len(calls) + (objective.name == "ict")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_its_state_is_all_that_the_next_step_depends_on(objective: Objective) -> None:
    one, other = learner(objective), learner(objective)
    for number in range(3):
        one.step(number)
    other.load({name: tensor.clone() for name, tensor in one.tensors().items()})
    assert torch.equal(one.step(3), other.step(3))
    expected = one.tensors()
    assert expected.keys() == other.tensors().keys()
    for name, tensor in other.tensors().items():
        assert torch.equal(tensor, expected[name]), name
    assert any(name.startswith("target/") for name in expected) is (objective.name == "ct")


def test_the_gradient_is_clipped() -> None:
    """Adam's second moment after one step is (1 - beta) g^2, g of norm clip_norm at most."""
    made = learner(ECT(), clip_norm=0.01)
    made.step(0)
    squares = sum(float(t.double().sum()) for name, t in made.tensors().items() if name.startswith("adam/exp_avg_sq"))
    assert squares == pytest.approx(0.01 * 0.01**2, rel=1e-3)


def class_conditional(noisy: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
    """A denoiser of images that are all their label."""
    return teacher(noisy, sigma) + class_labels[:, None, None, None] * (
        1 - 0.01 / (0.01 + sigma[:, None, None, None] ** 2)
    )


@pytest.mark.parametrize(
    "objective",
    [*OBJECTIVES, CD(teacher=class_conditional, teacher_source={"name": "none"}, class_conditional=True)],
    ids=lambda objective: objective.name,
)
@pytest.mark.parametrize("micro", [1, 3, 100])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(objective: Objective, micro: int) -> None:
    """Where dropout does not draw by the layout of the batch."""
    whole, parts = (
        learner(objective, dropout=0.0, micro_batch=size, precision="float32", clip_norm=1e9) for size in (None, micro)
    )
    torch.testing.assert_close(parts.step(0), whole.step(0), rtol=1e-5, atol=1e-6)
    largest = max(p.grad.abs().max() for p in whole.weights.values() if p.grad is not None)
    for name, p in whole.weights.items():
        other = parts.weights[name].grad
        if p.grad is None:
            assert other is None
            continue
        torch.testing.assert_close(other, p.grad, rtol=1e-3, atol=1e-5 * largest.item())
