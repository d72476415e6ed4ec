"""Calls of the short names, for the type checker: it is read by mypy and never run.

Lines that end in `type: ignore[...]` hold a mistake that the checker must find; it complains where
one of them is none.
"""

from pathlib import Path

import anndata as ad
import scemb

adata = scemb.datasets.load("baron_pancreas")
adata = ad.read_h5ad("my_cells.h5ad")

# Preprocessing
tokens = scemb.pp.tokenize(adata, obs_columns=["donor"])
print(len(tokens), scemb.pp.map_genes(adata.var_names).rows.shape)
folder: Path = scemb.pp.write_tokens([adata], "tokens", overwrite=True)
verdict: str = scemb.pp.leakage("corpus", adata).verdict
scemb.pp.tokenize(adata, max_length=512)  # type: ignore[call-arg]
scemb.pp.tokenise(adata)  # type: ignore[attr-defined]

# Tools
scemb.tl.embed(adata, "scemb-base", max_len=512, layer="counts")
annotator = scemb.tl.finetune(adata, "cell_type", donor="donor")
scemb.tl.annotate(adata, annotator, threshold=0.5)
annotator.save("annotator")
screen = scemb.tl.screen(adata, [1.0, 0.0], refine=20)
print(screen.table, screen.trust)
state = scemb.tl.donor_shift(adata, "condition", "disease", control="healthy", donor="donor")
match = scemb.tl.correlate(state, scemb.tl.screen_shifts(adata))
print(scemb.tl.rankings(match.table)["reversal"], match.power["text"])
print(scemb.tl.grn(adata, method="trees", n_trees=20).symbols)
scemb.tl.embed(adata, modell="scemb-base")  # type: ignore[call-arg]
scemb.tl.embed(adata, "scemb-base", "last")  # type: ignore[call-arg]
scemb.tl.finetune(adata, "cell_type", donor=3)  # type: ignore[arg-type]
scemb.tl.correlate(adata, match)  # type: ignore[arg-type]
scemb.tl.embedd(adata)  # type: ignore[attr-defined]
print(match.tables)  # type: ignore[attr-defined]

# Plots and the model
paths: list = scemb.pl.save_figure(scemb.pl.signed_violins(match.table, match.draws), "match")
config = scemb.model.ScembConfig(vocab_size=len(tokens.vocabulary))
scemb.pl.violins(match.table)  # type: ignore[attr-defined]
scemb.model.ScembModels(config)  # type: ignore[attr-defined]

# Names of before
scemb.embed.embed(adata)
scemb.crispr.edistance(scemb.crispr.assign_guides(adata))
