"""cut-cross-entropy: a loss over a vocabulary whose logits are never in memory; programs take turns by a lock."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from agreement import BFLOAT16, assert_agrees
from cut_cross_entropy import linear_cross_entropy


def test_the_loss_of_a_linear_layer_in_bfloat16(launched, rng):
    targets = torch.randint(0, 90, (40,), generator=rng)
    targets[3] = -100
    assert_agrees(
        lambda x, w: linear_cross_entropy(x, w, targets, impl="cce"),
        lambda x, w: F.cross_entropy(x @ w.T, targets),
        *(torch.randn(*shape, generator=rng).bfloat16() for shape in ((40, 64), (90, 64))),
        tolerance=BFLOAT16,
    )
    assert launched >= {"_cce_lse_forward_kernel", "_indexed_neg_dot_forward_kernel", "_cce_backward_kernel"}
