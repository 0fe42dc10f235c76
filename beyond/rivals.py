"""What else the same bytes could buy: the quantisers that engineers would use, as rows.

    python -m beyond.calibrate && python evaluate.py --rows rivals     # with SAEs or without

grouped    KIVI [arXiv 2402.02750] at 2, 3 and 4 bits, group 32, and 2 bits, group 128: each group
           to even steps between its extremes, kept as fp16 minimum and step; keys in groups of
           tokens of one channel, values of channels of one token. Keys before RoPE, kinder than
           KIVI's own [arXiv 2401.18079]. Simulated: rounded, then computed with.
rotated    the idea of TurboQuant [arXiv 2504.19874], at 1, 2 and 3 bits: a head's key or value,
           less its mean, by a fixed random rotation; an fp16 norm, Lloyd-Max levels of a Gaussian.
transform  the idea of KVTC [arXiv 2511.01815]: principal axes, each in 0 to 8 bits by greed on what
           they save, Lloyd-Max levels. Of a head's key or value, or of a layer, all heads together;
           plain: squared error, equal bits everywhere; loss: what an error costs the model, bits
           wherever they save most. KVTC's entropy coder would save 4 to 6 % at 2 to 3 bits.
All are fitted on the text of beyond/calibrate.py, never on the text that is scored.
"""
import argparse
import functools
import itertools
import json
import math

import safetensors.torch
import torch
import torch.nn.functional as F

import evaluate
import sta

SHARES = (0.0625, 0.09375, 0.125, 0.1875, 0.25)  # of bf16

# ------------------------------------------------------------------ grouped
def quantise(x, live, kind, bits, group):
    """x (B, T, H, D) as KIVI keeps it; live (B, T) is False for what no group may see: sinks and
    padding."""
    rows = x.transpose(1, 3) if kind == "key" else x  # (B, D, H, T): groups along the last axis
    real = live[:, None, None] if kind == "key" else live[..., None, None]
    fill = -rows.shape[-1] % group

    def cut(other):  # (..., groups, group), with `other` where nothing is
        padded = F.pad(torch.where(real, rows, other), (0, fill), value=other)
        return padded.unflatten(-1, (-1, group))

    low = cut(math.inf).amin(-1, keepdim=True).half().float()
    high = cut(-math.inf).amax(-1, keepdim=True)
    step = ((high - low) / (2 ** bits - 1)).half().float()
    levels = ((cut(0.0) - low) / step.clamp_min(1e-6)).round().clamp(0, 2 ** bits - 1)
    rows = (levels * step + low).flatten(-2)[..., :rows.shape[-1]]
    return rows.transpose(1, 3) if kind == "key" else rows

class Grouped:
    """A codec of one layer, simulated. In decode a token comes alone: it is a group of its own, and
    its key is then exact, where KIVI would wait for the group to fill."""

    def __init__(self, shape, bits, group):
        """shape: (n_kv_heads, head_dim)."""
        self.bits, self.group = bits, group
        self.bytes_per_token = grouped_bytes(*shape, bits, group)

    def roundtrip(self, keys, values, live):
        return (quantise(keys, live, "key", self.bits, self.group),
                quantise(values, live, "value", self.bits, self.group))

def grouped_bytes(n_kv_heads, head_dim, bits, group):
    """Bytes a token of one layer: the levels, and an fp16 minimum and step a group."""
    per_key = head_dim * (bits / 8 + 4 / group)
    return n_kv_heads * (per_key + head_dim * bits / 8 + 4 * math.ceil(head_dim / group))

# ------------------------------------------------------------------ levels for a Gaussian
@functools.cache
def lloyd_max(bits):
    """(the 2^bits levels (float64) that leave a unit Gaussian the least squared error, that)."""
    middle = (torch.arange(2 ** bits).double() + 0.5) / 2 ** bits
    levels = math.sqrt(3) * torch.special.ndtri(middle)  # a good start
    for _ in range(2000):
        edges = F.pad((levels[1:] + levels[:-1]) / 2, (1, 1)).contiguous()
        edges[0], edges[-1] = -40, 40
        mass = torch.special.ndtr(edges).diff()
        levels = -torch.exp(-edges.square() / 2).diff() / math.sqrt(2 * math.pi) / mass
    return levels, 1 - (mass * levels.square()).sum().item()

class Levels:
    """Numbers (..., n) of spread 1, the i-th in bits[i] (0 to 8) bits, as packed bytes (..., m)."""

    def __init__(self, bits):
        n, device = len(bits), bits.device
        self.bits, self.powers = bits, torch.arange(8, dtype=torch.uint8, device=device)
        self.number = torch.arange(n, device=device).repeat_interleave(bits)  # of each bit
        first = bits.cumsum(0) - bits
        self.place = torch.arange(len(self.number), device=device) - first[self.number]
        self.groups = [((bits == b).nonzero()[:, 0], lloyd_max(b)[0].float().to(device))
                       for b in bits.unique().tolist() if b]

    def encode(self, y):
        levels = torch.zeros_like(y, dtype=torch.uint8)
        for some, table in self.groups:
            edges = (table[1:] + table[:-1]) / 2
            levels[..., some] = torch.bucketize(y[..., some], edges).to(torch.uint8)
        ones = levels[..., self.number] >> self.place.to(torch.uint8) & 1
        ones = F.pad(ones, (0, -len(self.number) % 8)).unflatten(-1, (-1, 8))  # (..., m, 8)
        return (ones << self.powers).sum(-1, dtype=torch.uint8)

    def decode(self, packed):
        ones = (packed[..., None] >> self.powers & 1).flatten(-2)[..., :len(self.number)]
        levels = torch.zeros(*packed.shape[:-1], len(self.bits), dtype=torch.int32,
                             device=packed.device)
        levels.index_add_(-1, self.number, ones.int() << self.place.int())
        y = torch.zeros_like(levels, dtype=torch.float32)
        for some, table in self.groups:
            y[..., some] = table[levels[..., some]]
        return y

class Rotated:
    """A codec of one layer: each vector's direction, turned at random, and its norm."""

    def __init__(self, mean, shape, bits, seed=0):
        """mean (P,) of keys and values of all heads; shape (n_kv_heads, head_dim)."""
        self.mean, dim = mean.view(2, *shape), shape[1]  # (2, H, D): keys, values
        turn = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)))
        self.turn, self.scale = turn.Q.to(mean.device), math.sqrt(dim)
        self.levels = Levels(torch.full((dim,), bits, device=mean.device))

    def encode(self, keys, values):
        x = torch.stack([keys, values], -3) - self.mean  # (..., 2, H, D)
        norm = x.norm(dim=-1, keepdim=True).half()
        y = x @ self.turn / norm.float().clamp_min(1e-6) * self.scale
        return norm.flatten(-3), self.levels.encode(y).flatten(-3)

    def decode(self, stored):
        norm, packed = (x.unflatten(-1, (2, self.mean.shape[1], -1)) for x in stored)
        y = self.levels.decode(packed) / self.scale * norm.float()
        return (y @ self.turn.T + self.mean).unbind(-3)

# ------------------------------------------------------------------ transform
def principal_axes(covariance, metric):
    """(variances (P,), W (P, P), W^-1): y = x W has uncorrelated numbers of these variances, and
    an error in y has the square length that the metric gives it in x. Strongest first."""
    root = torch.linalg.cholesky(metric)
    variances, axes = torch.linalg.eigh(root.T @ covariance @ root)
    axes = axes.flip(1)
    return variances.flip(0).clamp_min(0), root @ axes, axes.T @ torch.linalg.inv(root)

def allocate(variances, n_bits):
    """Numbers of these variances (any shape) -> bits of each, 0 to 8: n_bits by greed, each where
    it lowers the summed squared error most [reverse water-filling]."""
    left = torch.tensor([1.0] + [lloyd_max(b)[1] for b in range(1, 9)], dtype=torch.float64)
    gains = variances.cpu()[..., None] * -left.diff()  # falling with every further bit
    chosen = torch.zeros(gains.numel(), dtype=torch.long)
    chosen[gains.flatten().topk(n_bits).indices] = 1
    return chosen.view(gains.shape).sum(-1)

class Transform:
    """A codec of one layer: a token's P numbers along axes, each in its number of bits."""

    def __init__(self, shape, mean, variances, W, inverse, bits):
        kept = bits.to(mean.device) > 0
        spread = variances[kept].sqrt()
        self.shape, self.mean, self.levels = shape, mean.float(), Levels(bits.to(mean.device)[kept])
        self.W = (W[:, kept] / spread).float()  # (P, axes kept)
        self.inverse = (spread[:, None] * inverse[kept]).float()

    def encode(self, keys, values):
        x = torch.cat([keys.flatten(-2), values.flatten(-2)], -1)  # (..., P)
        return (self.levels.encode((x - self.mean) @ self.W),)

    def decode(self, stored):
        x = self.levels.decode(stored[0]) @ self.inverse + self.mean  # (..., P)
        return x.unflatten(-1, (2, *self.shape)).unbind(-3)

def transforms(fitted, shape, unit, metric):
    """A function share -> {layer: Transform}; unit "head" or "layer", metric "plain" or "loss"."""
    P, axes = 2 * math.prod(shape), {}
    size = shape[1] if unit == "head" else P
    for layer, found in fitted.items():
        covariance = found["covariance"].double()
        A = found["metric"].double() if metric == "loss" else torch.eye(P).to(covariance)
        variances, W, inverse = zip(*(principal_axes(
            covariance[i:i + size, i:i + size], A[i:i + size, i:i + size])
            for i in range(0, P, size)))
        axes[layer] = torch.cat(variances), torch.block_diag(*W), torch.block_diag(*inverse)

    def at(share):
        variances = torch.stack([found[0] for found in axes.values()])  # (layers, P)
        sites = variances.view(1, -1) if metric == "loss" else variances.view(-1, size)
        n_bits = int(share * 16 * sites.shape[1])
        bits = torch.stack([allocate(site, n_bits) for site in sites]).view(variances.shape)
        return {layer: Transform(shape, fitted[layer]["mean"], *found, some)
                for (layer, found), some in zip(axes.items(), bits)}
    return at

# ------------------------------------------------------------------ the rows
def read(path, model, layer):
    """{mean, covariance, metric} of a layer of the model."""
    device = model.device
    with sta.explain(f"{path}: missing or corrupt; run python -m beyond.calibrate"):
        with safetensors.safe_open(path, "pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            marks = json.loads(file.metadata()["marks"])
    if not sta.same_marks(marks, sta.model_marks(model, [layer])):
        raise sta.UsageError(f"{path}: of another model; choose another --saes")
    return tensors

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row]."""
    config = model.get_decoder().config
    shape, layers = sta.kv_shape(config), evaluate.coded_layers(model, saes, args)
    found = []
    for bits, group in ((2, 32), (3, 32), (4, 32), (2, 128)):
        codecs = dict.fromkeys(layers, Grouped(shape, bits, group))
        found.append(evaluate.Row(f"grouped {bits} bits, {group}", codecs,
                                  method=f"grouped {group}"))
    folder = evaluate.find_fitted(args.saes, args.model)[0] / "calibration"
    fitted = {layer: read(folder / f"layer{layer}.safetensors", model, layer) for layer in layers}
    for bits in (1, 2, 3):
        found.append(evaluate.Row(f"rotated {bits} bits", {
            layer: Rotated(fitted[layer]["mean"], shape, bits) for layer in layers},
            once_bytes=len(layers) * 8 * math.prod(shape), method="rotated"))
    for unit, metric in itertools.product(("head", "layer"), ("plain", "loss")):
        at = transforms(fitted, shape, unit, metric)
        for share in SHARES:
            codecs, name = at(share), f"transform {unit} {metric}"
            once = sum(x.nbytes for codec in codecs.values()
                       for x in (codec.mean, codec.W, codec.inverse))
            found.append(evaluate.Row(f"{name} {100 * share:g}", codecs, once_bytes=once,
                                      method=name))
    return found

def main(argv=None):
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    raise sta.UsageError("this file adds rows to a table; run: python evaluate.py --rows rivals")

if __name__ == "__main__":
    sta.run(main)
