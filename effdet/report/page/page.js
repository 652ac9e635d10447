// The sections of the report, from the data in the page. A section without data is left out.

function progress() {
  const { intervals, epochs, evaluations } = data;
  const common = { xLabel: "epochs done", xWord: "epoch", xLow: 0, xHigh: Math.max(...intervals.x, ...epochs.x, ...evaluations.x, 0.001) };
  const line = (name, color, y, x) => ({ name, color, y, x: x || intervals.x });
  const weight = data.box_loss_weight;
  section("progress", "Progress", "Means over short stretches of the run; point at a chart for its values.", grid(
    lineChart("Loss", [line("total", BLUE, intervals.loss), line("class", ORANGE, intervals.class_loss), line(weight === 1 ? "box" : `box × ${weight}`, GREEN, intervals.box_loss)], { ...common, zero: true }),
    lineChart("Average precision", [line("AP", BLUE, evaluations.AP, evaluations.x), line("AP50", ORANGE, evaluations.AP50, evaluations.x)], { ...common, zero: true, format: fraction }),
    lineChart("Learning rate", [line("lr", BLUE, intervals.lr)], { ...common, zero: true }),
    lineChart("Throughput", [line("training", BLUE, intervals.img_per_s)], { ...common, zero: true, unit: "images / s" }),
    lineChart("Waiting for data", [line("share of the time", VIOLET, intervals.data_share)], { ...common, zero: true, format: percent, tickFormat: percent }),
    lineChart("Skipped steps", [line("so far", RED, epochs.skipped, epochs.x)], { ...common, zero: true, counts: true, unit: "updates with inf or NaN" })));
}

function accuracy() {
  const sizes = [["all", "AP"], ["small", "AP_small", "under 32² px"], ["medium", "AP_medium", "32² to 96² px"], ["large", "AP_large", "over 96² px"]];
  const bars = make("div", { className: "bars" }, ...sizes.filter(([, key]) => key in data.stats).flatMap(([name, key, range]) => [
    make("span", {}, name, range ? make("small", {}, ` ${range}`) : ""),
    make("span", { className: "meter" }, make("i", { style: `width:${100 * (data.stats[key] || 0)}%` })), make("b", {}, fraction(data.stats[key]))]));
  const over = evaluationsBySize();
  const more = Object.entries(data.stats).filter(([key]) => !/^AP(_|$)/.test(key));
  const numbers = make("div", { className: "card" }, make("strong", {}, "AP by object size"), bars, make("p", {}, more.map(([key, value]) => `${key} ${fraction(value)}`).join("  ·  ")));
  section("accuracy", "Accuracy", data.accuracy_note, grid(precisionRecall(), numbers, over));
}

function evaluationsBySize() {
  const { evaluations } = data;
  const lines = [["small", ORANGE], ["medium", GREEN], ["large", BLUE]].map(([name, color]) => ({ name, color, x: evaluations.x, y: evaluations[`AP_${name}`] || [] }));
  return evaluations.x.length > 1 ? lineChart("AP by object size, over the run", lines, { xLabel: "epochs done", xWord: "epoch", xLow: 0, zero: true, format: fraction, height: 260 }) : null;
}

function precisionRecall() {
  if (!data.precision) return null;
  const recalls = data.precision.all[0].map((_, k) => k / 100);
  const chart = (curves) => lineChart("Precision over recall", [["IoU 0.50", BLUE], ["IoU 0.75", ORANGE], ["mean .50 to .95", GREEN]].map(([name, color], k) => ({ name, color, x: recalls, y: curves[k] })),
    { whole: true, xLow: 0, xHigh: 1, xLabel: "recall", format: fraction, unit: "precision", restText: true, height: 260 });
  return byClass("all classes (mean)", data.precision.of, (k) => chart(k === null ? data.precision.all : data.precision.of[k]));
}

// A chart of one class or of all, chosen in a list; chart(k) draws class k, or all for null.
function byClass(whole, of, chart) {
  const holder = make("div");
  const choice = make("select", { ariaLabel: "class" }, make("option", { value: "all" }, whole),
    ...data.classes.map((row, k) => (of[k] ? make("option", { value: String(k) }, row.name) : null)));
  const show = () => {
    const drawn = chart(choice.value === "all" ? null : choice.value);
    if (drawn) drawn.querySelector("figcaption").append(choice);
    holder.replaceChildren(drawn || "");
  };
  choice.addEventListener("change", () => { show(); choice.focus(); });
  show();
  return holder;
}

function thresholds() {
  const found = data.thresholds;
  if (!found) return;
  const last = found.best.length - 1;
  const chart = (k) => {
    const best = found.best[k ?? last];
    const lines = ["precision", "recall", "F1"].map((name, at) => ({ name, color: [BLUE, ORANGE, GREEN][at], x: found.scores, y: (k === null ? found.all : found.of[k])[at] }));
    return lineChart(`Best F1 at ${fraction(best.threshold)}`, lines, { whole: true, xLow: 0, xHigh: 1, xLabel: "score threshold", xWord: "score", format: fraction, restText: true, height: 260 });
  };
  const all = found.best[last];
  const worth = make("div", { className: "card" }, make("strong", {}, `Recommended score threshold: ${fraction(all.threshold)}`),
    make("p", {}, `With it ${percent(all.precision)} of the detections are right and ${percent(all.recall)} of the objects are found (F1 ${fraction(all.F1)}). Those of the classes are in the table below.`));
  section("thresholds", "Score threshold", "Which share of the detections with at least a score is right (precision), which share of the objects they find (recall), and F1, the harmonic mean of both, at IoU 0.5. For all classes, detections are counted together.",
    grid(byClass("all classes", found.of, chart), worth));
}

function errorTypes() {
  if (!data.error_types.length) return;
  const rows = data.error_types;
  section("errors", "Error types", "The AP50 that would be won if errors of one kind were mended, each alone (TIDE), over all scores.",
    sortableTable(rows, [{ key: "text", name: "error" }, { key: "ap_lost", name: "AP50 lost", format: fraction, meter: true }, { key: "count", name: "detections, or objects" }], "ap_lost"));
}

function suspects() {
  if (!data.suspects.length) return;
  section("suspects", "Labels to look at", "Predictions with a score of 0.5 or more where the annotations have no object, or one of another class: the surest first. Some are errors of the detector, others of the annotations.",
    make("div", { className: "images crops" }, ...data.suspects.map((one) => make("div", { className: "card" },
      image(one.image, `${one.file}, ${one.predicted}`, one.width, one.height),
      make("p", {}, make("b", {}, one.predicted), ` ${fraction(one.score)}, ${one.labelled === null ? "no label" : `labelled ${one.labelled}`}`, make("br"), one.file)))));
}

function classes() {
  if (!data.classes.length) return;
  const has = (key) => data.classes.some((row) => row[key] !== undefined && row[key] !== null);
  const columns = [{ key: "name", name: "class" }, { key: "AP", name: "AP", format: fraction, meter: true },
    ...["AP50", "AP75", "AP_small", "AP_medium", "AP_large"].map((key) => ({ key, name: key.replace("AP_", ""), format: fraction })),
    { key: "F1", name: "best F1", format: fraction }, { key: "threshold", name: "at score", format: fraction },
    { key: "count", name: "objects" }, { key: "train", name: "in training" }];
  section("classes", "Classes", "Click a column to sort by it. Small, medium and large are the AP of objects of that size; “objects” are those of the validation images.",
    sortableTable(data.classes, columns.filter(({ key }) => key === "name" || has(key)), "AP"));
}

function confusion() {
  const found = data.confusion;
  if (!found) return;
  const readout = make("p", { className: "note", id: "cell" });
  const top = found.top.length ? make("div", { className: "card" }, make("strong", {}, "Most frequent confusions"),
    textTable(found.top.map(([truth, taken, count]) => [truth, `taken for ${taken}`, String(count)]))) : null;
  const matrix = make("div", { className: "scroll flat" }, heatmap(found.rows, found.labels, "nothing there", "missed", readout));
  section("confusion", "Confusions", found.note, make("div", { className: "beside" }, make("div", {}, matrix, readout), top));
}

function worst() {
  if (!data.worst.length) return;
  const key = (color, text) => make("span", { className: "key" }, make("i", { style: `background:${color}` }), text);
  section("worst", "Worst images", data.worst_note,
    make("p", { className: "note" }, key("rgb(46 160 88)", "right"), key("rgb(240 150 30)", "taken for another class"), key("rgb(222 58 48)", "missed, or a false alarm")),
    make("div", { className: "images" }, ...data.worst.map((one) => make("div", { className: "card" },
      make("div", { className: "pair" }, ...["truth", "prediction"].map((side) => make("figure", {}, image(one[side], `${one.file}, ${side}`, one.width, one.height), side))),
      make("p", {}, make("b", {}, one.file), ` ${errors(one)}`)))));
}

function errors(one) {
  const parts = [[one.missed, "missed"], [one.confused, "taken for another class"], [one.false_alarms, one.false_alarms > 1 ? "false alarms" : "false alarm"]];
  return parts.filter(([count]) => count).map(([count, text]) => `${count} ${text}`).join(", ");
}

function batch() {
  if (data.batch) section("batch", "First training batch", "The first images as the network saw them: after augmentation, resizing and padding, with the boxes it learned from.",
    make("div", { className: "scroll flat wide" }, image(data.batch.source, "first training batch", data.batch.width, data.batch.height)));
}

function dataSets() {
  const sets = data.data.sets;
  if (!sets.length) return;
  const share = (counts) => { const sum = counts.reduce((a, b) => a + b, 0) || 1; return counts.map((one) => one / sum); };
  const colors = [BLUE, ORANGE];
  const edges = data.data.edges.map((edge) => Math.round(edge));
  const bins = edges.slice(0, -1);
  const size = (wh) => (wh ? `${wh[0]}×${wh[1]}` : "–");
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...["", ...sets.map((one) => one.name)].map((name) => make("th", {}, name)))),
    make("tbody", {}, ...[["images", (one) => one.images], ["without objects", (one) => one.empty], ["objects", (one) => one.boxes], ["crowd regions", (one) => one.crowd],
      ["smallest image", (one) => size(one.image_sizes[0])], ["median", (one) => size(one.image_sizes[1])], ["largest", (one) => size(one.image_sizes[2])]]
      .filter(([name, of]) => name !== "crowd regions" || sets.some(of))
      .map(([name, of]) => make("tr", {}, make("td", {}, name), ...sets.map((one) => make("td", {}, String(of(one))))))));
  const ranges = bins.map((low, k) => `${k === 0 ? "under" : `${low} to`} ${k === bins.length - 1 ? "more" : edges[k + 1]} px`);
  const counts = sets[0].per_image.map((_, k) => (k === 20 ? "20 and more" : String(k)));
  section("data", "Data", null, grid(make("div", { className: "card" }, table),
    histogram("Object size as the network sees it", sets.map((one, k) => ({ name: one.name, color: colors[k], y: share(one.sizes) })), bins.map((low, k) => (k % 2 ? "" : String(low))), ranges, { xLabel: "square root of the box area after resizing, px", unit: "share of objects", edges: true }),
    histogram("Objects in an image", sets.map((one, k) => ({ name: one.name, color: colors[k], y: share(one.per_image) })), counts.map((_, k) => (k === 20 ? "20+" : k % 2 ? "" : String(k))), counts.map((text) => `${text} objects`), { xLabel: "objects", unit: "share of images" })));
}

function settings() {
  const changed = data.settings.changed;
  const table = make("table", { className: "text" }, make("thead", {}, make("tr", {}, ...["setting", "value", "default"].map((name) => make("th", {}, name)))),
    textTable(changed.map(([key, ...rest]) => [key.replace(/[._]/g, "$&\u200b"), ...rest])).querySelector("tbody"));
  section("settings", "Settings and environment", changed.length ? "What differs from the defaults, then everything." : null, grid(
    make("div", { className: "card" }, changed.length ? table : "all settings have their defaults",
      make("details", {}, make("summary", {}, "All settings, as YAML"), make("pre", {}, data.settings.yaml))),
    make("div", { className: "card" }, textTable(data.environment))));
}

head(); progress(); accuracy(); thresholds(); classes(); errorTypes(); confusion(); worst(); suspects(); batch(); dataSets(); settings();
