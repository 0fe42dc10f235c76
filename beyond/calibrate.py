"""What the keys and values of a layer are like, and what an error in them costs the model.

    python -m beyond.calibrate                            # tiny: saes/tiny/calibration/
    python -m beyond.calibrate --model DIR --text T       # any model; a file a layer
    python -m beyond.additive --model DIR --text T        # codes that start from it
    python evaluate.py --rows rivals                      # and quantisers that do

A token's keys (before RoPE) and values of all heads, side by side, are one vector x of P = 2 H D
numbers. Of one text, for each layer:

    mean (P,) and covariance (P, P) of x
    metric A (P, P):  A = 0.45 G + 0.05 B,  G = E[g g^T]: an error e costs about e^T A e nats

g is the gradient of the loss to x at targets drawn from the model's own predictions: G is Fisher's
information, e^T G e / 2 the KL divergence of the model with e from that without, to second order.
B, plain squared error (of keys and of values, each in its mean cost), is there because G comes from
a finite text. Of shares of G from 0.2 to 0.95, 0.8 to 0.95 were best on other windows of the text.
The idea is that of Fisher pruning [arXiv 1801.05787]. Non-goal: G across tokens or layers.
"""
import argparse
import hashlib
import json
import pathlib

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import sta

FISHER = 0.9  # the share of G in the metric

def draw(logits, generator):
    """One token of each row's distribution: logits (T, V) -> (T,)."""
    p = logits.float().softmax(-1).cumsum(-1)  # (T, V)
    u = torch.rand(len(p), 1, generator=generator).to(p.device)
    return (p < u * p[:, -1:]).sum(-1)

def statistics(model, windows, layers, sink=1, seed=0):
    """Windows (n, T) of token ids -> {layer: (mean (P,), covariance (P, P), G (P, P))}, float64,
    of all tokens but the first `sink` of each window."""
    total, n, generator = {}, 0, torch.Generator().manual_seed(seed)
    x, error = {}, {}  # of one window, by layer

    class Probe:
        """A codec that adds zero: an error to which the loss has a gradient."""
        def __init__(self, layer):
            self.layer = layer

        def roundtrip(self, keys, values, live):
            rows = torch.cat([keys[live].flatten(1), values[live].flatten(1)], 1)  # (T - sink, P)
            x[self.layer], error[self.layer] = rows, torch.zeros_like(rows, requires_grad=True)
            parts = error[self.layer].unflatten(1, (2, *keys.shape[2:])).unbind(1)
            return [kind.index_put((live,), kind[live] + part)
                    for kind, part in zip((keys, values), parts)]

    with sta.reconstruct(model, {layer: Probe(layer) for layer in layers}, sink):
        for ids in tqdm(windows, desc="calibrating", disable=None):
            with torch.enable_grad():
                logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
                targets = draw(logits.detach(), generator)
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                grads = torch.autograd.grad(loss, [error[layer] for layer in layers])
            for layer, g in zip(layers, grads):
                rows = x[layer].detach()
                new = rows.sum(0), rows.T @ rows, g.T @ g
                old = total.get(layer, (0, 0, 0))
                total[layer] = [a + b.double() for a, b in zip(old, new)]
            n += len(rows)
    return {layer: (mean / n, square / n - (mean / n).outer(mean / n), G / n)
            for layer, (mean, square, G) in total.items()}

def metric(G):
    """A (P, P) of G: an error e costs about e^T A e nats."""
    plain = torch.cat([part.mean().expand_as(part) for part in G.diagonal().chunk(2)])
    return (FISHER * G + (1 - FISHER) * plain.diag()) / 2

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="short name, hub id or folder (default tiny)")
    add("--layer", default="all", help="layers: all, 12, 0-7, 3,9 (default all)")
    add("--text", help="UTF-8 file or hub data set (default: tiny's own, else WikiText-103)")
    add("--tokens", type=int, help="of it (default 122,880; tiny: 20,480)")
    add("--seq-len", type=int, help="tokens a window (default 512, or the model's limit)")
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda or auto (default: cuda if any)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the model")
    add("--out", type=pathlib.Path, default=pathlib.Path("saes"), help="(default saes)")
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (20_480 if args.model == "tiny" else 122_880)
    sta.check_out(args.out)
    model, tokenizer, layers = sta.load_model(
        args.model, *sta.pick_device(args.device, args.dtype), args.layer)
    pieces = sta.read_text(args.text, "train", args.model)
    windows = sta.token_windows(pieces, tokenizer, model, args.seq_len, 512, args.tokens)
    settings = {"tokens": windows.numel(), "seed": args.seed,
                "text_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:12]}
    found = statistics(model, windows, layers, seed=args.seed)
    folder = args.out / sta.slug(args.model) / "calibration"
    for layer, (mean, covariance, G) in found.items():
        tensors = {"mean": mean, "covariance": covariance, "metric": metric(G)}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise sta.UsageError(f"layer {layer}: a gradient is not finite; use --dtype float32")
        sta.write_atomic(folder / f"layer{layer}.safetensors", safetensors.torch.save(
            {name: tensor.float().cpu() for name, tensor in tensors.items()},
            {"marks": json.dumps(sta.model_marks(model, [layer])),
             "settings": json.dumps(settings)}))
    print(f"{folder}: {len(layers)} layers, {windows.numel():,} tokens; next: python -m "
          f"beyond.additive --model {args.model}, or evaluate.py --rows rivals")

if __name__ == "__main__":
    sta.run(main)
