"""S3-Attention: retrieval inside the model, by the atoms that a question's queries share with keys.

    python -m beyond.s3 --text LONG.txt --question "When was the fort built?" --budget 256
    python -m beyond.s3 --model DIR --evaluate --task-dir DIR/tasks      # on BoolQ's passages

Scan: the text passes through the model in chunks, each with up to OVERLAP tokens before it. The key
SAEs of a few layers turn every key into k latents, which go into an inverted index, latent ->
positions. All else is dropped, except the mean query of each head.
Search: a query, before RoPE and less that mean, is described by the k key atoms with which its
inner product is largest. Per query, a position sums inner product times inverse document frequency
over the latents that they share; its score is the sum over queries of the squares of that. The
scores are fused with those of BM25 by ranks. Source: the abstract of arXiv 2601.17702. It leaves
open, and we chose: the layers (best recall on other questions), the mean, weights, spans.
--evaluate compares the recall of the passage that a question is about with BM25 over words, with
dense products of queries and keys in the same layers, and with cosines of the residual stream; its
standard errors are over contexts, whose questions share one text.
"""
import itertools
import json
import pathlib
import re
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import sta
from beyond import capture_queries, parse_args, pick, table
from support.files import run_main, write_atomic
from support.models import context_length
from support.results import load_run
from support.tasks import Question, loglikelihoods, margin, mean_stderr, task_rows
from support.text import encode_text, read_text, tokenize

CHUNK, OVERLAP, SPAN = 512, 64, 32  # tokens
N_CHOOSE, N_LAYERS, N_TEST = 150, 3, 300  # questions to choose layers on, layers, other questions
METHODS = ("s3", "dense", "residual")  # each with its own best layers
PASSAGES, SHARE = (30, 100), 0.05  # in a context; of its tokens, returned

# ------------------------------------------------------------------ the scan
def read(model, ids, layers):
    """{layer: [keys (T, H, D), queries (T, H, group, D), both before RoPE, and the residual stream
    (T, width)]} of token ids (T,)."""
    decoder, parts = model.get_decoder(), {}
    H, _ = sta.kv_shape(decoder.config)
    with sta.capture(model, layers) as keys, capture_queries(model, layers) as queries:
        streams = decoder(input_ids=ids[None].to(model.device), use_cache=False,
                          output_hidden_states=True).hidden_states
    for layer in layers:
        q = queries[layer][0].unflatten(1, (H, -1))  # (T, H, group, D)
        parts[layer] = [x.float() for x in (keys[layer, "key"][0], q, streams[layer][0])]
    return parts

def chunks(model, ids, layers):
    """Token ids (n,) -> yields (position, what `read` returns) chunk by chunk; none is longer, with
    the tokens before it, than the model's context."""
    length = min(CHUNK, context_length(model) - OVERLAP)
    for at in range(0, len(ids), length):
        before = min(at, OVERLAP)
        by_layer = read(model, ids[at - before:at + length], layers)
        yield at, {layer: [x[before:] for x in parts] for layer, parts in by_layer.items()}

def scan(model, saes, ids):
    """Token ids (n,), {layer: key SAE} -> the index {layer: (start (H M + 1,), positions, mean
    query (H, group, D))}: f = head * M + latent fired at positions[start[f]:start[f + 1]]."""
    fired, index = {layer: [] for layer in saes}, {}
    for at, parts in chunks(model, ids, list(saes)):
        for layer, (k, q, _) in parts.items():
            z, idx = saes[layer].encode(k, saes[layer].k)  # (T, H, k)
            first = saes[layer].n_latents * torch.arange(k.shape[1], device=k.device)
            token = at + (z > 0).nonzero()[:, 0].int()
            fired[layer].append([x.cpu().numpy() for x in (
                (idx + first[:, None])[z > 0], token, q.sum(0))])
    for layer, parts in fired.items():
        latent, token, q = zip(*parts)
        latent, size = np.concatenate(latent), k.shape[1] * saes[layer].n_latents
        order = np.argsort(latent, kind="stable")
        index[layer] = (np.searchsorted(latent[order], np.arange(size + 1)),
                        np.concatenate(token)[order], torch.tensor(sum(q) / len(ids)))
    return index

# ------------------------------------------------------------------ the search
def search(model, saes, index, question, n_tokens, special=()):
    """{("s3", layer): scores (n_spans,)} of a question (token ids) on a text of n_tokens. The model
    reads the special ids among them too, but their queries are left out."""
    scores, ordinary = {}, torch.tensor([i not in special for i in question.tolist()])
    for layer, (_, q, _) in read(model, question, list(saes)).items():
        q = q[ordinary.to(q.device)]
        (start, positions, mean), sae, score = index[layer], saes[layer], np.zeros(n_tokens)
        along, idx = ((q.cpu() - mean) @ sae.W_dec.cpu().T).topk(sae.k)  # (T, H, group, k)
        f = (idx + sae.n_latents * torch.arange(q.shape[1])[:, None, None]).numpy()
        df = start[f + 1] - start[f]  # of how many tokens
        weight = along.clamp_min(0).numpy() * np.log(n_tokens / df.clip(1))
        for query in np.ndindex(f.shape[:3]):
            hits = np.concatenate([positions[start[i]:start[i + 1]] for i in f[query]])
            score += np.bincount(hits, np.repeat(weight[query], df[query]), n_tokens) ** 2
        scores["s3", layer] = of_spans(score / max(score.mean(), 1e-9))
    return scores

def of_spans(x):
    """Numbers (n,) of tokens -> their sums (n_spans,) over spans of SPAN, the tail dropped."""
    return x[:len(x) // SPAN * SPAN].reshape(-1, SPAN).sum(1)

def words_of(text):
    return re.findall(r"\w+", text.lower())

def span_words(tokenizer, ids):
    """The words of each span of token ids (n,), the tail dropped."""
    return [words_of(tokenizer.decode(span)) for span in ids[:len(ids) // SPAN * SPAN].split(SPAN)]

def bm25(spans, question):
    """Scores (n_spans,) of spans for a question, all lists of words [Robertson; k1 = 1.2; all spans
    are taken to be of one length]."""
    score = np.zeros(len(spans))
    for word in sorted(set(question)):
        tf = np.array([span.count(word) for span in spans])
        df = (tf > 0).sum()
        score += np.log(1 + (len(tf) - df + 0.5) / (df + 0.5)) * tf * 2.2 / (tf + 1.2)
    return score

def combine(by_layer, chosen, bm25s):
    """{(method, layer): scores} -> {name: scores}: for each name in chosen, the sum over the pairs
    that it lists; bm25; s3 and bm25 fused [reciprocal ranks, Cormack 2009]."""
    scores = {name: sum(by_layer[pair] for pair in pairs) for name, pairs in chosen.items()}
    scores["bm25"] = bm25s
    scores["fused"] = sum(1 / (61 + np.argsort(np.argsort(-scores[name], kind="stable")))
                          for name in ("s3", "bm25") if name in scores)
    return scores

def best_spans(score, budget):
    """Scores (n_spans,) -> (the best spans, best first, `budget` tokens in all, but at least one
    span; the places of their tokens in the text, rising)."""
    spans = np.argsort(-score, kind="stable")[:max(1, int(budget // SPAN))]
    return spans, (SPAN * np.sort(spans)[:, None] + np.arange(SPAN)).flatten()

def answer(model, tokenizer, saes, ids, question, budget):
    """Print the best spans of a text (token ids), and what the model writes from them."""
    if not words_of(question):
        raise sta.UsageError("--question: no words in it; ask something")
    if not SPAN <= budget < len(ids) or len(ids) < CHUNK:
        raise sta.UsageError(f"--budget {budget}, a text of {len(ids):,} tokens: want {SPAN} or "
                             f"more, and more text than that and than a chunk, {CHUNK}")
    began = time.time()
    index, words = scan(model, saes, ids), span_words(tokenizer, ids)
    scanned, n_bytes = time.time(), sum(x.nbytes for parts in index.values() for x in parts)
    question_ids = torch.tensor(encode_text(tokenizer, question)).long()
    by_layer = search(model, saes, index, question_ids, len(ids), tokenizer.all_special_ids)
    scores = combine(by_layer, {"s3": list(by_layer)}, bm25(words, words_of(question)))
    spans, places = best_spans(scores["fused"], budget)
    print(f"{len(ids):,} tokens scanned in {scanned - began:.1f} s, searched in "
          f"{1000 * (time.time() - scanned):.0f} ms; index of {n_bytes / len(ids):.0f} bytes "
          "per token")
    for i in spans:
        print(f"  {SPAN * i:,}:", *(f"{name} {x[i]:.3g}," for name, x in scores.items()),
              repr(tokenizer.decode(ids[SPAN * i:SPAN * (i + 1)])))
    end = encode_text(tokenizer, f"\n\nQuestion: {question}\nAnswer:", special=False)
    for name, context in (("spans", ids[places]), ("last tokens", ids[-budget:])):
        prompt = torch.cat([context, torch.tensor(end)])[None].to(model.device)
        written = model.generate(input_ids=prompt, max_new_tokens=40, do_sample=False)[0]
        print(f"from the {name}: {tokenizer.decode(written[prompt.shape[1]:])!r}")

# ------------------------------------------------------------------ how well it finds
def boolq_contexts(rows, n, tokenizer):
    """BoolQ's rows -> yields (token ids (T,) of n passages without their last sentences; each
    token's passage (T,); the n questions, as text; as ids; the n last sentences, as ids)."""
    def encode(text): return torch.tensor(encode_text(tokenizer, text, special=False))
    for group in (rows[i:i + n] for i in range(0, len(rows) - n + 1, n)):
        sentences = [re.split(r"(?<=[.!?])\s+", row["passage"].strip()) for row in group]
        bodies = [encode(" ".join(parts[:-1]) + "\n\n") for parts in sentences]
        questions = [row["question"] for row in group]
        yield (torch.cat(bodies), np.repeat(np.arange(n), [len(ids) for ids in bodies]), questions,
               [encode(f"{question}?") for question in questions],
               [encode(parts[-1]) for parts in sentences])

def rival_scores(model, ids, layers, questions):
    """Yields for each question (token ids) {(method, layer): scores (n_spans,)}: attention without
    RoPE, its queries less their mean, which S3 approximates; cosine of residual streams, less their
    mean."""
    parts, scores = [part for _, part in chunks(model, ids, layers)], {}
    text = {layer: [torch.cat(x) for x in zip(*(part[layer] for part in parts))]
            for layer in layers}
    for question in questions:
        for layer, (_, q, stream) in read(model, question, layers).items():
            k, text_q, text_stream = text[layer]
            logits = torch.einsum("thgd,nhd->thgn", q - text_q.mean(0), k) / k.shape[2] ** 0.5
            scores["dense", layer] = of_spans(logits.softmax(-1).sum((0, 1, 2)).cpu().numpy())
            centred, mean = (x - text_stream.mean(0) for x in (text_stream, stream.mean(0)))
            scores["residual", layer] = of_spans(
                F.cosine_similarity(centred, mean, dim=-1).cpu().numpy())
        yield dict(scores)

def recalls(scores, right):
    """{method: scores (n_spans,)}, whether a token is of the right passage (T,) -> {what: the share
    of these tokens that is returned}."""
    places = {method: best_spans(x, SHARE * len(right))[1] for method, x in scores.items()}
    return {f"recall by {method}": right[x].sum() / right.sum() for method, x in places.items()}

def losses_after(model, contexts, sentence):
    """{name: token ids} -> {what: mean loss (nats) of a sentence's tokens after that context}."""
    room = context_length(model) - len(sentence)
    requests = [(ids[-room:].tolist(), sentence.tolist()) for ids in contexts.values()]
    totals = loglikelihoods(lambda ids: model(input_ids=ids, use_cache=False).logits,
                            [Question(requests, [], 0)], model, "losses")
    return {f"loss after {name}": -total / len(sentence)
            for name, total in zip(contexts, totals)}

def try_on(model, tokenizer, saes, rows, n, chosen, with_losses=True):
    """n passages at a time -> {what: its mean in each context}: `recalls` of the methods, each with
    its `chosen` layers; `losses_after` of the right passage's last sentence."""
    means, chance = {}, np.random.default_rng(0)
    for ids, passages, questions, question_ids, last in boolq_contexts(rows, n, tokenizer):
        index, words, figures = scan(model, saes, ids), span_words(tokenizer, ids), {}
        for i, by_layer in enumerate(rival_scores(model, ids, list(saes), question_ids)):
            by_layer |= search(model, saes, index, question_ids[i], len(ids))
            scores = combine(by_layer, chosen, bm25(words, words_of(questions[i])))
            scores["chance"] = chance.random(len(words))
            columns = recalls(scores, passages == i)
            if with_losses:
                best = best_spans(scores["fused"], SHARE * len(ids))[1]
                contexts = {"nothing": ids[:1], "the right passage": ids[passages == i],
                            "what fused returns": ids[best]}
                if n == PASSAGES[0] and i % 10 == 0:  # because the full context takes longest
                    contexts["full context"] = ids
                columns |= losses_after(model, contexts, last[i])
            for what, figure in columns.items():
                figures.setdefault(what, []).append(float(figure))
        for what, x in figures.items():
            means.setdefault(what, []).append(np.mean(x))
    return means

def choose_layers(model, tokenizer, saes, rows):
    """{method: its N_LAYERS pairs (method, layer) of the best recall}; prints all recalls."""
    single = {f"{method} {layer}": [(method, layer)] for method in METHODS for layer in saes}
    means, chosen = try_on(model, tokenizer, saes, rows, PASSAGES[0], single, False), {}
    for method in METHODS:
        recall = {layer: np.mean(means[f"recall by {method} {layer}"]) for layer in saes}
        print(f"{method}, layer: recall", ", ".join(f"{i}: {x:.3f}" for i, x in recall.items()))
        chosen[method] = [(method, layer) for layer in sorted(recall, key=recall.get)[-N_LAYERS:]]
    chosen["dense, s3's layers"] = [("dense", layer) for _, layer in chosen["s3"]]
    return chosen

def evaluate_on(model, tokenizer, saes, rows):
    """BoolQ's rows: choose layers on a part, print and return the figures on others."""
    rows = list({row["passage"]: row for row in rows if re.search(
        r"[.!?]\s+\S", row["passage"])}.values())  # each passage once, of two sentences
    if len(rows) < N_CHOOSE + max(PASSAGES):
        raise sta.UsageError(f"--evaluate: {len(rows)} different passages, --limit or fewer; want "
                             f"{N_CHOOSE + max(PASSAGES)} or more, to choose layers and to test")
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    chosen, retrieval = choose_layers(model, tokenizer, saes, rows[:N_CHOOSE]), []
    layers = sorted({layer for pairs in chosen.values() for _, layer in pairs})
    saes = {layer: saes[layer] for layer in layers}
    for n in PASSAGES:
        means = try_on(model, tokenizer, saes, rows[N_CHOOSE:N_CHOOSE + N_TEST], n, chosen)
        for what, x in means.items():
            mean, error = mean_stderr(x)
            print(f"{n:3} passages, {len(x)} contexts: {what:28} {mean:.3f} ± {error:.3f}")
            retrieval.append({"passages": n, "what": what, "contexts": len(x), "mean": mean,
                              "margin": margin(error, len(x))})
    return {"chosen": chosen, "retrieval": retrieval}

# ------------------------------------------------------------------ a table, and the run
LABELS = {  # what was measured: its name in the table
    "recall by s3": "recall: atoms (S3)",
    "recall by dense": "recall: queries and keys themselves",
    "recall by dense, s3's layers": "recall: queries and keys, in S3's layers",
    "recall by residual": "recall: cosine of the residual stream",
    "recall by bm25": "recall: words (BM25)",
    "recall by fused": "recall: atoms and words, fused by ranks",
    "recall by chance": "recall: chance",
    "loss after nothing": "loss after nothing",
    "loss after what fused returns": "loss after what atoms and words return",
    "loss after the right passage": "loss after the right passage"}

def table_of_recall(lines):
    """What was measured ± half its 95% interval over texts, by number of passages in a text."""
    cells = {}
    for line in pick(lines, kind="retrieval")[-1:]:
        for (what, label), x in itertools.product(LABELS.items(), line["retrieval"]):
            if x["what"] == what:
                scale, digits = (100, 0) if what.startswith("recall") else (1, 2)
                cells[label, f"{x['contexts']} texts of {x['passages']} passages"] = (
                    f"{scale * x['mean']:.{digits}f} ± {scale * x['margin']:.{digits}f}")
    return table("recall in %, loss in nats", cells)

@torch.no_grad()
def main(argv=None):
    args = parse_args(
        __doc__, argv, "model saes layer text limit device dtype out",
        question=dict(default="Who was the President?", help="to look for in --text"),
        budget=dict(type=int, default=256, help="tokens of spans (default 256)"),
        evaluate=dict(action="store_true", help="measure on BoolQ's rows instead"),
        task_dir=dict(type=pathlib.Path, help="with boolq.jsonl (else the hub's rows)"))
    run = load_run(args, "-s3")
    saes = {layer: run.saes[layer, "key"] for layer in run.layers}
    if args.evaluate:
        rows = [row for _, row in task_rows("boolq", args.task_dir, args.limit)]
        result = {"model": run.name, "settings": run.settings, **run.about,
                  **evaluate_on(run.model, run.tokenizer, saes, rows)}
        return write_atomic(run.path, json.dumps(result))
    ids = tokenize(read_text(args.text, "valid", run.name), run.tokenizer, sys.maxsize)
    answer(run.model, run.tokenizer, saes, ids, args.question, args.budget)

if __name__ == "__main__":
    run_main(main)
