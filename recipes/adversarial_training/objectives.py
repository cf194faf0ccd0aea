"""The objectives as functions of logits.

Each takes the logits (B, K) of the clean and of the adversarial images and gives a scalar, the mean over the batch,
computed in float32. Where the released codes differ from the papers we follow the codes, to their constants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(target: Tensor, other: Tensor) -> Tensor:
    """KL(p || p') of each example, (B,), of two rows of logits: p that of ``target``."""
    return F.kl_div(other.float().log_softmax(-1), target.float().softmax(-1), reduction="none").sum(-1)


def trades_loss(logits: Tensor, adv_logits: Tensor, label: Tensor, beta: float = 6.0) -> Tensor:
    """CE(f(x), y) + beta KL(p(x) || p(x')) (TRADES, arXiv 1901.08573, eq. 5). Gradients flow through both branches."""
    return F.cross_entropy(logits.float(), label) + beta * kl_divergence(logits, adv_logits).mean()


def mart_loss(logits: Tensor, adv_logits: Tensor, label: Tensor, beta: float = 5.0) -> Tensor:
    """BCE(f(x'), y) + beta KL(p || p') (1 - p_y) (MART, OpenReview rklOg6EFwS, eq. 8).

    The boosted cross-entropy adds -log(1 - the largest probability of a wrong class). As released, the weight 1 - p_y
    is not detached.
    """
    adv = adv_logits.float().softmax(-1)
    clean = logits.float().softmax(-1)
    wrong = adv.scatter(1, label[:, None], -1.0).amax(1)
    boosted = F.cross_entropy(adv_logits.float(), label) - torch.log(1.0001 - wrong + 1e-12).mean()
    own = clean.gather(1, label[:, None]).squeeze(1)
    apart = F.kl_div(torch.log(adv + 1e-12), clean, reduction="none").sum(-1)
    return boosted + beta * (apart * (1.0000001 - own)).mean()


def alp_loss(logits: Tensor, adv_logits: Tensor, label: Tensor, lam: float = 0.5) -> Tensor:
    """Half of both cross-entropies + lam |f(x) - f(x')|^2 (adversarial logit pairing, arXiv 1803.06373, eq. 2)."""
    logits, adv_logits = logits.float(), adv_logits.float()
    both = 0.5 * (F.cross_entropy(logits, label) + F.cross_entropy(adv_logits, label))
    return both + lam * (logits - adv_logits).pow(2).sum(-1).mean()


def vat_loss(logits: Tensor, adv_logits: Tensor) -> Tensor:
    """Local distributional smoothness, KL(p(x) || p(x')) with p(x) constant (VAT, arXiv 1704.03976, eq. 5)."""
    return kl_divergence(logits.detach(), adv_logits).mean()
