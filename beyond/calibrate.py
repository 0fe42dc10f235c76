"""What the keys and values of a layer are like, and what an error in them costs the model.

    python -m beyond.calibrate                            # tiny: saes/tiny/calibration/
    python -m beyond.additive                             # codes that start from it
    python evaluate.py --rows rivals,additive             # and quantisers that do
    python -m beyond.calibrate --model DIR --text T --tokens 1000000 --write mixed.txt
    python -m beyond.calibrate --model DIR --text mixed.txt

The keys (before RoPE) and the values of all heads of a token, side by side, are one vector x of
P = 2 H D numbers. For each layer, from one text, this measures:

    mean (P,) and covariance (P, P) of x
    metric A (P, P):  A = 0.45 G + 0.05 B,  G = E[g g^T]: an error e costs about e^T A e nats

g is the gradient of the loss with respect to x, at targets drawn from the model's predictions. So G
is Fisher's information: e^T G e / 2 is the KL divergence that an error e causes, to second order. B
is plain squared error, of keys and of values, each weighted by the mean of G's diagonal; it is
there because G comes from a finite text. Shares of G from 0.8 to 0.95 did best on other windows of
the text. The idea is that of Fisher pruning [arXiv 1801.05787].

Codes that are fitted on one kind of text do not carry over to another. So --write makes a text from
the given one: of every third piece of it, the model keeps the beginning and writes the rest, and
what a model writes is of the kinds that it was trained on [LLM-QAT, arXiv 2305.17888]. SAEs and all
their rivals can then be fitted on the same file. Non-goal: G across tokens or layers.
"""
import json
import pathlib
import types

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import sta
from beyond import fitted_folder, parse_args
from support.files import (check_out, expect_same, explain, model_hash, run_main,
                           sha256, write_atomic)
from support.models import load_model, pick_device, slug
from support.results import commit, find_saes
from support.text import read_text, text_name, token_windows

FISHER = 0.9  # the share of G in the metric
STEPS, STEP_TOKENS, RATE = 60, 512, 0.03  # in which a stretch is learned; of Adam, falling to 0
SAMPLES, PROMPT = 64, 32  # windows that the model writes at once; tokens with which each begins

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

def mean_of_kind(square):
    """(P, P) -> (P,): the mean of the diagonal's half to which a number belongs, keys or values."""
    return torch.cat([part.mean().expand_as(part) for part in square.diagonal().chunk(2)])

def metric(G):
    """The metric A (P, P) from G: an error e costs about e^T A e nats."""
    return (FISHER * G + (1 - FISHER) * mean_of_kind(G).diag()) / 2

def plain_metric(covariance):
    """The metric in which keys count in units of their spread, and so do values: (P, P)."""
    return (1 / mean_of_kind(covariance)).diag()

def principal_axes(covariance, metric):
    """-> (variances (P,), W (P, P), W^-1), float64: y = (x - mean) W has uncorrelated numbers of
    these variances, strongest first, and an error in y has the square length that the metric gives
    it in x."""
    root = torch.linalg.cholesky(metric.double())
    variances, axes = torch.linalg.eigh(root.T @ covariance.double() @ root)
    axes = axes.flip(1)
    return variances.flip(0).clamp_min(0), root @ axes, axes.T @ torch.linalg.inv(root)

class EightBits:
    """A table (..., n) of a code, kept in 8 bits per number: whole multiples of a step, of which
    each row has its own, in bf16."""

    def __init__(self, x):
        self.step = (x.abs().amax(-1, keepdim=True) / 127).bfloat16()
        multiples = (x / self.step.float().clamp_min(1e-30)).round().clamp(-127, 127)
        self.multiples = multiples.to(torch.int8)
        self.nbytes = self.step.nbytes + self.multiples.nbytes

    def read(self):
        return self.multiples.float() * self.step.float()

# ------------------------------------------------------------------ a stretch per head
class Stretched:
    """A codec of one layer that lengthens what another one decodes, about a mean."""

    def __init__(self, codec, means, factors):
        """means (2, H, D) and factors (2, H), of keys and of values."""
        self.codec, self.means, self.factors = codec, means, factors
        if hasattr(codec, "roundtrip"):
            self.roundtrip, self.bytes_per_token = self.stretched_roundtrip, codec.bytes_per_token

    def encode(self, keys, values):
        return self.codec.encode(keys, values)

    def decode(self, stored):
        return self.stretch(self.codec.decode(stored))

    def stretched_roundtrip(self, keys, values, live):
        return self.stretch(self.codec.roundtrip(keys, values, live))

    def stretch(self, decoded):
        return [mean + factor[:, None] * (x_hat - mean)
                for x_hat, mean, factor in zip(decoded, self.means, self.factors)]

def learn_stretch(model, codecs, windows, sink=1, per="head"):
    """Windows (n, T) of training text -> {layer: {means (2, H, D), factors (2, H)}} for codecs
    {layer: codec}. per: head (and kind), layer (and kind), model, or mean (head; its mean is
    learned as well)."""
    (H, D), layers = sta.kv_shape(model.get_decoder().config), sorted(codecs)
    vectors = sta.harvest(model, windows[:max(1, 4096 // windows.shape[1])], layers, sink)
    means = torch.stack([vectors[layer, kind].float().mean(0).cpu()
                         for layer in layers for kind in sta.KINDS]).view(-1, 2, H, D)
    shape = {"model": (1, 1, 1), "layer": (len(layers), 2, 1)}.get(per, (len(layers), 2, H))
    factors = torch.ones(shape, requires_grad=True)
    learned = [factors, means.requires_grad_()] if per == "mean" else [factors]
    optimizer = torch.optim.Adam(learned)
    batches = windows.split(max(1, STEP_TOKENS // windows.shape[1]))[:STEPS]
    for step, ids in enumerate(tqdm(batches, desc="stretching", disable=None)):
        optimizer.param_groups[0]["lr"] = RATE * min(1, 2 * (1 - step / len(batches)))
        of_layers = zip(layers, means.to(model.device),
                        factors.expand(len(layers), 2, H).to(model.device))
        stretched = {layer: Stretched(codecs[layer], *learned_of)
                     for layer, *learned_of in of_layers}
        ids = ids.to(model.device)
        with torch.enable_grad(), sta.reconstruct(model, stretched, sink):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
            # summed, not averaged: coefficients in fp16 have a gradient in fp16
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(),
                                   reduction="sum")
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not factors.isfinite().all():
        raise sta.UsageError("the loss is not finite; use --dtype float32 or bfloat16")
    factors = factors.detach().expand(len(layers), 2, H)
    return {layer: {"means": means[i].detach(), "factors": factors[i]}
            for i, layer in enumerate(layers)}

# ------------------------------------------------------------------ text that the model writes
@torch.no_grad()
def continued(model, windows, share):
    """Windows (n, T) of token ids -> (the same, but of a share of them, spread evenly, only the
    first 32 tokens remain, and the model writes the others at temperature 1, by torch's global
    generator; which they are, bool (n,))."""
    windows, chosen = windows.clone(), torch.zeros(len(windows), dtype=torch.bool)
    n_chosen = round(share * len(windows))
    chosen[((torch.arange(n_chosen) + 0.5) * len(windows) / max(1, n_chosen)).long()] = True
    n_new = windows.shape[1] - PROMPT
    # of a prompt, only the last position reaches the output layer, as a view: torch would copy the
    # weights for each text, run out of memory, and do without its fast kernels from then on
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda layer, args: args[0].contiguous())
    for part in tqdm(chosen.nonzero()[:, 0].split(SAMPLES), desc="samples", disable=None):
        ids = windows[part, :PROMPT].to(model.device)
        windows[part] = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=n_new,
            min_new_tokens=n_new, pad_token_id=0).cpu()
    hook.remove()
    return windows, chosen

def write_mixture(path, model, tokenizer, windows, share):
    """Write a text, given as windows (n, T) of token ids, of which the model continues a share."""
    if windows.shape[1] <= PROMPT:
        raise sta.UsageError(f"--seq-len {windows.shape[1]}: want more than the {PROMPT} tokens "
                             "which the model continues")
    windows, chosen = continued(model, windows, share)
    texts = tokenizer.batch_decode(windows, skip_special_tokens=True,
                                   clean_up_tokenization_spaces=False)
    write_atomic(path, "".join(f"\n\n{text}\n\n" if own else text
                               for text, own in zip(texts, chosen)))
    print(f"{path}: {windows.numel():,} tokens in {len(windows)} pieces, of which the model "
          f"continued {chosen.sum()}")

# ------------------------------------------------------------------ fitted files
def keep_settings(folder, settings):
    """Store the settings of a folder's files beside them, and the commit that fitted the first.
    Raises UsageError at other ones there."""
    path, stored = folder / "settings.json", {"commit": commit()}
    if path.exists():
        with explain(f"{path}: corrupt; delete the folder"):
            stored = json.loads(path.read_text(encoding="utf-8"))
        expect_same(folder, stored, settings)
    write_atomic(path, json.dumps({**stored, **settings}, indent=1) + "\n")

def write_fitted(folder, model, layer, tensors):
    write_atomic(folder / f"layer{layer}.safetensors", safetensors.torch.save(
        {name: x.float().cpu().contiguous() for name, x in tensors.items()},
        {"model_sha256": model_hash(model, [layer])}))

def read_fitted(folder, model, layer):
    """The tensors of a layer in a folder that `write_fitted` wrote in, on the model's device."""
    path = folder / f"layer{layer}.safetensors"
    command = {"calibration": "calibrate", "additive": "additive", "joint": "rivals"}.get(
        folder.name, "variants --what stretch")
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

def open_calibrated(args):
    """A model that was calibrated, and of that: .name, .model, .folder (saes/<model>), .fitted
    ({layer: mean, covariance and metric}), .windows (n, T) of token ids, .settings."""
    check_out(args.saes)
    name = args.model or find_saes(args.saes, None)[1] or "tiny"
    folder = fitted_folder(args.saes, name)
    calibration = folder / "calibration"
    settings = read_settings(calibration)
    model, _, layers = load_model(name, *pick_device(args.device, args.dtype), args.layer or "all")
    return types.SimpleNamespace(
        name=name, model=model, folder=folder, settings=settings,
        fitted={layer: read_fitted(calibration, model, layer) for layer in layers},
        windows=safetensors.torch.load_file(calibration / "windows.safetensors")["ids"])

def settings_of_fit(args, model, windows):
    layers = range(model.get_decoder().config.num_hidden_layers)
    return {"model_sha256": model_hash(model, layers),
            "text": text_name(args.text, "train", args.model), "text_sha256": sha256(windows),
            "tokens": windows.numel(), "seq_len": windows.shape[1], "seed": args.seed,
            "fisher": FISHER}

def main(argv=None):
    args = parse_args(
        __doc__, argv, "layer text seq-len seed device dtype",
        model=dict(default="tiny", help="short name, hub id or folder (default tiny)"),
        tokens=dict(type=int, least=2, help="of the text (default 122,880; tiny: 20,480)"),
        out=dict(default=pathlib.Path("saes"), help="(default saes)"),
        write=dict(type=pathlib.Path, help="write a text to this file, and measure nothing"),
        own=dict(type=float, help="share of that text which the model writes (default a third)"))
    if args.own is not None and not (args.write and 0 <= args.own < 1):
        raise sta.UsageError(f"--own {args.own}: want a share of at least 0, below 1, and --write")
    check_out(args.write.parent if args.write else args.out)
    model, tokenizer, layers = load_model(
        args.model, *pick_device(args.device, args.dtype), args.layer or "all")
    n_tokens = args.tokens or (20_480 if args.model == "tiny" else 122_880)
    windows = token_windows(read_text(args.text, "train", args.model), tokenizer, model,
                            args.seq_len, 512, n_tokens, least=2)
    if args.write:
        torch.manual_seed(args.seed)
        share = 1 / 3 if args.own is None else args.own
        return write_mixture(args.write, model, tokenizer, windows, share)
    folder = args.out / slug(args.model) / "calibration"
    keep_settings(folder, settings_of_fit(args, model, windows))
    write_atomic(folder / "windows.safetensors", safetensors.torch.save({"ids": windows}))
    for layer, (mean, covariance, G) in statistics(model, windows, layers, seed=args.seed).items():
        tensors = {"mean": mean, "covariance": covariance, "metric": metric(G)}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise sta.UsageError(f"layer {layer}: a gradient is not finite; use --dtype float32")
        write_fitted(folder, model, layer, tensors)
    print(f"{folder}: {len(layers)} layers, {windows.numel():,} tokens")

if __name__ == "__main__":
    run_main(main)
