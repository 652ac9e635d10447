"""report.html: its numbers against their sources, and the page in a real browser where there is one."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effdet.config import get_efficientdet_config
from effdet.config.cli import parse_train_args
from effdet.data.dataset_factory import open_coco
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.evaluator import CocoEvaluator
from effdet.predict.gallery import draw_training_batch
from effdet.report import html as report
from effdet.report.data_stats import SIZE_EDGES_PX, describe_dataset
from effdet.report.html import Report, changed_settings
from effdet.report.images import BATCH_NAME

REPO = Path(__file__).resolve().parents[3]
ODD_NAME = "</script><b>ball & co"  # a class name must stay text
EPOCHS = 3


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Training and validation set, with an odd class name."""
    root = make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=6, num_val=8)
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        next(c for c in content["categories"] if c["name"] == "ball")["name"] = ODD_NAME
        path.write_text(json.dumps(content))
    return open_coco(root, "train"), open_coco(root, "val")


def evaluate(dataset) -> CocoEvaluator:
    """Score predictions that find every other object exactly, take one for another class and add an alarm."""
    evaluator = CocoEvaluator(dataset, all_images=True)
    for index in range(len(dataset)):
        truth = dataset.parser.get_ann_info(index)
        rows = [
            [*box[[1, 0, 3, 2]], 0.9 - 0.01 * n, label if n else label % 6 + 1]
            for n, (box, label) in enumerate(zip(truth["bbox"], truth["cls"], strict=True))
            if n % 2 == 0
        ]
        rows.append([0, 0, 9, 9, 0.5, 1])
        evaluator.add_predictions(torch.tensor(np.array(rows), dtype=torch.float32)[None], {"img_idx": [index]})
    evaluator.evaluate()
    return evaluator


def rows_of_a_run() -> list[dict]:
    rows = []
    for epoch in range(EPOCHS):
        rows += [
            {
                "kind": "interval",
                "epoch": epoch,
                "step": step,
                "steps": 4,
                "loss": 3.0 / (4 * epoch + step),
                "class_loss": 1.0 / (4 * epoch + step),
                "box_loss": 0.04 / (4 * epoch + step),
                "lr": 1e-3,
                "img_per_s": 40.0 + step,
                "data_share": 0.05,
            }
            for step in (2, 4)
        ]
        rows.append({"kind": "epoch", "epoch": epoch, "skipped": epoch})
        rows.append(
            {
                "kind": "evaluation",
                "epoch": epoch,
                "AP": 0.1 * epoch,
                "AP50": 0.2 * epoch,
                "AP_small": None,
                "AP_medium": 0.1,
                "AP_large": 0.2,
            }
        )
    rows[0]["loss"] = None  # not finite
    return rows


@pytest.fixture(scope="module")
def page(sets, tmp_path_factory) -> tuple[Path, CocoEvaluator]:
    """A written page with every section, and the evaluation in it."""
    train_set, val_set = sets
    folder = tmp_path_factory.mktemp("run")
    images = torch.full((4, 3, 64, 64), 0.0)
    target = {"bbox": torch.tensor([[[8.0, 8, 40, 40]]] * 4), "cls": torch.ones(4, 1, dtype=torch.int64)}
    mean, std = torch.full((1, 3, 1, 1), 120.0), torch.full((1, 3, 1, 1), 60.0)
    names = val_set.parser.category_map.class_names
    draw_training_batch(images, target, names, mean, std).save(folder / BATCH_NAME)
    evaluator = evaluate(val_set)
    cfg = parse_train_args(["--root", "data", "--lr", "0.08"])
    made = Report(
        folder / report.NAME,
        "a run",
        cfg,
        get_efficientdet_config("tf_efficientdet_d0"),
        val_set,
        train_set,
        "cpu",
        [("ms an image", "12.3")],
    )
    made.write(evaluator, rows_of_a_run())
    assert [path.name for path in folder.iterdir() if path.name != BATCH_NAME] == [report.NAME], "nothing half-written"
    return folder / report.NAME, evaluator


def data_of(path: Path) -> dict:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text("utf-8"), re.S)
    return json.loads(text, parse_constant=pytest.fail)


def test_numbers_are_those_of_the_evaluation(page, sets):
    data, evaluator = data_of(page[0]), page[1]
    assert list(data["stats"]) == list(evaluator.stats)
    assert data["stats"]["AP"] == pytest.approx(evaluator.stats["AP"], rel=1e-5) and 0 < data["stats"]["AP"] < 1
    for row, line in zip(data["classes"], evaluator.per_class(), strict=True):
        assert (row["name"], row["count"]) == (line.name, line.count)
        assert row["AP"] == pytest.approx(line.AP, rel=1e-5) and row["AP50"] == pytest.approx(line.AP50, rel=1e-5)
    in_training = sets[0].parser.box_table()["category_id"]
    assert [row["train"] for row in data["classes"]] == [
        int((in_training == row["category_id"]).sum()) for row in data["classes"]
    ]
    at_50 = np.array(data["precision"]["all"][0])
    assert at_50.mean() == pytest.approx(evaluator.stats["AP50"], abs=2e-3), "AP is the area below the curve"
    of = data["precision"]["of"]["0"]
    assert np.mean(of[0]) == pytest.approx(data["classes"][0]["AP50"], abs=1e-3)
    assert np.mean(of[1]) == pytest.approx(data["classes"][0]["AP75"], abs=1e-3)
    assert np.mean(of[2]) == pytest.approx(data["classes"][0]["AP"], abs=1e-3)


def test_thresholds_errors_and_labels_to_look_at_are_those_of_the_evaluation(page):
    data, evaluator = data_of(page[0]), page[1]
    found = evaluator.score_curves
    assert data["thresholds"]["best"][-1] == pytest.approx(found.best[-1]._asdict(), rel=1e-5)
    assert data["thresholds"]["all"][1][0] == pytest.approx(found.curves[-1][1][0], abs=1e-4)
    for row, best in zip(data["classes"], found.best, strict=False):
        assert row["threshold"] == (None if np.isnan(best.threshold) else pytest.approx(best.threshold, rel=1e-5))
    assert {row["text"] for row in data["error_types"]} >= {"right place, wrong class", "nothing there"}
    alarms = [one for one in data["suspects"] if one["labelled"] is None]
    confused = [one for one in data["suspects"] if one["labelled"] is not None]
    assert confused and alarms and all(one["score"] >= 0.5 for one in data["suspects"])
    assert all(one["predicted"] != one["labelled"] for one in confused)
    crop = Image.open(io.BytesIO(base64.b64decode(alarms[0]["image"].partition(",")[2]))).convert("RGB")
    red = np.abs(np.asarray(crop).astype(int) - (222, 58, 48)).max(axis=2) < 40
    assert crop.size == (alarms[0]["width"], alarms[0]["height"]) and red.sum() > 50


def test_confusions_count_every_object(page):
    data = data_of(page[0])
    rows = np.array(data["confusion"]["rows"])
    assert rows.shape == (7, 7) and data["confusion"]["labels"][0] == ODD_NAME
    assert rows[:-1].sum(axis=1).tolist() == [row["count"] for row in data["classes"]]
    mixed = rows[:-1, :-1].sum() - np.trace(rows[:-1, :-1])
    assert mixed > 0 and sum(count for *_, count in data["confusion"]["top"]) == mixed
    assert rows[-1].sum() > 0, "the alarms"


def test_curves_stand_at_the_epochs_done(page):
    data = data_of(page[0])
    assert data["intervals"]["x"] == [0.5, 1, 1.5, 2, 2.5, 3] and data["evaluations"]["x"] == [1, 2, 3]
    assert data["intervals"]["loss"][:2] == [None, 0.75]
    weighted = [50 * 0.04 / step for step in (2, 4, 6, 8, 10, 12)]
    assert data["intervals"]["box_loss"] == pytest.approx(weighted, rel=1e-4), "as it enters the sum"
    assert data["epochs"]["skipped"] == [0, 1, 2] and ["best AP (epoch 2)", "0.200"] in data["tiles"]


def test_long_curves_are_thinned_to_means():
    values = [float(k) for k in range(6000)]
    thin = report._thin(values)
    assert len(thin) == 600 and thin[0] == 4.5 and thin[-1] == 5994.5
    assert report._thin([None] * 6000) == [None] * 600 and report._thin([1.0, None]) == [1.0, None]


def test_worst_images_are_drawn_with_what_is_wrong_in_its_colour(page):
    worst = data_of(page[0])["worst"]
    assert 1 <= len(worst) <= 8 and worst[0]["missed"] + worst[0]["confused"] + worst[0]["false_alarms"] > 0
    for side in ("truth", "prediction"):
        image = Image.open(io.BytesIO(base64.b64decode(worst[0][side].partition(",")[2]))).convert("RGB")
        assert image.size == (worst[0]["width"], worst[0]["height"])
        red = np.abs(np.asarray(image).astype(int) - (222, 58, 48)).max(axis=2) < 24
        assert red.sum() > 100
    batch = data_of(page[0])["batch"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(batch["source"].partition(",")[2]))).convert("RGB"))
    assert image.shape[:2] == (batch["height"], batch["width"])
    assert np.abs(image[-20, 40].astype(int) - 120).max() < 4, "normalisation is undone: 0 is the mean"


def test_the_page_loads_nothing(page):
    text = page[0].read_text("utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", text) and "@import" not in text
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), "the one address is a name, not fetched"


def test_settings_that_differ_from_the_defaults():
    cfg = parse_train_args(["--root", "data", "--lr", "0.08", "--no-model-ema", "--device-list", "0,1"])
    assert changed_settings(cfg) == [
        ("data.root", "data", "none"),
        ("optim.lr", "0.08", "0.32"),
        ("ema.enabled", "off", "on"),
        ("dist.device_list", "0, 1", "none"),
    ]


def test_a_failure_is_said_once_and_ends_nothing(sets, page, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "file").write_text("")
    made = Report(
        tmp_path / "file" / "report.html",
        "a",
        parse_train_args(["--root", "x"]),
        get_efficientdet_config("tf_efficientdet_d0"),
        sets[1],
    )
    made.write(page[1])
    made.write(page[1])
    assert len([r for r in caplog.records if "report.html could not be written" in r.getMessage()]) == 1


def test_an_evaluation_without_anything_makes_a_page(sets, tmp_path):
    evaluator = CocoEvaluator(sets[1], all_images=True)
    evaluator.evaluate()
    Report(
        tmp_path / "report.html",
        "empty",
        parse_train_args(["--root", "x"]),
        get_efficientdet_config("tf_efficientdet_d0"),
        sets[1],
    ).write(evaluator)
    data = data_of(tmp_path / "report.html")
    assert data["stats"]["AP"] == 0 and data["worst"] == [] and data["confusion"] is None and data["batch"] is None


def test_data_statistics_by_hand(sets):
    parser = sets[1].parser
    numbers = describe_dataset(sets[1], (512, 512))
    annotations = [parser.get_ann_info(k) for k in range(len(sets[1]))]
    assert numbers["boxes"] == sum(len(a["cls"]) for a in annotations) == sum(numbers["sizes"])
    assert numbers["per_image"] == np.bincount([len(a["cls"]) for a in annotations], minlength=21).tolist()
    sizes = []
    for k, a in enumerate(annotations):
        info = parser.img_infos[k]
        factor = 512 / max(info["width"], info["height"])
        sizes += [float(((y1 - y0) * (x1 - x0)) ** 0.5) * factor for y0, x0, y1, x1 in a["bbox"].tolist()]
    assert numbers["sizes"] == np.histogram(sizes, SIZE_EDGES_PX)[0].tolist()
    assert sum(numbers["boxes_of"].values()) == numbers["boxes"]


def test_the_package_ships_the_page():
    text = (REPO / "pyproject.toml").read_text()
    assert '"report/page/*"' in text.partition("package-data")[2]
    assert {path.name for path in (REPO / "effdet" / "report" / "page").iterdir()} == {
        "page.html",
        "style.css",
        "charts.js",
        "parts.js",
        "page.js",
        "compare.js",
    }


# ---- in a browser ----------------------------------------------------------------------------------------------------

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
OVERLAPS = """
const clash = [];
for (const svg of document.querySelectorAll("figure svg")) {
  const boxes = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    const apart = p.left >= q.right - 1 || q.left >= p.right - 1 || p.top >= q.bottom - 3 || q.top >= p.bottom - 3;
    if (!apart) clash.push(`${a} | ${b}`);
  }));
  const frame = svg.getBoundingClientRect();
  for (const [a, p] of boxes) if (p.left < frame.left - 1 || p.right > frame.right + 1) clash.push(`${a} is cut off`);
}
return clash;"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)")
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("needs selenium (requirements-dev.txt)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def show(browser, path: Path, width: int, dark: bool = False) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
    )
    browser.get(path.as_uri())
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(
        lambda b: b.execute_script("return document.querySelectorAll('figure svg path').length") >= 10
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_every_section_renders(browser, page, width):
    show(browser, page[0], width)
    assert browser.execute_script("return [...document.querySelectorAll('section')].map((s) => s.id)") == [
        "progress",
        "accuracy",
        "thresholds",
        "classes",
        "errors",
        "confusion",
        "worst",
        "suspects",
        "batch",
        "data",
        "settings",
    ]
    titles = browser.execute_script("return [...document.querySelectorAll('figure strong')].map((s) => s.textContent)")
    assert titles == [
        "Loss",
        "Average precision",
        "Learning rate",
        "Throughput",
        "Waiting for data",
        "Skipped steps",
        "Precision over recall",
        "AP by object size, over the run",
        f"Best F1 at {page[1].score_curves.best[-1].threshold:.3f}",
        "Object size as the network sees it",
        "Objects in an image",
    ]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "no sideways scrolling"
    assert browser.execute_script(OVERLAPS) == []
    assert browser.execute_script(
        "return document.querySelectorAll('#main b, #main script').length === "
        "document.querySelectorAll('.readout b, .bars b, p b').length"
    ), "names stay text"
    assert ODD_NAME in browser.execute_script("return document.querySelector('#classes').textContent")
    loaded = browser.execute_script(
        "const all = [...document.images].filter((i) => i.src); all.forEach((i) => { i.loading = 'eager'; });"
        "return Promise.all(all.map((i) => i.decode())).then(() => all.map((i) => i.naturalWidth));"
    )
    data = data_of(page[0])
    assert len(loaded) == 2 * len(data["worst"]) + len(data["suspects"]) + 1 and min(loaded) > 0
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_sorting_and_hovering(browser, page):
    show(browser, page[0], 1280)
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    def column(number: int) -> list[str]:
        return browser.execute_script(
            f"return [...document.querySelectorAll('#classes tbody tr')].map((r) => r.cells[{number}].textContent)"
        )

    classes = data_of(page[0])["classes"]
    columns = len(browser.find_elements(By.CSS_SELECTOR, "#classes th"))
    for key, number in (("AP50", 2), ("name", 0), ("count", columns - 2)):
        for turn in range(2):
            head = browser.find_elements(By.CSS_SELECTOR, "#classes th")[number]
            head.find_element(By.TAG_NAME, "button").click()
            descending = head.get_attribute("aria-sort") == "descending"
            assert descending == ((turn == 0) == (key != "name"))
            values = [row[key] for row in classes]
            order = sorted(values, key=lambda v: v.lower() if isinstance(v, str) else v, reverse=descending)
            shown = [f"{v:.3f}" if isinstance(v, float) or key == "AP50" else str(v) for v in order]
            if key == "name":
                assert sorted(column(0)) == sorted(values) and column(0)[0 if descending else -1] != ODD_NAME
            else:
                assert column(number) == shown
    chart = browser.find_element(By.CSS_SELECTOR, "#progress figure svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(browser).move_to_element(chart).perform()
    figure = browser.find_element(By.CSS_SELECTOR, "#progress figure")
    assert figure.find_element(By.CSS_SELECTOR, ".where").text == "epoch 1.5"
    assert figure.find_element(By.CSS_SELECTOR, ".readout").text.split() == [
        "total",
        "0.5",
        "class",
        "0.167",
        "box",
        "×",
        "50",
        "0.333",
    ]
    choice = browser.find_element(By.CSS_SELECTOR, "#accuracy select")
    before = browser.execute_script("return document.querySelector('#accuracy path').getAttribute('d')")
    browser.execute_script("arguments[0].value = '0'; arguments[0].dispatchEvent(new Event('change'))", choice)
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(
        lambda b: (
            b.execute_script("const p = document.querySelector('#accuracy path'); return p && p.getAttribute('d')")
            not in (None, before)
        )
    )
    browser.find_element(By.CSS_SELECTOR, "#worst img").click()
    assert browser.execute_script(
        "return document.querySelector('dialog').open && document.querySelector('dialog img').src.startsWith('data:')"
    )
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_dark_and_light_differ_and_can_be_read(browser, page):
    colors = []
    for dark in (False, True):
        show(browser, page[0], 1280, dark)
        rgb = browser.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        paper, ink = ([int(v) for v in re.findall(r"\d+", text)[:3]] for text in rgb)
        assert abs(sum(paper) - sum(ink)) > 450, "contrast"
        colors.append(sum(paper))
    assert colors[0] > 700 > 150 > colors[1]
