"Plant the mistake that each check is for, in a throw-away project, and see it found."

import io
import json
import os
import shutil
import tempfile
import unittest
import zipfile
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np

import checks
import docs
import processors
import suite

SLASH = "/"  # keeps the planted paths below out of this file's own check


def cell(source, kind="code", tags=(), outputs=()):
    c = {
        "cell_type": kind,
        "metadata": {"tags": list(tags)} if tags else {},
        "source": source,
        "id": f"c{abs(hash((source, kind))) % 10**8:08d}",
    }
    return {**c, "outputs": list(outputs), "execution_count": None} if kind == "code" else c


def stream(s):
    return {"output_type": "stream", "name": "stdout", "text": s}


class Planted(unittest.TestCase):
    def setUp(self):
        tmp = tempfile.TemporaryDirectory()
        self.addCleanup(tmp.cleanup)
        self.root = Path(tmp.name)
        (self.root / "scemb").mkdir()
        (self.root / "scemb" / "__init__.py").write_text('__version__ = "0.1.0"\n')
        shutil.copy(checks.ROOT / "settings.ini", self.root)
        self.page("index.ipynb", cell("# Toy\n\n> A toy.", "markdown"))
        self.page(
            "00_low.ipynb",
            cell("#| default_exp low"),
            cell("# Low\n\n> Low.", "markdown"),
            cell("#| export\ndef low(): return 1"),
            cell("assert low() == 1"),
        )
        self.page(
            "02_mid.ipynb",
            cell("#| default_exp mid"),
            cell("# Mid\n\n> Mid.", "markdown"),
            cell("#| export\nfrom scemb.low import low"),
            cell("#| export\ndef mid(): return low() + 1"),
        )
        self.page(
            "launch/run.ipynb",
            cell("# Run\n\n> Runs.", "markdown"),
            cell("seed = 0\nname: str = 'toy'", tags=["parameters"]),
            cell("from scemb.mid import mid"),
        )

    def page(self, rel, *cells, **metadata):
        path = self.root / "nbs" / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        kernel = {
            "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
        }
        path.write_text(
            json.dumps(
                {
                    "cells": list(cells),
                    "metadata": {**kernel, **metadata},
                    "nbformat": 4,
                    "nbformat_minor": 5,
                },
                indent=1,
            )
            + "\n"
        )
        return checks.Page(path, rel, json.loads(path.read_text()))

    def clean(self, check):
        self.assertEqual(check(self.root), [])

    def found(self, complaints, *words):
        self.assertEqual(len(complaints), 1, complaints)
        for w in words:
            self.assertIn(w, complaints[0])

    def test_order(self):
        "a page imports only lower pages"
        self.clean(checks.check_order)
        for source in [
            "from scemb.mid import mid",
            "import scemb.mid as m",
            "from scemb import mid",
            "from .mid import mid",
            "def f():\n    from scemb.mid import mid",
            "import importlib\nimportlib.import_module('scemb.mid')",
        ]:
            self.page("01_early.ipynb", cell("#| default_exp early"), cell(source))
            self.found(
                checks.check_order(self.root), "01_early.ipynb cell 1", "scemb.mid", "02_mid.ipynb"
            )
        self.page(
            "01_early.ipynb",
            cell("#| default_exp early"),
            cell("import scemb\nfrom scemb import __version__\n%time 1\n!ls"),
        )
        self.clean(checks.check_order)
        (self.root / "nbs" / "01_early.ipynb").rename(self.root / "nbs" / "02a_late.ipynb")
        self.page("02a_late.ipynb", cell("#| default_exp late"), cell("from scemb.mid import mid"))
        self.clean(checks.check_order)
        self.page("02_mid.ipynb", cell("#| default_exp mid"), cell("from scemb.late import f"))
        self.found(checks.check_order(self.root), "higher page nbs/02a_late.ipynb")

    def test_order_wings(self):
        "the package of a wing may be imported, where a page writes it only from higher pages"
        names = [cell("#| default_exp model.__init__"), cell("# Names\n\n> N.", "markdown")]
        self.page("model/01_names.ipynb", *names)
        source = cell("from scemb import data, model")
        self.page("adapt/00_fit.ipynb", cell("#| default_exp adapt.fit"), source)
        self.clean(checks.check_order)
        self.page("data/00_genes.ipynb", cell("#| default_exp data.genes"), source)
        self.found(checks.check_order(self.root), "higher page nbs/model/01_names.ipynb")

    def test_order_names(self):
        "modules without a page, a page's own module, twins and pages without a number are named"
        for source, words in [
            ("from scemb.nowhere import x", "no page writes"),
            ("from scemb.late import x", "its own module"),
            ("def f(:", "not Python"),
        ]:
            self.page("03_late.ipynb", cell("#| default_exp late"), cell(source))
            self.found(checks.check_order(self.root), words)
        self.page("03_late.ipynb", cell("#| default_exp mid"))
        self.found(checks.check_order(self.root), "both write scemb.mid")
        self.page("03_late.ipynb", cell("#| default_exp late"))
        self.page("03_twin.ipynb", cell("#| default_exp twin"))
        self.found(checks.check_order(self.root), "same number")
        (self.root / "nbs" / "03_twin.ipynb").rename(self.root / "nbs" / "twin.ipynb")
        self.found(checks.check_order(self.root), "no number")

    def test_processors(self):
        """an answer that depends on the processor is named, a vector only where it differs by more
        than the tolerance"""
        exact, close = {"tokens": "a1", "masks": "b2"}, {"scEMB": np.ones((2, 3))}
        self.assertEqual(
            processors.differences(
                "here", (exact, {"scEMB": np.ones((2, 3)) + 9e-6}), (exact, close)
            ),
            [],
        )
        self.found(
            processors.differences("here", (exact | {"masks": "c3"}, close), (exact, close)),
            "here: masks is c3",
            "b2",
        )
        self.found(
            processors.differences("here", ({"tokens": "a1"}, close), (exact, close)),
            "masks is None",
        )
        self.found(
            processors.differences(
                "here", (exact, {"scEMB": np.ones((2, 3)) + 2e-5}), (exact, close)
            ),
            "scEMB differ by 2.0e-05",
        )
        self.found(
            processors.differences(
                "here", (exact, {"scEMB": np.full((2, 3), np.nan)}), (exact, close)
            ),
            "scEMB differ by nan",
        )
        self.found(processors.differences("here", (exact, {}), (exact, close)), "scEMB are missing")
        for found in (
            ["AVX2", "AVX512F", "AVX512_SKX"],
            ["X86_V3", "X86_V4", "AVX512_ICL"],
        ):  # names of older and newer numpy
            names = processors.settings(found)
            self.assertEqual(names["no AVX-512"]["NPY_DISABLE_CPU_FEATURES"].split(), found[1:])
            self.assertEqual(names["no AVX2"]["NPY_DISABLE_CPU_FEATURES"].split(), found)

    def test_slowest(self):
        "the slowest pages are named by processor time, a page that was stopped is left out"
        lines = suite.slowest(
            {"a.ipynb": 1.0, "b.ipynb": 30.0, "c.ipynb": None, "d.ipynb": 9.0}, n=2
        )
        self.assertEqual([line.split()[-1] for line in lines[1:]], ["b.ipynb", "d.ipynb"])
        self.assertIn("3 pages took 40 s", lines[0])
        self.assertIn("98%", lines[0])

    def test_shown(self):
        "a visible cell that ends in a value and stores no output is named"
        self.clean(checks.check_shown)
        for source in [
            "table",
            "table.head()",
            "pd.read_csv('a.csv')",
            "x = 1\nprint(x)",
            "#| slow\nlow() + 1",
            "#| echo: false\nMarkdown('| a |')",
        ]:
            self.page("03_late.ipynb", cell("#| default_exp late"), cell(source))
            self.found(checks.check_shown(self.root), "03_late.ipynb cell 1", "stores no output")
            self.page(
                "03_late.ipynb", cell("#| default_exp late"), cell(source, outputs=[stream("1")])
            )
            self.clean(checks.check_shown)
        for source in [
            "#| hide\ntable",
            "#| gpu\ntable",
            "ax.plot(x);",
            "test_eq(1, 1)",
            "shutil.rmtree(folder)",
            "x = 1",
            "print('skipped', file=sys.stderr)",
            "'a comment'",
            "def look(x): assert x\nlook(1)",
            "#| export\ndef late(): return 2",
        ]:
            self.page("03_late.ipynb", cell("#| default_exp late"), cell(source))
            self.clean(checks.check_shown)

    def test_heads(self):
        """a title cell that holds more than the title and a sentence is refused, and a page of the
        walk without a module"""
        self.clean(checks.check_heads)
        module = cell("#| default_exp late")
        for head in [
            "# Late",
            "> Late.",
            "# Late\n\n> Late.\n\nA lost paragraph.",
            "# Late\n\n> Late.\n- key: value",
            "# Late\n\n> Two\n> lines.",
        ]:
            self.page("03_late.ipynb", module, cell(head, "markdown"))
            self.found(checks.check_heads(self.root), "03_late.ipynb: the first markdown cell")
        self.page("03_late.ipynb", cell("# Late\n\n> Late.", "markdown"))
        self.found(checks.check_heads(self.root), "no `#| default_exp")

    def test_parameters(self):
        "each papermill page has one parameters cell of literals, a page of the walk none"
        self.clean(checks.check_parameters)
        tag = ["parameters"]
        for cells, words in [
            ([cell("seed = 0")], "has 0 cells"),
            ([cell("a = 0", tags=tag), cell("b = 0", tags=tag)], "has 2 cells"),
            ([cell("a = 0", "markdown", tags=tag)], "not a code cell"),
            ([cell("import os\na = 1", tags=tag)], "literal"),
            ([cell("a = f()", tags=tag)], "literal"),
        ]:
            for folder in checks.TAGGED:
                self.page(f"{folder}/x.ipynb", *cells)
                if (folder, words) == ("figures", "has 0 cells"):  # the page only shows
                    self.clean(checks.check_parameters)
                else:
                    self.found(checks.check_parameters(self.root), f"{folder}/x.ipynb", words)
                (self.root / "nbs" / folder / "x.ipynb").unlink()
        self.page("03_late.ipynb", cell("a = 0", tags=tag))
        self.found(checks.check_parameters(self.root), "page of the walk")

    def test_outputs(self):
        "heavy pages, errors, widgets, progress bars and timings are refused"
        self.clean(checks.check_outputs)
        widget = {
            "output_type": "display_data",
            "metadata": {},
            "data": {"application/vnd.jupyter.widget-view+json": {}},
        }
        for out, words in [
            (stream("x" * 2**18), "weighs"),
            (stream(" 42%|####      | 21/50"), "progress"),
            (stream("3.1 it/s"), "progress"),
            (stream("1\r2"), "progress"),
            (stream("Wall time: 2 s"), "progress"),
            (stream("[2026-11-23 06:20:42,030] [WARNING] no GPU"), "progress"),
            (widget, "widget"),
            (
                {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []},
                "ValueError: no",
            ),
        ]:
            self.page("03_late.ipynb", cell("x", outputs=[out]))
            self.found(checks.check_outputs(self.root), "03_late.ipynb", words)
        self.page(
            "03_late.ipynb", cell("x", outputs=[stream("42% of 50 cells\n")]), widgets={"state": {}}
        )
        self.found(checks.check_outputs(self.root), "widget state")

    def test_paths(self):
        """absolute paths in sources, outputs and other files are refused; pictures, addresses and
        relative paths pass"""
        picture = {
            "output_type": "display_data",
            "metadata": {},
            "data": {
                "image/png": f"aa{SLASH}tmp{SLASH}bb",
                "text/html": f'<img src="data:image/png;base64,+{SLASH}tmp{SLASH}bb"/>',
            },
        }
        self.page(
            "03_late.ipynb",
            cell(
                f"a = 'https://x.org{SLASH}home{SLASH}y', '..{SLASH}work{SLASH}x', "
                f"'~{SLASH}tmp{SLASH}x'",
                outputs=[picture],
            ),
        )
        self.clean(checks.check_paths)
        for c in [
            cell(f"open('{SLASH}home{SLASH}me')"),
            cell("x", outputs=[stream(f"in {SLASH}tmp{SLASH}abc")]),
            cell(f"see {SLASH}root{SLASH}x", "markdown"),
        ]:
            self.page("03_late.ipynb", c)
            self.found(checks.check_paths(self.root), "03_late.ipynb cell 0", "absolute path")
        self.page("03_late.ipynb", cell("x"))
        (self.root / "NOTES.md").write_text(f"data in {SLASH}work{SLASH}shared")
        self.found(checks.check_paths(self.root), "NOTES.md")

    def test_modules(self):
        """modules without a page and exported imports of authoring tools or slow libraries are
        refused"""
        self.clean(checks.check_modules)
        for source, words in [
            ("import nbdev", "nbdev"),
            ("def f():\n    from fastcore.test import test_eq", "fastcore"),
            ("import scanpy as sc", "top-level import of scanpy"),
            ("from peft import LoraConfig", "top-level import of peft"),
        ]:
            self.page("03_late.ipynb", cell("#| default_exp late"), cell("#| export\n" + source))
            self.found(checks.check_modules(self.root), words)
        self.page(
            "03_late.ipynb",
            cell("#| default_exp late"),
            cell("#| export\ndef f():\n    import scanpy"),
            cell("from fastcore.test import *\nimport peft"),
        )
        self.clean(checks.check_modules)
        (self.root / "scemb" / "orphan.py").write_text("x = 1\n")
        self.found(checks.check_modules(self.root), "orphan.py comes from no page")

    def test_import_cells(self):
        "a cell that imports and works is refused on a page that exports code"
        self.clean(checks.check_import_cells)
        head = [cell("#| default_exp late"), cell("#| export\ndef f(): return 1")]
        self.page(
            "03_late.ipynb",
            *head,
            cell(
                "import pylab as plt, warnings\nwith warnings.catch_warnings(action='ignore'): "
                "import os\nplt.rcParams['x'] = 72\nplt.set_it('y', 1)"
            ),
        )
        self.clean(checks.check_import_cells)
        self.page(
            "03_late.ipynb",
            *head,
            cell("#| hide\nimport os, sys"),
            cell("def g():\n    import os\n    return f()"),
            cell("#| eval: false\nimport os; f()"),
        )
        self.clean(checks.check_import_cells)
        for source in [
            "import os\nx = f()",
            "import os\nos.listdir(x)",
            "if f():\n    import os",
            "#| slow\nimport os\nassert f()",
        ]:
            self.page("03_late.ipynb", *head, cell(source))
            self.found(
                checks.check_import_cells(self.root), "03_late.ipynb cell 2 imports and also works"
            )
        self.page("03_late.ipynb", cell("import os\nx = 1"))
        self.clean(checks.check_import_cells)

    def test_compiled(self):
        """a compiled function kept on disk inside another one, or around one of another module, is
        refused"""

        def kernel(name, calls, cache):
            return (
                f"@njit(nogil=True{', cache=True' if cache else ''})\ndef {name}(x): return "
                f"{calls}\n"
            )

        inner, outer = kernel("inner", "x", False), kernel("outer", "inner(x)", True)
        for low, late, found in [
            (inner + outer, "", ""),
            (kernel("inner", "x", True) + outer, "", "low.py: outer calls inner"),
            (inner, outer, "late.py: numba keeps outer on disk with inner of low"),
            (inner, outer.replace(", cache=True", ""), ""),
            (inner, outer.replace("cache=True", "cache=False"), ""),
            (inner.replace("inner", "_mix64"), outer.replace("inner", "_mix64"), ""),
        ]:
            (self.root / "scemb" / "low.py").write_text(low)
            (self.root / "scemb" / "late.py").write_text(late)
            self.found(checks.check_compiled(self.root), found) if found else self.clean(
                checks.check_compiled
            )

    def test_export_and_clean(self):
        "a module that differs from its page and a page that is not clean are named; tags stay"
        shutil.rmtree(self.root / "nbs" / "launch")
        self.page("launch/run.ipynb", cell("seed = 0", tags=["parameters"]))
        suite.export_and_clean(self.root)
        self.assertEqual(suite.export_and_clean(self.root), [])
        self.assertIn('"parameters"', (self.root / "nbs" / "launch" / "run.ipynb").read_text())
        module = self.root / "scemb" / "low.py"
        module.write_text(module.read_text().replace("return 1", "return 2"))
        self.found(suite.export_and_clean(self.root), "nbdev_export changed scemb/low.py")
        page = self.page("03_late.ipynb", cell("1"))
        page.nb["cells"][0].update(execution_count=7)
        page.path.write_text(json.dumps(page.nb, indent=1))
        self.found(suite.export_and_clean(self.root), "nbdev_clean changed nbs/03_late.ipynb")

    def test_snapshot(self):
        "a file that a test leaves behind is named"
        before = checks.snapshot(self.root)
        (self.root / "nbs" / "left.csv").write_text("1")
        (self.root / "nbs" / "sidebar.yml").write_text("generated")
        self.assertEqual(checks.changed(before, checks.snapshot(self.root)), ["nbs/left.csv"])

    def test_dead_fork(self):
        "a page whose fork dies of a signal is run by itself, which is said and decides"
        died = mock.patch.object(suite, "run_forked", lambda *_: (-6, "", "corrupted size"))
        with died, redirect_stdout(io.StringIO()) as said:
            good = self.page("02_good.ipynb", cell("1 + 1"))
            complaints, _, _, skips = suite.test_page(good, [], self.root, context=True)
            bad, *_ = suite.test_page(
                self.page("03_bad.ipynb", cell("1/0")), [], self.root, context=True
            )
        self.assertEqual(complaints, [])
        self.assertIn("signal 6", skips[0])
        self.assertIn("corrupted size", said.getvalue())
        self.assertIn("failed", bad[0])

    def test_pages(self):
        """a failing cell, a page that hangs and a skipped line are told; slow cells run only with
        their flag"""
        good = self.page(
            "03_late.ipynb",
            cell("import sys; print('skipped: no data', file=sys.__stderr__)"),
            cell("#| slow\nassert False, 'slow cell ran'"),
        )
        complaints, _, spent, skips = suite.test_page(good, [], self.root)
        self.assertGreater(spent, 0)
        self.assertEqual((complaints, skips), ([], ["skipped: no data"]))
        complaints, *_ = suite.test_page(good, ["slow"], self.root)
        self.assertIn("nbs/03_late.ipynb cell 1", complaints[0])
        self.assertIn("slow cell ran", complaints[1])
        complaints, seconds, *_ = suite.test_page(
            self.page("04_hangs.ipynb", cell("import time; time.sleep(60)")),
            [],
            self.root,
            timeout=6,
        )
        self.assertIn("stopped after 6 seconds", complaints[1])
        self.assertLess(seconds, 20)

    def test_papermill(self):
        "a parameters cell that a later cell overwrites does not pass"
        page = self.page(
            "launch/run.ipynb", cell("seed = 0", tags=["parameters"]), cell("print(seed)")
        )
        self.assertEqual(suite.papermill_wins(suite.papermill_page([page])), [])
        page = self.page(
            "launch/run.ipynb", cell("seed = 0", tags=["parameters"]), cell("seed = 0")
        )
        self.assertIn("seed was 'seen: 0'", suite.papermill_wins(page)[0])

    def test_light_import(self):
        "a package that loads a slow library or takes long is refused"
        (self.root / "deepspeed.py").write_text("")
        (self.root / "scemb" / "__init__.py").write_text("import deepspeed\n")
        self.found(suite.light_import(self.root, "import scemb"), "loads deepspeed")
        (self.root / "scemb" / "__init__.py").write_text("import time; time.sleep(.3)\n")
        self.found(suite.light_import(self.root, "import scemb", repeats=1, limit=0), "takes")
        self.assertIn("no_such", suite.light_import(self.root, "import scemb.no_such")[0])

    def test_wheel(self):
        "a wheel without an asset, with a stale asset or without the command is refused"
        asset = self.root / "scemb" / "assets" / "genes.csv"
        asset.parent.mkdir()
        asset.write_text("TP53")
        (self.root / "scemb" / "assets" / "gone").symlink_to("nowhere")
        wheel = self.root / "toy.whl"
        with zipfile.ZipFile(wheel, "w") as z:
            z.writestr("scemb/assets/genes.csv", "old")
            z.writestr("nbs/index.ipynb", "{}")
        complaints = "\n".join(suite.wheel_contents(wheel, self.root))
        for words in [
            "lacks scemb/__init__.py",
            "genes.csv differs",
            "gone is a link",
            "holds nbs/index.ipynb",
            "no `scemb` command",
        ]:
            self.assertIn(words, complaints)

    def test_claims(self):
        "a page that shows a committed table asserts something, in a cell that every suite runs"
        head, tagged = cell("# Fig\n\n> A figure.", "markdown"), cell("n = 1", tags=["parameters"])
        for source in [
            't = pd.read_csv("../../results/t.csv")',
            't = pd.read_csv(root/"results"/"t.csv")',
            'p = Path("results/t.json")',
        ]:
            for no_test in [
                "#| gpu\nassert len(t)",
                "#| eval: false\nassert len(t)",
                "print('assert')",
            ]:
                self.page("figures/fig.ipynb", head, tagged, cell(source), cell(no_test))
                self.found(checks.check_claims(self.root), "figures/fig.ipynb", "asserts nothing")
            self.page(
                "figures/fig.ipynb",
                head,
                tagged,
                cell(source),
                cell("#| hide\nfor x in t: assert x"),
            )
            self.clean(checks.check_claims)
        self.page("figures/fig.ipynb", head, tagged, cell("print('no table')"))
        self.page(
            "launch/other.ipynb", head, tagged, cell('t = pd.read_csv("../../results/t.csv")')
        )
        self.clean(checks.check_claims)

    def test_shelf(self):
        "results without a record, records of what is not there, pages that do not name the folder"
        head, tagged = cell("# Fig\n\n> A figure.", "markdown"), cell("n = 1", tags=["parameters"])
        folder = self.root / "results" / "fig" / "toy"
        folder.mkdir(parents=True)
        (folder / "params.yaml").write_text("n: 2\n")
        self.page("figures/fig.ipynb", head, tagged, cell('t = "results/fig/toys/scores.csv"'))
        self.clean(checks.check_shelf)  # parameters of a run that was not made
        (folder / "scores.csv").write_text("value\n1\n")
        self.found(checks.check_shelf(self.root), "toy/scores.csv", "no run.json")
        for broken, words in (
            ("{", "is not JSON"),
            ("[]", "is no record"),
            ("{}", "lacks command"),
        ):
            (folder / "run.json").write_text(broken)
            self.found(checks.check_shelf(self.root), "toy/run.json", words)
        page = "nbs/figures/fig.ipynb"
        record = dict(command="papermill", page=page, shown=page, model="", commit="", date="")

        def plant(**changes):
            (folder / "run.json").write_text(json.dumps(record | changes))
            return checks.check_shelf(self.root)

        made = {"scores.csv": {}}
        self.found(plant(files=made), "figures/fig.ipynb", "does not name this folder")
        self.page("figures/fig.ipynb", head, tagged, cell('t = "results/fig/toy/scores.csv"'))
        self.found(plant(files={}), "does not say what made scores.csv")
        gone = made | {"gone.png": {}}
        self.found(plant(files=gone), "names gone.png, which is not there")
        self.found(plant(files=made, page="nbs/launch/no.ipynb"), "its page", "does not exist")
        plant(files=made)
        self.clean(checks.check_shelf)

    def test_results_in_the_site(self):
        "pictures of results are brought into the site, and the links to them led there"
        made, site = self.root / "results" / "fig" / "toy", self.root / "site"
        made.mkdir(parents=True)
        (made / "a.png").write_bytes(b"")
        (site / "figures").mkdir(parents=True)
        page = site / "figures" / "fig.html"
        page.write_text('<img src="../../results/fig/toy/a.png"> ../../results/')
        self.found(docs.check_site(site, []), "fig.html links to", "is not in the site")
        docs.bring_results(self.root, site)
        self.assertEqual(docs.check_site(site, []), [])
        self.assertIn(" ../../results/", page.read_text())

    def test_ruff(self):
        "ruff sees an unused import and an unknown name, and lets star imports pass"
        shutil.copy(checks.ROOT / "pyproject.toml", self.root)
        for source, words in [
            ("import os\n", "F401"),
            ("def f(): return unknown\n", "F821"),
            ("x = 1; y = 2\n", "E702"),
            (f"x = '{'a ' * 60}'\n", "E501"),
            ("from math import *\nprint(pi)\n", None),
        ]:
            (self.root / "nbs" / "low.py").write_text(source)
            complaints = suite.succeeds(
                suite.BIN / "ruff",
                "check",
                "--no-cache",
                "--output-format=concise",
                ".",
                cwd=self.root,
            )
            self.assertTrue(words in complaints[0] if words else not complaints, complaints)

    def test_readme(self):
        "README.md follows the index, its links are seen from the top folder, dead links are named"
        (self.root / "nbs" / "images").mkdir()
        (self.root / "nbs" / "images" / "a.png").write_bytes(b"")
        self.page(
            "index.ipynb",
            cell(
                "# Toy\n\n![a](images/a.png) [low](00_low.ipynb#x) [top](../settings.ini) "
                "[law](https://github.com/scemb/scemb/blob/main/settings.ini)\n\n```\n[keep](me.md)\n```",
                "markdown",
            ),
            cell("#| hide\nhidden = 1"),
            cell("#| eval: false\nshown = 1", outputs=[stream("yes\n")]),
        )
        body, bad = docs.readme(self.root)
        self.assertEqual(bad, [])
        for words in [
            "![a](nbs/images/a.png) [low](nbs/00_low.ipynb#x) [top](settings.ini) "
            "[law](settings.ini)",
            "[keep](me.md)",
            "```python\nshown = 1\n```",
            "    yes",
        ]:
            self.assertIn(words, body)
        for words in ["hidden", "eval"]:
            self.assertNotIn(words, body)
        self.found(docs.check_readme(self.root), "make readme")
        (self.root / "README.md").write_text(body)
        self.clean(docs.check_readme)
        (self.root / "README.md").write_text(body.replace("Toy", "Boy"))
        self.found(docs.check_readme(self.root), "line 3: '# Boy', wanted '# Toy'")
        self.page(
            "index.ipynb",
            cell("[gone](gone.ipynb)", "markdown"),
            cell(
                "1",
                outputs=[
                    {"output_type": "display_data", "metadata": {}, "data": {"image/png": ""}}
                ],
            ),
        )
        self.assertEqual(len(docs.readme(self.root)[1]), 2)

    def wing_pages(self):
        "Move the toy's pages to wings, where a sidebar has sections for them."
        for name, wing in [("00_low", "data"), ("02_mid", "model")]:
            old = self.root / "nbs" / f"{name}.ipynb"
            (self.root / "nbs" / wing).mkdir(exist_ok=True)
            old.rename(self.root / "nbs" / wing / old.name)

    def test_sidebar(self):
        "every page stands in one section under its own title; a stray page is named"
        self.wing_pages()
        self.clean(checks.check_sidebar)
        lines = dict(checks.sidebar(self.root))
        self.assertEqual(list(lines), ["Start", "Chapters", "Launch"])
        self.assertEqual(lines["Start"], [("Toy", "index.ipynb")])
        self.assertEqual(lines["Chapters"][0], ("Data", [("Low", "data/00_low.ipynb")]))
        self.page("model/01_again.ipynb", cell("# Mid\n\n> Again.", "markdown"))
        self.found(checks.check_sidebar(self.root), "model/01_again.ipynb", "02_mid.ipynb", "'Mid'")
        (self.root / "nbs" / "model" / "01_again.ipynb").unlink()
        self.page("attic/old.ipynb", cell("# Old\n\n> Old.", "markdown"))
        self.found(checks.check_sidebar(self.root), "nbs/attic/old.ipynb", "no section")
        (self.root / "nbs" / "attic" / "old.ipynb").unlink()
        self.page("explain/decisions.ipynb", cell("# Decisions\n\n> Why.", "markdown"))
        complaints = checks.check_sidebar(self.root)
        self.assertTrue(complaints)
        for complaint in complaints:  # with an explain folder the fixed lists must hold
            self.assertIn("does not exist", complaint)

    def test_sidebar_file(self):
        "both renderers get the sections; a link by task leaves a page to its own section"
        import yaml

        self.wing_pages()
        self.page("tutorials/embed_your_cells.ipynb", cell("# Embed\n\n> Embed.", "markdown"))
        docs.write_sidebar(self.root)
        written = yaml.safe_load((self.root / "nbs" / "sidebar.yml").read_text())
        lines = {line["section"]: line for line in written["website"]["sidebar"]["contents"]}
        page = {"text": "Embed", "href": "tutorials/embed_your_cells.ipynb"}
        self.assertEqual(lines["Tutorials"]["contents"], [page])
        task = {
            "text": "Embed my cells",
            "href": "/tutorials/embed_your_cells.html#title-block-header",
        }
        self.assertEqual(lines["By task"]["contents"], [task])
        chapters = lines["Chapters"]["contents"]
        self.assertEqual([line["section"] for line in chapters], ["Data", "Model"])

    def test_vocabulary(self):
        "a heading, option, function or parameter that says an unsettled word is named"
        self.clean(checks.check_vocabulary)  # without a table there is nothing to hold to
        (self.root / ".ci").mkdir()
        (self.root / ".ci" / "vocabulary.toml").write_text(
            '[[word]]\nuse = ["order leak"]\nnot = ["leak", "leaks"]\nbecause = "two leaks"\n'
            '[[word.exception]]\nwhy = "old"\nplaces = ["mid: leak"]\n'
        )
        self.clean(checks.check_vocabulary)
        head = [cell("#| default_exp mid"), cell("# Mid\n\n> A leak.", "markdown")]

        def with_(*cells):
            self.page("02_mid.ipynb", *head, *cells)

        for source in [
            "#| export\ndef order_leak(leak): return 'leak'",
            "#| export\ndef _leaks(): pass\nleaks = 1",
            "def leaks(): pass",
        ]:
            with_(cell(source))
            self.clean(checks.check_vocabulary)
        for source, name in [
            ("#| export\ndef leaks(): pass", "leaks"),
            ("#| export\ndef mid(*, no_leak=1): pass", "no_leak"),
            ("#| export\nclass NoLeak: pass", "NoLeak"),
            ("#| export\nclass Mid:\n    any_leak: int = 0", "any_leak"),
            ("#| export\nclass Mid:\n    def one(self, leaks): pass", "leaks"),
            ("#| export\ndef mid(x=option('--leak')): pass", "--leak"),
        ]:
            with_(cell(source))
            self.found(checks.check_vocabulary(self.root), f"mid: {name!r}", "'order leak'")
        table = self.root / ".ci" / "vocabulary.toml"
        without = table.read_text()
        table.write_text(without.replace("because", 'headings = false\nfree = ["mid"]\nbecause'))
        with_(cell("## Leaks", "markdown"), cell("#| export\ndef leaks(): pass"))
        self.clean(checks.check_vocabulary)
        table.write_text(without)
        with_(cell("## Leaks\n\n```\n# leak\n```\n\n## The order leak", "markdown"))
        self.found(checks.check_vocabulary(self.root), "02_mid.ipynb: 'Leaks'")

    def test_docs_pages(self):
        "source is folded, formulas are MathML, and nothing is loaded from elsewhere"
        shown = '#| code-fold: show\n#| code-summary: "Exported source"\ndef low(): pass'
        self.page("model/a.ipynb", cell(shown), cell("low()"))
        self.page("figures/b.ipynb", cell("n = 1", tags=["parameters"]), cell("plot(n)"))
        docs.fold_code(self.root / "nbs")

        def sources(rel):
            nb = json.loads((self.root / "nbs" / rel).read_text())
            return [c["source"] for c in nb["cells"]]

        self.assertEqual(sources("model/a.ipynb"), [shown.replace("show", "true"), "low()"])
        folded = '#| code-fold: true\n#| code-summary: "Code"\nplot(n)'
        self.assertEqual(sources("figures/b.ipynb"), ["n = 1", folded])
        page = docs.with_mathml(
            '<link rel="stylesheet" href="https://x/katex@0/katex.min.css"><p>'
            '<span class="math inline">\\(x&#x27;_1 &lt; 2^n\\)</span></p>'
        )
        self.assertNotIn("katex", page)
        self.assertIn("<math", page)
        self.assertIn("&#x02032;", page.replace("\u2032", "&#x02032;"))
        site = self.root / "_docs"
        site.mkdir()
        (site / "low.html").write_text('<script src="https://x.org/y.js"></script>')
        self.found(docs.check_site(site, ["low.html"]), "low.html loads https://x.org/y.js")
        self.assertEqual(docs.check_site(site, ["low.html"], offline=False), [])

    def test_stage(self):
        "pages lose their numbers, links follow them, and what is only a name stays"
        site = "https://scemb.org/docs/"
        words = (
            "[a](../data/00_low.ipynb#x) [b](https://x.org/00_low.ipynb) `nbs/data/00_low.ipynb`\n"
            f"[`low`]({site}data/low.html#low)\n```\n[c](00_low.ipynb)\n```"
        )
        self.wing_pages()
        self.page("model/03a_Links.ipynb", cell(words, "markdown"))
        (self.root / "nbs" / "sidebar.yml").write_text("- text: Low\n  href: data/00_low.ipynb\n")
        out = self.root / "staged"
        docs.stage(self.root / "nbs", site, out)
        self.assertTrue((out / "data" / "low.ipynb").is_file())
        staged = json.loads((out / "model" / "links.ipynb").read_text())["cells"][0]["source"]
        wanted = words.replace("(../data/00_low", "(../data/low").replace(site, "../")
        self.assertEqual(staged, wanted)
        self.assertIn("href: data/low.ipynb", (out / "sidebar.yml").read_text())

    def test_site(self):
        "a page that was not rendered and a dead relative link are named"
        site = self.root / "_docs"
        site.mkdir()
        (site / "low.html").write_text(
            '<a href="low.html#x">a</a> <a href="https://x.org/y">b</a> <a href="#z">c</a>'
        )
        self.assertEqual(docs.check_site(site, ["low.html"]), [])
        (site / "low.html").write_text('<a href="gone.html#x">a</a>')
        complaints = docs.check_site(site, ["low.html", docs.html_name("launch/02a_Mid.ipynb")])
        self.assertEqual(
            complaints,
            [
                "launch/mid.html was not rendered.",
                "low.html links to gone.html#x, which does not exist.",
            ],
        )

    def test_constraints(self):
        """constraints.txt pins every package that settings.ini asks for, to a version and nothing
        else"""
        import freeze

        lines = [
            x
            for x in (checks.ROOT / "constraints.txt").read_text().split("\n")
            if x and not x.startswith("#")
        ]
        self.assertTrue(
            all(freeze.Requirement(x).specifier and "/" not in x and "@" not in x for x in lines)
        )
        pinned = {x.split("==")[0] for x in lines}
        self.assertEqual(
            {freeze.canonical(freeze.Requirement(w).name) for w in freeze.words()}
            - pinned
            - freeze.UNPINNED,
            set(),
        )


if __name__ == "__main__":
    os.chdir(checks.ROOT)
    unittest.main()
