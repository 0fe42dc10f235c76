"""What atoms do: attention taken apart, and a page to browse.

    python -m beyond.atoms                     # the newest SAEs: two minutes for tiny
    python -m beyond.atoms --model FOLDER --layer 14 --sentence "The capital of France is Paris"

A query's logit at an earlier token is q.k, with both turned by RoPE. As the key is its head's mean
plus its atoms plus what the code misses, the logit is a sum of such parts, and one can say which
atoms made a head look where it looked.

The page, results/<model>-atoms.html, is one file without network, made from atoms.html. A sentence
stands above; a click shows a token's code, and where it looks, part by part. Of each atom the page
shows the strongest tokens of a text, each a different word; tokens drawn at random from all for
which the atom fires; and how its coefficients are distributed. Of a value atom, the tokens that it
makes likelier and less likely, through W_O, the last norm's weights and the unembedding; of a key
atom, the words whose queries have the largest product with it, before RoPE. These two are those of
the kv head in which the atom fires most.

results/<model>-atoms.png shows the parts of one head's attention from the last token: that head of
all which looks most at a token that is neither the first nor one of the last NEAR. The .json has
these parts, and the code of the last key. Non-goal: naming atoms by a language model.
"""
import functools
import itertools
import json
import pathlib
import statistics
import textwrap

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import plots
import sta
from beyond import LOOK, begin_look, capture_queries, parse_args
from support.files import ROOT, explain, run_main, write_atomic
from support.text import encode_text

NEAR = 4  # tokens: attention that is not to one of the last NEAR, nor to the first, is called far
N_KEPT, N_SHOWN = 200, 6  # tokens per atom: from which different words are chosen, shown
BEFORE, AFTER = 8, 6  # tokens around one that is shown

def words_of(tokenizer, windows):
    """The text of each token, with the space before it, which some tokenizers drop when the token
    stands first."""
    first = encode_text(tokenizer, ":", special=False)[-1:]
    n = len(tokenizer.decode(first))
    text = {i: tokenizer.decode([*first, i])[n:] for i in windows.unique().tolist()}
    return [text[i] for i in windows.flatten().tolist()]

# ------------------------------------------------------------------ on which tokens atoms fire
@torch.no_grad()
def read_codes(model, saes, windows, ks):
    """Windows (n, T), budgets {kind: k} -> {(layer, kind): (z, idx)}, (n * T, H, k) each; z is 0 in
    first tokens, which are kept exact."""
    kept, layers = {site: [] for site in saes}, sorted({layer for layer, _ in saes})
    for ids in tqdm(windows.split(max(1, 16_384 // windows.shape[1])), desc="codes", disable=None):
        for site, x in sta.harvest(model, ids, layers, sink=0).items():
            z, idx = saes[site].encode(x.float(), ks[site[1]])  # (tokens, H, k)
            z[::windows.shape[1]] = 0
            kept[site].append((z.half().cpu(), idx.short().cpu()))
    return {site: tuple(map(torch.cat, zip(*parts))) for site, parts in kept.items()}

def by_atom(z, idx, n_latents):
    """A code (tokens, H, k) -> (M, tokens): an atom's coefficients, in whichever head it is
    largest."""
    dense = torch.zeros(len(z), n_latents, device=z.device)
    for of_head in zip(z.float().unbind(1), idx.long().unbind(1)):
        dense = dense.maximum(torch.zeros_like(dense).scatter_(1, *reversed(of_head)))
    return dense.T

def strongest_head(z, idx, n_latents):
    """A code (tokens, H, k) -> (M,): the head in which an atom fires most."""
    fired = [torch.bincount(i[v > 0].int(), minlength=n_latents)
             for v, i in zip(z.unbind(1), idx.unbind(1))]
    return torch.stack(fired).argmax(0)

# ------------------------------------------------------------------ what writes, and what reads
@torch.no_grad()
def promoted(model, layer, atoms, heads):
    """What value atoms (M, D) of kv heads (M,) add to the logits, up to a factor, if all queries of
    the head read alike -> (ids (M, n) of the tokens that gain most, of those that lose most); None
    for a model without o_proj and a final norm of that name."""
    decoder = model.get_decoder()
    H, D = sta.kv_shape(decoder.config)
    try:
        W_O = decoder.layers[layer].self_attn.o_proj.weight.float()
        gain = decoder.norm.weight.float()
    except AttributeError:
        return None
    W_O = W_O.unflatten(1, (H, -1, D)).mean(2)  # (width, H, D)
    every = torch.arange(len(atoms), device=atoms.device)
    written = gain * torch.einsum("whd,md->hmw", W_O, atoms)[heads, every]  # (M, width)
    most, least = [], []
    for part in written.split(128):  # (128, width)
        logits = model.get_output_embeddings()(part.to(model.dtype)).float()  # (128, V)
        most.append(logits.topk(N_SHOWN).indices)
        least.append((-logits).topk(N_SHOWN).indices)
    return torch.cat(most), torch.cat(least)

@torch.no_grad()
def readers(queries, ids, atoms, heads):
    """Queries (tokens, H, D), the mean over each kv head's queries; ids (tokens,); key atoms (M, D)
    of kv heads (M,) -> token ids (M, n) whose mean query has the largest product with the atom, of
    those that occur three times or more."""
    known, label, counts = ids.unique(return_inverse=True, return_counts=True)
    sums = queries.new_zeros(len(known), *queries.shape[1:]).index_add_(0, label, queries)
    means = (sums / counts[:, None, None])[counts >= 3]  # (words, H, D)
    every = torch.arange(len(atoms), device=atoms.device)
    products = torch.einsum("whd,md->hmw", means, atoms)[heads, every]  # (M, words)
    return known[counts >= 3][products.topk(min(2 * N_SHOWN, len(means))).indices]

def different(items, text):
    """The first N_SHOWN items whose texts are different words."""
    chosen = {}
    for item in items:
        chosen.setdefault(text(item).strip().lower(), item)
    return list(chosen.values())[:N_SHOWN]

def find_readers(run, windows, heads):
    """heads: {site: (M,)}, in which head an atom fires most -> {site: {name: [[word]]}}: by which
    tokens' queries key atoms are read, and what value atoms promote and suppress."""
    windows = windows.to(run.model.device)
    with capture_queries(run.model, run.layers) as queries:
        run.model.get_decoder()(input_ids=windows, use_cache=False)
    found = {}
    for (layer, kind), sae in run.saes.items():
        if kind == "key":
            H = len(sae.b_dec)
            mean = queries[layer].unflatten(2, (H, -1)).mean(3).flatten(0, 1).float()
            found[layer, kind] = {"queries": readers(mean, windows.flatten(), sae.W_dec,
                                                     heads[layer, kind])}
        else:
            both = promoted(run.model, layer, sae.W_dec, heads[layer, kind])
            found[layer, kind] = dict(zip(("promoted", "suppressed"), both)) if both else {}
    decode = functools.lru_cache(None)(lambda i: run.tokenizer.decode([i]))

    def words(ids):
        return [decode(i) for i in different(ids, decode)]

    return {site: {name: [words(row) for row in ids.tolist()] for name, ids in lists.items()}
            for site, lists in found.items()}

# ------------------------------------------------------------------ attention taken apart
@torch.no_grad()
def read_attention(model, layers, ids):
    """Token ids (B, T) -> {layer: (queries after RoPE (B, T, query heads, D), keys and values (B,
    T, H, D))}, float32. Raises UsageError if attention is not the softmax of q.k after Llama's
    RoPE, as it is in Qwen, Mistral, Yi and others."""
    def read(ids, **options):
        with sta.capture(model, layers) as vectors, capture_queries(model, layers) as queries:
            output = model.get_decoder()(input_ids=ids.to(model.device), use_cache=False, **options)
        return output, {layer: (rotated(model, queries[layer].float()),
                                *(vectors[layer, kind].float() for kind in sta.KINDS))
                        for layer in layers}

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns its weights
    with explain("this attention is no softmax of q.k after Llama's RoPE, and not taken apart"):
        output, few = read(ids[:, :64], output_attentions=True)
        for layer, (queries, keys, _) in few.items():
            weights = softmax(logits(model, layer, queries, keys))
            if not torch.allclose(weights, output.attentions[layer].float(), atol=2e-2):
                raise ValueError(f"layer {layer} attends otherwise")
    model.set_attn_implementation(before)
    return read(ids)[1]

def rotated(model, x):
    """Vectors (B, T, n, D) of tokens 0 to T - 1, after RoPE."""
    cos, sin = model.get_decoder().rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
    return apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]

def logits(model, layer, queries, vectors):
    """Queries after RoPE (B, T, n, D), keys or parts of them before RoPE (B, T, H, D) -> their
    scaled products (B, n, T, T): of head and query token with earlier token."""
    n_groups = queries.shape[2] // vectors.shape[2]
    turned = rotated(model, vectors).repeat_interleave(n_groups, 2)  # (B, T, n, D)
    scale = model.get_decoder().layers[layer].self_attn.scaling
    return scale * torch.einsum("btnd,bind->bnti", queries, turned)

def softmax(x):
    """Of logits (..., T, T), over tokens up to the query's."""
    future = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return x.masked_fill(future, -torch.inf).softmax(-1)

@torch.no_grad()
def take_apart(model, layer, sae, k, queries, keys):
    """Queries and keys of a layer, as `read_attention` returns them -> idx (B, T, H, k), and the
    parts of all logits, which add up to them: of the mean (B, n, T, T), of each atom (B, n, T, T,
    k), of what the code misses (B, n, T, T)."""
    z, idx = sae.encode(keys, k)  # (B, T, H, k)
    atoms = sae.scale * z[..., None] * sae.W_dec[idx]  # (B, T, H, k, D)
    missed = keys - sae.decode(z, idx)
    mean, rest = (logits(model, layer, queries, x) for x in (sae.b_dec.expand_as(keys), missed))
    parts = [logits(model, layer, queries, atoms[..., j, :]) for j in range(k)]
    return idx, mean, torch.stack(parts, -1), rest

@torch.no_grad()
def measure_attention(model, rows, layers, ids, sink=1):
    """How well the keys of {name: {layer: codec}} serve dense queries, over token ids (B, T) ->
    {name: {layer: {r2, slope, fvu}}}. Of a query's logits at coded tokens, less their mean: the
    share of their variance that the coded keys explain; the slope of the coded logits on the exact
    ones. And the keys' own FVU."""
    measured = {name: {} for name in rows}
    for layer, (queries, keys, values) in read_attention(model, layers, ids).items():
        exact = logits(model, layer, queries, keys)
        live = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        for name, codecs in rows.items():
            keys_hat = sta.roundtrip(codecs[layer], keys, values, live)[0]
            measured[name][layer] = compare_logits(
                exact, logits(model, layer, queries, keys_hat), sink)
            measured[name][layer]["fvu"] = sta.fidelity(keys[:, sink:], keys_hat[:, sink:])["fvu"]
    return measured

def compare_logits(exact, coded, sink):
    """Logits (B, n, T, T) -> {r2, slope}, as `measure_attention` has them."""
    seen = torch.ones(exact.shape[-2:], dtype=torch.bool, device=exact.device).tril()
    seen[:, :sink] = False
    n_seen = seen.sum(-1, keepdim=True).clamp_min(1)
    exact, coded = ((x - (x * seen).sum(-1, keepdim=True) / n_seen) * seen for x in (exact, coded))
    variance = exact.square().sum()
    return {"r2": 1 - ((coded - exact).square().sum() / variance).item(),
            "slope": ((coded * exact).sum() / variance).item()}

def furthest_look(weights):
    """Attention weights {layer: (n, T, T)} -> (layer, head): whose last query looks most at a token
    that is neither the first nor one of the last NEAR."""
    most = {(layer, head): x[-1, 1:-NEAR].max().item()
            for layer, of_layer in weights.items() for head, x in enumerate(of_layer)
            if of_layer.shape[-1] > NEAR + 1}
    return max(most, key=most.get) if most else None

# ------------------------------------------------------------------ the picture
def example_of_attention(looks, said):
    """For `draw_attention`: where the last token of the sentence looks, by the head that
    `furthest_look` finds; without the first token, which stays exact."""
    found = furthest_look({layer: weights for layer, (_, weights, _) in looks.items()})
    if not found:
        return None
    layer, head = found
    idx, weights, parts = looks[layer]
    idx = idx[:, head * idx.shape[1] // len(weights)]  # (T, k): of the kv head that it reads
    atoms = [[[m, round(x, 4)] for m, x in zip(*pair)]
             for pair in zip(idx.tolist(), parts[head, -1, :, 2:].tolist())]
    mean, missed = parts[head, -1, :, :2].T.tolist()
    return {"layer": layer, "head": head, "tokens": said[1:], "mean": mean[1:], "atoms": atoms[1:],
            "missed": missed[1:], "weights": weights[head, -1, 1:].tolist()}

def draw_attention(look, model_name):
    """The picture of what `example_of_attention` returned: a column for each earlier token, of the
    parts of its logit; above, its attention weight. The nine atoms with the largest parts have a
    colour each. Attention depends on differences of logits alone, so the part of the mean key is
    drawn less its average."""
    figure, (top, panel) = plt.subplots(2, 1, figsize=(8.5, 5.2), sharex=True, height_ratios=(1, 4),
                                        layout="constrained")
    places = range(len(look["tokens"]))
    top.bar(places, look["weights"], color="dimgrey")
    top.set_ylabel("attention")
    size = {}  # atom: the largest of its parts
    for m, part in itertools.chain(*look["atoms"]):
        size[m] = max(size.get(m, 0), abs(part))
    largest = sorted(size, key=size.get, reverse=True)[:9]
    palette = [colour for i, colour in enumerate(plt.get_cmap("tab10").colors) if i != 7]  # no grey
    colours = dict(zip(largest, palette))
    ends = {1: [0.0] * len(places), -1: [0.0] * len(places)}  # of columns, above and below zero

    def stack(x, part, **style):
        sign = 1 if part > 0 else -1
        panel.bar(x, part, bottom=ends[sign][x], lw=0.4, **style)
        ends[sign][x] += part

    average = statistics.mean(look["mean"])
    for x, (atoms, mean, missed) in enumerate(zip(look["atoms"], look["mean"], look["missed"])):
        stack(x, mean - average, color="darkgrey", ec="white")
        for m, part in sorted(atoms, key=lambda pair: (pair[0] not in colours, -abs(pair[1]))):
            stack(x, part, color=colours.get(m, "#f0e4cc"), ec="white")
        stack(x, missed, color="white", hatch="////", ec="grey")
    for m in largest:
        on = [token.strip() for token, atoms in zip(look["tokens"], look["atoms"])
              if m in dict(atoms)]
        words = textwrap.shorten(" ".join(dict.fromkeys(on)), 26, placeholder=" …")
        panel.bar(0, 0, color=colours[m], label=f"atom {m}: {words}")
    panel.bar(0, 0, color="#f0e4cc", label="other atoms")
    panel.bar(0, 0, color="darkgrey", label="mean key (average subtracted)")
    panel.bar(0, 0, color="white", hatch="////", ec="grey", label="missed by the code")
    panel.axhline(0, color="black", lw=0.8)
    panel.set_xticks(places, look["tokens"], rotation=60, ha="right", parse_math=False)
    panel.set_ylabel("parts of the logit")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=8.5)
    top.set_title(f"{model_name}, layer {look['layer']}, head {look['head']}: what the last token "
                  "attends to", fontsize=10, parse_math=False)
    return figure

# ------------------------------------------------------------------ the page
def page_of_site(by_atom, words, generator):
    """What atoms.html shows of a site's atoms, whose coefficients are by_atom (M, tokens). Contexts
    are a token, and hundredths of the coefficients at the BEFORE tokens before it, at it, and at
    the AFTER tokens behind it."""
    page = {"fired": [], "strongest": [], "sample": [], "bars": []}
    for z in by_atom:  # (tokens,)
        fires = z.nonzero()[:, 0]
        some = fires[torch.randperm(len(fires), generator=generator)[:N_SHOWN]]
        best = z.topk(min(N_KEPT, len(fires))).indices.tolist()
        padded = F.pad((100 * z).round().int(), (BEFORE, AFTER))

        def contexts(tokens):
            return [[i, *padded[i:i + BEFORE + 1 + AFTER].tolist()] for i in tokens]

        page["fired"].append(round(len(fires) / len(words), 5))
        page["strongest"].append(contexts(different(best, lambda i: words[i])))
        page["sample"].append(contexts(some[z[some].argsort(descending=True)].tolist()))
        page["bars"].append(torch.histc(z[fires], 10, 0, z.max().item()).int().tolist())
    return page

@torch.no_grad()
def code_of(run, ids, ks):
    """{site: [[[atom, z] of a head] of a token]} of token ids (T,)."""
    codes = {}
    for (layer, kind), x in sta.harvest(run.model, ids[None], run.layers, sink=0).items():
        z, idx = run.saes[layer, kind].encode(x.float(), ks[kind])  # (T, H, k)
        codes[f"{layer}.{kind}"] = []
        for token in zip(idx.tolist(), z.tolist()):
            heads = [[[m, round(v, 2)] for m, v in zip(*head)] for head in zip(*token)]
            codes[f"{layer}.{kind}"].append(heads)
    return codes

def looks_of(run, ids, k_key):
    """Token ids (T,) -> {layer: (idx (T, H, k), weights (n, T, T), parts (n, T, T, 2 + k): of the
    mean, of what the code misses, of each atom)}."""
    looks = {}
    for layer, (queries, keys, _) in read_attention(run.model, run.layers, ids[None]).items():
        idx, mean, atoms, missed = take_apart(
            run.model, layer, run.saes[layer, "key"], k_key, queries, keys)
        parts = torch.cat([mean[..., None], missed[..., None], atoms], -1)
        looks[layer] = idx[0], softmax(parts.sum(-1))[0], parts[0]
    return looks

def looks_of_page(weights, parts):
    """What atoms.html shows of a layer's attention: of each head, query token and token up to it,
    thousandths of its weight and hundredths of the parts of its logit."""
    whole = torch.cat([1000 * weights[..., None], 100 * parts], -1).round().int().tolist()
    return [[of_query[:t + 1] for t, of_query in enumerate(of_head)] for of_head in whole]

def example_of_key(page, words, codes):
    """The key of the sentence's last token in each layer's first head: its atoms with their
    coefficients, and what the page shows of them."""
    rows = {}
    for site, shown in page.items():
        if site.endswith("key"):
            rows[site] = [{"atom": m, "z": z, "fired": shown["fired"][m],
                           "strongest": [words[i] for i, *_ in shown["strongest"][m]],
                           "sample": [words[i] for i, *_ in shown["sample"][m]],
                           "queries": shown["queries"][m]}
                          for m, z in codes[site][-1][0] if z > 0]
    return rows

def main(argv=None):
    args = parse_args(__doc__, argv, LOOK, sentence=dict(
        help="that the page takes apart (default: the text's first 48 tokens)"))
    run = begin_look(args, "-atoms")
    ks = {"key": args.k_key, "value": args.k_val}
    sentence = run.windows[0, 1:49]
    if args.sentence:
        sentence = torch.tensor(encode_text(run.tokenizer, args.sentence))
    words, said = (words_of(run.tokenizer, ids) for ids in (run.windows, sentence[None]))
    codes, page, generator = code_of(run, sentence, ks), {}, torch.Generator().manual_seed(0)
    of_text = read_codes(run.model, run.saes, run.windows, ks)
    heads = {site: strongest_head(*code, run.saes[site].n_latents)
             for site, code in of_text.items()}
    readers_of = find_readers(run, run.windows[:max(1, 16_384 // run.windows.shape[1])], heads)
    for (layer, kind), code in of_text.items():
        dense = by_atom(*code, run.saes[layer, kind].n_latents)
        page[f"{layer}.{kind}"] = {**page_of_site(dense, words, generator),
                                   **readers_of[layer, kind], "sentence": codes[f"{layer}.{kind}"]}
    try:
        looks = looks_of(run, sentence, args.k_key)
    except sta.UsageError as error:
        print(f"the page shows no attention: {error}")
        looks = {}
    for layer, (_, weights, parts) in looks.items():
        page[f"{layer}.key"]["looks"] = looks_of_page(weights, parts)
    about = {**run.about, "k_key": args.k_key, "k_val": args.k_val}
    name, look = pathlib.Path(run.name).name, example_of_attention(looks, said)
    data = {"model": name, "words": words, "sentence": said, "sites": page, "before": BEFORE,
            "tokens": about["tokens"], "k_key": args.k_key, "k_val": args.k_val}
    data = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # so that no tag of the page begins in it
    template = (ROOT / "beyond" / "atoms.html").read_text(encoding="utf-8")
    if look:
        plots.save(draw_attention(look, name), run.path.with_suffix(".png"))
    example = example_of_key(page, words, codes)
    result = {**about, "sentence": said, "example": example, "look": look}
    for path, content in ((run.path.with_suffix(".html"), template.replace("DATA", data)),
                          (run.path, json.dumps(result) + "\n")):
        write_atomic(path, content)
        print(f"wrote {path}")

if __name__ == "__main__":
    run_main(main)
