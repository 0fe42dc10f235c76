"""What the commands of beyond/ share: their options, how a run on fitted SAEs is opened, and how
a table of a README is made.

Who may import whom is held by a test (IMPORTS in test_beyond.py).
"""
import argparse
import contextlib
import functools
import pathlib
import statistics

import sta
from support.files import sha256
from support.models import parse_layers, slug
from support.results import find_saes, load_run
from support.text import read_text, text_name, token_windows

OPTIONS = {  # arguments of add_argument, and `least` and `most`: numbers beyond them are refused
    "model": dict(help="short name, hub id or folder (default: that of the newest SAEs)"),
    "saes": dict(type=pathlib.Path, default=pathlib.Path("saes"), help="(default saes)"),
    "layer": dict(help="12, 0-7 or 3,9 (default all, or all that have SAEs)"),
    "text": dict(help="UTF-8 file or hub data set (default: tiny's own, else WikiText)"),
    "seq_len": dict(type=int, help="tokens per window (default: the model's limit, at most 512 to "
                                   "fit, 2048 to measure)"),
    "max_tokens": dict(type=int, default=131_072, least=2,
                       help="tokens of the text, at most (default 131,072)"),
    "k_key": dict(type=int, least=1, help="atoms per key (default: what SAEs were trained for)"),
    "k_val": dict(type=int, least=1, help="atoms per value (default: the same)"),
    "sink": dict(type=int, default=1, least=0, help="first tokens kept exact (default 1)"),
    "limit": dict(type=int, least=1, help="rows per task (default all)"),
    "seed": dict(type=int, default=0, least=0, help="(default 0)"),
    "device": dict(help="cpu or cuda (default: cuda if any)"),
    "dtype": dict(choices=["float32", "bfloat16", "float16"],
                  help="of the model (default: float32 on cpu, bfloat16 on cuda)"),
    "out": dict(type=pathlib.Path, default=pathlib.Path("results"), help="(default results)")}
LOOK = "model saes layer text seq-len max-tokens k-key k-val device dtype out"  # of begin_look

def parse_args(doc, argv, names, **more):
    """Parse the options of the table that `names` lists, and more: {name: entry}, which the table
    lacks, or has with other values. Raises UsageError at a number below the `least` of its option
    or above its `most`, 2^40 if it has none."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    limits = {}
    for name in (*names.replace("-", "_").split(), *more):
        entry = OPTIONS.get(name, {}) | more.get(name, {})
        limits[name] = entry.pop("least", None), entry.pop("most", 1 << 40)
        parser.add_argument(f"--{name.replace('_', '-')}", **entry)
    args = parser.parse_args(argv)
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if None not in (value, least) and not least <= value <= most:
            raise sta.UsageError(f"--{name.replace('_', '-')} {value}: want {least} or more, up to "
                                 f"{most:,}")
    return args

def begin_look(args, ending):
    """What `load_run` returns, and in it: windows (n, T) of the text, about (what the result says
    of the run). Raises UsageError at more atoms than an SAE has."""
    run = load_run(args, ending)
    for (_, kind), sae in run.saes.items():
        option, k = ("--k-key", args.k_key) if kind == "key" else ("--k-val", args.k_val)
        if k > sae.n_latents:
            raise sta.UsageError(f"{option} {k}: want 1 to n_latents = {sae.n_latents}")
    run.windows = token_windows(read_text(args.text, "valid", run.name), run.tokenizer, run.model,
                                args.seq_len, 2048, args.max_tokens)
    run.about |= {
        "model": run.name, "text": text_name(args.text, "valid", run.name),
        "text_sha256": sha256(run.windows), "tokens": run.windows.numel(),
        "seq_len": run.windows.shape[1], "settings": run.settings}
    return run

def fitted_folder(root, model_name):
    """The folder of all that is fitted to a model: that of its SAEs, or, where it has none, root if
    it holds something else that was fitted, or saes/<model>."""
    folder, _ = find_saes(root, model_name)
    return folder or (root if any(root.glob("*/layer*.safetensors")) else root / slug(model_name))

def coded_layers(model, saes, args):
    """The layers that rows of beyond/ code: those of the SAEs, else those of --layer."""
    n_layers = model.get_decoder().config.num_hidden_layers
    return sorted({layer for layer, _ in saes}) or parse_layers(args.layer or "all", n_layers)

@contextlib.contextmanager
def capture_queries(model, layers):
    """`with capture_queries(model, layers) as queries: model(ids)` sets queries[layer] to the
    queries of the call before RoPE, (B, T, query heads, D). Raises UsageError at a type of model
    whose queries are not found."""
    queries, config = {}, model.get_decoder().config
    sites = sta.kv_sites(model, ("query", *sta.KINDS))

    def keep(layer, name, module, args, y):
        queries[layer] = sta.per_head(config, name, "query", args[0], y).detach().clone()

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            name, module = list(sites[layer, "query"].items())[-1]
            hook = functools.partial(keep, layer, name)
            hooks.callback(module.register_forward_hook(hook).remove)
        yield queries

# ------------------------------------------------------------------ tables
def pick(lines, **wanted):
    """The lines whose columns have the values wanted."""
    return [line for line in lines if all(line.get(name) == x for name, x in wanted.items())]

def spread(values, digits=3):
    """Numbers of several seeds -> "mean ± standard deviation", if that is seen to vary; of none,
    ""."""
    if not values:
        return ""
    mean, error = f"{statistics.mean(values):.{digits}f}", ""
    if len(values) > 1 and round(statistics.stdev(values), digits) > 0:
        error = f" ± {statistics.stdev(values):.{digits}f}"
    return mean + error

def table(corner, cells):
    """{(row, column): text} -> Markdown; rows and columns stand in the order of the cells."""
    rows, columns = (list(dict.fromkeys(labels)) for labels in zip(*cells)) if cells else ([], [])
    lines = [[corner, *columns]]
    lines += [[row, *(cells.get((row, column), "") for column in columns)] for row in rows]
    heading, *others = ("| " + " | ".join(line) + " |" for line in lines)
    return [heading, "|---" * len(lines[0]) + "|", *others]
