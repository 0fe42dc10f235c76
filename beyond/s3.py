"""S3-Attention: retrieval inside the model, by the atoms that a question's queries share with keys.

    python -m beyond.s3 --text LONG.txt --question "When was the fort built?" --budget 256
    python -m beyond.s3 --model DIR --evaluate --task-dir DIR/tasks      # on BoolQ's passages

Scan: the text passes through the model in chunks, each with OVERLAP tokens before it; the key SAEs
of a few layers leave every token's latents, k a head, in an inverted index, latent -> positions.
All else is dropped, but the mean query. Search: a query of the question, before RoPE and less that
mean, has as its latents the k atoms of its group's keys that it is most along. A position scores,
for each query, alignment times inverse document frequency, summed over the latents they share and
squared; all add up. Fused with BM25 by ranks. Source: the abstract of arXiv 2601.17702; ours, as it
leaves them open: layers (by recall on other questions, then --layer), mean, weights, spans.

Verdict (SmolLM2, layers 5, 9, 15; 30 passages, 5 % of their tokens): it finds the passage that a
question is about (recall 0.56 ± 0.02) no worse than dense q k (0.51), better than BM25 (0.50) and
residual streams (0.47), best fused with BM25 (0.58). Without the mean query it hardly beats chance.
Its spans help the model less with the passage's last sentence (loss 3.98, without any context 4.31)
than the passage does (3.37).
"""
import argparse
import itertools
import json
import re
import resource
import time

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
import sta

CHUNK, OVERLAP, SPAN = 512, 64, 32  # tokens
N_CHOOSE, N_LAYERS, N_TEST = 150, 3, 300  # questions to choose layers on, layers, other questions
METHODS = ("s3", "dense", "residual")  # each with its own best layers
PASSAGES, SHARES = (10, 30, 100), (0.02, 0.05, 0.1)  # in a context; of its tokens, returned

# ------------------------------------------------------------------ the scan
def read(model, ids, layers):
    """{layer: [keys (T, H, D), queries (T, H, group, D), both before RoPE, and the residual stream
    (T, width)]} of token ids (T,)."""
    decoder, found = model.get_decoder(), {}
    H, D = sta.kv_shape(decoder.config)
    with sta.capture(model, layers) as keys:
        streams = decoder(input_ids=ids[None].to(model.device), use_cache=False,
                          output_hidden_states=True).hidden_states
    for layer in layers:
        block = decoder.layers[layer]
        with sta.explain("no projection of queries; want llama, mistral, qwen2 or qwen3"):
            q = block.self_attn.q_proj(block.input_layernorm(streams[layer])[0])
            q = getattr(block.self_attn, "q_norm", torch.nn.Identity())(q.unflatten(-1, (H, -1, D)))
        found[layer] = [x.float() for x in (keys[layer, "key"][0], q, streams[layer][0])]
    return found

def chunks(model, ids, layers):
    """Token ids (n,) -> yields (position, what `read` finds there) chunk by chunk, each with the
    tokens before it no longer than the model's context."""
    limit = model.get_decoder().config.max_position_embeddings
    length = min(CHUNK, limit - OVERLAP)
    for at in range(0, len(ids), length):
        before = min(at, OVERLAP)
        found = read(model, ids[at - before:at + length], layers)
        yield at, {layer: [x[before:] for x in parts] for layer, parts in found.items()}

def scan(model, saes, ids):
    """Token ids (n,), {layer: key SAE} -> the index {layer: (start (H M + 1,), positions, mean
    query (H, group, D))}: f = head * M + latent fired at positions[start[f]:start[f + 1]]."""
    found, index = {layer: [] for layer in saes}, {}
    for at, parts in chunks(model, ids, list(saes)):
        for layer, (k, q, _) in parts.items():
            z, idx = saes[layer].encode(k, saes[layer].k)  # (T, H, k)
            first = saes[layer].n_latents * torch.arange(k.shape[1], device=k.device)
            token = at + (z > 0).nonzero()[:, 0].int()
            found[layer].append([x.cpu().numpy() for x in (
                (idx + first[:, None])[z > 0], token, q.sum(0))])
    for layer, parts in found.items():
        latent, token, q = zip(*parts)
        latent, size = np.concatenate(latent), k.shape[1] * saes[layer].n_latents
        order = np.argsort(latent, kind="stable")
        index[layer] = (np.searchsorted(latent[order], np.arange(size + 1)),
                        np.concatenate(token)[order], torch.tensor(sum(q) / len(ids)))
    return index

# ------------------------------------------------------------------ the search
def search(model, saes, index, question, n_tokens, special=()):
    """{("s3", layer): scores (n_spans,)} of a question (token ids) on a text of n_tokens. The model
    reads the special ids among them too, but they search for nothing."""
    found, asks = {}, torch.tensor([i not in special for i in question.tolist()])
    for layer, (_, q, _) in read(model, question, list(saes)).items():
        q = q[asks.to(q.device)]
        (start, positions, mean), sae, score = index[layer], saes[layer], np.zeros(n_tokens)
        along, idx = ((q.cpu() - mean) @ sae.W_dec.cpu().T).topk(sae.k)  # (T, H, group, k)
        f = (idx + sae.n_latents * torch.arange(q.shape[1])[:, None, None]).numpy()
        df = start[f + 1] - start[f]  # of how many tokens
        weight = along.clamp_min(0).numpy() * np.log(n_tokens / df.clip(1))
        for one in np.ndindex(f.shape[:3]):  # a query
            hits = np.concatenate([positions[start[i]:start[i + 1]] for i in f[one]])
            score += np.bincount(hits, np.repeat(weight[one], df[one]), n_tokens) ** 2
        found["s3", layer] = of_spans(score / max(score.mean(), 1e-9))
    return found

def of_spans(x):
    """Numbers (n,) of tokens -> their sums (n_spans,) over spans of SPAN, the tail dropped."""
    return x[:len(x) // SPAN * SPAN].reshape(-1, SPAN).sum(1)

def words_of(tokenizer, ids):
    """Each token's text (n,), in lower case."""
    return np.array([tokenizer.decode([i]).strip().lower() for i in ids.tolist()])

def bm25(words, asked):
    """Scores (n_spans,) of a text's words (n,) [Robertson; k1 = 1.2; all spans are as long]."""
    score = 0
    for word in sorted(set(asked)):
        tf = of_spans(words == word)
        df = (tf > 0).sum()
        score = score + np.log(1 + (len(tf) - df + 0.5) / (df + 0.5)) * tf * 2.2 / (tf + 1.2)
    return score

def combine(found, chosen, bm25s):
    """{(method, layer): scores} -> {name: scores}: for each name of chosen the sum of those; bm25;
    s3 and bm25 fused [reciprocal ranks, Cormack 2009]."""
    scores = {name: sum(found[pair] for pair in pairs) for name, pairs in chosen.items()}
    scores["bm25"] = bm25s
    scores["fused"] = sum(1 / (61 + np.argsort(np.argsort(-scores[name], kind="stable")))
                          for name in ("s3", "bm25") if name in scores)
    return scores

def best_spans(score, budget):
    """Scores (n_spans,) -> the best spans, best first, of `budget` tokens in all, but one at least;
    the places of their tokens, in the text's order."""
    found = np.argsort(-score, kind="stable")[:max(1, int(budget // SPAN))]
    return found, (SPAN * np.sort(found)[:, None] + np.arange(SPAN)).flatten()

def answer(model, tokenizer, saes, ids, question, budget):
    """Print the best spans of a text (token ids), and what the model writes from them."""
    asked, special = torch.tensor(sta.encode(tokenizer, question)).long(), tokenizer.all_special_ids
    words_asked = words_of(tokenizer, asked[~torch.isin(asked, torch.tensor(special))])
    began = time.time()
    if not len(words_asked):
        raise sta.UsageError("--question: no tokens in it; ask something")
    if not SPAN <= budget < len(ids) or len(ids) < CHUNK:
        raise sta.UsageError(f"--budget {budget}, a text of {len(ids):,} tokens: want {SPAN} or "
                             f"more, and more text than that and than a chunk, {CHUNK}")
    index, words = scan(model, saes, ids), words_of(tokenizer, ids)
    scanned, size = time.time(), sum(x.nbytes for pair in index.values() for x in pair)
    scores = combine(search(model, saes, index, asked, len(ids), special), {"s3": [
        ("s3", layer) for layer in saes]}, bm25(words, words_asked))
    spans, places = best_spans(scores["fused"], budget)
    print(f"{len(ids):,} tokens scanned in {scanned - began:.1f} s, searched in "
          f"{1000 * (time.time() - scanned):.0f} ms; index {size / len(ids):.0f} bytes a token; "
          f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10:,} MiB")
    for i in spans:
        print(f"  {SPAN * i:,}:", *(f"{name} {x[i]:.3g}," for name, x in scores.items()),
              repr(tokenizer.decode(ids[SPAN * i:SPAN * (i + 1)])))
    end = tokenizer(f"\n\nQuestion: {question}\nAnswer:", add_special_tokens=False).input_ids
    for name, context in (("spans", ids[places]), ("last tokens", ids[-budget:])):
        prompt = torch.cat([context, torch.tensor(end)])[None].to(model.device)
        written = model.generate(input_ids=prompt, max_new_tokens=40, do_sample=False)[0]
        print(f"from the {name}: {tokenizer.decode(written[prompt.shape[1]:])!r}")
    if len(ids) <= model.get_decoder().config.max_position_embeddings:
        began = time.time()
        model.get_decoder()(input_ids=ids[None].to(model.device), use_cache=False)
        print(f"one pass over the whole text, for comparison: {time.time() - began:.1f} s")

# ------------------------------------------------------------------ how well it finds
def contexts(rows, n, tokenizer):
    """BoolQ's rows -> yields (token ids (T,) of n passages without their last sentences; each
    token's passage (T,); the n questions; the n last sentences)."""
    def encode(text): return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    for group in (rows[i:i + n] for i in range(0, len(rows) - n + 1, n)):
        parts = [re.split(r"(?<=[.!?])\s+", row["passage"].strip()) for row in group]
        body = [encode(" ".join(part[:-1]) + "\n\n") for part in parts]
        yield (torch.cat(body), np.repeat(np.arange(n), [len(ids) for ids in body]),
               [encode(row["question"] + "?") for row in group], [encode(p[-1]) for p in parts])

def others(model, ids, layers, asked):
    """Yields of each question {(method, layer): scores (n_spans,)}: attention without RoPE, its
    queries less their mean, which S3 approximates; cosine of residual streams, less their mean."""
    parts, found = [part for _, part in chunks(model, ids, layers)], {}
    text = {layer: [torch.cat(x) for x in zip(*(part[layer] for part in parts))]
            for layer in layers}
    for question in asked:
        for layer, (_, q, stream) in read(model, question, layers).items():
            k, text_q, text_stream = text[layer]
            logits = torch.einsum("thgd,nhd->thgn", q - text_q.mean(0), k) / k.shape[2] ** 0.5
            found["dense", layer] = of_spans(logits.softmax(-1).sum((0, 1, 2)).cpu().numpy())
            text_stream, own = (x - text_stream.mean(0) for x in (text_stream, stream.mean(0)))
            found["residual", layer] = of_spans(
                F.cosine_similarity(text_stream, own, dim=-1).cpu().numpy())
        yield dict(found)

def try_on(model, tokenizer, saes, rows, n, chosen):
    """n passages at a time -> {what: [its figure for each question]}: recall of the right passage's
    tokens; hit, whether they are half of what is returned; loss of its last sentence (nats)."""
    found, chance = {}, np.random.default_rng(0)
    for ids, owner, asked, last in contexts(rows, n, tokenizer):
        index, words = scan(model, saes, ids), words_of(tokenizer, ids)
        for i, by_layer in enumerate(others(model, ids, list(saes), asked)):
            right, bm25s = owner == i, bm25(words, words_of(tokenizer, asked[i]))
            by_layer |= search(model, saes, index, asked[i], len(ids))
            scores = combine(by_layer, chosen, bm25s) | {"chance": chance.random(len(bm25s))}
            for share, (method, score) in itertools.product(SHARES, scores.items()):
                hits = right[best_spans(score, share * len(ids))[1]]
                for what, x in (("recall", hits.sum() / right.sum()), ("hit", hits.mean() >= 0.5)):
                    found.setdefault(f"{what} by {method} at {share:.0%}", []).append(x)
            tried = {"nothing": ids[:1], "the right passage": ids[right],
                     "5 % by fused": ids[best_spans(scores["fused"], len(ids) / 20)[1]]}
            if n == PASSAGES[1] and i % 10 == 0:  # as it takes longest
                tried["full context"] = ids
            asks = [(context.tolist(), last[i].tolist()) for context in tried.values()]
            totals = evaluate.loglikelihoods(
                lambda x: model(input_ids=x, use_cache=False).logits,
                [evaluate.Question(asks, [], 0)], model, "losses")
            for name, total in zip(tried, totals):
                found.setdefault(f"loss after {name}", []).append(-total / len(last[i]))
    return found

def evaluate_on(model, tokenizer, saes, rows):
    """BoolQ's rows: choose layers on some, print and return what is found on others."""
    rows = list({row["passage"]: row for row in rows if re.search(
        r"[.!?]\s+\S", row["passage"])}.values())  # each passage once, of two sentences
    if len(rows) < N_CHOOSE + max(PASSAGES):
        raise sta.UsageError(f"--evaluate: {len(rows)} different passages, --limit or fewer; want "
                             f"{N_CHOOSE + max(PASSAGES)} or more, to choose layers and to test")
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    single = {f"{method} {layer}": [(method, layer)] for method in METHODS for layer in saes}
    found, chosen = try_on(model, tokenizer, saes, rows[:N_CHOOSE], PASSAGES[1], single), {}
    for method in METHODS:
        recall = {layer: np.mean(found[f"recall by {method} {layer} at 5%"]) for layer in saes}
        print(f"{method}, layer: recall", ", ".join(f"{i}: {x:.3f}" for i, x in recall.items()))
        chosen[method] = [(method, layer) for layer in sorted(recall, key=recall.get)[-N_LAYERS:]]
    chosen["dense, s3's layers"] = [("dense", layer) for _, layer in chosen["s3"]]
    saes, table = {i: saes[i] for i in sorted({i for x in chosen.values() for _, i in x})}, []
    for n in PASSAGES:
        found = try_on(model, tokenizer, saes, rows[N_CHOOSE:N_CHOOSE + N_TEST], n, chosen)
        for what, x in found.items():
            bm25s = found.get(re.sub("by .* at", "by bm25 at", what), x)
            row = {"mean": evaluate.mean_stderr(x),
                   "less bm25's": evaluate.mean_stderr(np.subtract(x, bm25s, dtype=float))}
            print(f"{n:3} passages, {len(x)} questions: {what:28}", ", ".join(
                f"{name} {value:.3f} ±{error:.3f}" for name, (value, error) in row.items()))
            x = np.array(x, float).round(4).tolist()
            table.append({"passages": n, "what": what, **row, "of each": x})
    return {"chosen": chosen, "table": table}

@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default="Who was the President?")
    parser.add_argument("--budget", type=int, default=256, help="tokens of spans (default 256)")
    parser.add_argument("--evaluate", action="store_true", help="with BoolQ's rows")
    own, rest = parser.parse_known_args(argv)
    args = evaluate.parse_args(rest)
    folder, has_saes, name = evaluate.find_fitted(args.saes, args.model)
    if not has_saes:
        raise sta.UsageError(f"{args.saes}: no SAEs; first run: python train_sae.py")
    model, tokenizer, layers = sta.load_model(
        name, *sta.pick_device(args.device, args.dtype), args.layer or "all")
    saes = {layer: sae for (layer, kind), sae in sta.load_saes(
        folder, model, layers if args.layer else None)[0].items() if kind == "key"}
    if own.evaluate:
        rows = [row for _, row in evaluate.task_rows("boolq", args.task_dir, args.limit)]
        about = evaluate.provenance(model)
        path = evaluate.result_path(args.out, name, about, "-s3")
        return sta.write_atomic(path, json.dumps(about | evaluate_on(model, tokenizer, saes, rows)))
    ids = sta.tokenize(sta.read_text(args.text, "valid", name), tokenizer, args.max_tokens)
    answer(model, tokenizer, saes, ids, own.question, own.budget)

if __name__ == "__main__":
    sta.run(main)
