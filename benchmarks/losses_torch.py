"""Measures the loss of TRL or Liger; benchmarks/losses.py runs it.

    python losses_torch.py trl|liger FILE

FILE is an .npz file with the arrays `head`, `hidden`, `teacher_head` and `teacher_hidden`. The
script prints one line of JSON.
"""

import json
import resource
import statistics
import sys
import time

import numpy as np
import torch


def trl(head, hidden, teacher_head, teacher_hidden):
    """Computes the reverse KL with TRL's GKD loss on logits (beta 1)."""
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_head
    labels = torch.zeros(hidden.shape[:2], dtype=torch.long)
    return GKDTrainer.generalized_jsd_loss(hidden @ head, teacher_logits, labels, beta=1.0)


def liger(head, hidden, teacher_head, teacher_hidden):
    """Computes the reverse KL with Liger's fused linear JSD, in chunks of its default size.

    The hard loss and torch.compile are switched off.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False
    )
    labels = torch.zeros(hidden.shape[1], dtype=torch.long)
    return loss(hidden[0], head.T, teacher_hidden[0], teacher_head.T, labels)


def main(form: str, file: str) -> None:
    arrays = [torch.from_numpy(array) for array in np.load(file).values()]
    head, hidden = arrays[0].requires_grad_(), arrays[1].requires_grad_()
    seconds = []
    for _ in range(3):
        head.grad = hidden.grad = None
        start = time.process_time()
        loss = {"trl": trl, "liger": liger}[form](*arrays)
        loss.backward()
        seconds.append(time.process_time() - start)
    norm = float(np.hypot(*(x.grad.double().norm().item() for x in (head, hidden))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"cpu_s": seconds, "loss": loss.item(), "grad_norm": norm, "peak_rss_gib": peak}
    print(form, statistics.median(seconds), "CPU-s", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
