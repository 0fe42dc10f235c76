"""Other ways to choose atoms or to train them: search, one SAE per layer, other splits, L1.

    python evaluate.py --rows variants                 # search, and the others that are trained
    python -m beyond.variants --what layer             # tiny: saes/layer/tiny/
    python -m beyond.variants --what splits            # tiny: saes/splits/tiny/
    python -m beyond.variants --what l1                # tiny: saes/l1/tiny/

search     The encoder's one pass only guesses which atoms to use. Hard thresholding pursuit
           [Foucart 2011] solves for the coefficients of the chosen atoms by least squares, looks
           for atoms in line with what is left, keeps the k best of all, and repeats this ROUNDS
           times. The dictionary, the bytes and the decoder are those of the dual budget.
           Coefficients may be negative, and the first j atoms are not the code at budget j.
layer      One SAE sees the keys and values of all heads of a token, side by side, each kind in
           units of its spread. It keeps k = H (k_key + k_val) atoms: the bytes of the dual budget,
           shared out between keys and values as each token needs.
splits     SAEs trained for the other splits of the same bytes: as many atoms per key as per value,
           and the dual budget reversed. The controls of the dual budget, whose SAEs are trained
           for it.
l1         A ReLU autoencoder with an L1 penalty, whose weight is adapted until k latents are active
           on average: the rival of the paper's first claim. It needs three times the tokens and
           four times the learning rate of the others (beyond/claims.py).
Non-goal: search among the atoms of a layer's SAE.
"""
import argparse
import math
import pathlib

import torch
import torch.nn.functional as F

import evaluate
import sta
import train_sae
from beyond import coded_layers, fitted_folder
from beyond.calibrate import apart, side_by_side
from support.files import load_saes, run_main

ROUNDS = 2  # of pursuit: each gains less than the one before
SEARCHED = ", searched"  # ends the names of rows whose atoms are found by search

# ------------------------------------------------------------------ search
@torch.no_grad()
def pursue(sae, x, k):
    """TopKSAE.encode by hard thresholding pursuit, which starts from the encoder's atoms:
    x (..., H, D) -> z (..., H, k), signed, and idx (..., H, k)."""
    _, idx = sae.encode(x, k)
    target = ((x - sae.b_dec) / sae.scale).flatten(0, -2)  # (N, D)
    parts = zip(target.split(4096), idx.flatten(0, -2).split(4096))
    codes = [pursue_rows(rows, start, sae.W_dec) for rows, start in parts]
    return tuple(torch.cat(part).view(idx.shape) for part in zip(*codes))

def pursue_rows(target, idx, atoms):
    """target (N, D), a first choice idx (N, k) of the unit atoms (M, D) -> z and idx (N, k)."""
    for _ in range(ROUNDS):
        z = solve(target, atoms[idx])
        left = target - F.embedding_bag(idx, atoms, per_sample_weights=z, mode="sum")
        gain = (left @ atoms.T).scatter_add_(1, idx, z)  # (N, M): what each atom would carry
        idx = gain.abs_().topk(k=idx.shape[1]).indices
    return solve(target, atoms[idx]), idx

def solve(target, chosen):
    """The coefficients (N, k) with which atoms chosen (N, k, D) come closest to target (N, D)."""
    gram = chosen @ chosen.mT + 1e-6 * torch.eye(chosen.shape[1], device=target.device)
    z = torch.linalg.solve(gram, chosen @ target[..., None])[..., 0]
    # atoms that are nearly alike may get large coefficients that cancel; fp16 ends at 65,504
    return z.clamp(-65_504, 65_504)

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

# ------------------------------------------------------------------ one SAE per layer
class LayerSAE(sta.TopKSAE):
    """A TopKSAE of one vector per token: keys and values of all heads, each kind in units of its
    spread."""

    def __init__(self, dim, n_latents, k, generator=None):
        super().__init__(1, dim, n_latents, k, generator)
        self.scale = torch.ones(dim)

    @torch.no_grad()
    def centre(self, x):
        """Set b_dec and scale (P,) to those of vectors x (tokens, 1, P)."""
        self.b_dec.copy_(x.mean(0))
        variances = (x - self.b_dec).square().mean((0, 1))  # (P,)
        self.scale.copy_(torch.cat([part.mean().sqrt().expand_as(part)
                                    for part in variances.chunk(2)]))

class PerLayer:
    """What train_sae.py trains for a layer: one LayerSAE."""

    def make_saes(self, shape, args, generator):
        k = shape[0] * (args.k_key + args.k_val)
        if k > args.n_latents:
            raise sta.UsageError(f"--n-latents {args.n_latents}: want {k} = n_kv_heads (k_key + "
                                 "k_val) or more")
        return {"layer": LayerSAE(2 * math.prod(shape), args.n_latents, k, generator)}

    def vectors(self, keys, values):
        return {"layer": side_by_side(keys, values)[:, None]}  # (tokens, 1, P)

class LayerBudget:
    """A codec of one layer: k atoms of one SAE for the keys and values of all heads."""

    def __init__(self, sae, k, shape):
        """shape: (n_kv_heads, head_dim)."""
        self.sae, self.k, self.shape = sae, k, shape

    def encode(self, keys, values):
        """-> coefficients fp16 and indices int16, (..., k) each."""
        z, idx = self.sae.encode(side_by_side(keys, values)[..., None, :], self.k)  # (..., 1, k)
        return sta.pack(z, idx, self.sae.n_latents)

    def decode(self, stored):
        z, idx = stored[0].float()[..., None, :], stored[1].int()[..., None, :]
        return apart(self.sae.decode(z, idx)[..., 0, :], self.shape)

# ------------------------------------------------------------------ other splits
class Splits:
    """What train_sae.py trains for a layer: for each split but the dual one, an SAE of keys and one
    of values, named by kind and budget."""

    def make_saes(self, shape, args, generator):
        saes = {}
        for budget in other_splits(args.k_key, args.k_val).values():
            for kind, k in zip(sta.KINDS, budget):
                saes[f"{kind}{k}"] = sta.TopKSAE(*shape, args.n_latents, k, generator)
        self.names = list(saes)
        return saes

    def vectors(self, keys, values):
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

class L1(train_sae.KeysAndValues):
    """What train_sae.py trains for a layer: L1SAEs of keys and of values."""

    def make_saes(self, shape, args, generator):
        return {"key": L1SAE(*shape, args.n_latents, args.k_key, generator),
                "value": L1SAE(*shape, args.n_latents, args.k_val, generator)}

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
VARIANTS = {"layer": PerLayer(), "splits": Splits(), "l1": L1()}

def beside(folder, what):
    """Where a variant's SAEs of a model lie, given saes/<model>, the folder of its other SAEs."""
    return folder.parent / what / folder.name

def searched(settings):
    """The settings of SAEs, and those of the search."""
    return {**settings, "rounds": ROUNDS}

def settings_of(before):
    """Those with which the SAEs of the rows before were trained."""
    return next((row.settings for row in before if row.settings), None)

def layer_rows(model, folder, layers, args):
    shape = sta.kv_shape(model.get_decoder().config)
    saes, metadata = load_saes(folder, model, layers, ["layer"])
    codecs = {layer: LayerBudget(sae, sae.k, shape) for (layer, _), sae in saes.items()}
    return [evaluate.Row(f"layer SAE {saes[layers[0], 'layer'].k}", codecs, method="layer SAE",
                         once_bytes=evaluate.dictionary_bytes(saes, "layer"),
                         settings=metadata["settings"])]

def split_rows(model, folder, layers, args):
    """Uniform and reverse, by SAEs trained for them, by one pass and searched."""
    new_rows = []
    for name, budget in other_splits(args.k_key, args.k_val).items():
        kinds = {f"{kind}{k}": kind for kind, k in zip(sta.KINDS, budget)}
        loaded, metadata = load_saes(folder, model, layers, list(kinds))
        saes = {(layer, kinds[sae_name]): sae for (layer, sae_name), sae in loaded.items()}
        codecs, settings = evaluate.dual_codecs(saes, *budget), metadata["settings"]
        once_bytes = evaluate.dictionary_bytes(saes, *sta.KINDS)
        for ending, some in (("", codecs), (SEARCHED, search(codecs))):
            new_rows.append(evaluate.Row(
                f"{name}, trained for it{ending}", some, budget, once_bytes, with_tasks=False,
                settings=searched(settings) if ending else settings))
    return new_rows

def l1_rows(model, folder, layers, args):
    saes, metadata = load_saes(folder, model, layers)
    codecs = {layer: ReluCode(saes[layer, "key"], saes[layer, "value"]) for layer in layers}
    return [evaluate.Row("l1", codecs, settings=metadata["settings"],
                         once_bytes=evaluate.dictionary_bytes(saes, *sta.KINDS))]

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row], of search and of the variants that were trained."""
    folder, new_rows = fitted_folder(args.saes, args.model), []
    layers = coded_layers(model, saes, args)
    if saes:
        codecs = search(evaluate.dual_codecs(saes, args.k_key, args.k_val))
        new_rows.append(evaluate.Row(
            "searched", codecs, (args.k_key, args.k_val), settings=searched(settings_of(before)),
            once_bytes=evaluate.dictionary_bytes(saes, *sta.KINDS)))
    uniform_key = evaluate.splits(args.k_key, args.k_val)["uniform"][0]
    for what, sae_name, rows_of in (("layer", "layer", layer_rows),
                                    ("splits", f"key{uniform_key}", split_rows),
                                    ("l1", "key", l1_rows)):
        trained = beside(folder, what)
        if (trained / f"layer{layers[0]}.{sae_name}").exists():
            new_rows += rows_of(model, trained, layers, args)
    if not new_rows:
        raise sta.UsageError("--rows variants: needs SAEs; first run: python train_sae.py")
    return new_rows

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of train_sae.py: see python train_sae.py -h")
    parser.add_argument("--what", choices=VARIANTS, default="layer", help="(default layer)")
    parser.add_argument("--out", type=pathlib.Path, default="saes", help="(default saes)")
    args, rest = parser.parse_known_args(argv)
    train_sae.main([*rest, "--out", str(args.out / args.what)], VARIANTS[args.what], __doc__)

if __name__ == "__main__":
    run_main(main)
