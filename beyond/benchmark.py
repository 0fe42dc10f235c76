"""Are other libraries' Top-K SAEs better than ours? Their errors and times on the same vectors.

    python -m beyond.benchmark --layer 2 --steps 500      # tiny
    python -m beyond.benchmark --model path/to/folder --layer 3,12,25 --text train.txt --resume

Ours, EleutherAI's sparsify, dictionary_learning and SAELens train on the same vectors in the same
order, heads centred, for keys and values: at one budget k, with 1,024 latents, in float32 on the
CPU. Each has its own loss, optimiser, schedule and revival of dead latents, as its defaults are;
only the rate is the best of four, by the error on vectors of other windows. Each is trained with
three seeds. Beside them stands ours as train_sae.py trains it, for budgets k and 2k. *Dead* is a
latent that fires for none of the vectors that it was trained on. The time of a step is a median;
the libraries take turns, and the first three rounds are discarded.
The peers need an environment of their own; one that is not installed is skipped:
    pip install eai-sparsify==1.3.3 sae-lens==6.54.0 nnsight matplotlib
    pip install --no-deps dictionary-learning==0.1.0
Writes results/<model>-peers.json. Non-goal: tuning more than the rate.
"""
import functools
import json
import math
import statistics
import time

import torch

import sta
import train_sae
from beyond import parse_args, pick, spread, table
from support.files import check_out, expect_same, explain, run_main, sha256, write_atomic
from support.models import load_model, slug
from support.results import provenance
from support.text import read_text, text_name, token_windows

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # left alone, theirs would be 0.02, 0.0008 and 0.0003
SHAPES = ((64, 1024, 16, 1024), (128, 1024, 16, 2048), (512, 4096, 32, 2048))  # D, M, k, vectors
N_ROUNDS = 20  # of timing, after three more that are discarded

# ------------------------------------------------------------------ the trainers
class KAlone(sta.TopKSAE):
    """Ours, trained for a single budget, as the peers are."""

    def loss(self, x):
        z, idx = self.encode(x, self.k)
        self.count_fired(idx[z > 0], x[..., 0].numel())
        return ((x - self.decode(z, idx)) / self.scale).square().mean()

class Ours:
    """A trainer has step(x) and rebuild(x) -> (x_hat, the latents that fire), for vectors x (N, D).
    D, M, k are those of sta.py; lr is the peak of the learning rate."""

    def __init__(self, D, M, k, lr, n_steps, seed, kind=KAlone):
        self.sae = kind(1, D, M, k, torch.Generator().manual_seed(seed))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr, train_sae.BETAS, fused=True)
        self.lr, self.n_steps, self.n_done = lr, n_steps, 0

    def step(self, x):
        lr = train_sae.learning_rate(self.lr, self.n_done, self.n_steps)
        self.optimizer.param_groups[0]["lr"] = lr
        train_sae.train_step({"": self.sae}, self.optimizer, {"": x[:, None]})
        self.n_done += 1

    def rebuild(self, x):
        z, idx = self.sae.encode(x[:, None], self.sae.k)
        return self.sae.decode(z, idx)[:, 0], idx[z > 0]

class Sparsify:
    def __init__(self, D, M, k, lr, n_steps, seed):
        import sparsify
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD
        torch.manual_seed(seed)
        self.sae = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=M, k=k))
        self.optimizer = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr), momentum=0.95)

    def step(self, x):  # as in its trainer
        self.optimizer.train()
        self.sae.set_decoder_norm_to_unit_norm()
        self.sae(x).fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rebuild(self, x):
        self.optimizer.eval()  # the average of its steps
        output = self.sae(x)
        return output.sae_out, output.latent_indices[output.latent_acts > 0]

class DictionaryLearning:
    def __init__(self, D, M, k, lr, n_steps, seed):
        from dictionary_learning.trainers.top_k import TopKTrainer
        self.trainer = TopKTrainer(n_steps, D, M, k, layer=0, lm_name="", lr=lr, device="cpu",
                                   warmup_steps=min(1000, n_steps // 5), seed=seed)
        self.n_done = 0

    def step(self, x):
        self.trainer.update(self.n_done, x)
        self.n_done += 1

    def rebuild(self, x):
        x_hat, z = self.trainer.ae(x, output_features=True)
        return x_hat, z.nonzero()[:, 1]

class SAELens:
    def __init__(self, D, M, k, lr, n_steps, seed):
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        torch.manual_seed(seed)
        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=M, k=k))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr)
        self.silent = torch.zeros(M)

    def step(self, x):  # as in its trainer
        from sae_lens.saes.sae import TrainStepInput
        output = self.sae.training_forward_pass(TrainStepInput(x, {}, self.silent > 1000, 0, False))
        self.silent = torch.where((output.feature_acts > 0).any(0), 0, self.silent + 1)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rebuild(self, x):
        z = self.sae.encode(x)
        return self.sae.decode(z), z.nonzero()[:, 1]

TRAINERS = {"ours": Ours, "sparsify": Sparsify, "dictionary_learning": DictionaryLearning,
            "SAELens": SAELens, "ours, k and 2k": functools.partial(Ours, kind=sta.TopKSAE)}

def installed_trainers():
    """Those of TRAINERS whose library is installed; prints a line for each that is skipped."""
    trainers = {}
    for name, make in TRAINERS.items():
        try:
            make(4, 8, 2, 1e-3, 100, 0).step(torch.randn(16, 4))
            trainers[name] = make
        except ImportError as error:
            print(f"{name}: skipped ({error})")
    return trainers

# ------------------------------------------------------------------ errors
@torch.no_grad()
def score(trainer, x, n_latents):
    """(The share of variance that is left of vectors x (N, D), whose mean is 0; the share of
    latents that fire for none of them)."""
    error, fires = 0, torch.zeros(n_latents, dtype=torch.bool)
    for batch in x.split(8192):
        x_hat, fired = trainer.rebuild(batch)
        error += (batch - x_hat).square().sum().item()
        fires[fired] = True
    return error / x.square().sum().item(), 1 - fires.float().mean().item()

def fit(make, x, k, lr, seed, args):
    """A trainer after --steps steps on vectors x (N, D), which are read again where they end."""
    generator, n_wanted = torch.Generator().manual_seed(seed), args.steps * args.batch
    n_passes = math.ceil(n_wanted / len(x))
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(n_passes)])
    trainer = make(x.shape[1], args.n_latents, k, lr, args.steps, seed)
    for batch in order[:n_wanted].split(args.batch):
        trainer.step(x[batch])
    return trainer

def compare_at(site, trainers, parts, k, args):
    """Vectors (N, D) of one site in three parts: held out, to choose the rate by, to train on
    -> {trainer: {lr, by_rate (the FVU at each rate), fvu and dead (of each seed)}}."""
    (held_out, choose, train), results = parts, {}
    for name, make in trainers.items():
        tried = {lr: fit(make, train, k, lr, 0, args) for lr in LEARNING_RATES}
        by_rate = {lr: score(trainer, choose, args.n_latents)[0] for lr, trainer in tried.items()}
        lr = min(by_rate, key=lambda lr: (math.isnan(by_rate[lr]), by_rate[lr]))  # nan comes last
        seeds = [tried[lr], *(fit(make, train, k, lr, seed, args) for seed in (1, 2))]
        fvu = [score(trainer, held_out, args.n_latents)[0] for trainer in seeds]
        dead = [score(trainer, train, args.n_latents)[1] for trainer in seeds]
        results[name] = {"lr": lr, "by_rate": by_rate, "fvu": fvu, "dead": dead}
        print(f"{site:14} {name:19} lr {lr:.1e}  FVU {statistics.mean(fvu):.4f} "
              f"±{statistics.stdev(fvu):.4f}  dead {statistics.mean(dead):.1%}", flush=True)
    return results

def compare(trainers, args, sites, save):
    """Add to sites {site: what `compare_at` returns} those of the keys and values of the layers
    that are missing, with save(about the run) after each. Of 15 parts of the text, one is held out
    and one chooses the rate."""
    model, tokenizer, layers = load_model(args.model, "cpu", getattr(torch, args.dtype),
                                          args.layer or "all")
    windows = token_windows(read_text(args.text, "train", args.model), tokenizer, model,
                            args.seq_len, 512, args.tokens, least=30)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    about = {"tokens": windows.numel(), "text_sha256": sha256(windows),
             "seq_len": windows.shape[1], **provenance(model)}
    for (layer, kind), x in sta.harvest(model, windows, layers).items():
        site, k = f"layer {layer} {kind}", args.k_key if kind == "key" else args.k_val
        if site in sites:
            continue
        x = x.float() - x.float().mean(0)  # (tokens, H, D), heads centred
        x = (x / x.square().mean().sqrt()).flatten(0, 1)  # (N, D)
        n = len(windows) // 15 * (len(x) // len(windows))
        sites[site] = compare_at(site, trainers, x.split([n, n, len(x) - 2 * n]), k, args)
        save(about)

# ------------------------------------------------------------------ times
def time_steps(trainers):
    """{shape: {trainer: median ms of a step}}, in turn, on random vectors."""
    medians = {}
    for D, M, k, n_vectors in SHAPES:
        x, ms = torch.randn(n_vectors, D), {name: [] for name in trainers}
        made = {name: make(D, M, k, 1e-3, 1000, 0) for name, make in trainers.items()}
        for _ in range(3 + N_ROUNDS):
            for name, trainer in made.items():
                began = time.perf_counter()
                trainer.step(x)
                ms[name].append(1000 * (time.perf_counter() - began))
        shape = f"D {D}, M {M}, k {k}, {n_vectors} vectors"
        medians[shape] = {name: statistics.median(times[3:]) for name, times in ms.items()}
        print(f"step at {shape}, ms: " + ", ".join(
            f"{name} {median:.1f}" for name, median in medians[shape].items()), flush=True)
    return medians

def table_of_peers(lines):
    """FVU of held-out vectors and dead latents by library and kind, means over layers, then ms per
    step by shape, as the first of the runs measured it."""
    runs, cells = pick(lines, kind="peers"), {}
    for run in runs:
        steps = run["settings"].get("steps", 334)  # the oldest run does not say
        by_kind = {}
        for site, by_name in run["peers"]["sites"].items():
            by_kind.setdefault(site.split()[-1], {})[site] = by_name
        for kind, sites in by_kind.items():
            layers = ", ".join(site.split()[1] for site in sites)
            label = f"FVU (dead), {kind}s, layer {layers}, {steps:,} steps"
            for name in next(iter(sites.values())):
                by_seed = zip(*(by_name[name]["fvu"] for by_name in sites.values()))
                dead = [x for by_name in sites.values() for x in by_name[name]["dead"]]
                cells[label, name] = "{} ({:.1f}%)".format(
                    spread([statistics.mean(fvus) for fvus in by_seed], 4),
                    100 * statistics.mean(dead))
    for shape, by_name in runs[0]["peers"]["times"].items() if runs else ():
        cells |= {(f"ms per step, {shape}", name): f"{ms:.1f}" for name, ms in by_name.items()}
    return table("", cells)

def main(argv=None):
    args = parse_args(
        __doc__, argv, "layer text seq-len out",
        model=dict(default="tiny", help="short name, hub id or folder (default tiny)"),
        dtype=dict(default="float32", choices=["float32", "bfloat16"], help="of the model"),
        tokens=dict(type=int, default=132_000, least=2, help="of the text (default 132,000)"),
        n_latents=dict(type=int, default=1024, least=1, most=1 << 15, help="(default 1024)"),
        k_key=dict(default=8, help="atoms per key (default 8)"),
        k_val=dict(default=16, help="atoms per value (default 16)"),
        batch=dict(type=int, default=1024, least=1, help="vectors per step (default 1024)"),
        steps=dict(type=int, default=5000, least=2, help="of training (default 5,000)"),
        resume=dict(action="store_true", help="keep the layers that are in --out already"))
    check_out(args.out)
    settings = {name: getattr(args, name) for name in ("k_key", "k_val", "n_latents", "batch",
                                                       "steps")}
    path, sites = args.out / f"{slug(args.model)}-peers.json", {}
    if args.resume and path.exists():
        with explain(f"{path}: corrupt; delete it"):
            result = json.loads(path.read_text(encoding="utf-8"))
        expect_same(path, result["settings"], settings)
        sites = result["peers"]["sites"]
    trainers = installed_trainers()
    times = time_steps(trainers)

    def save(about):
        write_atomic(path, json.dumps({
            "model": args.model, "text": text_name(args.text, "train", args.model),
            "dtype": args.dtype, "settings": settings, **about,
            "peers": {"sites": sites, "times": times}}) + "\n")

    compare(trainers, args, sites, save)
    print(f"wrote {path}")

if __name__ == "__main__":
    run_main(main)
