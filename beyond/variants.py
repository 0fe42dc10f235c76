"""Other ways to choose atoms, to store them, or to train them.

    python evaluate.py --rows variants                 # search, words, and what is trained below
    python -m beyond.variants --what stretch           # tiny: saes/tiny/stretch/dual/
    python -m beyond.variants --what layer             # tiny: saes/layer/tiny/
    python -m beyond.variants --what splits            # tiny: saes/splits/tiny/
    python -m beyond.variants --what l1                # tiny: saes/l1/tiny/
    python -m beyond.variants --what twin              # tiny: saes/twin/tiny/

search     The encoder's one pass only guesses which atoms to use. Hard thresholding pursuit
           [Foucart 2011] solves for the coefficients of the chosen atoms by least squares, looks
           for atoms in line with what is left, keeps the k best of all, and repeats this ROUNDS
           times. The dictionary, the bytes and the decoder are those of the dual budget. The first
           j atoms are not the code at budget j.
packed     Each atom of a code takes one 16-bit word in place of two: 10 bits of index, 6 of a
           coefficient's level on a logarithmic scale.
stretch    Least squares shrinks: what the atoms miss is missing from the length as well. One factor
           per head and kind lengthens x_hat - mean. It is learned on the model's own loss with all
           layers coded and everything else frozen, in STEPS steps of 512 tokens of training text.
           `--row` and `--rows` learn it for another row of evaluate.py's table, and --rows
           rivals,variants then shows it: a row that is stretched comes first.
layer      One SAE sees the keys and values of all heads of a token, side by side, each kind in
           units of its spread. It keeps k = H (k_key + k_val) atoms: the bytes of the dual budget,
           shared out between keys and values as each token needs. Like the next, it starts from
           the mean and covariance of beyond/calibrate.py.
metric     The same, but errors count as they cost the model: in the metric of beyond/calibrate.py.
           *shared*: layers get as many atoms as help them, of as many in all.
splits     SAEs trained for the other splits of the same bytes: as many atoms per key as per value,
           and the dual budget reversed. The controls of the dual budget, whose SAEs are trained
           for it.
twin       The untrained twin: atoms stay random, and only the encoder is trained.
l1         A ReLU autoencoder with an L1 penalty, whose weight is adapted until k latents are active
           on average: the rival of the paper's first claim. It needs three times the tokens and
           four times the learning rate of the others (beyond/claims.py).
"""
import argparse
import dataclasses
import functools
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import evaluate
import sta
import train_sae
from beyond import coded_layers, fitted_folder, parse_args
from beyond.additive import share_out
from beyond.calibrate import (RATE, STEP_TOKENS, STEPS, Stretched, apart, keep_settings,
                              learn_stretch, plain_metric, read_fitted, read_settings,
                              side_by_side, write_fitted)
from support.files import expect_same, load_saes, run_main, sha256
from support.results import load_run
from support.text import read_text, text_name, token_windows

ROUNDS = 2  # of pursuit: each gains less than the one before
LEVELS, OCTAVES = 63, 8  # of a packed coefficient above 0: the levels, and how far they reach
PURSUED = 1 << 23  # numbers in the atoms that are solved for at once
SEARCHED, STRETCHED, PACKED = ", searched", ", stretched", ", packed"  # end the names of rows

# ------------------------------------------------------------------ search
@torch.no_grad()
def pursue(sae, x, k):
    """TopKSAE.encode by hard thresholding pursuit, which starts from the encoder's atoms:
    x (..., H, D) -> z (..., H, k) >= 0 and idx (..., H, k)."""
    _, idx = sae.encode(x, k)
    target = ((x - sae.b_dec) / sae.scale).flatten(0, -2)  # (N, D)
    size = max(1, PURSUED // (k * x.shape[-1]))
    parts = zip(target.split(size), idx.flatten(0, -2).split(size))
    codes = [pursue_rows(rows, start, sae.W_dec) for rows, start in parts]
    return tuple(torch.cat(part).view(idx.shape) for part in zip(*codes))

def pursue_rows(target, idx, atoms):
    """target (N, D), a first choice idx (N, k) of the unit atoms (M, D) -> z and idx (N, k)."""
    for _ in range(ROUNDS):
        z = solve(target, atoms[idx])
        left = target - sta.sum_of_rows(z, idx, atoms)
        gain = (left @ atoms.T).scatter_add_(1, idx, z)  # (N, M): what each atom would carry
        idx = gain.topk(k=idx.shape[1]).indices
    return solve(target, atoms[idx]), idx

def solve(target, chosen):
    """Coefficients (N, k) >= 0 with which atoms chosen (N, k, D) come close to target (N, D): those
    of least squares, negative ones set to 0, and each then adjusted once to all others."""
    gram = chosen @ chosen.mT + 1e-6 * torch.eye(chosen.shape[1], device=target.device)
    wanted = (chosen @ target[..., None])[..., 0]  # (N, k)
    # atoms that are nearly alike may get large coefficients that cancel; fp16 ends at 65,504
    z = torch.linalg.solve(gram, wanted).clamp(0, 65_504)
    for j in range(z.shape[1]):
        change = (wanted[:, j] - (gram[:, j] * z).sum(-1)) / gram[:, j, j]
        z[:, j] = (z[:, j] + change).clamp(0, 65_504)
    return z

class Searched(sta.DualBudget):
    """The dual budget with searched codes; decoding is the same."""

    def encode(self, keys, values):
        parts = (keys, self.key_sae, self.budget.k_key), (values, self.value_sae, self.budget.k_val)
        codes = [sta.pack(*pursue(sae, x, k), sae.n_latents) for x, sae, k in parts]
        return codes[0] + codes[1]

def search(codecs):
    """{layer: dual budget} -> the same with searched codes."""
    return {layer: Searched(codec.key_sae, codec.value_sae, codec.budget)
            for layer, codec in codecs.items()}

# ------------------------------------------------------------------ one word per atom
class Packed:
    """A codec of one layer: the code of another, a 16-bit word per atom. The upper 10 bits are the
    index. The lower 6 are the coefficient's level: 0 for none, else the nearest of 63 on a
    logarithmic scale, whose highest is the largest that the SAE showed in training."""

    def __init__(self, codec, *saes):
        """saes: those of the pairs of coefficients and indices that codec.encode returns. Raises
        UsageError if one has too many latents."""
        self.codec, self.largest = codec, [sae.largest_z for sae in saes]
        for sae in saes:
            if sae.n_latents > 1 << 10:
                raise sta.UsageError(f"n_latents = {sae.n_latents}: 10 bits name at most 1,024")

    def encode(self, keys, values):
        """-> words, int16, of the same shapes as the codec's indices."""
        stored = self.codec.encode(keys, values)
        pairs = zip(stored[::2], stored[1::2])
        return tuple(to_words(*pair, most) for pair, most in zip(pairs, self.largest))

    def decode(self, stored):
        pairs = [from_words(words, most) for words, most in zip(stored, self.largest)]
        return self.codec.decode([part for pair in pairs for part in pair])

def to_words(z, idx, most):
    """Coefficients and indices, (..., n) each -> words, int16 (..., n). most: the highest level."""
    level = LEVELS + LEVELS / OCTAVES * (z.float() / most).log2()  # -infinite where z = 0
    return (idx.int() << 6 | level.round().clamp(0, LEVELS).int()).short()

def from_words(words, most):
    level = words.int() & LEVELS
    z = most * torch.exp2((level - LEVELS) * OCTAVES / LEVELS)
    return z * (level > 0), words.int() >> 6 & 1023

def packed_rows(saes, names, rows):
    """[Row]: those of the rows that have one of the names, in words, if words can name the atoms of
    saes {(layer, kind): SAE}."""
    if max((sae.n_latents for sae in saes.values()), default=0) > 1 << 10:
        return []
    new_rows = []
    for row in (row for row in rows if row.name in names):
        of_layer = {layer: [sae for (other, _), sae in saes.items() if other == layer]
                    for layer in row.codecs}
        codecs = {layer: Packed(codec, *of_layer[layer]) for layer, codec in row.codecs.items()}
        name = row.name + PACKED if row.name != "dual" else "packed"
        new_rows.append(dataclasses.replace(row, name=name, method=row.method or row.name,
                                            codecs=codecs))
    return new_rows

# ------------------------------------------------------------------ a stretch per head
def stretched_rows(model, folder, rows):
    """[Row]: those of the rows for which factors lie in saes/<model>, stretched. Raises UsageError
    if they were learned for other SAEs."""
    by_name, new_rows = {row.name: row for row in rows}, []
    for path in sorted({file.parent for file in (folder / "stretch").glob("*/layer*")}):
        settings = read_settings(path)
        row = by_name.get(settings["of"])
        if row:
            expect_same(path, settings.pop("fit"), fit_of(row))
            learned = {layer: read_fitted(path, model, layer) for layer in row.codecs}
            codecs = {layer: Stretched(codec, **learned[layer])
                      for layer, codec in row.codecs.items()}
            name = path.name.replace("dual", "stretched") if row.name == "dual" else (
                path.name + STRETCHED)
            once_bytes = row.once_bytes + sum(
                x.nbytes for tensors in learned.values() for x in tensors.values())
            new_rows.append(dataclasses.replace(
                row, name=name, method=name, codecs=codecs, once_bytes=once_bytes,
                settings={**(row.settings or {}), "stretch": settings}))
    return new_rows

def fit_of(row):
    """What factors are learned for."""
    return {**(row.settings or {}), "budget": list(row.budget)}

def stretch(argv):
    """`--what stretch`."""
    args = parse_args(
        __doc__, argv, "model saes layer text seq-len k-key k-val sink device dtype",
        rows=dict(default="", help="files of beyond/ that add rows, such as rivals"),
        row=dict(default="dual", help="the row that is stretched (default dual)"),
        per=dict(default="head", choices=["head", "layer", "model", "mean"], help="a factor per "
                 "head, layer or model, or per head, with its mean learned, too (default head)"))
    args.out = args.saes
    run = load_run(args, needs_saes=not args.rows)
    args.only = ""
    rows = {row.name: row for row in evaluate.choose_rows(run, args)}
    if args.row not in rows or not rows[args.row].codecs:
        raise sta.UsageError(f"--row {args.row}: want one of {', '.join(list(rows)[1:])}")
    windows = token_windows(read_text(args.text, "train", run.name), run.tokenizer, run.model,
                            args.seq_len, 512, STEPS * STEP_TOKENS)
    folder = fitted_folder(args.saes, run.name) / "stretch" / (
        args.row + f" per {args.per}" * (args.per != "head"))
    keep_settings(folder, {
        "of": args.row, "per": args.per, "fit": fit_of(rows[args.row]),
        "text": text_name(args.text, "train", run.name), "text_sha256": sha256(windows),
        "tokens": windows.numel(), "seq_len": windows.shape[1], "steps": STEPS, "rate": RATE})
    learned = learn_stretch(run.model, rows[args.row].codecs, windows, args.sink, args.per)
    for layer, tensors in learned.items():
        write_fitted(folder, run.model, layer, tensors)
        factors = [" ".join(f"{x:.3f}" for x in of_kind) for of_kind in tensors["factors"]]
        print(f"layer {layer:3}: keys {factors[0]}, values {factors[1]}")
    print(f"wrote {folder}")

# ------------------------------------------------------------------ one SAE per layer
class PerLayer:
    """What train_sae.py trains for a layer: one SAE of y = (x - mean) root, where x are the keys
    and values of all heads of a token, side by side, and mean and root (P, P) are of the model's
    calibration. root: each kind in units of its spread, or (in_metric) lengths as in its metric."""

    def __init__(self, in_metric):
        self.in_metric, self.spaces = in_metric, {}  # {layer: (mean, root)}

    def make_saes(self, model, layer, args, generator):
        shape = sta.kv_shape(model.get_decoder().config)
        k = shape[0] * (args.k_key + args.k_val)
        if k > args.n_latents:
            raise sta.UsageError(f"--n-latents {args.n_latents}: want {k} = n_kv_heads (k_key + "
                                 "k_val) or more")
        self.spaces[layer] = self.space(model, layer, fitted_folder(args.out.parent, args.model))
        return {"layer": sta.TopKSAE(1, 2 * math.prod(shape), args.n_latents, k, generator)}

    def space(self, model, layer, folder):
        """-> mean (P,), root (P, P)."""
        fitted = read_fitted(folder / "calibration", model, layer)
        metric = fitted["metric"] if self.in_metric else plain_metric(fitted["covariance"])
        return fitted["mean"], torch.linalg.cholesky(metric.double()).float()

    def vectors(self, layer, keys, values):
        return {"layer": into_space(self.spaces[layer], keys, values)}

def into_space(space, keys, values):
    """(mean, root), keys and values (..., H, D) -> y (..., 1, P), as PerLayer has it."""
    mean, root = space
    return ((side_by_side(keys, values) - mean) @ root)[..., None, :]

class LayerBudget:
    """A codec of one layer: k atoms of one SAE for the keys and values of all heads."""

    def __init__(self, sae, k, shape, space, encode=sta.TopKSAE.encode):
        """shape: (n_kv_heads, head_dim); space: (mean, root), as PerLayer has it; encode: or
        `pursue`. By one pass, mean and root could be a part of the SAE's weights."""
        self.sae, self.k, self.shape, self.space = sae, k, shape, space
        self.inverse, self.encode_with = torch.linalg.inv(space[1]), encode

    def encode(self, keys, values):
        """-> coefficients fp16 and indices int16, (..., k) each."""
        y = into_space(self.space, keys, values)  # (..., 1, P)
        return sta.pack(*self.encode_with(self.sae, y, self.k), self.sae.n_latents)

    def decode(self, stored):
        z, idx = stored[0].float()[..., None, :], stored[1].int()[..., None, :]  # (..., 1, k)
        return apart(self.sae.decode(z, idx)[..., 0, :] @ self.inverse + self.space[0], self.shape)

def share_atoms(saes, spaces, vectors, total):
    """{layer: k}, `total` in all: 4 for each layer, and the others, in steps of 4, where they lower
    the error in y most. vectors: {(layer, kind): (tokens, H, D)}."""
    curves = {}
    for layer, space in spaces.items():
        sae = saes[layer, "layer"]
        y = into_space(space, *(vectors[layer, kind] for kind in sta.KINDS))  # (tokens, 1, P)
        z, idx = sae.encode(y, min(2 * sae.k, sae.n_latents) // 4 * 4)
        curves[layer] = torch.stack([
            (y - sae.decode(z[..., :k], idx[..., :k])).square().sum(-1).mean()
            for k in range(4, idx.shape[-1] + 1, 4)])
    counts = share_out(curves, total // 4 - len(spaces))
    return {layer: 4 + 4 * counts[layer] for layer in spaces}

# ------------------------------------------------------------------ other splits
class Splits:
    """What train_sae.py trains for a layer: for each split but the dual one, an SAE of keys and one
    of values, named by kind and budget."""

    def make_saes(self, model, layer, args, generator):
        shape, saes = sta.kv_shape(model.get_decoder().config), {}
        for budget in other_splits(args.k_key, args.k_val).values():
            for kind, k in zip(sta.KINDS, budget):
                saes[f"{kind}{k}"] = sta.TopKSAE(*shape, args.n_latents, k, generator)
        self.names = list(saes)
        return saes

    def vectors(self, layer, keys, values):
        return {name: keys if name.startswith("key") else values for name in self.names}

def other_splits(k_key, k_val):
    """evaluate.splits without the dual one."""
    return {name: budget for name, budget in evaluate.splits(k_key, k_val).items()
            if name != "dual"}

# ------------------------------------------------------------------ L1
class L1SAE(sta.TopKSAE):
    """A ReLU autoencoder whose L1 weight follows the number of active latents until that is k."""

    def __init__(self, n_heads, head_dim, n_latents, k, generator=None):
        super().__init__(n_heads, head_dim, n_latents, k, generator)
        self.register_buffer("l1_weight", torch.tensor(0.05))

    def loss(self, x):
        """As TopKSAE.loss, but the number of active latents follows k."""
        inside = (x - self.b_dec) / self.scale  # (tokens, H, D)
        z = F.relu(inside @ self.W_enc + self.b_enc)  # (tokens, H, M)
        with torch.no_grad():
            active = (z > 0).sum(-1).float().mean()
            self.l1_weight *= (active / self.k).clamp(0.1, 10) ** 0.02
            self.count_fired((z > 0).nonzero()[:, -1], x[..., 0].numel())
        error = (inside - z @ self.W_dec).square().mean()
        return error + self.l1_weight * z.sum(-1).mean() / x.shape[-1]

class Twin(train_sae.KeysAndValues):
    """What train_sae.py trains for a layer: SAEs whose atoms stay random."""

    def make_saes(self, model, layer, args, generator):
        saes = super().make_saes(model, layer, args, generator)
        for sae in saes.values():
            sae.W_dec.requires_grad_(False)
        return saes

class L1(train_sae.KeysAndValues):
    """What train_sae.py trains for a layer: L1SAEs of keys and of values."""
    sae_class = L1SAE

class ReluCode:
    """A codec of one layer: every positive latent, however many; SAEs trained as L1SAE."""

    def __init__(self, key_sae, value_sae):
        self.saes = key_sae, value_sae

    def encode(self, keys, values):
        """-> for keys, then values: coefficients fp16 (n,), indices int16 (n,), how many of them
        each vector has, int16 (..., H)."""
        stored = []
        for x, sae in zip((keys, values), self.saes):
            z = (x - sae.b_dec) / sae.scale @ sae.W_enc + sae.b_enc  # (..., H, M)
            fires = z > 0
            stored += [*sta.pack(z[fires][:, None], fires.nonzero()[:, -1:], sae.n_latents),
                       fires.sum(-1).short()]
        return tuple(stored)

    def decode(self, stored):
        both = []
        for (z, idx, counts), sae in zip((stored[:3], stored[3:]), self.saes):
            ends = counts.flatten().long().cumsum(0)
            x = F.embedding_bag(idx.long(), sae.W_dec, ends - counts.flatten(), mode="sum",
                                per_sample_weights=z.float())  # (N, D)
            both.append(sae.scale * x.view(*counts.shape, -1) + sae.b_dec)
        return tuple(both)

# ------------------------------------------------------------------ the rows, and the run
VARIANTS = {"layer": PerLayer(in_metric=False), "metric": PerLayer(in_metric=True),
            "splits": Splits(), "l1": L1(), "twin": Twin()}

def beside(folder, what):
    """Where a variant's SAEs of a model lie, given saes/<model>, the folder of its other SAEs."""
    return folder.parent / what / folder.name

def searched(settings):
    """The settings of SAEs, and those of the search."""
    return {**settings, "rounds": ROUNDS}

def settings_of(before):
    """Those with which the SAEs of the rows before were trained."""
    return next((row.settings for row in before if row.settings), None)

def layer_rows(model, folder, layers, args, what="layer"):
    """One SAE per layer, by one pass and searched, each also in words; in the metric, also with
    another k per layer."""
    shape, name = sta.kv_shape(model.get_decoder().config), "layer SAE" + ", metric" * (
        what == "metric")
    saes, metadata = load_saes(beside(folder, what), model, layers, ["layer"])
    spaces = {layer: VARIANTS[what].space(model, layer, folder) for layer in layers}
    same_k, new_rows = {layer: saes[layer, "layer"].k for layer in layers}, []

    def add(name, ks, encode, settings):
        codecs = {layer: LayerBudget(saes[layer, "layer"], ks[layer], shape, spaces[layer], encode)
                  for layer in layers}
        row = evaluate.Row(name, codecs, settings=settings, with_tasks=False,
                           once_bytes=evaluate.dictionary_bytes(saes, "layer"))
        new_rows.extend([row, *packed_rows(saes, [name], [row])])

    by_search = searched(metadata["settings"])
    add(name, same_k, sta.TopKSAE.encode, metadata["settings"])
    add(name + SEARCHED, same_k, pursue, by_search)
    if what == "metric":
        ids = load_file(folder / "calibration" / "windows.safetensors")["ids"]
        vectors = sta.harvest(model, ids[:max(1, 4096 // ids.shape[1])], layers)
        shared = share_atoms(saes, spaces, vectors, sum(same_k.values()))
        add(f"{name}, shared{SEARCHED}", shared, pursue, by_search)
    return new_rows

def split_rows(model, folder, layers, args):
    """Uniform and reverse, by SAEs trained for them, by one pass and searched."""
    new_rows = []
    for name, budget in other_splits(args.k_key, args.k_val).items():
        kinds = {f"{kind}{k}": kind for kind, k in zip(sta.KINDS, budget)}
        loaded, metadata = load_saes(beside(folder, "splits"), model, layers, list(kinds))
        saes = {(layer, kinds[sae_name]): sae for (layer, sae_name), sae in loaded.items()}
        codecs, settings = evaluate.dual_codecs(saes, *budget), metadata["settings"]
        once_bytes = evaluate.dictionary_bytes(saes, *sta.KINDS)
        for ending, some in (("", codecs), (SEARCHED, search(codecs))):
            new_rows.append(evaluate.Row(
                f"{name}, trained for it{ending}", some, budget, once_bytes, with_tasks=False,
                settings=searched(settings) if ending else settings))
    return new_rows

def twin_rows(model, folder, layers, args):
    saes, metadata = load_saes(beside(folder, "twin"), model, layers)
    return [evaluate.Row("untrained twin", evaluate.dual_codecs(saes, args.k_key, args.k_val),
                         (args.k_key, args.k_val), settings=metadata["settings"], with_tasks=False,
                         once_bytes=evaluate.dictionary_bytes(saes, *sta.KINDS))]

def l1_rows(model, folder, layers, args):
    saes, metadata = load_saes(beside(folder, "l1"), model, layers)
    codecs = {layer: ReluCode(saes[layer, "key"], saes[layer, "value"]) for layer in layers}
    return [evaluate.Row("l1", codecs, settings=metadata["settings"],
                         once_bytes=evaluate.dictionary_bytes(saes, *sta.KINDS))]

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row], of search and of the variants that were trained."""
    folder, new_rows = fitted_folder(args.saes, args.model), []
    layers = coded_layers(model, saes, args)
    for row in [row for row in before if row.name == "dual"]:
        new_rows.append(dataclasses.replace(
            row, name="searched", method="searched", codecs=search(row.codecs),
            settings=searched(row.settings), with_tasks=True))
    uniform_key = evaluate.splits(args.k_key, args.k_val)["uniform"][0]
    for what, sae_name, rows_of in (
            ("layer", "layer", layer_rows),
            ("metric", "layer", functools.partial(layer_rows, what="metric")),
            ("splits", f"key{uniform_key}", split_rows), ("twin", "key", twin_rows),
            ("l1", "key", l1_rows)):
        there = beside(folder, what)
        trained = [(there / f"layer{layer}.{sae_name}").exists() for layer in layers]
        if all(trained):
            new_rows += rows_of(model, folder, layers, args)
        elif any(trained):
            print(f"{there}: not of all {len(layers)} layers, so it has no rows")
    new_rows += stretched_rows(model, folder, [*before, *new_rows])
    new_rows += packed_rows(saes, ("dual", "searched", "stretched"), [*before, *new_rows])
    if not new_rows:
        raise sta.UsageError("--rows variants: needs SAEs; first run: python train_sae.py")
    return new_rows

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of train_sae.py: see python train_sae.py -h; with "
               "--what stretch, --model --saes --layer --text --seq-len --k-key --k-val --sink "
               "--device --dtype of evaluate.py, --row, --rows and --per")
    parser.add_argument("--what", choices=[*VARIANTS, "stretch"], default="layer",
                        help="(default layer)")
    parser.add_argument("--out", type=pathlib.Path, help="(default saes; a stretch lies in --saes)")
    args, rest = parser.parse_known_args(argv)
    if args.what == "stretch":
        if args.out:
            raise sta.UsageError(f"--out {args.out}: a stretch is written beside its SAEs, in "
                                 "--saes")
        return stretch(rest)
    out = (args.out or pathlib.Path("saes")) / args.what
    train_sae.main([*rest, "--out", str(out)], VARIANTS[args.what], __doc__)

if __name__ == "__main__":
    run_main(main)
