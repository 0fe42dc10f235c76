"""One SAE for a layer: the paper's atoms, but of the keys and values of all heads at once.

    python -m beyond.layer_sae                   # tiny: saes/tiny/layer_sae/, a folder a layer
    python -m beyond.layer_sae --model DIR --text T --tokens 600000 --n-latents 4096
    python evaluate.py --rows layer_sae          # at the dual budget's bytes, a half, a quarter

The paper's SAEs see one head's key or value at a time. But all of a layer's are linear images of
one hidden state: what they have in common is then written again for each. Here a token's keys and
values, side by side, are one vector x of P = 2 H D numbers, each kind in units of its spread, and
an SAE keeps k = H (k_key + k_val) of its latents: the bytes of the dual budget, shared out between
keys and values as each token needs. The rest of the recipe is train_sae.py's; a step has 1 / H of
the rows, so that there are as many steps. All rows are in memory: 4 H D bytes a token and layer.
Verdict (SmolLM2, 300,000 tokens): 1.106 of dense perplexity where the dual budget has 1.435, on
other prose 1.538 and 2.309; at half the bytes 1.337, not competitive with additive codes (1.003).
Non-goals: pursuit (72 searches among 4,096 atoms a token), resuming within a layer.
"""
import argparse
import hashlib
import pathlib

import torch
from tqdm import tqdm

import evaluate
import sta
import train_sae

BATCH = 1024  # heads a step, as in train_sae.py

# ------------------------------------------------------------------ the codec
def side_by_side(keys, values):
    """Keys and values (..., H, D) -> x (..., P), float32."""
    return torch.cat([keys.flatten(-2), values.flatten(-2)], -1).float()

def spread_of(x):
    """Rows x (N, P) -> (P,): the root mean square of all keys' numbers, and of all values'."""
    variance = (x - x.mean(0)).square().mean(0)  # (P,)
    return torch.cat([part.mean().sqrt().expand_as(part) for part in variance.chunk(2)])

@torch.no_grad()
def for_rows(sae, spread):
    """The SAE of rows x / spread becomes that of rows x; its atoms are no longer of length 1."""
    sae.W_enc /= spread[:, None]
    sae.W_dec *= spread
    sae.b_dec *= spread
    return sae.requires_grad_(False)

class LayerBudget:
    """A codec of one layer: k atoms of one SAE for the keys and values of all heads."""

    def __init__(self, sae, k, shape):
        """shape: (n_kv_heads, head_dim)."""
        self.sae, self.k, self.shape = sae, k, shape

    def encode(self, keys, values):
        """-> coefficients fp16 and indices int16, (..., k) each."""
        z, idx = self.sae.encode(side_by_side(keys, values), self.k)
        return z.half(), idx.short()

    def decode(self, stored):
        x = self.sae.decode(stored[0].float(), stored[1].int())  # (..., P)
        return x.unflatten(-1, (2, *self.shape)).unbind(-3)

# ------------------------------------------------------------------ training
def train(x, k, args, n_heads):
    """Rows x (N, P) of one layer -> (a TopKSAE of k atoms, its fvu on the last tenth of x, at most
    8,192 rows, which it is not trained on)."""
    generator = torch.Generator().manual_seed(args.seed)
    n_held, spread = min(8192, len(x) // 10), spread_of(x[:32_768])
    held, x = x[-n_held:], x[:-n_held]
    sae = sta.TopKSAE(x.shape[1], args.n_latents, k, generator).to(x.device)
    sae.centre(x[:32_768] / spread)
    optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    batches = torch.randperm(len(x), generator=generator).split(max(1, BATCH // n_heads))
    for step, batch in enumerate(tqdm(batches, desc="steps", leave=False, disable=None)):
        factor = train_sae.BUDGET_CYCLE[step % len(train_sae.BUDGET_CYCLE)]
        sae.loss(x[batch] / spread, min(max(1, round(factor * k)), args.n_latents)).backward()
        optimizer.param_groups[0]["lr"] = train_sae.learning_rate(args.lr, step, len(batches))
        train_sae.update({"": sae}, optimizer, len(batch))
    sae = for_rows(sae, spread)
    return sae, sta.fidelity(held / spread, sae.decode(*sae.encode(held, k)) / spread)["fvu"]

def read(folder, model, layer):
    """(TopKSAE, settings) of the folder's layer<i>."""
    folder = folder / f"layer{layer}"
    sae, metadata = sta.load_sae(folder)
    if not sta.same_marks(metadata.get("marks", {}), sta.model_marks(model, [layer])):
        raise sta.UsageError(f"{folder}: of another model; choose another --saes or --out")
    return sae, metadata["settings"]

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row], at the SAEs' k, a half and a quarter of it."""
    config, layers = model.get_decoder().config, evaluate.coded_layers(model, saes, args)
    folder = evaluate.find_fitted(args.saes, args.model)[0] / "layer_sae"
    trained = {layer: read(folder, model, layer)[0].to(model.device) for layer in layers}
    once, found = sum(p.nbytes for sae in trained.values() for p in sae.parameters()), []
    for part in (1, 2, 4):
        codecs = {layer: LayerBudget(sae, sae.k // part, sta.kv_shape(config))
                  for layer, sae in trained.items()}
        found.append(evaluate.Row(f"layer SAE {codecs[layers[0]].k}", codecs, once_bytes=once,
                                  method="layer SAE"))
    return found

# ------------------------------------------------------------------ the run
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="short name, hub id or folder (default tiny)")
    add("--layer", default="all", help="layers: all, 12, 0-7, 3,9 (default all)")
    add("--text", help="UTF-8 file or hub data set (default: tiny's own, else WikiText-103)")
    add("--tokens", type=int, default=200_000, help="of it (default 200,000)")
    add("--n-latents", type=int, default=1024, help="dictionary size (default 1024)")
    add("--k-key", type=int, default=8, help="atoms a key of the dual budget (default 8)")
    add("--k-val", type=int, default=16, help="atoms a value (default 16)")
    add("--lr", type=float, default=0.004, help="Adam's peak rate (default 0.004)")
    add("--seed", type=int, default=0)
    add("--device", help="cpu or cuda (default: cuda if any)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the model")
    add("--out", type=pathlib.Path, default=pathlib.Path("saes"), help="(default saes)")
    args = parser.parse_args(argv)
    sta.check_out(args.out)
    model, tokenizer, layers = sta.load_model(
        args.model, *sta.pick_device(args.device, args.dtype), args.layer, no_deeper=True)
    n_heads = sta.kv_shape(model.get_decoder().config)[0]
    k = n_heads * (args.k_key + args.k_val)
    if not k <= args.n_latents <= 1 << 15:
        raise sta.UsageError(f"--n-latents {args.n_latents}: want {k} = n_kv_heads (k_key + k_val) "
                             f"to {1 << 15:,}")
    pieces = sta.read_text(args.text, "train", args.model)
    windows = sta.token_windows(pieces, tokenizer, model, None, 512, args.tokens, least=2)
    settings = {"tokens": windows.numel(), "n_latents": args.n_latents, "k": k, "lr": args.lr,
                "seed": args.seed,
                "text_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:12]}
    folder = args.out / sta.slug(args.model) / "layer_sae"
    todo = [layer for layer in layers if not (folder / f"layer{layer}" / "cfg.json").exists()]
    for layer in set(layers) - set(todo):
        path = folder / f"layer{layer}"
        train_sae.expect_same(path, read(folder, model, layer)[1], settings)
    print(f"{args.model}: {len(todo)} of {len(layers)} layers to train, {windows.numel():,} tokens")
    kept = sta.harvest(model, windows, todo) if todo else {}
    for layer in todo:
        x = side_by_side(kept.pop((layer, "key")), kept.pop((layer, "value")))  # (N, P)
        sae, fvu = train(x, k, args, n_heads)
        print(f"layer {layer:3}: fvu {fvu:.4f}, dead {len(sae.dead()) / sae.n_latents:.1%}",
              flush=True)
        sta.save_sae(folder / f"layer{layer}", sae, {
            "model": args.model, "marks": sta.model_marks(model, [layer]), "layer": layer,
            "kind": "layer",
            "held_out": {"fvu": fvu}, "settings": settings})
    print(f"{folder} is complete; next: python evaluate.py --rows layer_sae --model {args.model}")

if __name__ == "__main__":
    sta.run(main)
