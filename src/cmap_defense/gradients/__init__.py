"""How the gradient with respect to the input image is taken.

A purification may contain an optimisation; how its derivative is taken decides how strong a gradient attack is. The
choice is an object, handed to ``PurifiedClassifier(gradient=...)``. Where it is left out, it is the exact gradient of a
purifier that denoises, and the straight-through one of CMAP; the model's repr shows which.
"""

from cmap_defense.gradients.base import GradientMode, Purification
from cmap_defense.gradients.detached import Detached
from cmap_defense.gradients.implicit import Implicit
from cmap_defense.gradients.straight_through import StraightThrough
from cmap_defense.gradients.surrogate import Surrogate
from cmap_defense.gradients.unrolled import Unrolled

__all__ = ["Detached", "GradientMode", "Implicit", "Purification", "StraightThrough", "Surrogate", "Unrolled"]
