"""Zero-shot questions: formats, requests and scores, as in lm-evaluation-harness 0.4.13.

A task is a data set of the hub, or a .jsonl file with context, choices and label. Non-goals:
few-shot prompts; other tasks (lm-eval itself runs in sta.reconstruct).
"""
import itertools
import json
import math
import pathlib
import re
from typing import NamedTuple

import torch
from tqdm import tqdm

from sta import UsageError
from support.files import explain
from support.text import encode_text

BATCH_TOKENS = 4096  # in a call of the model

def hellaswag(row):
    def clean(text):
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in row["endings"]], row["label"]

def lettered(context, row):  # ARC, OpenBookQA
    letters = row["choices"]["label"]
    return context, row["choices"]["text"], letters.index(row["answerKey"].strip())

def arc(row):
    return lettered(f"Question: {row['question']}\nAnswer:", row)

def winogrande(row):  # the options are in the contexts; what follows them is scored
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return contexts, [after.strip()] * 2, int(str(row["answer"])) - 1

# name: (data set, config, split, row -> (context, or one per choice; choices; label))
TASKS = {
    "piqa": ("baber/piqa", None, "validation", lambda row: (
        f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])),
    "hellaswag": ("Rowan/hellaswag", None, "validation", hellaswag),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", arc),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", winogrande),
    "boolq": ("aps/super_glue", "boolq", "validation", lambda row: (
        f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], row["label"])),
    "openbookqa": ("allenai/openbookqa", "main", "test", lambda row: lettered(
        row["question_stem"], row))}

class Question(NamedTuple):
    """A task's row, tokenised."""
    requests: list  # (context ids, continuation ids), one per choice
    lengths: list  # characters of each choice
    label: int

def task_rows(spec, task_dir, limit):
    """Yields (where, row) of the hub's data set, of task_dir/<task>.jsonl or of a .jsonl file."""
    if spec in TASKS and task_dir is None:
        with explain(f"--tasks {spec}: the hub's rows cannot be had; give --task-dir"):
            from datasets import load_dataset  # optional: pip install datasets
            rows = load_dataset(*TASKS[spec][:2], split=TASKS[spec][2])
        yield from ((f"{spec} row {i}", rows[i]) for i in range(len(rows))[:limit])
        return
    path = task_dir / f"{spec}.jsonl" if spec in TASKS else pathlib.Path(spec)
    with explain(f"--tasks {spec}: cannot read {path}"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # without a byte order mark
    for number, line in [(i, line) for i, line in enumerate(lines, 1) if line.strip()][:limit]:
        with explain(f"{path} line {number}: not JSON"):
            row = json.loads(line)
        yield f"{path} line {number}", row

def encode_pair(tokenizer, context, continuation):
    """(context ids, continuation ids): trailing spaces go to the continuation, whose ids are what
    the whole has after the context's; an empty context is BOS, else EOS."""
    bare = context.rstrip()
    continuation = context[len(bare):] + continuation
    if not bare:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ValueError("an empty context, and a tokenizer with neither BOS nor EOS")
        return [start], encode_text(tokenizer, continuation, special=False)
    ids = encode_text(tokenizer, bare)
    return ids, encode_text(tokenizer, bare + continuation)[len(ids):]

def make_question(spec, row, tokenizer, max_length):
    """A task's row -> Question, its contexts whole. Raises an error unless the label is the number
    of one of several choices, each of which has tokens of its own, at most max_length."""
    contexts, choices, label = TASKS[spec][3](row) if spec in TASKS else (
        row["context"], row["choices"], row["label"])
    contexts = [contexts] * len(choices) if isinstance(contexts, str) else contexts
    requests = [encode_pair(tokenizer, context, " " + choice)
                for context, choice in zip(contexts, choices)]
    label = int(str(label))  # str: int alone makes 1 of 1.9
    lengths = [len(rest) if choice.strip() else 0 for choice, (_, rest) in zip(choices, requests)]
    if len(choices) < 2 or min(lengths) < 1 or max(lengths) > max_length or not (
            0 <= label < len(choices)):
        raise ValueError(f"label {label}, choices of {lengths} tokens: want the number, from 0, of "
                         f"one of two or more, each of 1 to {max_length} tokens of its own")
    return Question(requests, [len(choice) for choice in choices], label)

def load_task(spec, task_dir, limit, tokenizer, max_length):
    """--tasks entry -> [Question]. A context loses its left end where the whole is longer than
    max_length. Raises UsageError naming the file and line of a bad row."""
    if not spec.endswith(".jsonl") and spec not in TASKS:
        raise UsageError(f"--tasks {spec}: want path.jsonl or one of {', '.join(TASKS)}")
    questions, n_cut = [], 0
    for where, row in task_rows(spec, task_dir, limit):
        with explain(f"{where}: not a row of {spec}"):
            question = make_question(spec, row, tokenizer, max_length)
        for i, (ids, rest) in enumerate(question.requests):
            room = max_length + 1 - len(rest)  # the last token is not read, only predicted
            n_cut += len(ids) > room
            question.requests[i] = ids[-room:], rest
        questions.append(question)
    if not questions:
        raise UsageError(f"--tasks {spec}: no rows")
    if n_cut:
        print(f"{spec}: {n_cut} contexts cut on the left, to the model's {max_length} tokens")
    return questions

def load_tasks(specs, *rest):
    """--tasks -> {name: [Question]}; a .jsonl file's name is its stem."""
    specs = [spec for spec in specs.split(",") if spec]
    names = [pathlib.Path(spec).stem for spec in specs]
    if len(set(names)) < len(names):
        raise UsageError(f"--tasks: two of {', '.join(names)} have one name; rename a file")
    return {name: load_task(spec, *rest) for name, spec in zip(names, specs)}

@torch.no_grad()
def loglikelihoods(forward, questions, model, name):
    """[sum of log p over the continuation] of all requests."""
    requests = [request for question in questions for request in question.requests]
    by_input, by_length, totals = {}, {}, [None] * len(requests)
    for i, (context, rest) in enumerate(requests):  # one input, several choices of one token
        by_input.setdefault((*context, *rest[:-1]), []).append(i)
    for ids in by_input:
        by_length.setdefault(len(ids), []).append(ids)  # one length: no padding
    for length, group in tqdm(by_length.items(), desc=name, leave=False, disable=None):
        n = max(1, BATCH_TOKENS // length)
        for batch in (group[j:j + n] for j in range(0, len(group), n)):
            for ids, logits in zip(batch, forward(torch.tensor(batch, device=model.device))):
                for i in by_input[ids]:
                    rest = torch.tensor(requests[i][1], device=logits.device)
                    log_p = logits[-len(rest):].float().log_softmax(-1)  # (len(rest), V)
                    totals[i] = log_p.gather(-1, rest[:, None]).double().sum().item()
    return totals

def score_task(questions, totals, dense):
    """Columns of a task: n; acc, whether the choice of the largest log-likelihood is right;
    acc_norm, the same per character; delta_acc, from dense; each with _stderr; right, acc by row.
    All are nan if one total is. totals: of `loglikelihoods`; dense: dense's columns, or None."""
    right, norm, rest = [], [], iter(totals)
    for question in questions:
        sums = list(itertools.islice(rest, len(question.lengths)))
        per_character = [total / n for total, n in zip(sums, question.lengths)]
        for scores, hits in ((sums, right), (per_character, norm)):
            is_hit = scores.index(max(scores)) == question.label
            hits.append(math.nan if math.isnan(sum(scores)) else is_hit)
    gain = [a - b for a, b in zip(right, dense["right"] if dense else right)]
    columns = {"n": len(right), "right": right}
    for metric, values in (("acc", right), ("acc_norm", norm), ("delta_acc", gain)):
        columns[metric], columns[f"{metric}_stderr"] = mean_stderr(values)
    return columns

def mean_stderr(values):
    """(mean, sample standard deviation / sqrt(n)) of numbers or booleans. One number alone tells
    nothing of its error: inf."""
    x = torch.as_tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else math.inf

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

def margin(stderr, n):
    """Half the width of the 95% interval of a mean of n numbers with this standard error, by
    Student's t: of four numbers it is 3.2 standard errors, of many 1.96."""
    return stderr * STUDENT.get(n, 1.96 + 2.6 / max(1, n - 1))

def mean_margin(values):
    """(mean, half its 95% interval) of numbers."""
    mean, stderr = mean_stderr(values)
    return mean, margin(stderr, len(values))
