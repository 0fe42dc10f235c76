"""A file or a hub data set -> windows of token ids."""
import functools
import itertools
import os
import re

import torch

from sta import UsageError
from support.files import ROOT, explain

PIECE, STRIP = 1 << 16, 256  # characters read at a time; on each side of a cut, to try it

WIKITEXT = {"train": "Salesforce/wikitext:wikitext-103-raw-v1:train",
            "valid": "Salesforce/wikitext:wikitext-2-raw-v1:test"}

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
        for text in hub_documents(spec):
            yield from (text[i:i + PIECE] for i in range(0, len(text), PIECE))
        return
    with explain(f"--text {spec}: no UTF-8 file"), open(spec, encoding="utf-8") as file:
        while piece := file.read(PIECE):
            yield piece

def hub_documents(spec):
    """Yields a data set's documents, streamed. `datasets` itself takes a broken stream up again."""
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
    none after it."""
    bos, eos = tokenizer.bos_token or tokenizer.eos_token, tokenizer.eos_token
    special = special and not (bos and text.startswith(bos))
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    appended = special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if appended and not text.endswith(eos) else ids

def tokenize(pieces, tokenizer, n):
    """A text in pieces -> the first n token ids (n,), or all of fewer: those of one call on the
    whole text, of which no more is read than they need. A long text is cut at a place on each side
    of which a strip of text has the same tokens apart as together; places before white space are
    tried first, as tokenizers of words have seams there."""
    def after(text):  # the ids of a text that goes on: its beginning is not the text's
        return encode_text(tokenizer, "\n" + text, False)[len(encode_text(tokenizer, "\n", False)):]

    def find_cut(text):
        places = range(len(text) - STRIP, max(0, len(text) - 8 * STRIP), -1)
        for place in sorted(places, key=lambda place: not text[place].isspace()):
            left, right = text[max(0, place - STRIP):place], text[place:place + STRIP]
            repeated = len(set(left)) == 1 or len(set(right)) == 1  # a run hides its beginning
            if not repeated and after(left) + after(right) == after(left + right):
                return place
        return 0

    text, ids = "", [torch.empty(0, dtype=torch.long)]
    ids_of = functools.partial(encode_text, tokenizer)
    for piece in itertools.chain(pieces, [None]):  # None: the end
        text += piece or ""
        cut = len(text) if piece is None else find_cut(text) if len(text) >= PIECE else 0
        if cut:
            ids.append(torch.tensor(ids_of(text[:cut]), dtype=torch.long))
            text, ids_of = text[cut:], after
        if sum(map(len, ids)) >= n:
            break
    return torch.cat(ids)[:n]

def token_windows(pieces, tokenizer, model, seq_len, default, max_tokens, least=1):
    """Text in pieces -> token ids (n, seq_len): disjoint windows, the tail dropped, of about
    max_tokens, but at least `least` of them. Special tokens stand at the beginning of the text
    only: the GPTQ convention for perplexity. seq_len None: `default`, or the model's limit."""
    limit = getattr(model.get_decoder().config, "max_position_embeddings", default)
    seq_len = min(default, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise UsageError(f"--seq-len {seq_len}: want 2 to the model's limit of {limit}")
    ids = tokenize(pieces, tokenizer, max(max_tokens, least * seq_len))
    n, n_known = len(ids) // seq_len, model.get_input_embeddings().num_embeddings
    if len(ids) and ids.max() >= n_known:
        raise UsageError(f"the tokenizer makes token {ids.max()}, but the model has {n_known}")
    if n < least:
        raise UsageError(f"text of {len(ids)} tokens: too short for {least} windows of {seq_len}; "
                         "give more text or a smaller --seq-len")
    return ids[:n * seq_len].view(n, seq_len)
