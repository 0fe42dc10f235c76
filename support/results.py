"""Which SAEs and which result file; where each row came from.

evaluate.py and the commands of beyond/ begin with `load_run`, and write one JSON per model.
"""
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
import types

import torch

from sta import UsageError
from support.files import (ROOT, check_out, explain, load_sae, load_saes, model_hash, sha256,
                           write_atomic)
from support.models import load_model, pick_device, slug

def check_pattern(only):
    with explain(f"--only {only}: no regular expression"):
        re.compile(only)

# ------------------------------------------------------------------ which SAEs
def find_saes(root, model_name):
    """--saes, --model -> (the folder of the newest SAEs of that model, or of any: root, or one
    below it, or None; the model's name, if none is given that of the SAEs)."""
    folders = [root, root / slug(model_name)] if model_name else [root, *root.glob("*")]
    paths = [path for folder in folders for path in folder.glob("layer*.key/cfg.json")]
    if not paths:
        return None, model_name
    newest = max(paths, key=lambda path: path.stat().st_mtime).parent
    return newest.parent, model_name or load_sae(newest)[1]["model"]

def fitted_folder(root, model_name):
    """The folder of all that is fitted to a model: that of its SAEs, or, where it has none, root if
    it holds something else that was fitted, or saes/<model>."""
    folder, _ = find_saes(root, model_name)
    return folder or (root if any(root.glob("*/layer*.safetensors")) else root / slug(model_name))

def load_run(args, ending="", needs_saes=True):
    """--model, --saes, --layer, --out, ... -> a namespace: model, tokenizer, name; folder, saes
    {(layer, kind): SAE} and their settings; layers, those that have SAEs, or else those of --layer;
    about, where the result comes from; path, where it goes. Raises UsageError without SAEs, unless
    they are not needed and the model is named."""
    folder, name = find_saes(args.saes, args.model)
    if folder is None and (needs_saes or name is None):
        raise UsageError(f"{args.saes}: no SAEs of {name or 'any model'}; first run: python "
                         f"train_sae.py --model {name or 'tiny'} --out {args.saes}")
    check_out(args.out)
    device, dtype = pick_device(args.device, args.dtype)
    model, tokenizer, layers = load_model(name, device, dtype, args.layer or "all")
    about = provenance(model)
    path = result_path(args.out, name, about, ending)
    saes, metadata = {}, {}
    if folder:
        saes, metadata = load_saes(folder, model, layers if args.layer else None)
        layers = sorted({layer for layer, _ in saes})
    return types.SimpleNamespace(model=model, tokenizer=tokenizer, name=name, folder=folder,
                                 saes=saes, settings=metadata.get("settings"), layers=layers,
                                 about=about, path=path)

# ------------------------------------------------------------------ which result
def provenance(model):
    """What a reader needs to run it again."""
    try:
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True,
                                capture_output=True).stdout.strip()
    except OSError:
        commit = None  # no git on this machine
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine()
    words = [word if len(word) <= 200 else f"sha256:{sha256(word.encode())}"  # a prompt
             for word in sys.orig_argv[1:]]
    layers = range(model.get_decoder().config.num_hidden_layers)
    return {"command": "python " + " ".join(words), "commit": commit or None,
            "model_sha256": model_hash(model, layers), "dtype": str(model.dtype),
            "device": f"{model.device} ({name}, {torch.get_num_threads()} threads)",
            "torch": torch.__version__, "transformers": importlib.metadata.version("transformers"),
            "date": time.ctime()}

def result_path(out, name, about, ending=""):
    """The path of a model's result, asked for before anything is computed. Raises UsageError if one
    is there already, of another model. about: what `provenance` returned."""
    path = out / f"{slug(name)}{ending}.json"
    if path.exists():
        with explain(f"{path}: no result of this version; delete it or choose another --out"):
            there = json.loads(path.read_text())["model_sha256"]
        if there != about["model_sha256"]:
            raise UsageError(f"{path}: of another model of that name, or one of the two is in "
                             "float16; choose another --out")
    return path

def finished_rows(path, result):
    """{name: row of the JSON} that an interrupted run left at path. Raises UsageError if it was run
    with other options, on another text, or with SAEs that have been trained anew since."""
    if not path.exists():
        return {}
    config = json.loads(json.dumps(result["config"], default=str))
    with explain(f"{path}: --resume cannot continue it; choose another --out"):
        there = json.loads(path.read_text())
        for name in config.keys() - {"rows", "only", "resume", "out"}:
            if there["config"][name] != config[name]:
                raise ValueError(f"{name} is {there['config'][name]} there, {config[name]} here")
        if there["text_sha256"] != result["text_sha256"]:
            raise ValueError("it is of another text")
        if there["training"] != result["training"]:
            raise ValueError("the SAEs have been trained anew since")
        return {row["name"]: row for row in there["rows"]}

def save_result(path, result):
    write_atomic(path, json.dumps(result, indent=1, default=str) + "\n")
