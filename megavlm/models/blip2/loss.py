"""The losses of pairs. Shape letters as in ``pair.py``; C classes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrast_loss(similarities: Tensor, targets: Tensor, is_candidate: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of finding one's own among the candidates; the smoothed share is spread over all candidates.

    Args:
        similarities: ``[N, W]`` float32, divided by the temperature.
        targets: ``[N]`` int64.
        is_candidate: ``[W]`` bool. The loss of a row whose own is none is 0.
        label_smoothing: share of the target that is spread.

    Returns:
        ``[N]``.
    """
    counts = is_candidate[targets]
    log_shares = F.log_softmax(similarities.masked_fill(~is_candidate, float("-inf")), dim=1)
    log_shares = torch.where(is_candidate & counts.unsqueeze(1), log_shares, 0.0)
    own = log_shares.gather(1, targets.unsqueeze(1)).squeeze(1)
    spread = log_shares.sum(1) / is_candidate.sum().clamp(min=1)
    return -(1.0 - label_smoothing) * own - label_smoothing * spread


def matching_loss(logits: Tensor, is_pair: Tensor, has_negatives: Tensor) -> Tensor:
    """Cross-entropy of telling a pair from its two negatives, each of the three alike.

    Args:
        logits: ``[3, N, 2]`` float32: of the pair, of the caption with another image, of the image with another
            caption; class 1 is "belongs together".
        is_pair: ``[N]`` bool; the loss of others is 0.
        has_negatives: 0-d bool; without them there is only the pair.

    Returns:
        ``[N]``.
    """
    labels = torch.tensor([1, 0, 0], device=logits.device).unsqueeze(1).expand(-1, logits.shape[1])
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    mean = torch.where(has_negatives, losses.mean(0), losses[0])
    return torch.where(is_pair, mean, 0.0)
