"""What the keys and values of a layer are like, and what an error in them costs the model.

    python -m beyond.calibrate                            # tiny: saes/tiny/calibration/
    python -m beyond.calibrate --model DIR --text T --own 0.33
    python -m beyond.additive --model DIR                 # codes that start from it
    python evaluate.py --rows rivals                      # and quantisers that do

The keys (before RoPE) and the values of all heads of a token, side by side, are one vector x of
P = 2 H D numbers. For each layer, from one text, this measures:

    mean (P,) and covariance (P, P) of x
    metric A (P, P):  A = 0.45 G + 0.05 B,  G = E[g g^T]: an error e costs about e^T A e nats

g is the gradient of the loss with respect to x, at targets drawn from the model's predictions. So G
is Fisher's information: e^T G e / 2 is the KL divergence that an error e causes, to second order. B
is plain squared error, of keys and of values, each weighted by the mean of G's diagonal; it is
there because G comes from a finite text. Shares of G from 0.8 to 0.95 did best on other windows of
the text. The idea is that of Fisher pruning [arXiv 1801.05787].

Codes that are fitted on one kind of text do not carry over to another. So --own mixes text that the
model writes into the given one: it is of all the kinds that the model was trained on [LLM-QAT,
arXiv 2305.17888]. Non-goal: G across tokens or layers.
"""
import json
import pathlib

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import sta
from beyond import parse_args
from support.files import (check_out, expect_same, explain, model_hash, run_main,
                           sha256, write_atomic)
from support.models import load_model, pick_device, slug
from support.results import commit
from support.text import read_text, text_name, token_windows

FISHER = 0.9  # the share of G in the metric
SAMPLES = 64  # windows that the model writes at once

# ------------------------------------------------------------------ what a layer is like
def side_by_side(keys, values):
    """Keys and values (..., H, D) -> x (..., P), float32."""
    return torch.cat([keys.flatten(-2), values.flatten(-2)], -1).float()

def apart(x, shape):
    """x (..., P) -> keys and values (..., H, D); shape: (n_kv_heads, head_dim)."""
    return x.unflatten(-1, (2, *shape)).unbind(-3)

def draw(logits, generator):
    """One token of each row's distribution: logits (T, V) -> (T,)."""
    p = logits.float().softmax(-1).cumsum(-1)  # (T, V)
    u = torch.rand(len(p), 1, generator=generator).to(p.device)
    return (p < u * p[:, -1:]).sum(-1)

class Probe:
    """A codec that adds a tensor of zeros, `error`: its gradient is that of x."""

    def roundtrip(self, keys, values, live):
        self.x = side_by_side(keys[live], values[live])  # (live tokens, P)
        self.error = torch.zeros_like(self.x, requires_grad=True)
        errors = apart(self.error, keys.shape[2:])
        return [x.index_put((live,), x[live] + error) for x, error in zip((keys, values), errors)]

def statistics(model, windows, layers, sink=1, seed=0):
    """Windows (n, T) of token ids -> {layer: (mean (P,), covariance (P, P), G (P, P))}, float64,
    of all tokens but the first `sink` of each window."""
    sums, centres, n_tokens = {}, {}, 0
    generator, probes = torch.Generator().manual_seed(seed), {layer: Probe() for layer in layers}
    with sta.reconstruct(model, probes, sink):
        for ids in tqdm(windows, desc="calibrating", disable=None):
            with torch.enable_grad():
                logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
                targets = draw(logits.detach(), generator)
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                with explain("no gradient passes through this model's layers"):  # 4 bits on a CPU
                    grads = torch.autograd.grad(loss, [probe.error for probe in probes.values()])
            for (layer, probe), g in zip(probes.items(), grads):
                x = probe.x.detach()
                # about the first window's mean, where float32 does not lose the spread
                x = x - centres.setdefault(layer, x.mean(0))
                new = x.sum(0), x.T @ x, g.T @ g
                sums[layer] = [a + b.double() for a, b in zip(sums.get(layer, (0, 0, 0)), new)]
            n_tokens += len(x)
    by_layer = {}
    for layer, (total, square, G) in sums.items():
        mean = total / n_tokens
        covariance = square / n_tokens - mean.outer(mean)
        by_layer[layer] = mean + centres[layer].double(), covariance, G / n_tokens
    return by_layer

def metric(G):
    """The metric A (P, P) from G: an error e costs about e^T A e nats."""
    plain = torch.cat([part.mean().expand_as(part) for part in G.diagonal().chunk(2)])
    return (FISHER * G + (1 - FISHER) * plain.diag()) / 2

def principal_axes(covariance, metric):
    """-> (variances (P,), W (P, P), W^-1), float64: y = (x - mean) W has uncorrelated numbers of
    these variances, strongest first, and an error in y has the square length that the metric gives
    it in x."""
    root = torch.linalg.cholesky(metric.double())
    variances, axes = torch.linalg.eigh(root.T @ covariance.double() @ root)
    axes = axes.flip(1)
    return variances.flip(0).clamp_min(0), root @ axes, axes.T @ torch.linalg.inv(root)

# ------------------------------------------------------------------ text that the model writes
@torch.no_grad()
def own_windows(model, tokenizer, n, length):
    """Windows (n, length) that the model writes, by torch's global generator: BOS if it has one, a
    token drawn from the whole vocabulary, and what the model makes of that at temperature 1."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    start = torch.tensor(start, dtype=torch.long)
    known = range(min(len(tokenizer), tokenizer.n_known))
    ordinary = torch.tensor(sorted(set(known) - set(tokenizer.all_special_ids)))
    drawn, windows = ordinary[torch.randint(len(ordinary), (n,))], []
    for first in tqdm(drawn.split(SAMPLES), desc="samples", disable=None):
        ids = torch.cat([start.expand(len(first), -1), first[:, None]], 1)  # (B, 1 or 2)
        ids, n_new = ids.to(model.device), length - ids.shape[1]
        windows.append(model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=n_new,
            min_new_tokens=n_new, pad_token_id=0).cpu())
    return torch.cat(windows)

def mix_in_own(windows, model, tokenizer, share):
    """Windows (n, T) -> as many, of which the model wrote a share; each kind is spread evenly over
    the whole."""
    n_own = round(share * len(windows))
    if n_own == 0:
        return windows
    both = windows[:len(windows) - n_own], own_windows(model, tokenizer, n_own, windows.shape[1])
    places = [torch.arange(len(part)).add(0.5) / len(part) for part in both]
    return torch.cat(both)[torch.cat(places).argsort(stable=True)]

# ------------------------------------------------------------------ fitted files
def keep_settings(folder, settings, **late):
    """Store the settings of a folder's files beside them, the commit that fitted the first, and
    late, what became known after that. Raises UsageError at other ones there."""
    path, stored = folder / "settings.json", {"commit": commit()}
    if path.exists():
        with explain(f"{path}: corrupt; delete the folder"):
            stored = json.loads(path.read_text(encoding="utf-8"))
        expect_same(folder, {**late, **stored}, {**settings, **late})
    write_atomic(path, json.dumps({**stored, **settings, **late}, indent=1) + "\n")

def write_fitted(folder, model, layer, tensors):
    write_atomic(folder / f"layer{layer}.safetensors", safetensors.torch.save(
        {name: x.float().cpu().contiguous() for name, x in tensors.items()},
        {"model_sha256": model_hash(model, [layer])}))

def read_fitted(folder, model, layer):
    """The tensors of a layer in saes/<model>/<calibration or additive>, on the model's device."""
    path = folder / f"layer{layer}.safetensors"
    command = {"calibration": "calibrate"}.get(folder.name, folder.name)
    with explain(f"{path}: missing or corrupt; run python -m beyond.{command}"):
        with safetensors.safe_open(path, "pt", device=str(model.device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            hash_there = file.metadata()["model_sha256"]
    if hash_there != model_hash(model, [layer]):
        raise sta.UsageError(f"{path}: of another model; choose another --saes or --out")
    return tensors

def read_settings(folder):
    with explain(f"{folder}: nothing fitted there; run python -m beyond.calibrate"):
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))

def settings_of_fit(args, model, windows):
    layers = range(model.get_decoder().config.num_hidden_layers)
    return {"model_sha256": model_hash(model, layers),
            "text": text_name(args.text, "train", args.model), "text_sha256": sha256(windows),
            "tokens": windows.numel(), "seq_len": windows.shape[1], "seed": args.seed,
            "own": args.own, "fisher": FISHER}

def main(argv=None):
    args = parse_args(
        __doc__, argv, "layer text seq-len seed device dtype",
        model=dict(default="tiny", help="short name, hub id or folder (default tiny)"),
        tokens=dict(type=int, least=2, help="of the text (default 122,880; tiny: 20,480)"),
        out=dict(default=pathlib.Path("saes"), help="(default saes)"),
        own=dict(type=float, default=0.0, help="share that the model writes (default 0)"))
    if not 0 <= args.own < 1:
        raise sta.UsageError(f"--own {args.own}: want a share of at least 0, below 1")
    check_out(args.out)
    model, tokenizer, layers = load_model(
        args.model, *pick_device(args.device, args.dtype), args.layer or "all")
    n_tokens = args.tokens or (20_480 if args.model == "tiny" else 122_880)
    windows = token_windows(read_text(args.text, "train", args.model), tokenizer, model,
                            args.seq_len, 512, n_tokens, least=2)
    folder = args.out / slug(args.model) / "calibration"
    settings = settings_of_fit(args, model, windows)
    keep_settings(folder, settings)
    torch.manual_seed(args.seed)
    windows = mix_in_own(windows, model, tokenizer, args.own)
    keep_settings(folder, settings, with_own_sha256=sha256(windows))
    write_atomic(folder / "windows.safetensors", safetensors.torch.save({"ids": windows}))
    for layer, (mean, covariance, G) in statistics(model, windows, layers, seed=args.seed).items():
        tensors = {"mean": mean, "covariance": covariance, "metric": metric(G)}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise sta.UsageError(f"layer {layer}: a gradient is not finite; use --dtype float32")
        write_fitted(folder, model, layer, tensors)
    print(f"{folder}: {len(layers)} layers, {windows.numel():,} tokens")

if __name__ == "__main__":
    run_main(main)
