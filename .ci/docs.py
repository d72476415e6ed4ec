"""Render the documentation into _docs/ and make README.md from nbs/index.ipynb.

docs.py build            Quarto when it is installed, otherwise an approximation of it that needs no
other program
docs.py sidebar          write nbs/sidebar.yml, for someone who calls Quarto by hand
docs.py readme           write README.md
docs.py readme --check   exit code 1 when README.md is not what the index gives
"""

import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from checks import ROOT, TAGGED, directives, pages, sidebar, text

TARGET = re.compile(
    r"(!?\[[^\]]*\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))|((?:src|href)=\")([^\"]+)(\")"
)


def html_name(rel):
    "The file that a page is rendered to: 00_genes.ipynb becomes genes.html, as nbdev names it."
    folder, _, name = rel.rpartition("/")
    name = re.sub(r"^\d+[a-zA-Z0-9]*_", "", name.lower()).removesuffix(".ipynb") + ".html"
    return f"{folder}/{name}" if folder else name


def outside_fences(markdown, change):
    "Apply `change` to the lines of a Markdown text that are not inside a code fence."
    fenced, lines = False, []
    for line in markdown.split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        lines.append(line if fenced else change(line))
    return "\n".join(lines)


def relative(target):
    return not urlsplit(target).scheme and not target.startswith(("#", "/"))


# --- README ---------------------------------------------------------------------------------------


def readme(root):
    "(text of README.md, complaints): the index as Markdown, its links seen from the top folder."
    import nbformat
    from nbconvert import MarkdownExporter

    nb, bad = nbformat.read(root / "nbs" / "index.ipynb", as_version=4), []
    settings = ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    hosted = f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}/"

    def from_top(m):
        head, target, tail = m.group(1, 2, 3) if m[1] else m.group(4, 5, 6)
        if not relative(target) and not target.startswith(hosted):
            return m[0]
        path, hash_, anchor = target.partition("#")
        moved = (
            path.removeprefix(hosted)
            if path.startswith(hosted)
            else posixpath.normpath(posixpath.join("nbs", path))
        )
        if not (root / unquote(moved)).exists():
            bad.append(f"nbs/index.ipynb links to {target}, which does not exist.")
        return f"{head}{moved}{hash_}{anchor}{tail}"

    kept = []
    for cell in nb.cells:
        if {d.split()[0] for d in directives(cell)} & {"hide", "default_exp", "export", "exporti"}:
            continue
        if "echo: false" in directives(cell):  # only what it makes, as the documentation shows it
            cell = nbformat.v4.new_markdown_cell(
                "\n\n".join(
                    text(o.data["text/markdown"])
                    for o in cell.outputs
                    if "text/markdown" in o.get("data", {})
                )
            )
        if cell.cell_type == "markdown":
            cell.source = outside_fences(cell.source, lambda line: TARGET.sub(from_top, line))
        if cell.cell_type == "code":
            cell.source = re.sub(r"^\s*#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for o in cell.outputs:
                if "text/html" in o.get("data", {}):
                    o.data["text/html"] = re.sub(
                        r"<style.*?</style>\s*", "", text(o.data["text/html"]), flags=re.S
                    )
                if any(k.startswith("image/") for k in o.get("data", {})):
                    bad.append(
                        "nbs/index.ipynb shows a picture made by a cell; save it in nbs/images/ "
                        "and show it as ![caption](images/name.png)."
                    )
        if cell.source:
            kept.append(cell)
    nb.cells, nb.metadata["language_info"] = kept, {"name": "python"}
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in body.strip().split("\n")))
    return (
        "<!-- Made from nbs/index.ipynb by `make readme`; edit the page, not this file. "
        f"-->\n\n{body}\n",
        bad,
    )


def check_readme(root):
    wanted, bad = readme(root)
    have = (root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else ""
    if have != wanted:
        a, b = have.split("\n"), wanted.split("\n")
        n = next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )
        bad.append(
            f"README.md is not what nbs/index.ipynb gives (line {n + 1}: "
            f"{a[n] if n < len(a) else 'end of file'!r}, wanted "
            f"{b[n] if n < len(b) else 'end of file'!r}); run `make readme`."
        )
    return bad


# --- documentation --------------------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.loaded = [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "script" or (tag == "link" and found.get("rel") == "stylesheet"):
            self.loaded.append(found.get("src") or found.get("href") or "")
        self.targets += [
            v
            for k, v in attrs
            if v
            and (tag, k) in {("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")}
        ]


def check_site(site, wanted, offline=True):
    """Complaints about a rendered site: `wanted` files that are missing, relative links that lead
    nowhere and, if it is to be read `offline`, scripts and styles that come from elsewhere."""
    bad = [f"{name} was not rendered." for name in wanted if not (site / name).is_file()]
    for f in sorted(site.rglob("*.html")):
        links = Links()
        links.feed(f.read_text(encoding="utf-8"))
        for target in dict.fromkeys(links.loaded):
            if offline and urlsplit(target).netloc:
                bad.append(f"{f.relative_to(site)} loads {target}, which needs a network.")
        for target in dict.fromkeys(links.targets):
            path = unquote(urlsplit(target).path)
            if not path or not relative(target):
                continue
            if not (f.parent / path).exists():
                bad.append(f"{f.relative_to(site)} links to {target}, which does not exist.")
    return bad


def without_number(target):
    "A link to a page, seen from a page whose file has been renamed: ../data/00_genes.ipynb#top."
    path, hash_, anchor = target.partition("#")
    if not relative(target) or not path.endswith(".ipynb"):
        return target
    return html_name(path).removesuffix(".html") + ".ipynb" + hash_ + anchor


def stage(proc, site_url, out):
    """Copy nbdev's processed pages, named as they will be rendered: the offline renderer knows no
    `output-file`."""
    shutil.copytree(proc, out, ignore=shutil.ignore_patterns("_docs", "_site"))
    for page in sorted(out.rglob("*.ipynb")):
        page.rename(out / without_number(page.relative_to(out).as_posix()))

    def in_markdown(source, top):
        "Links of a Markdown text: to renamed pages, and to this site wherever it lies."

        def link(m):
            head, target, tail = m.group(1, 2, 3) if m[1] else m.group(4, 5, 6)
            return head + without_number(target.replace(site_url, top)) + tail

        return outside_fences(source, lambda line: TARGET.sub(link, line).replace(site_url, top))

    for config in out.rglob("*.yml"):
        lines = config.read_text(encoding="utf-8")
        lines = re.sub(r"^ *html-math-method:.*\n", "", lines, flags=re.M)  # smalldocs has none
        lines = re.sub(r"(?<=href: )\S+", lambda m: without_number(m[0]), lines)
        config.write_text(lines, encoding="utf-8")
    for page in out.rglob("*.ipynb"):
        nb = json.loads(page.read_text(encoding="utf-8"))
        top = "../" * (len(page.relative_to(out).parts) - 1) or "./"
        for cell in nb["cells"]:
            source = text(cell["source"])
            if cell["cell_type"] == "markdown":
                cell["source"] = in_markdown(source, top)
            if cell["cell_type"] == "raw":
                cell["source"] = re.sub(r"^output-file:.*\n", "", source, flags=re.M)
            for output in cell.get("outputs", []):
                shown = output.get("data", {}).get("text/markdown")
                if shown:
                    output["data"]["text/markdown"] = in_markdown(text(shown), top)
        page.write_text(json.dumps(nb, ensure_ascii=False, indent=1), encoding="utf-8")


def write_sidebar(root):
    "Write nbs/sidebar.yml, which Quarto and smalldocs read through `metadata-files`."
    import yaml

    def entry(line, by_task=False):
        "One line of the sidebar: a page, or a section with the lines below it."
        name, target = line
        if not isinstance(target, str):
            below = [entry(inner, name == "By task") for inner in target]
            return {"section": name, "contents": below}
        if by_task:  # a link to its first heading: the page itself belongs to another section
            target = f"/{html_name(target)}#title-block-header"
        return {"text": name, "href": target}

    contents = [entry(line) for line in sidebar(root)]
    written = yaml.safe_dump(
        {"website": {"sidebar": {"contents": contents}}}, sort_keys=False, allow_unicode=True
    )
    (root / "nbs" / "sidebar.yml").write_text(written, encoding="utf-8")


def fold_code(proc):
    """Close the listings of exported code in nbdev's processed pages, and on papermill pages all
    but the parameters; a click opens them."""
    for file in sorted(proc.rglob("*.ipynb")):
        folder = file.relative_to(proc).parts[0]
        nb = json.loads(file.read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            if cell["cell_type"] != "code":
                continue
            source = text(cell["source"]).replace("#| code-fold: show", "#| code-fold: true")
            is_parameters = "parameters" in cell["metadata"].get("tags", [])
            if folder in TAGGED and not is_parameters and "#| code-fold" not in source:
                source = f'#| code-fold: true\n#| code-summary: "Code"\n{source}'
            cell["source"] = source
        file.write_text(json.dumps(nb, ensure_ascii=False, indent=1), encoding="utf-8")


FORMULA = re.compile(
    r'<span class="math (?P<kind>inline|display)">\\[(\[](?P<tex>.*?)\\[)\]]</span>', re.S
)
KATEX = re.compile(r"\s*<(?:link|script)\b[^>]*\bkatex@[^>]*>(?:</script>)?")


def with_mathml(page):
    """A rendered page whose formulas are MathML, which browsers draw by themselves, and which
    loads no KaTeX from the network."""
    from latex2mathml.converter import convert

    def drawn(found):
        display = "block" if found["kind"] == "display" else "inline"
        # as a superscript a prime is hard to see where no font for mathematics is installed
        tex = html.unescape(found["tex"]).strip().replace("'", "\u2032")
        formula = convert(tex, display=display)
        return f'<span class="math {found["kind"]}">{formula}</span>'

    return KATEX.sub("", FORMULA.sub(drawn, page))


def prepare(root):
    """Write _proc/, the pages as nbdev hands them to a renderer: signatures of exported functions
    added, their source folded. Returns complaints."""
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    proc = root / "_proc"
    shutil.rmtree(proc, ignore_errors=True)
    refresh_quarto_yml()
    write_sidebar(root)
    try:
        with warnings.catch_warnings():
            # checks.check_import_cells sees to it that such cells do no work
            warnings.filterwarnings("ignore", message="Found cells containing imports")
            proc_nbs(n_workers=0)
    except Exception as e:  # nbdev names page and cell
        return [f"{str(e).splitlines()[0]} {type(e.__cause__).__name__}: {e.__cause__}"]
    fold_code(proc)
    return []


def render_offline(root, cfg):
    "Render _proc/ into _docs/ with smalldocs, an approximation of Quarto."
    docs = root / "_docs"
    with tempfile.TemporaryDirectory() as tmp:
        staged = Path(tmp) / "site"
        stage(root / "_proc", f"{cfg.doc_host}{cfg.doc_baseurl}/", staged)
        # An iframe without height and the like are not worth a failure; a page that is not
        # rendered is, in `check_site`.
        smalldocs = str(Path(sys.executable).parent / "smalldocs")
        subprocess.run([smalldocs, "render", "--quiet", str(staged)], check=True)
        shutil.rmtree(docs, ignore_errors=True)
        shutil.copytree(staged / docs.name, docs)
    for file in sorted(docs.rglob("*.html")):
        page = file.read_text(encoding="utf-8")
        file.write_text(with_mathml(page), encoding="utf-8")
    for file in sorted(docs.rglob("*.css")):  # the theme asks a server for its font
        style = file.read_text(encoding="utf-8")
        style = re.sub(r"@import url\([^)]*//[^)]*\);?", "", style)
        file.write_text(style, encoding="utf-8")


def build(root):
    "Render every page into _docs/; returns complaints."
    from nbdev.config import get_config

    cfg, docs = get_config(), root / "_docs"
    os.chdir(root / "nbs")  # exported cells run here, as they do in JupyterLab and in the tests
    sys.path.insert(0, str(root))
    wanted = [html_name(p.rel) for p in pages(root)]
    quarto = shutil.which("quarto")
    renderer = "Quarto" if quarto else "smalldocs, since Quarto is not installed"
    print(f"docs: rendering {len(wanted)} pages with {renderer}", flush=True)
    bad = prepare(root)
    if bad:
        return bad
    if quarto:
        subprocess.run([quarto, "render", "--no-cache"], check=True, cwd=root / "_proc")
        shutil.rmtree(docs, ignore_errors=True)
        shutil.move(root / "_proc" / docs.name, docs)
    else:
        render_offline(root, cfg)
    bad = check_site(docs, wanted, offline=not quarto)
    if not bad:
        print(f"docs: done, no dead link; start at {docs.name}/index.html")
    return bad


def main(action, *options):
    if action == "readme" and "--check" not in options:
        body, bad = readme(ROOT)
        (ROOT / "README.md").write_text(body, encoding="utf-8")
    elif action == "sidebar":
        write_sidebar(ROOT)
        bad = []
    else:
        bad = check_readme(ROOT) if action == "readme" else build(ROOT)
    print("\n".join(bad), end="\n" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["build"])))
