"""All that a GPU without our data sets needs to train and to judge, in one small folder.

    scemb curate data_manifests/corpora/corpus_open.toml --out runs/corpus
    python nbs/launch/gpu_pack.py --corpus runs/corpus --out local/gpu_pack

The folder holds the counts of the open corpus by token of the vocabulary, its cells' table, what
the judging compares with (principal components), the gene vectors that training starts from, and a
small token data set. No evaluation set is in it: the corpus leaves them out.
`nbs/launch/gpu_train.py` reads it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))

OBS = ["dataset_id", "batch", "donor_id", "tissue", "cell_type"]
NO_LABEL = ["unknown", "unassigned", "nan", "None", ""]


def read_corpus_counts(corpus, vocabulary):
    "Cells of a curated corpus -> counts (cells, tokens) as CSR, table, genes each study measured."
    import anndata as ad
    from scemb.corpus.curate import read_corpus

    parts, tables, measured = [], [], {}
    token_of = {gene: i + 4 for i, gene in enumerate(vocabulary.genes)}
    for shard in read_corpus(corpus)["shards"]:
        data = ad.read_h5ad(Path(corpus) / shard["file"])
        tokens = np.array([token_of[gene] for gene in data.var_names])
        shape = (data.n_obs, len(vocabulary))
        token_of_value = tokens[data.X.indices].astype(np.int32)
        indptr = data.X.indptr.astype(np.int32)
        parts.append(sp.csr_matrix((data.X.data, token_of_value, indptr), shape=shape))
        tables.append(data.obs[OBS].astype(str).reset_index(drop=True))
        seen = np.zeros(len(vocabulary), bool)
        seen[tokens[data.var["measured"].to_numpy(bool)]] = True
        for study in tables[-1].dataset_id.unique():
            measured[study] = measured.get(study, False) | seen
    counts = sp.vstack(parts).tocsr()
    counts.sort_indices()
    return counts, pd.concat(tables, ignore_index=True), measured


def write_counts(path, counts, obs):
    "Counts and table as compressed Arrow: of each cell the steps from gene to gene, the counts."
    import pyarrow as pa

    steps = np.diff(counts.indices, prepend=0)
    first_of_cell = counts.indptr[:-1][np.diff(counts.indptr) > 0]
    steps[first_of_cell] = counts.indices[first_of_cell]
    offsets = pa.array(counts.indptr.astype(np.int32))
    columns = dict(
        steps=pa.ListArray.from_arrays(offsets, pa.array(steps.astype(np.uint16))),
        counts=pa.ListArray.from_arrays(offsets, pa.array(counts.data.astype(np.uint16))),
    )
    columns |= {name: pa.array(obs[name].to_numpy(dtype=object)) for name in obs}
    table = pa.table(columns)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 15))
    with (
        pa.OSFile(str(path), "wb") as f,
        pa.ipc.new_file(f, table.schema, options=options) as writer,
    ):
        writer.write_table(table)


def read_counts(path):
    "What `write_counts` wrote -> counts as CSR (indptr, indices, data), table."
    import pyarrow as pa

    table = pa.ipc.open_file(str(path)).read_all().combine_chunks()
    steps = table.column("steps").chunk(0)
    indptr = steps.offsets.to_numpy().astype(np.int64)
    gaps = steps.values.to_numpy().astype(np.int64)
    upto = np.concatenate([[0], np.cumsum(gaps)])
    indices = (upto[1:] - np.repeat(upto[indptr[:-1]], np.diff(indptr))).astype(np.int32)
    data = table.column("counts").chunk(0).values.to_numpy().astype(np.int32)
    return indptr, indices, data, table.drop_columns(["steps", "counts"]).to_pandas()


def write_vectors(path, vectors):
    "Gene vectors in eight bits, with a scale for each gene: a start needs no more."
    scale = np.maximum(np.abs(vectors).max(1, keepdims=True), 1e-9) / 127
    np.savez_compressed(
        path, vectors=np.rint(vectors / scale).astype(np.int8), scale=scale.astype(np.float32)
    )


def read_vectors(path):
    "What `write_vectors` wrote, (tokens, width)."
    packed = np.load(path)
    return packed["vectors"].astype(np.float32) * packed["scale"]


def own_components(counts, n_top_genes):
    "Fifty principal components of log-normalised counts, fitted on these very cells."
    import anndata as ad
    from scemb.model.baselines import pca_embedding

    some = np.asarray((counts > 0).sum(0)).ravel() > 0
    return pca_embedding(ad.AnnData(counts[:, some]), n_top_genes=n_top_genes)


def transferred_labels(obs, components):
    "The source's cell type; in unlabelled blood PBMC 3k's, where 12 of 15 neighbours agree."
    from sklearn.neighbors import KNeighborsClassifier

    labels = obs.cell_type.where(~obs.cell_type.isin(NO_LABEL), "").to_numpy(dtype=object)
    blood = (obs.tissue == "blood").to_numpy()
    z = components.copy()
    for study in obs.dataset_id[blood].unique():  # each study around its own mean
        of_study = (obs.dataset_id == study).to_numpy()
        z[of_study] -= z[of_study].mean(0)
    teachers = blood & (labels != "")
    asked = blood & (labels == "") & (obs.dataset_id != "pbmc3k").to_numpy()
    if not asked.any():
        return labels
    vote = KNeighborsClassifier(15).fit(z[teachers], labels[teachers].astype(str))
    shares = vote.predict_proba(z[asked])
    named = vote.classes_[shares.argmax(1)].astype(object)
    labels[asked] = np.where(shares.max(1) >= 12 / 15, named, "")
    return labels


def write_training_tokens(out, corpus, vocabulary, max_len, share):
    "A token data set of a random share of the cells."
    import anndata as ad
    from scemb.corpus.curate import read_corpus
    from scemb.tokens.ranking import TokenizerSettings
    from scemb.tokens.tokenize import write_tokens

    sources = []
    for shard in read_corpus(corpus)["shards"]:
        data = ad.read_h5ad(Path(corpus) / shard["file"])
        n_kept = int(np.ceil(share * data.n_obs))
        kept = np.sort(np.random.default_rng(0).permutation(data.n_obs)[:n_kept])
        sources.append(data[kept].copy())
    columns = ["dataset_id", "batch", "cell_type"]
    settings = TokenizerSettings(max_len=max_len)
    write_tokens(
        sources,
        out,
        vocabulary=vocabulary,
        settings=settings,
        obs_columns=columns,
        overwrite=True,
        compression="zstd",
    )


def toy_cells(vocabulary, n_cells=150):
    "Some pancreas cells of the package; its third library stands in for PBMC 3k in a trial."
    from scemb.data import datasets
    from scemb.data.counts import read_counts as counts_of

    data = datasets.load("baron_pancreas")
    libraries = data.obs.batch.astype(str).to_numpy()
    names = np.unique(libraries)
    chosen = np.concatenate([np.flatnonzero(libraries == name)[:n_cells] for name in names])
    data = data[chosen].copy()
    tokens = vocabulary.token_of_rows(counts_of(data).genes.rows)
    known = np.flatnonzero(tokens >= 0)
    values = sp.csr_matrix(data.X)[:, known].tocoo()
    shape = (data.n_obs, len(vocabulary))
    counts = sp.csr_matrix((values.data, (values.row, tokens[known][values.col])), shape=shape)
    obs = data.obs.reindex(columns=OBS).astype(str).reset_index(drop=True)
    third = (obs.batch == names[2]).to_numpy()
    obs["dataset_id"] = np.where(third, "pbmc3k", "baron_pancreas")
    obs["tissue"] = np.where(third, "blood", "pancreas")
    seen = np.asarray(counts.sum(0)).ravel() > 0
    return counts.astype(np.int32), obs, dict(pbmc3k=seen, baron_pancreas=seen)


def write_pack(out, vocabulary, counts, obs, measured, width):
    "Write all but the token data set."
    from scemb.model.baselines import gene_vectors
    from scemb.tokens.ranking import Encoder, TokenizerSettings
    from scemb.tokens.tokenize import TokenSet

    vocabulary.save(out)
    components = own_components(counts, None)
    np.save(out / "components.npy", components.astype(np.float16))
    for name, study in (("pbmc3k", "pbmc3k"), ("baron", "baron_pancreas")):
        rows = (obs.dataset_id == study).to_numpy()
        for kind, n_top_genes in (("svd50", None), ("hvg50", 2000)):
            own = own_components(counts[rows], n_top_genes)
            np.save(out / f"{name}_{kind}.npy", own.astype(np.float16))
    obs["label"] = transferred_labels(obs, components)
    write_counts(out / "counts.arrow", counts, obs)
    np.save(out / "measured.npy", np.packbits([measured[s] for s in sorted(measured)], axis=1))

    settings = TokenizerSettings(max_len=512)
    encoded = Encoder(np.arange(len(vocabulary)), vocabulary, settings)(counts)
    parts = [(encoded["offsets"], encoded["genes"], encoded["bins"])]
    cells = TokenSet(parts, obs, vocabulary, settings)
    write_vectors(out / "gene_vectors.npz", gene_vectors(cells, width, max_len=512))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", default="runs/corpus", help="folder made by scemb curate")
    parser.add_argument("--out", default="local/gpu_pack", help="folder to write")
    parser.add_argument("--width", type=int, default=192, help="width of the gene vectors")
    parser.add_argument("--share", type=float, default=0.25, help="cells in the token data set")
    parser.add_argument("--toy", action="store_true", help="a trial on the package's own cells")
    args = parser.parse_args(arguments)
    from scemb.tokens.ranking import protein_vocabulary

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = protein_vocabulary()
    cells = toy_cells(vocabulary) if args.toy else read_corpus_counts(args.corpus, vocabulary)
    write_pack(out, vocabulary, *cells, 32 if args.toy else args.width)
    if args.share and not args.toy:
        write_training_tokens(out / "tokens_1024", args.corpus, vocabulary, 1024, args.share)
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.relative_to(out)}")


if __name__ == "__main__":
    main()
