"""What ours is measured against: the published procedure, done faithfully, and a plain forward pass."""
import numpy as np
import torch

from gradsentry_nb.capture import pad_right


def published_entropy(model, encoded):
    """The published score of each row (arXiv 2605.26574): batch 1, the library's own loss, autograd of the head alone,
    crop to the first eighth of rows and columns, randomised low-rank SVD with q = 16, entropy of the singular values."""
    weight = model.get_output_embeddings().weight
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in wanted: p.requires_grad_(p is weight)
    out = []
    try:
        for e in encoded:
            ids = torch.from_numpy(e.ids.astype(np.int64))[None].to(model.device)
            labels = torch.where(torch.from_numpy(e.supervised)[None].to(model.device), ids, -100)
            grad, = torch.autograd.grad(model(input_ids=ids, labels=labels, use_cache=False).loss, [weight])
            crop = grad.detach()[:grad.shape[0]//8, :grad.shape[1]//8].float()
            s = torch.svd_lowrank(crop, q=16)[1].clamp_min(1e-12)
            p = s/s.sum()
            out.append(float(-(p*p.log()).sum()/np.log(16)))
    finally:
        for p, r in wanted: p.requires_grad_(r)
    return np.array(out)


@torch.no_grad()
def plain_forward(model, encoded, batch=32):
    "Read every row with the model once: length-sorted, padded, logits at all positions."
    order = np.argsort([-len(e) for e in encoded], kind='stable')
    for i in range(0, len(order), batch):
        rows = [encoded[j] for j in order[i:i+batch]]
        ids = pad_right([e.ids for e in rows])
        mask = (torch.arange(ids.shape[1])[None] < torch.tensor([len(e) for e in rows])[:, None]).long()
        model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
