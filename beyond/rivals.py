"""What else could the same bytes buy? The quantisers that engineers would use, as rows.

    python -m beyond.calibrate && python evaluate.py --rows rivals     # with SAEs or without
    python -m beyond.rivals --model tiny                               # adds the rows `joint`

grouped    KIVI [arXiv 2402.02750] at 2 and 3 bits in groups of 32: each group is rounded to equal
           steps from its minimum to its maximum; minimum and step are kept in fp16. Keys are
           grouped over tokens of one channel, values over channels of one token. The keys are those
           before RoPE, which loses less than KIVI itself does [arXiv 2401.18079]. It is simulated:
           the model computes with rounded numbers.
rotated    the idea of TurboQuant [arXiv 2504.19874] at 1, 2 and 3 bits: a head's key or value, less
           its mean, is turned by a fixed random rotation. Kept are an fp16 norm and, per number,
           the index of the nearest of the levels that suit a Gaussian best (Lloyd-Max).
transform  the idea of KVTC [arXiv 2511.01815]: the keys and values of all heads of a token along
           their principal axes, in the metric of beyond/calibrate.py. Each axis of each layer gets
           0 to 8 bits, each bit where it saves most, and Lloyd-Max levels. KVTC's entropy coder,
           which is left out, would save 4 to 6% at 2 to 3 bits. At the bytes of the dual budget in
           words (beyond/variants.py) there are also its steps: axes per head, per layer, and in the
           metric, with as many bytes in each layer.
joint      transform with axes across layers, as KVTC has them: the keys and values of all layers of
           a token are one vector. They are there only when the model has read the token. So it
           suits a text that is stored between its uses; and it is scored by two passes: the model
           reads the text, and then reads it again with decoded keys and values, without errors
           that build up from layer to layer. Transform by two passes stands beside it.

The last three are fitted on the text of beyond/calibrate.py, never on the text that is scored.
"""
import contextlib
import functools
import math

import torch
import torch.nn.functional as F

import evaluate
import sta
from beyond import coded_layers, fitted_folder, parse_args
from beyond.calibrate import (EightBits, apart, keep_settings, open_calibrated, plain_metric,
                              principal_axes, read_fitted, read_settings, side_by_side,
                              write_fitted)
from support.files import expect_same, run_main

SHARES = (0.0625, 0.09375, 0.125, 0.1875, 0.25)  # of bf16
JOINT_SHARES = (0.015625, 0.03125, 0.0625)

# ------------------------------------------------------------------ grouped
def quantise(x, live, kind, bits, group):
    """x (B, T, H, D) as KIVI keeps it; live (B, T) is False for sinks and padding, which no group
    takes in."""
    rows = x.transpose(1, 3) if kind == "key" else x  # (B, D, H, T): groups along the last axis
    real = live[:, None, None] if kind == "key" else live[..., None, None]
    fill = -rows.shape[-1] % group

    def grouped(filler):  # (..., groups, group), with `filler` where no number counts
        padded = F.pad(torch.where(real, rows, filler), (0, fill), value=filler)
        return padded.unflatten(-1, (-1, group))

    low = grouped(math.inf).amin(-1, keepdim=True).half().float()
    high = grouped(-math.inf).amax(-1, keepdim=True)
    # a group without live tokens has no bounds, and is read by nobody
    low, high = (bound.masked_fill(bound.isinf(), 0) for bound in (low, high))
    step = ((high - low) / (2 ** bits - 1)).half().float()
    levels = ((grouped(0.0) - low) / step.clamp_min(1e-6)).round().clamp(0, 2 ** bits - 1)
    rows = (levels * step + low).flatten(-2)[..., :rows.shape[-1]]
    return rows.transpose(1, 3) if kind == "key" else rows

class Grouped:
    """A codec of one layer, simulated. In generation a token comes alone: it is a group by itself,
    and its key is exact to fp16. KIVI, too, keeps keys exact until their group is full."""

    def __init__(self, shape, bits, group):
        """shape: (n_kv_heads, head_dim)."""
        self.bits, self.group, (n_kv_heads, head_dim) = bits, group, shape
        per_key = head_dim * (bits / 8 + 4 / group)  # an fp16 minimum and step per group
        per_value = head_dim * bits / 8 + 4 * math.ceil(head_dim / group)
        self.bytes_per_token = n_kv_heads * (per_key + per_value)

    def roundtrip(self, keys, values, live):
        return (quantise(keys, live, "key", self.bits, self.group),
                quantise(values, live, "value", self.bits, self.group))

# ------------------------------------------------------------------ levels for a Gaussian
@functools.cache
def lloyd_max(bits):
    """(the 2^bits levels, float64, of least squared error for a unit Gaussian, that error)."""
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
        self.tables = [((bits == b).nonzero()[:, 0], lloyd_max(b)[0].float().to(device))
                       for b in bits.unique().tolist() if b]

    def encode(self, y):
        levels = torch.zeros_like(y, dtype=torch.uint8)
        for numbers, table in self.tables:
            edges = (table[1:] + table[:-1]) / 2
            levels[..., numbers] = torch.bucketize(y[..., numbers], edges).to(torch.uint8)
        ones = levels[..., self.number] >> self.place.to(torch.uint8) & 1
        ones = F.pad(ones, (0, -len(self.number) % 8)).unflatten(-1, (-1, 8))  # (..., m, 8)
        return (ones << self.powers).sum(-1, dtype=torch.uint8)

    def decode(self, packed):
        ones = (packed[..., None] >> self.powers & 1).flatten(-2)[..., :len(self.number)]
        levels = torch.zeros(*packed.shape[:-1], len(self.bits), dtype=torch.int32,
                             device=packed.device)
        levels.index_add_(-1, self.number, ones.int() << self.place.int())
        y = torch.zeros_like(levels, dtype=torch.float32)
        for numbers, table in self.tables:
            y[..., numbers] = table[levels[..., numbers]]
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
def allocate(variances, n_bits):
    """Numbers of these variances (any shape) -> bits of each, 0 to 8, n_bits in all: a bit goes
    where it lowers the summed squared error most [reverse water-filling]."""
    left = torch.tensor([1.0] + [lloyd_max(b)[1] for b in range(1, 9)], dtype=torch.float64)
    gains = variances.cpu()[..., None] * -left.diff()  # falling with every further bit
    chosen = torch.zeros(gains.numel(), dtype=torch.long)
    chosen[gains.flatten().topk(n_bits).indices] = 1
    return chosen.view(gains.shape).sum(-1)

class SixteenBits:
    """A table kept in bf16, read as float32."""

    def __init__(self, x):
        self.x, self.nbytes = x.bfloat16(), 2 * x.numel()

    def read(self):
        return self.x.float()

class Transform:
    """A codec of one layer: a token's P numbers along axes, each in its number of bits. Its tables
    are kept in 8 bits per number."""

    def __init__(self, shape, mean, variances, W, inverse, bits, table=EightBits):
        """shape: (n_kv_heads, head_dim); mean (P,); what `principal_axes` and `allocate` return;
        table: how the axes for encoding are kept."""
        used = (bits.to(mean.device) > 0) & (variances > 0)
        spread = variances[used].sqrt()
        self.shape, self.mean, self.levels = shape, mean.float(), Levels(bits.to(mean.device)[used])
        self.axes = table((W[:, used] / spread).T.float())  # (axes in use, P)
        self.inverse = EightBits((spread[:, None] * inverse[used]).float())  # (axes in use, P)

    def encode(self, keys, values):
        y = (side_by_side(keys, values) - self.mean) @ self.axes.read().T
        return (self.levels.encode(y),)

    def decode(self, stored):
        x = self.levels.decode(stored[0]) @ self.inverse.read() + self.mean
        return apart(x, self.shape)

STEPS = (", per head", ", per layer", ", metric", "")  # end the names of rows

def axes_of(fitted, shape, step):
    """What `principal_axes` returns of a layer, at a step."""
    covariance, metric = fitted["covariance"], fitted["metric"]
    if step in STEPS[:2]:
        metric = plain_metric(covariance)
    if step == STEPS[0]:
        head = torch.arange(len(covariance), device=covariance.device) // shape[1]
        covariance = covariance * (head[:, None] == head)
    return principal_axes(covariance, metric)

# ------------------------------------------------------------------ axes across layers
def learn_joint_axes(model, windows, fitted):
    """Windows (n, T) of token ids, {layer: what calibrate.py measured} -> the variances (Q,) of the
    numbers along common principal axes, strongest first, and {layer: axes (P, Q)}: a layer's part
    in y = sum over layers of (x - mean) root axes, root the root of its metric. Q axes are as many
    as the largest of JOINT_SHARES uses."""
    vectors, parts = sta.harvest(model, windows, list(fitted)), []
    for layer, of_layer in fitted.items():
        x = side_by_side(vectors.pop((layer, "key")), vectors.pop((layer, "value")))
        parts.append((x - of_layer["mean"]) @ torch.linalg.cholesky(of_layer["metric"]))
    y = torch.cat(parts, 1)  # (tokens, L P)
    variances, axes = (x.flip(-1) for x in torch.linalg.eigh(y.T @ y / len(y)))
    bits = allocate(variances.clamp_min(0), int(max(JOINT_SHARES) * 16 * len(variances)))
    n_axes = int(bits.nonzero().max()) + 1
    by_layer = axes[:, :n_axes].split(parts[0].shape[1])
    return variances[:n_axes], dict(zip(fitted, by_layer))

def joint_codec(fitted, learned, shape, share):
    """`Transform` for the keys of all L layers, side by side as heads, and their values. fitted,
    learned: by layer, what calibrate.py measured, and {variances, axes} of `learn_joint_axes`."""
    def keys_first(parts):  # L of (P, ...) -> (L P, ...)
        return torch.stack(parts).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)

    roots = [torch.linalg.cholesky(of_layer["metric"]) for of_layer in fitted.values()]
    axes = [of_layer["axes"] for of_layer in learned.values()]
    W = keys_first([root @ part for root, part in zip(roots, axes)])  # (L P, Q)
    inverse = keys_first([torch.linalg.inv(root).T @ part for root, part in zip(roots, axes)]).T
    variances = next(iter(learned.values()))["variances"]
    bits = allocate(variances, int(share * 16 * len(W)))
    mean = keys_first([of_layer["mean"] for of_layer in fitted.values()])
    # with 8 bits, what rounding adds to the weak axes from the strong ones is more than they hold
    return Transform((len(fitted) * shape[0], shape[1]), mean, variances, W, inverse, bits,
                     SixteenBits)

class Given:
    """A codec of one layer that makes of any vectors what it was given."""

    def roundtrip(self, keys, values, live):
        return self.decoded

@contextlib.contextmanager
def two_passes(model, layers, code, sink):
    """`with two_passes(...) as forward`: ids (B, T) -> logits (B, T, V) with decoded keys and
    values. code: what a code makes of those of all layers, (B, T, L H, D) each, which the
    unmodified model has."""
    given = {layer: Given() for layer in layers}

    def forward(ids):
        with sta.capture(model, layers) as vectors:
            model.get_decoder()(input_ids=ids, use_cache=False)
        both = [torch.cat([vectors[layer, kind].float() for layer in layers], 2)
                for kind in sta.KINDS]
        decoded = [x.chunk(len(layers), 2) for x in code(*both)]
        for codec, *of_layer in zip(given.values(), *decoded):
            codec.decoded = of_layer
        with sta.reconstruct(model, given, sink):
            return model(input_ids=ids, use_cache=False).logits

    yield forward

def each_alone(codecs, keys, values):
    """What the codecs of L layers make of the keys and values of all, (B, T, L H, D) each."""
    parts = zip(codecs, keys.chunk(len(codecs), 2), values.chunk(len(codecs), 2))
    return [torch.cat(x, 2) for x in zip(*(codec.decode(codec.encode(*part))
                                           for codec, *part in parts))]

def joint_rows(model, folder, fitted, axes, shape, sink):
    """[Row], by two passes: transform across layers, and transform, whose axes {layer: what
    `axes_of` returns} are given, at the same shares."""
    learned = {layer: read_fitted(folder / "joint", model, layer) for layer in fitted}
    variances, new_rows = torch.stack([of_layer[0] for of_layer in axes.values()]), []
    for share in JOINT_SHARES:
        joint = joint_codec(fitted, learned, shape, share)
        bits = allocate(variances, int(share * 16 * variances.numel()))
        alone = {layer: Transform(shape, fitted[layer]["mean"], *axes[layer], of_layer)
                 for layer, of_layer in zip(fitted, bits)}
        n_dense = model.get_decoder().config.num_hidden_layers - len(fitted)
        size = math.ceil(joint.levels.bits.sum().item() / 8) + n_dense * 4 * math.prod(shape)
        for name, code, codecs, bytes_per_token in (
                ("joint", functools.partial(sta.roundtrip, joint, live=None), {}, size),
                ("transform", functools.partial(each_alone, list(alone.values())), alone, None)):
            tables = [x for codec in (alone.values() if codecs else [joint])
                      for x in (codec.mean, codec.axes, codec.inverse)]
            new_rows.append(evaluate.Row(
                f"{name} {100 * share:g}, two passes", codecs, method=f"{name}, two passes",
                once_bytes=sum(x.nbytes for x in tables), bytes_per_token=bytes_per_token,
                make_forward=functools.partial(two_passes, layers=list(fitted), code=code,
                                               sink=sink)))
    return new_rows

# ------------------------------------------------------------------ the rows
def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row]."""
    shape = sta.kv_shape(model.get_decoder().config)
    layers = coded_layers(model, saes, args)
    folder = fitted_folder(args.saes, args.model) / "calibration"
    fitted = {layer: read_fitted(folder, model, layer) for layer in layers}
    settings, new_rows = read_settings(folder), []
    for bits in (2, 3):
        codecs = dict.fromkeys(layers, Grouped(shape, bits, 32))
        new_rows.append(evaluate.Row(f"grouped {bits} bits", codecs, method="grouped"))
    for bits in (1, 2, 3):
        codecs = {layer: Rotated(fitted[layer]["mean"], shape, bits) for layer in layers}
        new_rows.append(evaluate.Row(f"rotated {bits} bits", codecs, method="rotated",
                                 once_bytes=len(layers) * 8 * math.prod(shape)))
    in_words = (args.k_key + args.k_val) / (2 * shape[1])  # share of the dual budget in words
    for step in STEPS:
        axes = {layer: axes_of(fitted[layer], shape, step) for layer in layers}
        variances = torch.stack([axes[layer][0] for layer in layers])  # (layers, P)
        for share in SHARES if step == "" else [in_words]:
            n_bits = int(share * 16 * variances.shape[1])  # of a layer
            together = len(layers) if step == "" else 1  # layers that share bits
            bits = torch.cat([allocate(part, n_bits * len(part))
                              for part in variances.split(together)])
            codecs = {layer: Transform(shape, fitted[layer]["mean"], *axes[layer], of_layer)
                      for layer, of_layer in zip(layers, bits)}
            once = sum(x.nbytes for codec in codecs.values()
                       for x in (codec.mean, codec.axes, codec.inverse))
            name = f"transform {100 * share:g}{step}"
            new_rows.append(evaluate.Row(name, codecs, once_bytes=once, method=f"transform{step}"))
    if (folder.with_name("joint") / f"layer{layers[-1]}.safetensors").exists():
        expect_same(folder.with_name("joint"), read_settings(folder.with_name("joint")),
                    {"calibration": settings})
        # axes are those of the last step
        new_rows += joint_rows(model, folder.parent, fitted, axes, shape, args.sink)
    for row in new_rows:
        row.settings = settings
    return new_rows

@torch.no_grad()
def main(argv=None):
    run = open_calibrated(parse_args(__doc__, argv, "model saes layer device dtype"))
    folder = run.folder / "joint"
    keep_settings(folder, {"calibration": run.settings})
    variances, by_layer = learn_joint_axes(run.model, run.windows, run.fitted)
    for layer, axes in by_layer.items():
        write_fitted(folder, run.model, layer, {"axes": axes, "variances": variances})
    print(f"{folder}: {len(variances):,} axes across {len(by_layer)} layers")

if __name__ == "__main__":
    run_main(main)
