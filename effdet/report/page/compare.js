// The sections of a comparison of runs, from the data in the page.

const COLORS = [BLUE, ORANGE, GREEN, RED, VIOLET];

function headed(rows, corner) {
  const head = make("thead", {}, make("tr", {}, ...[corner, ...data.names].map((name) => make("th", {}, name))));
  return make("div", { className: "scroll" }, make("table", { className: "text" }, head, textTable(rows).querySelector("tbody")));
}

function curves() {
  const chart = (title, part, key, options) => lineChart(title, data.runs.map((run, k) => ({
    name: run.name, color: COLORS[k % COLORS.length], dash: k < COLORS.length ? "none" : "5 4", x: run[part].x, y: run[part][key] })),
  { xLabel: "epochs done", xWord: "epoch", xLow: 0, zero: true, height: 260, ...options });
  section("curves", "Curves", null, grid(chart("Average precision", "evaluations", "AP", { format: fraction }), chart("AP50", "evaluations", "AP50", { format: fraction }),
    chart("Loss", "epochs", "loss", {}), chart("Learning rate", "epochs", "lr", {})));
}

head();
section("scores", "Results", data.notes.join(" "), headed(data.scores, ""));
curves();
section("settings", "Settings that differ", data.settings.length ? null : "All settings are equal.", data.settings.length ? headed(data.settings, "setting") : make("p"));
