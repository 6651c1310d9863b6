"""Rules of the house, over the source itself."""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import rarefy
from rarefy import catalogue

SRC = Path(rarefy.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
TREES = {path.relative_to(SRC).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
METHOD_FILES = {entry.target.split(":")[0].replace(".", "/") + ".py" for entry in catalogue.ENTRIES}
MAY_PRINT = ("cli.py", "ui/")

PUBLIC = [
    "BadInput", "Cost", "Damaged", "Frontier", "LiveStream", "Loss", "Point", "RarefyError", "Recipe", "Selection", "Sparse", "StoreStream",
    "TensorStream", "Unsupported", "__version__", "calibrate", "capture", "check_method", "documents", "entry", "kv_cache", "load", "measure",
    "open_model", "pareto", "plan", "replaced", "save", "share", "sites", "sweep", "text", "timed", "train", "windows",
]


def dotted(node):
    """"a.b.c" of an attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return ""


def unsafe(tree):
    """Calls and imports that run or unpickle what they are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {n}" for n in names if n.split(".")[0] in {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"})
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}:
                yield name
            for keyword in node.keywords:
                on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value in (False, None))
                if keyword.arg in {"trust_remote_code", "shell", "allow_pickle"} and on:
                    yield f"{keyword.arg} in {name}"


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "eval('1')", "exec('1')", "torch.load(f)", "import os; os.system('ls')", "yaml.load(f)",
    "f(trust_remote_code=True)", "f(trust_remote_code=flag)", "subprocess.run('ls', shell=True)", "np.load(f, allow_pickle=True)",
])
def test_the_rule_about_unsafe_code_sees_it(source):
    assert list(unsafe(ast.parse(source)))


@pytest.mark.parametrize("name", TREES)
def test_no_unsafe_code(name):
    assert list(unsafe(TREES[name])) == []


@pytest.mark.parametrize("name", TREES)
def test_sizes(name):
    lines = (SRC / name).read_text(encoding="utf-8").count("\n")
    most = 160 if name in METHOD_FILES else 400
    assert lines <= most, f"{name} has {lines} lines, {most} are allowed"
    functions = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f"{f.name}: {f.end_lineno - f.lineno + 1} lines" for f in functions if f.end_lineno - f.lineno + 1 > 60] == []


@pytest.mark.parametrize("name", TREES)
def test_library_code_prints_nothing(name):
    if name.startswith(MAY_PRINT):
        pytest.skip("the command line may print")
    assert [n.lineno for n in ast.walk(TREES[name]) if isinstance(n, ast.Call) and dotted(n.func) in {"print", "sys.stdout.write"}] == []


@pytest.mark.parametrize("name", TREES)
def test_docstrings(name):
    tree = TREES[name]
    bare = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            bare += [] if ast.get_docstring(node) else [node.name]
    assert bare == []


@pytest.mark.parametrize("name", TREES)
def test_no_notes_to_self(name):
    text = (SRC / name).read_text(encoding="utf-8")
    assert [w for w in ("TODO", "FIXME", "XXX", "/work/", "/tmp/") if w in text] == []


def layers():
    """Folders and modules from the top down, as pyproject.toml has them for import-linter."""
    import tomllib

    config = tomllib.loads((SRC.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    rows = config["tool"]["importlinter"]["contracts"][0]["layers"]
    return {name.strip().removeprefix("rarefy."): rank for rank, row in enumerate(rows) for name in row.split("|")}


def imported(name, tree):
    """Modules of rarefy that a file imports, wherever in it."""
    package = ["rarefy", *Path(name).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            else:
                base = (node.module or "").split(".")
            if base[0] == "rarefy":
                yield from ([*base[1:], a.name] for a in node.names) if len(base) == 1 else [base[1:]]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1:] for a in node.names if a.name.startswith("rarefy."))


@pytest.mark.parametrize("name", TREES)
def test_imports_point_down(name):
    rank = layers()
    own = Path(name).with_suffix("").parts[0]
    if own not in rank:
        pytest.skip("in no layer")
    wrong = []
    for target in imported(name, TREES[name]):
        top = target[0] if target else own
        if top != own and top in rank and rank[top] <= rank[own]:
            wrong.append(".".join(target))
    assert wrong == []


def test_import_linter():
    pytest.importorskip("importlinter")
    linter = Path(sys.executable).with_name("lint-imports")
    got = subprocess.run([linter, "--no-cache"], cwd=SRC.parents[1], capture_output=True, text=True, env=_env())
    assert got.returncode == 0, got.stdout[-3000:] + got.stderr[-2000:]


def test_public_names():
    assert rarefy.__all__ == PUBLIC
    assert dir(rarefy) == PUBLIC
    for name in PUBLIC:
        assert getattr(rarefy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rarefy.nothing


@pytest.mark.parametrize("entry", catalogue.ENTRIES, ids=lambda e: e.name)
def test_cards_match_classes(entry):
    cls = entry.load()
    assert (cls.name, cls.unit, cls.fitted) == (entry.name, entry.unit, entry.fitted)
    assert issubclass(cls, rarefy.Sparse)
    family, _, rest = entry.name.partition("/")
    assert rest and entry.target.startswith(f"{family}.")
    assert entry.title.startswith("baseline: ") or entry.link.startswith("https://")
    assert not entry.title.startswith("baseline") or entry.baseline
    assert 1950 <= entry.year <= 2030
    plain = (bool, int, float, str)
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        assert parameter.default is inspect.Parameter.empty or type(parameter.default) in plain, f"{parameter.name} is no plain scalar"


@pytest.mark.parametrize("card", [one for one in catalogue.CARDS if one.kind != "method"], ids=lambda one: one.name)
def test_cards_of_other_kinds_load(card):
    loaded = card.object()
    assert callable(loaded) and inspect.getdoc(loaded)
    assert card.kind in catalogue.KINDS and card.fitted in ("none", "calibrated", "trained") and card.unit and card.replaces
    assert card.title.startswith("baseline: ") or card.link.startswith("https://")
    assert not card.title.startswith("baseline") or card.baseline
    assert "/" in card.name and 1950 <= card.year <= 2030
    with pytest.raises(rarefy.BadInput, match=f"{card.name} is a {card.kind}"):
        catalogue.entry(card.name)


def test_every_module_of_sparse_coding_that_has_a_paper_has_a_card():
    having = {card.target.split(":")[0] for card in catalogue.CARDS}
    shared = {"__init__", "coded", "support"}                   # what the others share
    modules = {path.stem for path in (SRC / "latents/coding").glob("*.py")} - shared
    assert sorted(name for name in modules if f"latents.coding.{name}" not in having) == []


def test_catalogue_names_are_unique_and_every_family_has_a_random_baseline():
    every = [entry.name for entry in catalogue.CARDS]
    assert len(set(every)) == len(every)
    names = [entry.name for entry in catalogue.ENTRIES]
    for family in {name.split("/")[0] for name in names}:
        assert catalogue.entry(f"{family}/random").baseline
    with pytest.raises(rarefy.BadInput, match="did you mean latents/topk"):
        catalogue.entry("latent/topk")
    with pytest.raises(rarefy.BadInput, match="known: latents/random"):
        catalogue.entry("zzzzzzzz")


def _env():
    import os

    return {**os.environ, "PYTHONPATH": str(SRC.parent), "HF_HUB_OFFLINE": "1"}


def _fresh(code):
    """The output of code in a process of its own."""
    got = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=_env(), timeout=120)
    assert got.returncode == 0, got.stderr[-3000:]
    return got.stdout


@pytest.mark.parametrize("code", [
    "import rarefy; dir(rarefy); rarefy.__version__",
    "from rarefy import catalogue; catalogue.entry('latents/topk')",
    "import rarefy.errors; rarefy.BadInput",
    "import sys; sys.argv = ['rarefy', '--help']\nfrom rarefy.cli import main\ntry: main()\nexcept SystemExit as stop: assert not stop.code",
    "import sys; sys.argv = ['rarefy', 'methods']\nfrom rarefy.cli import main\ntry: main()\nexcept SystemExit as stop: assert not stop.code",
], ids=["import", "catalogue", "errors", "help", "methods"])
def test_no_torch_before_it_is_needed(code):
    out = _fresh(f"{code}\nimport sys\nprint('heavy:', sorted({{'torch', 'transformers', 'numpy', 'numba'}} & sys.modules.keys()))")
    assert out.rstrip().endswith("heavy: []")


def test_nothing_is_patched_by_import():
    """transformers' and torch's own functions are the same objects before and after every module of rarefy is imported."""
    names = (name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in TREES if name != "__init__.py")
    there = importlib.util.find_spec("triton") is not None
    modules = sorted(f"rarefy.{name}" for name in names if there or not name.endswith(".triton"))
    out = _fresh(f"""
import importlib, torch, transformers
from transformers import modeling_utils, masking_utils, LlamaForCausalLM, GPT2LMHeadModel
from transformers.models.llama import modeling_llama
from transformers.models.gpt2 import modeling_gpt2
def seen():
    out = {{}}
    homes = modeling_utils, masking_utils, modeling_llama, modeling_gpt2, torch.nn.functional, torch.nn.Module, torch.nn.Linear, torch.Tensor, torch
    for home in homes:
        for name in dir(home):
            if callable(vars(home).get(name)):
                out[repr(home)[:60], name] = vars(home)[name]
    out['attention'] = dict(modeling_utils.ALL_ATTENTION_FUNCTIONS)
    out['masks'] = dict(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
    return out
before = seen()
settings = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist()
for name in {modules!r}:
    importlib.import_module(name)
after = seen()
changed = [k for k in before if before[k] != after.get(k)]
assert not changed, changed
assert settings == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist())
print(len(before) > 500)
""")
    assert out.strip().endswith("True")


def test_the_built_in_files_are_packaged():
    for name in ("py.typed", "store/FORMAT.md", "ui/static/index.html", "builtin/model_files/config.json"):
        assert (SRC / name).is_file(), name
    assert importlib.import_module("rarefy.store.methods")
