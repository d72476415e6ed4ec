"""The same answers on every processor, with any number of threads.

    processors.py                  ask the same questions in several settings and compare the
    answers
    processors.py answers FOLDER   ask them once, in this process, and write the answers down

Libraries choose their instructions when they start: numpy, OpenBLAS, torch and numba each have
a variable of the environment that forbids the newer ones. Each setting is a process of its own.
Tokens, masks, batches, medians and hashes of cells must be equal to the bit. Vectors are sums of
floating-point numbers, whose order is the library's: they must agree within 1e-5.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5  # of vectors, whose entries are of the order of one
TIMEOUT = 900  # seconds for one setting
N_CELLS = 150  # real cells whose tokens, masks and hashes are asked about
N_VECTORS = 50  # of them, those whose vectors are

# What decides which instructions the C library's log and exp may use.
NO_FMA = "glibc.cpu.hwcaps=-AVX512F,-AVX2,-AVX2_Usable,-FMA,-FMA_Usable,-FMA4"


def numpy_features():
    """Names of the processor features, beyond the least, for which this numpy has code that can run
    here."""
    return np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])


def settings(features):
    "Name -> variables of the environment; the first is what the others are compared with."
    wide = [f for f in features if f.startswith("AVX512") or f == "X86_V4"]
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    one = dict.fromkeys(threads, "1")
    two = dict.fromkeys(threads, "2")
    no_avx512 = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(wide),
        "OPENBLAS_CORETYPE": "Haswell",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    no_avx2 = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(features),
        "OPENBLAS_CORETYPE": "Nehalem",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "GLIBC_TUNABLES": NO_FMA,
    }
    return {
        "all features": one,
        "two threads": two,
        "no AVX-512": one | no_avx512,
        "no AVX2": one | no_avx2,
        "numba generic": one | {"NUMBA_CPU_NAME": "generic"},
    }


# --- the questions ------------------------------------------------------------------------------


def digest(*arrays):
    "One short name for some arrays: equal names, equal bits."
    h = hashlib.sha256()
    for a in arrays:
        a = np.ascontiguousarray(a)
        h.update(f"{a.dtype} {a.shape} ".encode() + a.tobytes())
    return h.hexdigest()[:16]


def our_tokens(counts):
    "Tokens under each rule of the tokenizer, and the gene medians."
    from scemb.tokens.ranking import Encoder, TokenizerSettings, gene_medians, protein_vocabulary

    vocabulary = gene_medians(counts, protein_vocabulary())
    token = vocabulary.token_of_rows(counts.genes.rows)
    chunk = next(counts.chunks())[1]
    rules = {
        "as published": dict(bins_over="detected"),
        "window of 300": dict(max_len=300, seed=7),
        "index": dict(ties="index"),
        "median": dict(scale="median", max_len=400),
    }
    answers = {"gene medians": digest(np.array(vocabulary.medians))}
    for name, rule in rules.items():
        encoded = Encoder(token, vocabulary, TokenizerSettings(**rule))(chunk)
        answers[f"tokens, {name}"] = digest(*encoded.values())
    shielded = Encoder(token, vocabulary, TokenizerSettings(max_len=100), vocabulary.genes[:500])(
        chunk
    )
    answers["tokens, protected genes"] = digest(*shielded.values())
    return answers


def cell_hashes(counts):
    "What a corpus knows of a cell, and its counts of protein-coding genes."
    from scemb.corpus.filters import coding_counts, gene_axis, measure

    axis = gene_axis(counts.genes)
    chunk = next(counts.chunks())[1]
    coding = coding_counts(chunk, axis, np.ones(chunk.shape[0], bool))
    return {
        "measures and hashes of cells": digest(*measure(chunk, axis).values()),
        "protein-coding counts": digest(coding.indptr, coding.indices, coding.data),
    }


def masks_and_batches(counts):
    "Which genes are hidden, and which cells go together."
    from scemb.model.batching import mask_genes
    from scemb.model.batching import grouped_batches, token_budget_batches, unpadded_batches
    from scemb.tokens.ranking import TokenizerSettings
    from scemb.tokens.tokenize import tokenize

    tokens = tokenize(counts, settings=TokenizerSettings(max_len=512), n_threads=2)
    cells = np.arange(len(tokens))
    answers = {}
    for share in (0.15, 0.5, 1.0):
        hidden = mask_genes(
            *tokens.gather(cells), cells, len(tokens.vocabulary), seed=3, share=share
        )
        answers[f"mask, share {share}"] = digest(*hidden)
    lengths = np.random.default_rng(0).integers(1, 3000, 20_000)
    for rule in (unpadded_batches, grouped_batches, token_budget_batches):
        batches = list(rule(lengths, seed=1, rank=1, world=3))
        answers[f"batches, {rule.__name__}"] = digest(
            np.concatenate(batches), [len(b) for b in batches]
        )
    return answers


def models(folder, make):
    "Small models with random weights: made by the first setting, opened by all."
    import torch

    from scemb.model.bases import open_base
    from scemb.model.encoder import ScembConfig, ScembForMaskedLM
    from scemb.model.geneformer import toy_geneformer
    from scemb.model.scgpt import read_scgpt, toy_scgpt
    from scemb.tokens.ranking import TokenizerSettings, protein_vocabulary

    vocabulary = protein_vocabulary()
    config = ScembConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    net = ScembForMaskedLM(config)
    if make:
        torch.manual_seed(0)
        torch.save(ScembForMaskedLM(config).state_dict(), folder / "scemb.pt")
        toy_geneformer(folder / "geneformer", context=512)
        toy_scgpt(folder / "scgpt")
    net.load_state_dict(torch.load(folder / "scemb.pt", weights_only=True))
    return {
        "scEMB": (net, vocabulary, TokenizerSettings(max_len=512)),
        "Geneformer": open_base(folder / "geneformer"),
        "scGPT": read_scgpt(folder / "scgpt", max_len=301),
    }


def vectors_and_peers(adata, folder, make):
    "(digests of the tokens of the peers, vectors of the cells by each model)"
    from scemb.model.embed import embed
    from scemb.tokens.tokenize import tokenize

    exact, close = {}, {}
    for name, model in models(folder, make).items():
        few = adata[:: N_CELLS // N_VECTORS].copy()
        close[name] = embed(few, model, device="cpu").obsm["X_scemb"]
        if name != "scEMB":
            tokens = tokenize(adata, model.vocabulary, settings=model.settings)
            exact[f"tokens of {name}"] = digest(*tokens.gather(np.arange(adata.n_obs)))
    return exact, close


def toy_medians(folder):
    "The medians of a toy Geneformer, which are random numbers, made in this setting."
    import pickle

    from scemb.model.geneformer import toy_geneformer

    made = toy_geneformer(folder, layers=1, width=8, context=16)
    return digest(
        np.array(
            list(pickle.loads((made / "gene_median_dictionary_gc30M.pkl").read_bytes()).values())
        )
    )


def libraries():
    "What each library says that it runs with, and an order of ties that numpy leaves open."
    import torch
    from numba.core.registry import cpu_target
    from threadpoolctl import threadpool_info

    ties = np.argsort(np.random.default_rng(0).integers(0, 3, 1000))
    blas = {i["architecture"] for i in threadpool_info() if i["internal_api"] == "openblas"}
    return {
        "numpy": digest(ties)[:4],
        "torch": torch.backends.cpu.get_cpu_capability(),
        "OpenBLAS": ", ".join(sorted(blas)),
        "threads": torch.get_num_threads(),
        "numba": cpu_target.target_context.codegen()._get_host_cpu_name(),
    }


def write_answers(folder, shared, make):
    "Ask everything in this process."
    from scemb.data import datasets
    from scemb.data.counts import read_counts

    adata = datasets.load("baron_pancreas")[:: 1937 // N_CELLS].copy()
    counts = read_counts(adata)
    exact, close = vectors_and_peers(adata, shared, make)
    exact |= our_tokens(counts) | cell_hashes(counts) | masks_and_batches(counts)
    exact["medians of a toy Geneformer"] = toy_medians(folder / "toy")
    np.savez(folder / "vectors.npz", **close)
    (folder / "answers.json").write_text(json.dumps(dict(exact=exact, libraries=libraries())))


# --- the comparison -----------------------------------------------------------------------------


def ask(name, env, folder, shared, make, root=ROOT):
    "(exact answers, vectors, what the libraries say) of one setting."
    folder.mkdir()
    env = {**os.environ, **env, "PYTHONPATH": str(root)}
    command = [
        sys.executable,
        __file__,
        "answers",
        str(folder),
        str(shared),
        *(["make"] if make else []),
    ]
    done = subprocess.run(
        command, env=env, cwd=root, timeout=TIMEOUT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    answers = json.loads((folder / "answers.json").read_text())
    with np.load(folder / "vectors.npz") as vectors:
        close = dict(vectors)
    return answers["exact"], close, answers["libraries"]


def differences(name, here, reference):
    "Complaints where one setting answers otherwise than the reference; each is (exact, vectors)."
    bad = []
    (exact, close), (wanted, near) = here, reference
    for question in sorted(wanted.keys() | exact.keys()):
        got, want = exact.get(question), wanted.get(question)
        if got != want:
            bad.append(f"{name}: {question} is {got}, with all features it is {want}.")
    for model in sorted(near.keys() | close.keys()):
        if model not in near or model not in close:
            bad.append(f"{name}: vectors of {model} are missing in one setting.")
            continue
        worst = np.abs(close[model] - near[model]).max()
        if not worst <= TOLERANCE:
            bad.append(
                f"{name}: vectors of {model} differ by {worst:.1e}, wanted at most {TOLERANCE:.0e}."
            )
    return bad


def same_everywhere(root=ROOT):
    "Complaints about answers that depend on the processor or on the threads."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        shared = tmp / "models"
        shared.mkdir()
        todo = settings(numpy_features())
        first = next(iter(todo))
        found = {first: ask(first, todo[first], tmp / "0", shared, True, root)}
        with ThreadPoolExecutor(2) as pool:
            jobs = {
                name: pool.submit(ask, name, env, tmp / str(i), shared, False, root)
                for i, (name, env) in enumerate(todo.items())
                if name != first
            }
            found |= {name: job.result() for name, job in jobs.items()}
    bad, n = [], len(found[first][0])
    for name, (exact, close, libraries) in found.items():
        print(
            "      " + f"{name}: " + ", ".join(f"{k} {v}" for k, v in libraries.items()), flush=True
        )
        bad += differences(name, (exact, close), found[first][:2])
    worst = max(
        np.abs(close[m] - found[first][1][m]).max() for _, close, _ in found.values() for m in close
    )
    print(
        f"      {n} exact answers and {len(found[first][1])} sets of vectors in {len(found)} "
        f"settings; vectors differ by {worst:.0e} at most",
        flush=True,
    )
    return bad


if __name__ == "__main__":
    if sys.argv[1:2] == ["answers"]:
        write_answers(Path(sys.argv[2]), Path(sys.argv[3]), "make" in sys.argv[4:])
    else:
        complaints = same_everywhere()
        print(*complaints, sep="\n")
        sys.exit(1 if complaints else 0)
