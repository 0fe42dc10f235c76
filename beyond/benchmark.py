"""How long things take; and other libraries' Top-K SAEs on the same vectors.

    python -m beyond.benchmark                  # a minute on 2 cores; random weights and vectors
    python -m beyond.benchmark peers --model path/to/folder --layer 3,12,25 --text train.txt

times      Medians; the actions that are compared alternate, and the first three rounds are
           discarded. step: forward, backward, Adam, unit atoms, as train_sae.py makes it. codes:
           encode and decode, as sta.py defines them and through sta.fuse. The cache of codes is
           timed by python -m beyond.cache --contexts.
peers      Ours, EleutherAI's sparsify, dictionary_learning and SAELens train on the same vectors in
           the same order, heads centred, for keys and values: at one budget k, with 1,024 latents,
           in float32, by Adam, with our warm-up and decay. Each has the best of LEARNING_RATES by
           the error on vectors of other windows, and is then trained with three seeds. Beside them:
           ours as train_sae.py trains it, for budgets k and 2k. And the time of a step, in turn.
           The peers want an environment of their own, in which one that is missing is skipped:
           pip install eai-sparsify==1.3.3 sae-lens==6.54.0 matplotlib && pip install --no-deps
           dictionary-learning==0.1.0
Writes results/benchmark.json, or <model>-peers.json. Non-goal: tuning more than the rate.
"""
import functools
import json
import platform
import statistics
import sys
import time

import torch

import sta
import train_sae
from beyond import OPTIONS, parse_args
from support.files import check_out, run_main, sha256, write_atomic
from support.models import load_model, pick_device, slug
from support.results import provenance
from support.text import read_text, text_name, token_windows

SHAPES = {"tiny": (128, 512, 16, 1024), "SmolLM2": (64, 1024, 16, 1024),
          "Yi-6B": (128, 1024, 16, 2048), "large": (512, 4096, 32, 2048)}  # D, M, k, rows

N_ROUNDS = 20  # counted

def timed(actions, device):
    """{name: median ms} of callables, run in turn."""
    ms = {name: [] for name in actions}
    for i in range(N_ROUNDS + 3):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 3:
                ms[name].append(1000 * (time.perf_counter() - began))
    return {name: sorted(times)[N_ROUNDS // 2] for name, times in ms.items()}

def time_shape(shape, device):
    """One row of the benchmark: a training step and codes at (D, M, k, rows) on random rows."""
    D, M, k, n_rows = shape
    generator = torch.Generator().manual_seed(0)
    sae = sta.FastSAE(1, D, M, k, generator).to(device)
    x = torch.randn(n_rows, 1, D, generator=generator).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step(): train_sae.train_step({"": sae}, optimizer, {"": x})

    codec = sta.DualBudget(sae, sae, sta.Budget(k, k))
    x_half = x[:n_rows // 2]  # keys, and values: (N, 1, D)
    codecs = {"eager": codec, "compiled": sta.fuse({"": codec})[""]}
    codes = {name: functools.partial(sta.roundtrip, codec, x_half, x_half, None)
             for name, codec in codecs.items()}
    with torch.no_grad():
        ms = timed({"matmul": lambda: torch.addmm(sae.b_enc, x[:, 0], sae.W_enc), **codes}, device)
    return {"D": D, "M": M, "k": k, "rows": n_rows, "matmul_ms": ms.pop("matmul"), "code_ms": ms,
            "step_ms": timed({"": step}, device)[""]}

# ------------------------------------------------------------------ peers
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
PEER_SHAPES = ((64, 1024, 16, 1024), (128, 1024, 16, 2048), (512, 4096, 32, 2048))  # D, M, k, rows

class KAlone(sta.FastSAE):
    """Ours, trained for one budget as the peers are."""

    def loss(self, x):
        z, idx = self.encode(x, self.k)
        self.note_fired(idx[z > 0], x[..., 0].numel())
        return ((x - self.decode(z, idx)) / self.scale).square().mean()

class Ours:
    """A trainer: step(x) for vectors x (N, D), and rebuild(x) -> x_hat, the latents that fired."""

    def __init__(self, D, M, k, lr, n_steps, seed, kind=KAlone):
        self.sae = kind(1, D, M, k, torch.Generator().manual_seed(seed))
        self.optimizer, self.plan = adam(self.sae, lr, n_steps)

    def step(self, x):
        train_sae.train_step({"": self.sae}, self.optimizer, {"": x[:, None]})
        self.plan.step()

    def rebuild(self, x):
        z, idx = self.sae.encode(x[:, None], self.sae.k)
        return self.sae.decode(z, idx)[:, 0], idx[z > 0]

class Sparsify:
    def __init__(self, D, M, k, lr, n_steps, seed):
        import sparsify
        torch.manual_seed(seed)
        self.sae = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=M, k=k))
        self.optimizer, self.plan = adam(self.sae, lr, n_steps)

    def step(self, x):  # as in its trainer
        self.sae(x).fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.set_decoder_norm_to_unit_norm()
        self.plan.step()

    def rebuild(self, x):
        output = self.sae(x)
        return output.sae_out, output.latent_indices[output.latent_acts > 0]

class DictionaryLearning:
    def __init__(self, D, M, k, lr, n_steps, seed):
        from dictionary_learning.trainers.top_k import TopKTrainer
        self.trainer = TopKTrainer(
            n_steps, D, M, k, layer=0, lm_name="", lr=lr, warmup_steps=max(1, n_steps // 20),
            decay_start=max(2, round(0.7 * n_steps)), device="cpu", seed=seed)
        self.n_made = 0

    def step(self, x):
        self.trainer.update(self.n_made, x)
        self.n_made += 1

    def rebuild(self, x):
        x_hat, acts = self.trainer.ae(x, output_features=True)
        return x_hat, acts.nonzero()[:, 1]

class SAELens:
    def __init__(self, D, M, k, lr, n_steps, seed):
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        torch.manual_seed(seed)
        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=M, k=k))
        self.optimizer, self.plan = adam(self.sae, lr, n_steps, betas=(0.9, 0.999))  # its own
        self.silent = torch.zeros(M)

    def step(self, x):  # as in its trainer
        from sae_lens.saes.sae import TrainStepInput
        output = self.sae.training_forward_pass(TrainStepInput(x, {}, self.silent > 1000, 0, False))
        self.silent = torch.where((output.feature_acts > 0).any(0), 0, self.silent + 1)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.plan.step()

    def rebuild(self, x):
        acts = self.sae.encode(x)
        return self.sae.decode(acts), acts.nonzero()[:, 1]

TRAINERS = {"ours": Ours, "sparsify": Sparsify, "dictionary_learning": DictionaryLearning,
            "SAELens": SAELens, "ours, k and 2k": functools.partial(Ours, kind=sta.FastSAE)}

def adam(sae, lr, n_steps, betas=train_sae.BETAS):
    """(Adam for an SAE, its plan of our warm-up and decay)."""
    optimizer = torch.optim.Adam(sae.parameters(), lr, betas=betas, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: train_sae.learning_rate(1, min(step, n_steps - 1), n_steps))

def installed_trainers():
    """Those of TRAINERS that can be had here; a line for each that cannot."""
    there = {}
    for name, make in TRAINERS.items():
        try:
            make(4, 8, 2, 1e-3, 100, 0).step(torch.randn(16, 4))
            there[name] = make
        except ImportError as error:
            print(f"{name}: skipped ({error})")
    return there

@torch.no_grad()
def measure(trainer, x, n_latents):
    """(FVU of vectors x (N, D) of mean 0; the share of latents that none of them fires)."""
    error, alive = 0, torch.zeros(n_latents, dtype=torch.bool)
    for rows in x.split(8192):
        x_hat, fired = trainer.rebuild(rows)
        error += (rows - x_hat).square().sum()
        alive[fired] = True
    return (error / x.square().sum()).item(), 1 - alive.float().mean().item()

def fit(make, x, lr, seed, args, k):
    """(A trainer after one pass over vectors x (N, D); ms per step)."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(args.batch)
    trainer, began = make(x.shape[1], args.n_latents, k, lr, len(order), seed), time.time()
    for batch in order:
        trainer.step(x[batch])
    return trainer, 1000 * (time.time() - began) / len(order)

def compare_peers(trainers, args):
    """-> ({site: {trainer: {lr, by_rate, fvu and dead of each seed, ms}}} for keys and values of
    some layers; about the text). Of 15 parts of it, one is held out and one chooses the rate."""
    model, tokenizer, layers = load_model(args.model, "cpu", getattr(torch, args.dtype),
                                              args.layer or "all")
    windows = token_windows(read_text(args.text, "train", args.model), tokenizer, model,
                                args.seq_len, 512, args.tokens, least=30)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    n, sites = len(windows) // 15, {}
    for (layer, kind), x in sta.harvest(model, windows, layers).items():
        x = x.float()  # (tokens, H, D)
        x = x - x.mean(0)  # heads centred
        x = (x / x.square().mean().sqrt()).flatten(0, 1)  # (N, D)
        per_window = len(x) // len(windows)
        held, choose, x = x.split([n * per_window, n * per_window, len(x) - 2 * n * per_window])
        k, results = args.k_key if kind == "key" else args.k_val, {}
        for name, make in trainers.items():
            by_rate = {lr: measure(fit(make, x, lr, 9, args, k)[0], choose, args.n_latents)[0]
                       for lr in LEARNING_RATES}
            lr = min(by_rate, key=by_rate.get)
            runs = [fit(make, x, lr, seed, args, k) for seed in range(3)]
            fvu, _ = zip(*(measure(trainer, held, args.n_latents) for trainer, _ in runs))
            _, dead = zip(*(measure(trainer, x, args.n_latents) for trainer, _ in runs))
            ms = statistics.median(ms for _, ms in runs)
            results[name] = {"lr": lr, "by_rate": by_rate, "fvu": fvu, "dead": dead, "ms": ms}
            print(f"layer {layer:2} {kind:5} {name:19} lr {lr:.0e}  FVU {statistics.mean(fvu):.4f} "
                  f"±{statistics.stdev(fvu):.4f}  dead {statistics.mean(dead):6.2%}  {ms:5.1f} ms  "
                  f"{args.batch / ms / 1000:.2f}M vectors/s", flush=True)
        sites[f"layer {layer} {kind}"] = results
    return sites, {"tokens": windows.numel(), "text_sha256": sha256(windows),
                   "seq_len": windows.shape[1], **provenance(model)}

def time_peers(trainers):
    """{shape: {trainer: median ms of a step}}, in turn, on random vectors."""
    steps = {}
    for D, M, k, n_rows in PEER_SHAPES:
        x, actions = torch.randn(n_rows, D), {}
        for name, make in trainers.items():
            actions[name] = functools.partial(make(D, M, k, 1e-3, 1000, 0).step, x)
        shape = f"D {D}, M {M}, k {k}, {n_rows} vectors"
        steps[shape] = timed(actions, x.device)
        print(f"step at {shape}, ms: " + ", ".join(
            f"{name} {ms:.1f}" for name, ms in steps[shape].items()), flush=True)
    return steps

def peers_main(argv):
    args = parse_args(
        __doc__, argv, "layer text seq-len k-key k-val out",
        model=dict(default="tiny", help=OPTIONS["model"]["help"]),
        dtype=dict(default="float32", choices=["float32", "bfloat16"], help="of the model"),
        tokens=dict(type=int, default=132_000, help="of the text (default 132,000)"),
        n_latents=dict(type=int, default=1024, help="(default 1024)"),
        batch=dict(type=int, default=1024, help="vectors per step (default 1024)"))
    check_out(args.out)
    trainers = installed_trainers()
    times, (sites, about) = time_peers(trainers), compare_peers(trainers, args)
    settings = {name: getattr(args, name) for name in ("k_key", "k_val", "n_latents", "batch")}
    path = args.out / f"{slug(args.model)}-peers.json"
    write_atomic(path, json.dumps({
        "model": args.model, "text": text_name(args.text, "train", args.model),
        "dtype": args.dtype, "settings": settings, **about,
        "peers": {"sites": sites, "times": times}}) + "\n")
    print(f"wrote {path}")

# ------------------------------------------------------------------ the runs
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["peers"]:
        return peers_main(argv[1:])
    args = parse_args(__doc__, argv, "device out")
    check_out(args.out)
    device, shapes = torch.device(pick_device(args.device)[0]), {}
    print("ms, medians      D    M  k  rows  matmul    step  code: eager  compiled  million rows/s")
    for name, shape in SHAPES.items():
        row = shapes[name] = time_shape(shape, device)
        print(f"{name:12}{shape[0]:6}{shape[1]:5}{shape[2]:3}{shape[3]:6}{row['matmul_ms']:8.1f}"
              f"{row['step_ms']:8.1f}{row['code_ms']['eager']:13.1f}"
              f"{row['code_ms']['compiled']:10.1f}"
              f"{shape[3] / row['step_ms'] / 1000:16.2f}")
    result = {"device": f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)",
              "torch": torch.__version__, "command": "python -m beyond.benchmark",
              "date": time.ctime(), "shapes": shapes}
    write_atomic(args.out / "benchmark.json", json.dumps(result) + "\n")
    print(f"wrote {args.out / 'benchmark.json'}")

if __name__ == "__main__":
    run_main(main)
