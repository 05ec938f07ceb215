"""The report's data and its one file, without a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from typer.testing import CliRunner

from lco_lite import report as package
from lco_lite.cli import app
from lco_lite.evaluation.compare import paired_bootstrap, t_quantile
from lco_lite.recipe.file import dump, parse_yaml, validate
from lco_lite.report import as_html, figures, gather, visible
from lco_lite.report import runs as gathering
from lco_lite.report.about import chosen
from lco_lite.run import Run
from lco_lite.study.statistics import paired
from tests.conftest import TINY
from tests.report.made_runs import HOSTILE, make_run, make_study, score_of_base

TEMPLATE = (Path(package.__file__).parent / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on three seeds each."""
    root = tmp_path_factory.mktemp("report") / "runs"
    for seed, low, high in ((1, 0.5, 0.7), (2, 0.55, 0.7), (3, 0.4, 0.65)):
        make_run(root, f"one-seed-{seed}", seed, beta=1.0, right=low)
        make_run(root, f"two-seed-{seed}", seed, beta=0.5, right=high)
    return root


@pytest.fixture(scope="module")
def data(runs: Path) -> dict:
    return gather([Run(folder) for folder in sorted(runs.iterdir())])


def typed(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def read(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_runs_that_differ_by_seed_alone_are_one_method_named_by_what_it_has_of_its_own(data):
    found = {method["label"]: (len(method["runs"]), method["seeds"]) for method in data["methods"]}
    assert found == {"sft": (6, [1, 2, 3] * 2), "rl-kld, beta 1.0": (3, [1, 2, 3]), "rl-kld, beta 0.5": (3, [1, 2, 3])}
    assert [row["key"] for row in data["differences"]] == ["seed", "rl.beta"]


def test_scores_have_the_interval_over_seeds_and_a_lone_run_that_over_items(data, runs):
    by_label = {data["methods"][row["method"]]["label"]: row for row in data["scores"]}
    row, values = by_label["rl-kld, beta 0.5"], [0.7, 0.7, 0.65]
    half = t_quantile(2) * stdev(values) / 3**0.5
    assert (row["mean"], row["std"], row["over"]) == (
        pytest.approx(fmean(values)),
        pytest.approx(stdev(values)),
        "seeds",
    )
    assert row["interval"] == pytest.approx([fmean(values) - half, fmean(values) + half])
    assert len(by_label["sft"]["runs"]) == 3, "a seed that was made twice counts once"
    assert sum("the same recipe and seed" in text for text in data["left_out"]) == 3
    (alone,) = (r for r in gather([Run(runs / "one-seed-1")])["scores"] if r["stage"] == "rl-kld")
    drawn = paired_bootstrap(torch.tensor([1.0] * 20 + [0.0] * 20))
    assert alone["over"] == "items" and alone["interval"] == pytest.approx([drawn.low, drawn.high])


def test_methods_are_tested_against_each_other_over_seeds_and_over_items(data):
    labels = [method["label"] for method in data["methods"]]
    assert labels[0] == "sft" and all(test["a"] < test["b"] for test in data["tests"])
    (test,) = (t for t in data["tests"] if labels[t["a"]] != "sft")
    scores = {"rl-kld, beta 1.0": {1: 0.5, 2: 0.55, 3: 0.4}, "rl-kld, beta 0.5": {1: 0.7, 2: 0.7, 3: 0.65}}
    assert test["seeds"] == pytest.approx(paired(scores[labels[test["b"]]], scores[labels[test["a"]]])._asdict())
    assert test["items"]["difference"] == pytest.approx(0.2)
    assert test["items"]["items"] == 40 and not test["warnings"] and len(data["tests"]) == 3


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policy scores lower than its base, which has no curve."""
    folder = make_run(tmp_path_factory.mktemp("worse") / "runs", "worse", right=0.25)
    score_of_base(folder, 0.75)
    return folder


def test_a_difference_has_the_sign_and_the_numbers_of_eval_compare(worse):
    words = ["eval", "arithmetic", "--compare", "base", "rl-kld", "--json", "--name", "worse", "--runs"]
    said = CliRunner().invoke(app, [*words, str(worse.parent)])
    assert said.exit_code == 0, said.output
    told, found = json.loads(said.stdout)["arithmetic"], gather([Run(worse)])
    (test,) = found["tests"]
    assert [found["methods"][test[side]]["label"] for side in "ab"] == ["base", "rl-kld"]
    assert test["items"] == {key: told[key] for key in ("difference", "interval", "p", "items")}
    assert test["items"]["difference"] == -0.5
    assert [found["methods"][row["method"]]["label"] for row in found["scores"]] == ["base", "rl-kld"]


def test_the_head_says_what_was_trained_and_what_came_of_it(worse, data):
    (said,) = gather([Run(worse)])["headline"]["results"]
    low, high = (f"−{value}" for value in re.findall(r"−([\d.]+)", said.partition("interval")[2]))
    assert said == (
        "arithmetic: rl-kld is below base. pass@1 75.0 % → 25.0 %, −50.0 points, "
        f"95 % interval {low} to {high} points (paired over 40 items; one training seed)."
    )
    assert -70 < float(low.replace("−", "-")) < -50 < float(high.replace("−", "-")) < -30
    first, second = data["headline"]["results"]
    assert first.startswith("arithmetic: rl-kld, beta 1.0 is above sft. pass@1 20.0 % → 48.3 %, +28.3 points")
    assert second.startswith("arithmetic: rl-kld, beta 0.5 is above sft.") and "paired over 3 seeds" in second
    facts = dict(data["headline"]["facts"])
    assert facts["Data"] == "arithmetic" and facts["Objective"] == "kld" and facts["Finished"] == "2026-01-01"
    assert facts["Seed"] == "1 · 2 · 3" and facts["Stages"] == "sft 4 updates, rl-kld 4 steps"


def scored(folder: Path, stage: str, task: str = "arithmetic", **how: object) -> None:
    """Gives the run's score of the task other settings."""
    file = folder / "eval" / f"{task}--{stage}.json"
    result = json.loads(file.read_text())
    result["settings"] |= how
    file.write_text(json.dumps(result))


def rewarded(folder: Path, function: str, base: float, rl: float) -> None:
    """The run's scores are rewards of this function, of its base and of its policy."""
    for stage, mean in (("base", base), ("rl-kld", rl)):
        scored(folder, stage, scored_by={"functions": {"f": [function, "digest"]}})
        file = folder / "eval" / f"arithmetic--{stage}.json"
        told = {"mean": mean, "std": None, "stderr": 0.1}
        result = json.loads(file.read_text()) | {"own": True, "metric": "reward", **told, "metrics": {"reward": told}}
        file.write_text(json.dumps(result))
        rows = file.with_suffix(".rows.jsonl")
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        of = {"right": False, "why": "scored by aggregate", "gold": "", "extracted": None}
        graded = [line | of | {"score": mean + i % 2 / 10 - 0.05} for i, line in enumerate(lines)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in graded))


def test_a_policy_that_two_runs_scored_by_other_rewards_has_two_scores_and_each_run_its_own(tmp_path):
    folders = [make_run(tmp_path, "a", beta=1.0), make_run(tmp_path, "b", beta=0.5)]
    for folder, *how in zip(folders, ("short.py:f", "long.py:f"), (0.4, 70), (0.45, 60), strict=True):
        score_of_base(folder, 0.2)
        rewarded(folder, *how)
    found = gather([Run(folder) for folder in folders])
    assert not found["left_out"], "no seed is there twice"
    assert [(row["label"], row["mean"]) for row in found["scores"] if row["stage"] == "base"] == [
        ("base of a", 0.4),
        ("base of b", 70),
    ]
    first, second = found["headline"]["results"]
    assert "beta 1.0 is above base of a. reward 0.400 → 0.450" in first
    assert "beta 0.5 is below base of b. reward 70.000 → 60.000" in second
    tested = {tuple(test["labels"]) for test in found["tests"] if test["items"]}
    assert tested == {("base of a", "rl-kld, beta 1.0"), ("base of b", "rl-kld, beta 0.5")}
    assert any("scored in different ways" in text for test in found["tests"] for text in test["warnings"])


def test_the_head_has_no_difference_of_scores_that_were_made_in_different_ways(tmp_path):
    folder = make_run(tmp_path, "hot")
    scored(folder, "rl-kld", sampling={"temperature": 1.0})
    found = gather([Run(folder)])
    (said,) = found["headline"]["results"]
    assert "rl-kld has pass@1 50.0 %" in said and "→" not in said
    assert said.endswith("; sft was scored in another way: not tested.")
    assert found["tests"][0]["items"] and "sampling.temperature: 0.6 → 1.0" in found["tests"][0]["warnings"][0]
    scored(folder, "rl-kld", sampling={"temperature": 0.6}, protocol={"lco_lite": "0.3.0"})
    assert "rl-kld is above sft" in gather([Run(folder)])["headline"]["results"][0], "the version is no other way"


def test_seeds_that_were_scored_in_different_ways_have_no_mean(tmp_path):
    folders = [make_run(tmp_path, f"seed-{seed}", seed) for seed in (1, 2, 3)]
    scored(folders[2], "rl-kld", sampling={"temperature": 1.0})
    found = gather([Run(folder) for folder in folders])
    rows = {row["label"]: len(row["runs"]) for row in found["scores"]}
    assert rows == {"sft": 3, "rl-kld of seed-1, seed-2": 2, "rl-kld of seed-3": 1}
    scored(folders[0], "rl-kld", sampling={"temperature": 1.0})
    for responses in tmp_path.glob("*/eval/*.rows.jsonl"):
        responses.unlink()
    (test,) = (t for t in gather([Run(folder) for folder in folders])["tests"] if "seed-1" in t["labels"][1])
    assert test["seeds"] is None and test["items"] is None, "two seeds that sft has too, at another temperature"


def test_seeds_that_draw_their_own_items_are_one_mean_and_items_of_other_data_are_apart(tmp_path):
    folders = [make_run(tmp_path, f"seed-{seed}", seed) for seed in (1, 2)]
    for folder, items in zip(folders, "xy", strict=True):
        for stage in ("sft", "rl-kld"):
            scored(folder, stage, items=items, scored_by={"rows": items})
    (row, *more) = [row for row in gather([Run(f) for f in folders])["scores"] if row["stage"] == "sft"]
    assert row["label"] == "sft" and len(row["runs"]) == 2 and not more
    (folders[1] / "recipe.yaml").write_text("seed: 2\ndata:\n  prompts: other.jsonl\n")
    apart = [row["label"] for row in gather([Run(f) for f in folders])["scores"] if row["stage"] == "sft"]
    assert apart == ["sft of seed-1", "sft of seed-2"]
    twin = make_run(tmp_path, "twin", 1)
    scored(twin, "sft", items="z")
    labels = [row["label"] for row in gather([Run(folders[0]), Run(twin)])["scores"] if row["stage"] == "sft"]
    assert labels == ["sft of seed-1", "sft of twin"], "the same seed, other items"


def test_the_best_policy_of_two_reward_models_or_betas_is_two_methods(tmp_path):
    folders = [make_run(tmp_path, name) for name in "abc"]
    for folder, beta, rank in zip(folders, (1.0, 0.5, 1.0), (8, 8, 16), strict=True):
        (folder / "rm").mkdir()
        begun = {"settings": {"seed": 1, "reward_model.lora.r": rank}, "upstream": {}, "started": "2026-01-01"}
        (folder / "rm" / "stage.json").write_text(json.dumps(begun))
        for file in (folder / "eval").glob("*rl-kld*"):
            file.with_name(file.name.replace("rl-kld", "optimal")).write_text(
                file.read_text().replace("rl-kld", "optimal")
            )
        scored(folder, "optimal", made_by=f"rm {folder.name}, beta {beta}")
    found = gather([Run(folder) for folder in folders])
    named = [row["label"] for row in found["scores"] if row["stage"] == "optimal"]
    assert named == [f"optimal, r {rank}, beta {beta}" for beta, rank in ((1.0, 8), (0.5, 8), (1.0, 16))]


def test_a_response_of_a_task_that_is_not_right_or_wrong_has_its_score_and_no_grade(tmp_path):
    folder = make_run(tmp_path, "a")
    score_of_base(folder, 0.2)
    graded = [sample for sample in gather([Run(folder)])["samples"] if "task" in sample]
    assert all({"right", "gold", "extracted"} <= {*sample} for sample in graded)
    rewarded(folder, "short.py:f", 0.4, 0.45)
    ungraded = [sample for sample in gather([Run(folder)])["samples"] if "task" in sample]
    assert len(ungraded) == 80 and all("score" in sample for sample in ungraded)
    assert not any({"right", "why", "gold", "extracted"} & {*sample} for sample in ungraded)


def test_the_settings_that_were_chosen_are_those_without_which_the_recipe_is_another(tmp_path):
    given = TINY | {"rl": {"lr": 3e-3, "steps": 7}}
    data = parse_yaml(dump(validate(given, "here")))[0]
    found = {row["key"]: (row["value"], row["default"]) for row in chosen(data, "here")}
    assert found["task"] == ("arithmetic", None) and found["rl.steps"][0] == 7
    assert found["rl.lr"][1] == validate(given | {"rl": {}}, "here").rl.lr != 3e-3
    assert "rl.beta" not in found and "seed" not in found and not any(key.startswith("rollout") for key in found)
    assert found["model.lora.r"] == (4, 32) and found["model.init.layers"][0] == 1
    small = parse_yaml(dump(validate(TINY | {"model": {"init": {}}}, "here")))[0]
    assert "model.init" in {row["key"] for row in chosen(small, "here")}, "it is there, with defaults alone"
    assert chosen({"rl": 1}, "here") is None


def test_curves_have_the_mean_and_spread_over_seeds_and_every_run(data, runs):
    by_id = {figure["id"]: figure for figure in data["figures"]}
    first = ["rl-reward", "rl-accuracy", "rl-grad_norm", "rl-kl_to_old", "rl-loss"]
    assert list(by_id) == [*first, "rl-lr", "sft-grad_norm", "sft-loss"]
    assert [f["id"] for f in data["figures"] if f["share"]] == ["rl-accuracy"]
    series = by_id["rl-reward"]["series"][0]
    curves = [run["y"] for run in series["runs"]]
    assert len(curves) == 3 and series["band"]["x"] == [1, 2, 3, 4] and series["band"]["samples"] == [16, 32, 48, 64]
    assert series["band"]["mean"] == pytest.approx([fmean(at) for at in zip(*curves, strict=True)])
    assert series["band"]["std"] == pytest.approx([stdev(at) for at in zip(*curves, strict=True)])
    assert by_id["sft-loss"]["series"][0]["band"]["n"] == 3


def test_what_does_not_fit_is_left_out_evenly_and_said(runs, monkeypatch):
    monkeypatch.setattr(gathering, "POINTS", 2)
    size = (runs / "one-seed-1" / "rl-kld" / "samples.jsonl").stat().st_size
    monkeypatch.setattr(gathering, "SAMPLES", int(0.8 * size))
    monkeypatch.setattr(gathering, "LONGEST", 10)
    found = gather([Run(runs / "one-seed-1")])
    steps = [s["step"] for s in found["samples"] if "task" not in s]
    assert steps == [1, 1, 1, 4, 4, 4]
    assert all(run["x"] == [1, 3, 4] for f in found["figures"] for s in f["series"] for run in s["runs"])
    said = " ".join(found["left_out"])
    assert "2 of 4 training steps with samples" in said and "one of 2 steps" in said and "10 characters" in said
    assert all(len(s["response"]) < 60 for s in found["samples"])


def test_no_text_leaves_its_place_and_what_cannot_be_seen_is_written_out(runs, tmp_path):
    page = tmp_path / "page.html"
    typed("one-seed-1", "--runs", runs, "--out", page)
    text = page.read_text(encoding="utf-8")
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert not set("<>&\u2028\u2029\u202e\x1b") & set(data) and "hacked" in data
    assert text.replace(data, "{{data}}").replace("one-seed-1", "{{title}}") == TEMPLATE
    (sample,) = (s for s in read(page)["samples"] if "hacked" in s["response"])
    assert sample["response"] == visible(HOSTILE)
    assert "⟨U+202E⟩⟨U+001B⟩[31m" in sample["response"] and "<img src=x" in sample["response"]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\u2066x\u2069\u200f", "⟨U+2066⟩x⟨U+2069⟩⟨U+200F⟩"),
        ("\U000e0041\ufeff\x00\x7f\x9b", "⟨U+E0041⟩⟨U+FEFF⟩⟨U+0000⟩⟨U+007F⟩⟨U+009B⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("👩\u200d🔬 שלום é", "👩\u200d🔬 שלום é"),
    ],
)
def test_invisible_characters_are_written_out_and_scripts_of_the_world_are_left_alone(text, seen):
    assert visible(text) == seen


def test_the_page_loads_nothing_and_puts_data_in_as_text_alone():
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in TEMPLATE
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "import(",
        "fetch(",
        "@import",
        "url(",
    ):
        assert way not in TEMPLATE, way
    assert set(re.findall(r"https?://[^\"' )]+", TEMPLATE)) == {"http://www.w3.org/2000/svg"}
    assert TEMPLATE.count("{{data}}") == TEMPLATE.count("{{title}}") == 1


def test_names_are_escaped_in_the_title_too():
    assert "<title>&lt;b&gt;{{data}}" in as_html({"title": "<b>{{data}}"})


def test_without_a_name_the_newest_run_is_shown_and_the_last_line_is_the_page(tmp_path):
    folder = make_run(tmp_path / "runs", "only", tokens=False)
    assert typed("--runs", tmp_path / "runs", "-q").splitlines()[-1] == str(folder / "report.html")
    found = read(folder / "report.html")
    assert len([s for s in found["samples"] if "task" not in s]) == 12 and not any(
        "tokens" in s for s in found["samples"]
    )


def test_a_run_without_samples_and_one_that_has_just_begun_are_shown_too(tmp_path):
    folder = make_run(tmp_path, "early")
    (folder / "rl-kld" / "samples.jsonl").unlink()
    for file in [*(folder / "eval").iterdir(), folder / "rl-kld" / "done.json"]:
        file.unlink()
    with (folder / "rl-kld" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # being written
    found = gather([Run(folder)])
    assert not found["samples"] and not found["scores"] and len(found["figures"]) == 8
    assert [stage["done"] for stage in found["runs"][0]["stages"]] == [True, False]


def test_figures_are_written_as_svg_and_png_under_the_names_of_the_page(runs, tmp_path):
    typed("one-seed-1", "one-seed-2", "--runs", runs, "--out", tmp_path / "p.html", "--figures", tmp_path / "figures")
    names = {figure["id"] for figure in read(tmp_path / "p.html")["figures"]} | {"scores-arithmetic"}

    def written(kind: str) -> set[str]:
        return {file.stem for file in (tmp_path / "figures").glob(f"*.{kind}")}

    assert written("svg") == written("png") == names - {"rl-lr"}, "those that the page shows first"
    again = ("one-seed-1", "--runs", runs, "--out", tmp_path / "p.html", "--all-figures")
    assert "give it too" in typed(*again, code=2)
    typed(*again, "--figures", tmp_path / "figures")
    assert written("svg") == written("png") == names
    typed("one-seed-1", "one-seed-2", "--runs", runs, "--out", tmp_path / "p.html", "--figures", tmp_path / "figures")
    assert "mean ± std" in (tmp_path / "figures" / "rl-reward.svg").read_text(encoding="utf-8")


def test_the_axis_of_a_share_stays_within_0_and_1_unless_its_values_do_not():
    assert figures._of_shares((-0.05, 0.05), (0.0, 0.0), 1) == (0.0, 0.05)
    assert figures._of_shares((-3.0, 104.0), (2.0, 99.0), 100) == (0.0, 100)
    assert figures._of_shares((-5.5, -4.5), (-5.4, -4.6), 1) == (-5.5, -4.5)


def test_a_studys_folder_becomes_a_page_of_claims_tables_and_figures(tmp_path):
    folder = make_study(tmp_path / "studies" / "methods")
    typed(folder, "--figures", tmp_path / "figures")
    found = read(folder / "report.html")
    assert found["kind"] == "study" and [c["verdict"] for c in found["claims"]] == ["unclear"]
    assert found["tables"] == [
        {"title": "scores", "columns": ["method", "pass@1"], "rows": [["a, b", "0.5"], ["c", "0.25"]]}
    ]
    assert [(f["id"], f["title"]) for f in found["figures"]] == [("learning", "Curves")]
    assert found["figures"][0]["picture"].startswith("data:image/svg+xml;base64,")
    assert found["notes"] == ["Two seeds alone."]
    assert (tmp_path / "figures" / "learning.svg").exists()


@pytest.mark.parametrize("study", ["convexity", "dynamics", "efficiency", "methods"])
def test_the_studies_that_are_kept_have_a_page(study):
    folder = Path(package.__file__).parents[2] / "docs" / "studies" / study
    found = package.gather_study(folder)
    assert found["claims"] and found["tables"] and found["figures"] and len(as_html(found)) > len(TEMPLATE)


def test_only_a_page_is_written_over(runs, tmp_path):
    recipe = runs / "one-seed-1" / "recipe.yaml"
    before = recipe.read_bytes()
    assert "is no page of a report" in typed("one-seed-1", "--runs", runs, "--out", recipe, code=2)
    assert recipe.read_bytes() == before
    for page in (tmp_path / "page", tmp_path / "page"):
        typed("one-seed-1", "--runs", runs, "--out", page)
    assert read(page)
    (tmp_path / "empty.html").touch()
    typed("one-seed-1", "--runs", runs, "--out", tmp_path / "empty.html")


def test_what_cannot_be_shown_is_one_message(tmp_path, runs):
    study, empty = make_study(tmp_path / "study"), tmp_path / "empty"
    empty.mkdir()
    assert "there are: one-seed-1, " in typed("nowhere", "--runs", runs, code=2)
    assert "is a study" in typed(study, "one-seed-1", "--runs", runs, code=2)
    assert "no recipe, stage or score" in typed(empty, "--runs", runs, code=2)
    twins = [make_run(tmp_path / root, "twin") for root in "ab"]
    assert "several runs are called twin" in typed(*twins, code=2)
    assert "is a folder" in typed("one-seed-1", "--runs", runs, "--out", tmp_path, code=2)
    (study / "study.json").write_text('{"study": "x"}')
    assert "study.json" in typed(study, code=2)
    broken = make_run(tmp_path, "broken")
    (broken / "eval" / "arithmetic--sft.json").write_text("{")
    assert "arithmetic--sft.json: damaged: is not JSON" in typed(broken, code=2)
    study = make_study(tmp_path / "another")
    for file, content, told in (
        ("README.md", b"\xff\xfe", "README.md: damaged: is not UTF-8"),
        ("scores.csv", b"\xff\xfe", "scores.csv: damaged: is not UTF-8"),
        ("scores.csv", b"x" * 200_000, "scores.csv: damaged: field larger than field limit"),
    ):
        before = (study / file).read_bytes()
        (study / file).write_bytes(content)
        assert told in typed(study, code=2)
        (study / file).write_bytes(before)
    broken = make_run(tmp_path, "no-recipe")
    for recipe in (b"\xff", b"[1]", b"rl: {steps: " + b"9" * 5000 + b"}", b"[" * 100_000, b"seed: []"):
        (broken / "recipe.yaml").write_bytes(recipe)
        assert "recipe.yaml: damaged: " in (said := typed(broken, code=2)) and len(said) < 1000
    assert not (broken / "report.html").exists()
