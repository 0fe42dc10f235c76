"""What the commands of beyond/ share: their options, and how a run on fitted SAEs is opened.

Who may import whom is listed in README.md, and held by a test.
"""
import argparse
import contextlib
import functools
import pathlib

import sta
from support.files import sha256
from support.results import load_run
from support.text import read_text, text_name, token_windows

OPTIONS = {  # arguments of add_argument, and `least`, below which a number is refused
    "model": dict(help="short name, hub id or folder (default: that of the newest SAEs)"),
    "saes": dict(type=pathlib.Path, default=pathlib.Path("saes"), help="(default saes)"),
    "layer": dict(help="12, 0-7 or 3,9 (default all, or all that have SAEs)"),
    "text": dict(help="UTF-8 file or hub data set (default: tiny's own, else WikiText)"),
    "seq_len": dict(type=int, help="tokens per window (default: the model's limit, at most 512 to "
                                   "fit, 2048 to measure)"),
    "max_tokens": dict(type=int, default=131_072, least=2,
                       help="tokens of the text, at most (default 131,072)"),
    "k_key": dict(type=int, default=8, least=1, help="atoms per key (default 8)"),
    "k_val": dict(type=int, default=16, least=1, help="atoms per value (default 16)"),
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
    lacks, or has with other values. Raises UsageError at a number below the `least` of its
    option."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    least_values = {}
    for name in (*names.replace("-", "_").split(), *more):
        entry = OPTIONS.get(name, {}) | more.get(name, {})
        least_values[name] = entry.pop("least", None)
        parser.add_argument(f"--{name.replace('_', '-')}", **entry)
    args = parser.parse_args(argv)
    for name, least in least_values.items():
        value = getattr(args, name)
        if None not in (value, least) and value < least:
            raise sta.UsageError(f"--{name.replace('_', '-')} {value}: want {least} or more")
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

@contextlib.contextmanager
def capture_queries(model, layers):
    """`with capture_queries(model, layers) as queries: model(ids)` sets queries[layer] to the
    queries of the call before RoPE, (B, T, query heads, D). Llama, Mistral, Qwen2 and Qwen3 have
    modules of these names; a layer of another type is left out."""
    queries, D = {}, sta.kv_shape(model.get_decoder().config)[1]

    def keep(layer, module, args, y):
        queries[layer] = y.detach().flatten(2).unflatten(2, (-1, D))

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            try:
                attention = model.get_decoder().layers[layer].self_attn
                last = getattr(attention, "q_norm", attention.q_proj)
            except AttributeError:
                continue
            hook = functools.partial(keep, layer)
            hooks.callback(last.register_forward_hook(hook).remove)
        yield queries
