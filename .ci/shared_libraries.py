"""What many pages need of other people's libraries: imported, and compiled, once for all of them.

Nothing of scemb is here, and nothing that starts threads (jax).
"""
import warnings

import anndata
import numpy as np
import pynndescent
import scanpy

# UMAP and its search for neighbours are compiled in every process that first calls them (30 s).
points = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    cells = anndata.AnnData(points)
    scanpy.pp.neighbors(cells, use_rep="X")
    scanpy.tl.umap(cells)
    pynndescent.NNDescent(points, n_neighbors=15, random_state=0).neighbor_graph
