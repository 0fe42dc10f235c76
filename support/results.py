"""Which SAEs and which result file; where each row came from."""
import json
import platform
import re
import subprocess
import sys
import time

import torch
import transformers

from sta import UsageError
from support.files import (ROOT, check_out, explain, load_sae, model_marks, same_marks, sha256,
                           write_atomic)
from support.models import slug

def check_pattern(only):
    with explain(f"--only {only}: no regular expression"):
        re.compile(only)

def find_fitted(root, model_name):
    """--saes, --model -> (the folder of what is fitted to a model: root, or one below it; whether
    it has SAEs; the model's name). Without a name: that of the newest SAEs, or None."""
    folders = [root, root / slug(model_name)] if model_name else [root, *root.glob("*")]
    saes = [path for folder in folders for path in folder.glob("layer*.key/cfg.json")]
    if saes:
        newest = max(saes, key=lambda path: path.stat().st_mtime).parent
        with explain(f"{newest} names no model; give --model"):
            return newest.parent, True, model_name or load_sae(newest)[1]["model"]
    fitted = [path for folder in folders for path in folder.glob("*/layer*.safetensors")]
    return fitted[0].parent.parent if fitted else folders[-1], False, model_name

def finished_rows(path, result):
    """{name: row of the JSON} that an interrupted run left at path. Raises UsageError if it was run
    with other options, on another text, or with SAEs that have been trained anew since."""
    if not path.exists():
        return {}
    config = json.loads(json.dumps(result["config"], default=str))
    with explain(f"{path}: --resume cannot take it up; choose another --out"):
        there = json.loads(path.read_text())
        for name in config.keys() - {"rows", "only", "resume", "out"}:
            if there["config"][name] != config[name]:
                raise ValueError(f"{name} is {there['config'][name]} there, {config[name]} here")
        if there["text_sha256"] != result["text_sha256"]:
            raise ValueError("it is of another text")
        if there["training"] != result["training"]:
            raise ValueError("the SAEs have been trained anew since")
        return {row["name"]: row for row in there["rows"]}

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
    return {"command": "python " + " ".join(words), "commit": commit or None,
            "marks": model_marks(model, range(model.get_decoder().config.num_hidden_layers)),
            "device": f"{model.device} ({name}, {torch.get_num_threads()} threads)",
            "torch": torch.__version__, "transformers": transformers.__version__,
            "date": time.ctime()}

def result_path(out, name, about, ending=""):
    """The path of a model's result, asked for before anything is computed. Raises UsageError if it
    cannot be written, or is there already, of another model. about: what `provenance` returned."""
    check_out(out)
    path = out / f"{slug(name)}{ending}.json"
    if path.exists():
        with explain(f"{path}: no result of this version; delete it or choose another --out"):
            marks = json.loads(path.read_text())["marks"]
        if not same_marks(marks, about["marks"]):
            raise UsageError(f"{path}: of another model of that name; choose another --out")
    return path

def save_result(path, result):
    write_atomic(path, json.dumps(result, indent=1, default=str) + "\n")
