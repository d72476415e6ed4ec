"""What many pages need of other people's libraries: imported, and compiled, once for all of them.

Nothing of scemb is here, and nothing that starts threads (jax).
"""

import gc
import importlib
import warnings

import anndata
import numpy as np
import pynndescent
import scanpy
import torch
import transformers

for name in (
    "fastcore.test",
    "hypothesis",
    "IPython.display",
    "matplotlib.pyplot",
    "nbdev.test",
    "networkx",
    "pyarrow.parquet",
    "rich.progress",
    "safetensors.torch",
    "scipy.optimize",
    "scipy.stats",
    "sklearn.cluster",
    "sklearn.linear_model",
    "sklearn.metrics",
    "sklearn.model_selection",
    "torch.distributed.tensor",
    "transformers.trainer",
    "typer.testing",
    "xxhash",
    "yaml",
    "zarr",
):
    importlib.import_module(name)

# transformers imports a class when it is first asked for.
for name in (
    "AutoConfig",
    "AutoModelForMaskedLM",
    "AutoTokenizer",
    "BertForMaskedLM",
    "PreTrainedModel",
    "PreTrainedTokenizer",
    "Trainer",
    "TrainingArguments",
):
    getattr(transformers, name)

# UMAP and its search for neighbours are compiled in every process that first calls them (30 s).
points = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    cells = anndata.AnnData(points)
    scanpy.pp.neighbors(cells, use_rep="X")
    scanpy.tl.umap(cells)
    pynndescent.NNDescent(points, n_neighbors=15, random_state=0).neighbor_graph

# No thread of torch is alive before the fork, and no page's garbage is looked for in all this.
assert not torch.cuda.is_initialized()
gc.collect()
gc.freeze()
