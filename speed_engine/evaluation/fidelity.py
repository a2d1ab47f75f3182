"""Fidelity: how close generated images are to real ones, measured by torch-fidelity.

    FID         Frechet distance of two Gaussians fitted to the features (Heusel et al. 2017)
                |m_g - m_r|^2 + tr(S_g + S_r - 2 (S_g S_r)^(1/2)); lower is better
    KID         unbiased squared MMD, cubic kernel (Binkowski et al. 2018), mean over subsets; lower
    IS          exp of the mutual information of image and class (Salimans et al. 2016); higher
    precision   share of generated images inside the real manifold (Kynkaanniemi et al. 2019)
    recall      share of real images inside the generated manifold

All compare the features of one extractor; precision and recall, too, which torch-fidelity would by
itself compute from another network's. They are deterministic, leave the global random state as it
was, and raise ``UserError`` where torch-fidelity or torchvision cannot be imported.

Letters: N generated images, K classes.
"""

import numpy as np
import torch
from torch import Tensor

from speed_engine.evaluation.features import import_torch_fidelity
from speed_engine.evaluation.image_set import ImageSet, Statistics, statistics_of

KID_SUBSET_SIZE = 1000  # images, where there are as many


def frechet_distance(generated: Statistics, real: Statistics) -> float:
    """FID of two sets of images, from mean and covariance of their features."""
    import_torch_fidelity()
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    # It refuses two dtypes: statistics of an archive may have another than the features.
    ours, theirs = (
        {name: of[name].astype(np.float64) for name in ("mu", "sigma")} for of in (generated, real)
    )
    answer = fid_statistics_to_metric(ours, theirs, False)
    return float(answer["frechet_inception_distance"])


def frechet_distance_within(real: ImageSet, count: int) -> float:
    """FID of two random sets of ``count`` real images that share none: FID's bias for so few.

    Args:
        real: 2 ``count`` images or more.
        count: of each set.
    """
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    first, second = real.features[order[:count]], real.features[order[count : 2 * count]]
    return frechet_distance(statistics_of(first), statistics_of(second))


def kernel_distance(generated: ImageSet, real: ImageSet) -> float:
    """KID of two sets of images; may be negative, since it is unbiased."""
    import_torch_fidelity()
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    features = generated.features, real.features
    answer = kid_features_to_metric(*features, kid_subset_size=size, verbose=False)
    return float(answer["kernel_inception_distance_mean"])


def inception_score(logits: Tensor) -> float:
    """(N, K) logits -> IS, in [1, K]."""
    import_torch_fidelity()
    from torch_fidelity.metric_isc import isc_featuresdict_to_metric

    answer = isc_featuresdict_to_metric({"isc": logits}, "isc", verbose=False)
    return float(answer["inception_score_mean"])


def precision_and_recall(generated: ImageSet, real: ImageSet) -> tuple[float, float]:
    """Both in [0, 1]."""
    import_torch_fidelity()
    from torch_fidelity.metric_prc import prc_features_to_metric

    features = generated.features, real.features
    answer = prc_features_to_metric(*features, save_cpu_ram=True, verbose=False)
    return float(answer["precision"]), float(answer["recall"])
