"""A file or a hub data set -> windows of token ids.

Windows are those of the GPTQ convention for perplexity: disjoint, special tokens at the beginning
of the text only, the tail dropped. Non-goals: formats other than UTF-8 text; shuffling.
"""
import itertools
import math
import os
import re

import torch

from sta import UsageError
from support.files import ROOT, explain
from support.models import context_length

WIKITEXT = {"train": "Salesforce/wikitext:wikitext-103-raw-v1:train",
            "valid": "Salesforce/wikitext:wikitext-2-raw-v1:test"}
PIECE = 1 << 20  # characters: a longer text is read and tokenised in parts

def default_text(split, model_name):
    """Tiny's own text, else WikiText; split is "train" or "valid"."""
    return str(ROOT / "tiny" / f"{split}.txt") if model_name == "tiny" else WIKITEXT[split]

def text_name(spec, split, model_name):
    """What a text is called in results: --text, or the default's name."""
    return (spec or default_text(split, model_name)).replace(f"{ROOT}/", "")

def read_text(spec, split, model_name):
    """--text -> yields the text in pieces: a UTF-8 file, or a hub data set
    owner/name[:config[:split[:column]]], a blank line after each document. None: the default."""
    spec = default_text(split, model_name) if spec is None else spec
    like_a_file = re.search(r"\.[a-z]\w*$", spec) or not re.match(r"[\w-]+/[\w.-]+(:|$)", spec)
    if not (os.path.isfile(spec) or like_a_file):
        yield from hub_documents(spec)
        return
    with explain(f"--text {spec}: no UTF-8 file"), open(spec, encoding="utf-8-sig") as file:
        while piece := file.read(PIECE):
            yield piece

def hub_documents(spec):
    """Yields a data set's documents, streamed; `datasets` itself resumes a broken stream."""
    name, config, split, column = (spec.split(":") + [""] * 3)[:4]
    column = column or "text"
    with explain(f"--text {spec}: no file, and as a data set it cannot be read"):
        from datasets import load_dataset  # optional: pip install datasets
        for row in load_dataset(name, config or None, split=split or "train", streaming=True):
            if not isinstance(row.get(column), str):
                raise UsageError(f"--text {spec}: no text in column {column!r} of "
                                 f"{', '.join(row)}; want owner/name:config:split:column")
            yield row[column] + "\n\n"

def encode_text(tokenizer, text, special=True):
    """Token ids of a text; special tokens before it, unless it begins with BOS, as in lm-eval, and
    none after it. Raises UsageError at a token that the model does not know."""
    bos, eos = tokenizer.bos_token or tokenizer.eos_token, tokenizer.eos_token
    special = special and not (bos and text.startswith(bos))
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    n_known = getattr(tokenizer, "n_known", math.inf)  # set by load_model
    if max(ids, default=0) >= n_known:
        raise UsageError(f"the tokenizer makes token {max(ids)}, but the model has {n_known}")
    appended = special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if appended and not text.endswith(eos) else ids

def tokenize(pieces, tokenizer, n):
    """A text in pieces -> the first n token ids (n,), or all of fewer. A text shorter than PIECE is
    one call of the tokenizer. A longer one is cut after a line break, else before a space, else
    anywhere, once per PIECE, as one call takes 100 bytes of memory per character. At such a seam
    tokens may differ from those of one call."""
    text, parts, n_ids = "", [], 0
    for piece in itertools.chain(pieces, [None]):  # None: the end
        text += piece or ""
        if piece is None:
            cut = len(text)
        elif len(text) >= PIECE:
            cut = text.rfind("\n") + 1 or max(0, text.rfind(" ")) or len(text)
        else:
            continue
        parts.append(torch.tensor(encode_text(tokenizer, text[:cut], special=not parts)).long())
        text, n_ids = text[cut:], n_ids + len(parts[-1])
        if n_ids >= n:
            break
    return torch.cat(parts)[:n]

def token_windows(pieces, tokenizer, model, seq_len, default, max_tokens, least=1):
    """Text in pieces -> token ids (n, seq_len): disjoint windows, the tail dropped, of about
    max_tokens, but at least `least` of them. seq_len None: `default`, or the model's limit."""
    limit = context_length(model, default)
    seq_len = min(default, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise UsageError(f"--seq-len {seq_len}: want 2 to the model's limit of {limit}")
    ids = tokenize(pieces, tokenizer, max(max_tokens, least * seq_len))
    n = len(ids) // seq_len
    if n < least:
        raise UsageError(f"text of {len(ids)} tokens: too short for {least} windows of {seq_len}; "
                         "give more text or a smaller --seq-len")
    return ids[:n * seq_len].view(n, seq_len)
