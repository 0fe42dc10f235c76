"""Which SAEs and which result file; where each row came from.

evaluate.py and the commands of beyond/ begin with `load_run`, and write one JSON per model.
"""
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
import time
import types

import torch

from sta import UsageError
from support.files import ROOT, check_out, explain, load_sae, load_saes, model_hash, sha256
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

def load_run(args, ending="", needs_saes=True):
    """--model, --saes, --layer, --out, ... -> a namespace: model, tokenizer, name; folder, saes
    {(layer, kind): SAE} and their settings; layers, those that have SAEs, or else those of --layer;
    about, where the result comes from; path, where it goes. Where --k-key or --k-val is not given,
    it becomes what the SAEs were trained for. Raises UsageError without SAEs, unless they are not
    needed and the model is named."""
    folder, name = find_saes(args.saes, args.model)
    if folder is None and (needs_saes or name is None):
        command = shlex.join(["train_sae.py", "--model", name or "tiny", "--out", str(args.saes)])
        raise UsageError(f"{args.saes}: no SAEs of {name or 'any model'}; first run: "
                         f"python {command}")
    check_out(args.out)
    device, dtype = pick_device(args.device, args.dtype)
    model, tokenizer, layers = load_model(name, device, dtype, args.layer or "all")
    about = provenance(model)
    path = result_path(args.out, name, about, ending)
    saes, metadata = {}, {}
    if folder:
        saes, metadata = load_saes(folder, model, layers if args.layer else None)
        layers = sorted({layer for layer, _ in saes})
    settings = metadata.get("settings")
    for option, k in (("k_key", 8), ("k_val", 16)):
        if getattr(args, option, 0) is None:
            setattr(args, option, (settings or {}).get(option, k))
    return types.SimpleNamespace(model=model, tokenizer=tokenizer, name=name, folder=folder,
                                 saes=saes, settings=settings, layers=layers,
                                 about=about, path=path)

# ------------------------------------------------------------------ which result
def provenance(model):
    """What a reader needs to run it again."""
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine()
    layers = range(model.get_decoder().config.num_hidden_layers)
    return {"command": f"python {shlex.join(sys.orig_argv[1:])}", "commit": commit(),
            "program_sha256": program_hash(),
            "model_sha256": model_hash(model, layers), "dtype": str(model.dtype),
            "device": f"{model.device} ({name}, {torch.get_num_threads()} threads)",
            "torch": torch.__version__, "transformers": importlib.metadata.version("transformers"),
            "date": time.ctime()}

def program_hash():
    """Of all files of the program but its tests."""
    return sha256(b"".join(
        path.read_bytes() for folder in ("", "support", "beyond")
        for path in sorted((ROOT / folder).glob("*.py")) if not path.match("test_*")))

def commit():
    """The commit of our own repository, never of one around it, with -dirty where files differ from
    it; None without one."""
    git = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", "status", "--branch",
           "--porcelain=v2"]  # a line "# branch.oid <commit>", more with a #, one per change
    try:
        lines = subprocess.run(git, encoding="utf-8", capture_output=True).stdout.splitlines()
    except OSError:
        lines = []  # no git on this machine
    changed = "-dirty" * any(not line.startswith("#") for line in lines)
    return lines[0].split()[-1] + changed if lines else None

def result_path(out, name, about, ending=""):
    """The path of a model's result, asked for before anything is computed. Raises UsageError if one
    is there already, of another model. about: what `provenance` returned."""
    path = out / f"{slug(name)}{ending}.json"
    if path.exists():
        with explain(f"{path}: no result of this version; delete it or choose another --out"):
            there = json.loads(path.read_text(encoding="utf-8"))["model_sha256"]
        if there != about["model_sha256"]:
            raise UsageError(f"{path}: of another model of that name, or one of the two is in "
                             "float16; choose another --out")
    return path

def inputs_hash(about, args, row, *others):
    """What a row is made from, as a hash: about, which `provenance` returned (program, libraries,
    model, device and dtype); the options; its codecs with all their tensors; and others, such as
    the windows of the text."""
    def content(x):  # of what json does not know
        if isinstance(x, torch.Tensor):
            return sha256(x), x.shape
        return vars(x) if hasattr(x, "__dict__") else repr(x)

    free = "command", "commit", "date", "rows", "only", "resume", "out"
    options = {name: x for name, x in {**vars(args), **about}.items() if name not in free}
    return sha256(json.dumps([options, row, others], default=content).encode())

def finished_rows(path):
    """{name: row} of the result at path; none without a file there."""
    if not path.exists():
        return {}
    with explain(f"{path}: --resume cannot continue it; delete it"):
        return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
