"""How far two models' predictions lie apart, from their logits; float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Sums over predicted tokens: the negative log-likelihoods of the reference and of the other model, KL(reference ||
    other), the largest of it, and how many have the same most likely token. All in nats."""

    num_tokens: int = 0
    reference_nll: float = 0.0
    other_nll: float = 0.0
    kl: float = 0.0
    max_kl: float = 0.0
    num_agreeing: int = 0

    def __add__(self, more: Divergence) -> Divergence:
        return Divergence(
            num_tokens=self.num_tokens + more.num_tokens,
            reference_nll=self.reference_nll + more.reference_nll,
            other_nll=self.other_nll + more.other_nll,
            kl=self.kl + more.kl,
            max_kl=self.max_kl if self.max_kl > more.max_kl or math.isnan(self.max_kl) else more.max_kl,
            num_agreeing=self.num_agreeing + more.num_agreeing,
        )


def divergence(reference: Tensor, other: Tensor, targets: Tensor) -> Divergence:
    """Of logits (n, vocabulary) of any float dtype, and the tokens (n,) that came next."""
    first, second = (logits.double().log_softmax(dim=-1) for logits in (reference, other))
    # A token that is impossible to the reference weighs nothing, whatever the other one makes of it.
    terms = torch.where(first == -torch.inf, 0.0, first.exp() * (first - second))
    kl = terms.sum(dim=-1)
    at = targets.view(-1, 1)
    return Divergence(
        num_tokens=len(targets),
        reference_nll=-float(first.gather(1, at).sum()),
        other_nll=-float(second.gather(1, at).sum()),
        kl=float(kl.sum()),
        max_kl=float(kl.max()) if len(kl) else 0.0,
        num_agreeing=int((first.argmax(dim=-1) == second.argmax(dim=-1)).sum()),
    )
