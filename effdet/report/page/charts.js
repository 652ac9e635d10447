"use strict";
// Charts as SVG, drawn anew when their width changes. What they show is decided in page.js.

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "style") element.style.cssText = value;
    else if (key in element && key !== "list") element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function shape(parent, tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function short(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size < 1e-4) return value.toExponential(2).replace(/\.?0*e/, "e");
  return `${+value.toPrecision(size >= 1000 ? 4 : 3)}`;
}

const fraction = (value) => (isNumber(value) ? value.toFixed(3) : "–");
const percent = (value) => (isNumber(value) ? `${(100 * value).toFixed(value && value < 0.1 ? 1 : 0)} %` : "–");

function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((one) => one >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(+(k * step).toPrecision(12));
  return ticks;
}

// A figure with caption, readout and an SVG that `draw(svg, width)` fills; returns what a pointer handler needs.
function figure(title, height, draw) {
  const readout = make("div", { className: "readout" });
  const holder = make("div");
  const box = make("figure", { className: "card" }, make("figcaption", {}, make("strong", {}, title), make("span", { className: "where" })), readout, holder);
  let known = 0;
  const redraw = () => {
    const width = Math.floor(holder.clientWidth);
    if (!width || width === known) return;
    known = width;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", title);
    holder.replaceChildren(svg);
    draw(svg, width, readout);
  };
  new ResizeObserver(redraw).observe(holder);
  return box;
}

function readoutOf(readout, where, entries, block) {
  readout.replaceChildren(...entries.map((one) => make("span", {}, make("i", { className: block ? "block" : "", style: `background:${one.color}` }),
    `${one.name} `, one.text ? make("b", {}, one.text) : null)));
  readout.parentElement.querySelector(".where").textContent = where;
}

// The frame of a chart: y ticks with rules, x ticks, labels of both axes; returns the two scales.
function frame(svg, width, height, x, y) {
  const widest = Math.max(...y.ticks.map((tick) => y.format(tick).length));
  const left = Math.max(32, 13 + 6.8 * widest), right = 10, top = y.label ? 22 : 10, bottom = 38;
  const scaleX = (value) => left + ((value - x.low) / (x.high - x.low || 1)) * (width - left - right);
  const scaleY = (value) => height - bottom - ((value - y.low) / (y.high - y.low || 1)) * (height - top - bottom);
  if (y.label) shape(svg, "text", { x: 0, y: 10 }, y.label);
  for (const tick of y.ticks) {
    shape(svg, "line", { class: "rule", x1: left, x2: width - right, y1: scaleY(tick), y2: scaleY(tick) });
    shape(svg, "text", { x: left - 7, y: scaleY(tick) + 4, "text-anchor": "end" }, y.format(tick));
  }
  shape(svg, "line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom });
  for (const tick of x.ticks) {
    const at = scaleX(tick);
    shape(svg, "line", { class: "axis", x1: at, x2: at, y1: height - bottom, y2: height - bottom + 4 });
    const label = x.format(tick);
    const half = 3.4 * label.length;
    shape(svg, "text", { x: Math.min(Math.max(at, half), width - half), y: height - bottom + 17, "text-anchor": "middle" }, label);
  }
  if (x.label) shape(svg, "text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, x.label);
  return { scaleX, scaleY, left, right, top, bottom };
}

// series: [{name, color, x, y}]; options: unit (y label), xLabel, format, whole (y from 0 to 1), zero (y from 0).
function lineChart(title, series, options) {
  const format = options.format || short;
  const shown = series.filter((one) => one.y.some(isNumber));
  if (!shown.length) return null;
  const values = shown.flatMap((one) => one.y.filter(isNumber));
  const xs = shown.flatMap((one) => one.x);
  return figure(title, options.height || 230, (svg, width, readout) => {
    const height = options.height || 230;
    let low = options.whole || options.zero ? 0 : Math.min(...values);
    let high = options.whole ? 1 : Math.max(...values);
    if (high <= low) high = low + (Math.abs(low) || 1);
    if (options.counts) high = Math.max(high, 4);
    const yTicks = niceTicks(low, high, 4);
    const last = yTicks[yTicks.length - 1], step = yTicks.length > 1 ? last - yTicks[yTicks.length - 2] : 0;
    if (step && last < high - step * 0.02) yTicks.push(+(last + step).toPrecision(12));
    high = Math.max(high, yTicks[yTicks.length - 1]);
    const xLow = options.xLow ?? Math.min(...xs), xHigh = options.xHigh ?? Math.max(...xs);
    const spread = xHigh > xLow ? [xLow, xHigh] : [xLow - 0.5, xHigh + 0.5];
    const xTicks = niceTicks(spread[0], spread[1], Math.min(8, width / 70));
    const { scaleX, scaleY, left, right, top, bottom } = frame(svg, width, height,
      { low: spread[0], high: spread[1], ticks: xTicks, format: options.xFormat || short, label: options.xLabel },
      { low, high, ticks: yTicks, format: options.tickFormat || short, label: options.unit });
    for (const one of shown) {
      let path = "", pen = "M";
      one.y.forEach((value, k) => {
        if (!isNumber(value)) { pen = "M"; return; }
        path += `${pen}${scaleX(one.x[k]).toFixed(1)},${scaleY(Math.min(value, high)).toFixed(1)}`;
        pen = "L";
      });
      shape(svg, "path", { d: path, fill: "none", stroke: one.color, "stroke-width": 1.8, "stroke-linejoin": "round", "stroke-dasharray": one.dash || "none" });
      if (one.y.length <= 40) one.y.forEach((value, k) => isNumber(value) && shape(svg, "circle", { cx: scaleX(one.x[k]), cy: scaleY(value), r: 2.6, fill: one.color }));
    }
    const cross = shape(svg, "line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" });
    const marks = shown.map((one) => shape(svg, "circle", { r: 4, fill: one.color, stroke: "var(--card)", "stroke-width": 1.5, visibility: "hidden" }));
    const rest = () => {
      readoutOf(readout, "", shown.map((one) => ({ name: one.name, color: one.color, text: options.restText ? "" : format(one.y.findLast(isNumber)) })));
      for (const part of [cross, ...marks]) part.setAttribute("visibility", "hidden");
    };
    const point = (event) => {
      const where = event.clientX - svg.getBoundingClientRect().left;
      const target = spread[0] + ((where - left) / (width - left - right)) * (spread[1] - spread[0]);
      const nearest = (one) => one.x.reduce((best, value, k) => (Math.abs(value - target) < Math.abs(one.x[best] - target) ? k : best), 0);
      const at = shown.map(nearest);
      const x = shown[0].x[at[0]];
      cross.setAttribute("x1", scaleX(x)); cross.setAttribute("x2", scaleX(x)); cross.setAttribute("visibility", "visible");
      shown.forEach((one, k) => {
        const value = one.y[at[k]];
        marks[k].setAttribute("visibility", isNumber(value) ? "visible" : "hidden");
        if (isNumber(value)) { marks[k].setAttribute("cx", scaleX(one.x[at[k]])); marks[k].setAttribute("cy", scaleY(Math.min(value, high))); }
      });
      readoutOf(readout, `${options.xWord || options.xLabel || ""} ${short(x)}`.trim(),
        shown.map((one, k) => ({ name: one.name, color: one.color, text: format(one.y[at[k]]) })));
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", rest);
    rest();
  });
}

// Bars side by side: series: [{name, color, y}], labels: text under every bar or "" for none, names: full text of a bin.
function histogram(title, series, labels, names, options) {
  return figure(title, 220, (svg, width, readout) => {
    const high = Math.max(1e-9, ...series.flatMap((one) => one.y));
    const yTicks = niceTicks(0, high, 4);
    const { scaleX, scaleY, left, right, top, bottom } = frame(svg, width, 220,
      { low: 0, high: labels.length, ticks: [], format: short, label: options.xLabel },
      { low: 0, high: Math.max(high, yTicks[yTicks.length - 1]), ticks: yTicks, format: percent, label: options.unit });
    const slot = (width - left - right) / labels.length, bar = Math.max(1, (slot * 0.78) / series.length);
    let free = -1e9;
    labels.forEach((label, k) => {
      const at = scaleX(k + (options.edges ? 0 : 0.5)), half = 3.4 * label.length;
      if (label && at - half > free) {
        shape(svg, "text", { x: Math.min(at, width - half), y: 220 - bottom + 17, "text-anchor": "middle" }, label);
        if (options.edges) shape(svg, "line", { class: "axis", x1: at, x2: at, y1: 220 - bottom, y2: 220 - bottom + 4 });
        free = at + half + 4;
      }
      series.forEach((one, s) => shape(svg, "rect", {
        x: scaleX(k) + slot * 0.11 + s * bar, y: scaleY(one.y[k]), width: Math.max(0.5, bar - 0.6), rx: 1.5,
        height: Math.max(0, scaleY(0) - scaleY(one.y[k])), fill: one.color }));
    });
    const rest = () => readoutOf(readout, "", series.map((one) => ({ name: one.name, color: one.color, text: "" })), true);
    const point = (event) => {
      const k = Math.floor((event.clientX - svg.getBoundingClientRect().left - left) / slot);
      if (k < 0 || k >= labels.length) { rest(); return; }
      readoutOf(readout, names[k], series.map((one) => ({ name: one.name, color: one.color, text: percent(one.y[k]) })), true);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", rest);
    rest();
  });
}

// A matrix of counts, each row shaded by its share; `labels` name rows and columns, the last of them is "nothing".
function heatmap(rows, labels, lastRow, lastColumn, readout) {
  const count = labels.length, cell = count > 24 ? 19 : count > 12 ? 28 : 38;
  const clip = (text) => (text.length > 18 ? `${text.slice(0, 17)}…` : text);
  const rowNames = [...labels, lastRow].map(clip), columnNames = [...labels, lastColumn].map(clip);
  const left = 14 + 6.6 * Math.max(...rowNames.map((name) => name.length));
  const tall = 6.2 * Math.max(...columnNames.map((name) => name.length));
  const top = 16 + 0.87 * tall, width = left + (count + 1) * cell + 10 + 0.5 * tall, height = top + (count + 1) * cell + 4;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [key, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "confusion matrix" })) svg.setAttribute(key, value);
  columnNames.forEach((name, c) => {
    const x = left + (c + 0.5) * cell + 3;
    shape(svg, "text", { x, y: top - 6, transform: `rotate(-60 ${x} ${top - 6})` }, name);
  });
  const rest = "Rows are objects, columns what they were taken for. Point at a cell.";
  rows.forEach((row, r) => {
    const sum = row.reduce((a, b) => a + b, 0);
    shape(svg, "text", { x: left - 7, y: top + (r + 0.5) * cell + 4, "text-anchor": "end" }, rowNames[r]);
    row.forEach((value, c) => {
      const nothing = r === count && c === count, share = sum ? value / sum : 0;
      const color = nothing ? "none" : r === c ? "var(--green)" : c === count || r === count ? "var(--orange)" : "var(--red)";
      const box = shape(svg, "rect", { x: left + c * cell + 0.5, y: top + r * cell + 0.5, width: cell - 1, height: cell - 1, rx: 2,
        fill: value && !nothing ? color : "var(--track)", "fill-opacity": value ? 0.14 + 0.86 * Math.sqrt(share) : nothing ? 0 : 0.5 });
      if (value && cell >= 26 && !nothing) {
        const number = shape(svg, "text", { class: "cell-number", x: left + (c + 0.5) * cell, y: top + (r + 0.5) * cell }, short(value));
        number.style.fill = share > 0.25 ? "var(--card)" : "var(--ink)";
        number.style.pointerEvents = "none";
      }
      const text = nothing ? rest : r === count ? `${value} predictions of ${labels[c]} with no object there`
        : c === count ? `${value} of ${sum} ${labels[r]} missed (${percent(share)})`
          : r === c ? `${value} of ${sum} ${labels[r]} right (${percent(share)})` : `${value} of ${sum} ${labels[r]} taken for ${labels[c]} (${percent(share)})`;
      for (const kind of ["pointerenter", "pointerdown"]) box.addEventListener(kind, () => { readout.textContent = text; });
    });
  });
  svg.addEventListener("pointerleave", () => { readout.textContent = rest; });
  readout.textContent = rest;
  return svg;
}
