"""How well found structures lie on the true ones: Dice, IoU and surface distances, by sample and class.

What neither has is found perfectly (Dice, IoU and NSD 1, distance 0); what only one has counts as the worst (0, and the
image's diagonal). So every sample has a score for every class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from worker.evaluation.outputs import Bools, Ints

Doubles = npt.NDArray[np.float64]


def count_classes(found: Ints, truth: Ints, classes: int) -> tuple[Doubles, Doubles, Doubles]:
    """Voxels of each sample and class that are found, true, and both: (n, classes) of class indices (n, *sizes)."""
    count = len(found)
    rows = classes * np.arange(count)[:, None]
    found_at, true_at = (rows + indices.reshape(count, -1) for indices in (found, truth))
    cells = (found_at, true_at, true_at[found_at == true_at])
    in_found, in_truth, in_both = (
        np.bincount(cell.ravel(), minlength=count * classes).reshape(count, classes).astype(np.float64)
        for cell in cells
    )
    return in_found, in_truth, in_both


def count_labels(found: Bools, truth: Bools) -> tuple[Doubles, Doubles, Doubles]:
    """As `count_classes`, of independent labels (n, labels, *sizes)."""
    shape = (*found.shape[:2], -1)
    in_found, in_truth, in_both = (
        np.count_nonzero(mask.reshape(shape), axis=2).astype(np.float64) for mask in (found, truth, found & truth)
    )
    return in_found, in_truth, in_both


def dice(in_found: Doubles, in_truth: Doubles, in_both: Doubles) -> Doubles:
    """Twice the overlap over both sizes."""
    return _share(2 * in_both, in_found + in_truth)


def iou(in_found: Doubles, in_truth: Doubles, in_both: Doubles) -> Doubles:
    """The intersection over the union."""
    return _share(in_both, in_found + in_truth - in_both)


def _share(part: Doubles, whole: Doubles) -> Doubles:
    return np.divide(part, whole, out=np.ones_like(part), where=whole > 0)


def surface_scores(found: Bools, truth: Bools, spacing: Sequence[float], tolerance: float) -> tuple[float, float]:
    """95th percentile of the surface distance, and the share of both surfaces within `tolerance`, of one mask.

    The percentile is the larger of the two directions. Distances are in the unit of `spacing`, which has one value an
    axis; surfaces are those voxels of a mask that have a neighbour outside it. NSD as in arXiv 1809.04430, on voxels.
    """
    has_found, has_truth = bool(found.any()), bool(truth.any())
    if not has_found and not has_truth:
        return 0.0, 1.0
    if not has_found or not has_truth:
        return math.hypot(*(size * step for size, step in zip(found.shape, spacing, strict=True))), 0.0
    box = ndimage.find_objects((found | truth).astype(np.int8))[0]  # nothing outside it can be nearest
    surfaces = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (found, truth)]
    to_found, to_truth = (ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces)
    one_way, other_way = to_truth[surfaces[0]], to_found[surfaces[1]]
    hd95 = max(float(np.percentile(one_way, 95)), float(np.percentile(other_way, 95)))
    near = np.count_nonzero(one_way <= tolerance) + np.count_nonzero(other_way <= tolerance)
    return hd95, near / (len(one_way) + len(other_way))
