"""Our ViT against transformers': inference and training."""

import copy
import tempfile

import torch
import torch.nn.functional as F

from bench.measure import compare, dtype_suffix, precisions, training_step, transformers_class
from lib.checkpoint import save_pretrained
from vit_scratch import ViTConfig, ViTModel


def bench_vit(args, device: torch.device) -> list[dict]:
    """Our ViT against transformers' ViTForImageClassification with the same weights and the same attention kernel."""
    peer = transformers_class("ViTForImageClassification")
    dtypes = precisions(args, device)
    torch.manual_seed(args.seed)
    ours = ViTModel(ViTConfig.preset(args.size, pooling="cls")).to(device)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = peer.from_pretrained(folder, attn_implementation="sdpa").to(device)
    size = ours.config.image_size
    rows = []
    for batch in args.batch:
        pixels = torch.randn(batch, ours.config.num_channels, size, size, device=device)
        labels = torch.randint(0, ours.config.num_labels, (batch,), device=device)
        with torch.no_grad():
            difference = (ours.eval()(pixels) - theirs.eval()(pixels).logits).abs().max().item()
            if difference > 1e-3:
                raise ValueError(f"the two models differ by {difference:g}: there is nothing to compare")
            infer = {"ours": lambda x=pixels: ours(x), "transformers": lambda x=pixels: theirs(x)}
            rows.append(compare("ViT inference", infer, batch, args.rounds, device, size=args.size, batch=batch))

        def loss(model, x=pixels, labels=labels):
            out = model(x)
            return F.cross_entropy(out if isinstance(out, torch.Tensor) else out.logits, labels)

        models = {"ours": ours, "transformers": theirs}
        train = {
            name: training_step(copy.deepcopy(model).train(), loss, dtypes.get(name, dtypes["peer"]))
            for name, model in models.items()
        }
        for step in train.values():
            step()  # AdamW makes its state in the first step: not part of what a step costs
        what = f"ViT training step{dtype_suffix(dtypes)}"
        rows.append(compare(what, train, batch, args.rounds, device, size=args.size, batch=batch))
    return rows
