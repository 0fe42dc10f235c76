"""What the commands of beyond/ share: the options, and how a run begins.

Who may import whom is listed in README.md, and held by a test.
"""
import argparse
import contextlib
import functools
import json
import pathlib
import types

import sta
from support.files import check_out, load_saes, model_marks, sha256
from support.models import load_model, pick_device, slug
from support.results import find_fitted, provenance, result_path
from support.text import read_text, text_name, token_windows

OPTIONS = {
    "model": dict(help="short name, hub id or folder (default: that of the newest SAEs)"),
    "saes": dict(type=pathlib.Path, default=pathlib.Path("saes"), help="(default saes)"),
    "layer": dict(help="12, 0-7 or 3,9 (default all, or all that have SAEs)"),
    "text": dict(help="UTF-8 file or hub data set (default: tiny's own, else WikiText)"),
    "tokens": dict(type=int, help="of the text (default 122,880; tiny: 20,480)"),
    "seq-len": dict(type=int, help="tokens per window (default: the model's limit, at most 512 to "
                                   "fit, 2048 to measure)"),
    "max-tokens": dict(type=int, default=131_072, help="of the text, at most (default 131,072)"),
    "k-key": dict(type=int, default=8, help="atoms per key (default 8)"),
    "k-val": dict(type=int, default=16, help="atoms per value (default 16)"),
    "sink": dict(type=int, default=1, help="first tokens kept exact (default 1)"),
    "seed": dict(type=int, default=0, help="(default 0)"),
    "device": dict(help="cpu or cuda (default: cuda if any)"),
    "dtype": dict(choices=["float32", "bfloat16", "float16"], help="of the model (default: float32 "
                                                                   "on cpu, bfloat16 on cuda)"),
    "out": dict(type=pathlib.Path, default=pathlib.Path("results"), help="(default results)")}
FIT = "model layer text tokens seq-len seed device dtype out"
FIT_OPTIONS = OPTIONS | {
    "model": dict(default="tiny", help="short name, hub id or folder (default tiny)"),
    "out": OPTIONS["saes"]}
LOOK = "model saes layer text seq-len max-tokens k-key k-val device dtype out"
MINIMUM = {"tokens": 2, "max_tokens": 2, "k_key": 1, "k_val": 1, "sink": 0, "seed": 0, "recent": 0,
         "new_tokens": 1, "limit": 1, "n_latents": 1, "batch": 1}

def parse_args(doc, argv, names, **more):
    """Parse the shared options listed in `names`, and more: {name: arguments of add_argument}.
    Raises UsageError at a number that is too small."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names.split():
        parser.add_argument(f"--{name}", **(FIT_OPTIONS if names == FIT else OPTIONS)[name])
    for name, options in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    args = parser.parse_args(argv)
    for name, least in MINIMUM.items():
        if getattr(args, name, None) is not None and getattr(args, name) < least:
            raise sta.UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: want {least} "
                                 "or more")
    return args

def begin_fit(args, name):
    """-> (model, tokenizer, layers, windows (n, T) of the text, the folder saes/<model>/<name>, the
    settings that are stored beside the fitted files)."""
    check_out(args.out)
    args.tokens = args.tokens or (20_480 if args.model == "tiny" else 122_880)
    model, tokenizer, layers = load_model(
        args.model, *pick_device(args.device, args.dtype), args.layer or "all")
    pieces = read_text(args.text, "train", args.model)
    windows = token_windows(pieces, tokenizer, model, args.seq_len, 512, args.tokens, least=2)
    marks = json.dumps(model_marks(model, range(model.get_decoder().config.num_hidden_layers)))
    settings = {"model_sha256": sha256(marks.encode()),
                "text": text_name(args.text, "train", args.model),
                "text_sha256": sha256(windows), "tokens": windows.numel(),
                "seq_len": windows.shape[1], "seed": args.seed}
    return model, tokenizer, layers, windows, args.out / slug(args.model) / name, settings

def begin_look(args, ending):
    """-> a namespace: model, tokenizer, name, folder of the SAEs, saes {(layer, kind): SAE},
    layers, windows (n, T) of the text, about (provenance), path of the result."""
    folder, has_saes, name = find_fitted(args.saes, args.model)
    if not has_saes:
        raise sta.UsageError(f"{args.saes}: no SAEs; first run: python train_sae.py")
    check_out(args.out)
    model, tokenizer, layers = load_model(
        name, *pick_device(args.device, args.dtype), args.layer or "all")
    about = provenance(model)
    path = result_path(args.out, name, about, ending)
    saes, trained = load_saes(folder, model, layers if args.layer else None)
    for option, kind in (("k_key", "key"), ("k_val", "value")):
        most = min(sae.n_latents for (_, which), sae in saes.items() if which == kind)
        if getattr(args, option) > most:
            raise sta.UsageError(f"--{option.replace('_', '-')} {getattr(args, option)}: want 1 to "
                                 f"n_latents = {most}")
    pieces = read_text(args.text, "valid", name)
    windows = token_windows(pieces, tokenizer, model, args.seq_len, 2048, args.max_tokens)
    about |= {"model": name, "text": text_name(args.text, "valid", name),
              "tokens": windows.numel(),
              "text_sha256": sha256(windows), "seq_len": windows.shape[1],
              "settings": trained.get("settings")}
    return types.SimpleNamespace(
        model=model, tokenizer=tokenizer, name=name, folder=folder, saes=saes, path=path,
        layers=sorted({layer for layer, _ in saes}), windows=windows, about=about)

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
