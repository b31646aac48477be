"use strict";
// The page without this script: the answer and every table.  With it: tables that sort, charts, and a live grid.

const BRIGHT = ["#332288", "#D55E00", "#117733", "#AA4499", "#0072B2", "#999933", "#882255", "#44AA99", "#CC6677"];
const PALE = ["#a59cf0", "#ff9a5c", "#5fc77e", "#e68ad6", "#6cb8f0", "#d6d66b", "#e07fa6", "#6fd9c8", "#f09aa6"];
const AXES = { tokens: "training tokens", flops: "training FLOPs", seconds: "seconds of training" };
const MANY = 10; // cells, beyond which only the farthest from the reference have a colour
const HIGHLIGHTED = 4;
const ZOOMED = 0.1; // of the way: what comes before would flatten the rest
const MOST_ROWS = 60; // of the forest; the table has all
const BESIDE = ["optim/lr", "train/loss", "train/grad_norm", "tokens_per_second"]; // small, below the curves
const ASK_EVERY = 2000; // milliseconds
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = () => innerWidth < 720;

let data = JSON.parse(document.getElementById("data").textContent);
let printing = false;
let shown = null; // cells with a colour; null until chosen
let sorted = {}; // table -> [column, direction]

// -- tables ---------------------------------------------------------------------------------------------------------
function valueOf(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.v ?? (cell.textContent.trim() === "–" ? "" : cell.textContent.trim());
  const number = Number(text);
  return text === "" ? null : Number.isNaN(number) ? text.toLowerCase() : number;
}

function sort(table, column, direction) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // without a value: last, either way
    if (typeof a === typeof b) return direction * (a < b ? -1 : a > b ? 1 : 0);
    return typeof a === "number" ? -1 : 1;
  });
  body.append(...rows.map(([, row]) => row));
  for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
  const told = direction > 0 ? "ascending" : "descending";
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", told);
  sorted[table.getAttribute("aria-label")] = [column, direction];
}

function prepareTables() {
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.firstElementChild.onclick = () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        sort(table, column, up ? 1 : -1);
      };
    });
    const before = sorted[table.getAttribute("aria-label")];
    if (before) sort(table, ...before);
  }
}

// -- colours --------------------------------------------------------------------------------------------------------
function ink(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function isReference(cell) {
  return data.references.includes(cell);
}

function firstShown() {
  // Few cells: all.  Many: the references, and the arms that end farthest from theirs.
  if (data.cells.length <= MANY) return new Set(data.cells);
  const far = [...data.forest].sort((a, b) => Math.abs(b.delta) - Math.abs(a.delta));
  return new Set([...data.references, ...far.slice(0, HIGHLIGHTED).map((one) => one.cell)]);
}

function colours() {
  const palette = dark.matches && !printing ? PALE : BRIGHT;
  const found = {};
  let next = 0;
  for (const cell of data.cells) {
    if (isReference(cell) && shown.has(cell)) found[cell] = ink("--ink");
    else if (shown.has(cell)) found[cell] = palette[next++ % palette.length];
  }
  return found;
}

function prepareNames() {
  for (const name of document.querySelectorAll(".pick")) {
    name.onclick = () => {
      const cell = name.dataset.cell;
      if (!shown.delete(cell)) shown.add(cell);
      paintNames();
      drawCurves();
    };
  }
  paintNames();
}

function paintNames() {
  const of = colours();
  for (const name of document.querySelectorAll(".pick")) {
    const colour = of[name.dataset.cell];
    name.setAttribute("aria-pressed", colour ? "true" : "false");
    name.firstElementChild.style.background = colour ?? "";
    name.firstElementChild.style.borderColor = colour ?? "";
  }
}

// -- charts ---------------------------------------------------------------------------------------------------------
function layout(changes) {
  const axis = { gridcolor: ink("--line"), zeroline: false, linecolor: ink("--grey"), automargin: true };
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink("--ink"), size: narrow() ? 11 : 12, family: getComputedStyle(document.body).fontFamily },
    margin: { l: 54, r: 14, t: 10, b: 44 }, showlegend: false, hovermode: "closest",
    hoverlabel: { bgcolor: ink("--raised"), bordercolor: ink("--grey"), font: { color: ink("--ink") }, namelength: -1 },
    xaxis: { ...axis }, yaxis: { ...axis },
  };
  for (const key of ["xaxis", "yaxis"]) Object.assign(base[key], changes[key] ?? {});
  return { ...base, ...changes, xaxis: base.xaxis, yaxis: base.yaxis };
}

function draw(id, traces, changes) {
  const place = document.getElementById(id);
  if (!place || !window.Plotly) return;
  const made = layout(changes);
  if (printing) made.width = 680;
  // A finger scrolls the page; a chart takes the pinch only where it says so.
  Plotly.react(place, traces, made, { displayModeBar: false, responsive: true, scrollZoom: false });
}

function drawForest() {
  const arms = [...data.forest].sort((a, b) => Math.abs(a.delta) - Math.abs(b.delta)).slice(-MOST_ROWS);
  if (!arms.length) return;
  const colour = { helps: ink("--good"), better: ink("--good"), hurts: ink("--bad"), worse: ink("--bad"), equivalent: ink("--same") };
  const of = arms.map((arm) => colour[arm.verdict] ?? ink("--grey"));
  const whole = arms.map((arm) => (arm.low === null ? arm.delta : arm.low));
  const top = arms.map((arm) => (arm.high === null ? arm.delta : arm.high));
  const lines = arms.map((arm, i) => ({
    type: "scatter", mode: "lines", x: [whole[i], top[i]], y: [arm.cell, arm.cell],
    line: { color: of[i], width: 3 }, hoverinfo: "skip",
  }));
  const dots = {
    type: "scatter", mode: "markers", x: arms.map((arm) => arm.delta), y: arms.map((arm) => arm.cell),
    marker: { color: arms.map((arm, i) => (arm.low === null ? ink("--paper") : of[i])), size: 9,
      line: { color: of, width: 2 } },
    text: arms.map((arm) => arm.says), hovertemplate: "%{text}<extra></extra>",
  };
  const height = 64 + arms.length * (arms.length > 25 ? 18 : 26);
  draw("chart-forest", [...lines, dots], {
    height, margin: { l: 10, r: 14, t: 6, b: 44 },
    xaxis: { title: { text: `arm minus reference, ${data.unit}` }, zeroline: true, zerolinecolor: ink("--ink"), nticks: narrow() ? 5 : 9 },
    yaxis: { showgrid: false, tickfont: { size: narrow() ? 10 : 12 }, type: "category" },
  });
}

function rgba(colour, share) {
  const digits = colour.replace("#", "");
  const part = (i) => parseInt(digits.length === 3 ? digits[i] + digits[i] : digits.slice(2 * i, 2 * i + 2), 16);
  return `rgba(${part(0)},${part(1)},${part(2)},${share})`;
}

function traces(lines, axis, bandsToo) {
  const of = colours();
  const grey = { type: "scatter", mode: "lines", x: [], y: [], line: { color: ink("--grey"), width: 1 }, opacity: 0.45, hoverinfo: "skip", showlegend: false };
  const bands = [];
  const means = [];
  for (const line of lines) {
    const colour = of[line.cell];
    const x = along(line, axis);
    if (!colour) {
      grey.x.push(...x, null);
      grey.y.push(...line.mean, null);
      continue;
    }
    const told = line.sd.map((sd, i) => (sd === null ? "" : ` ± ${sd.toPrecision(2)}`) + `${runsAt(line, i)}`);
    means.push({
      type: "scatter", mode: x.length === 1 ? "markers" : "lines", name: line.cell, x, y: line.mean, text: told,
      line: { color: colour, width: isReference(line.cell) ? 2.4 : 1.8 }, marker: { color: colour, size: 7 },
      hovertemplate: `<b>${escaped(line.cell)}</b><br>%{y:.5g}%{text}<br>%{x:.4s}<extra></extra>`,
    });
    if (!bandsToo) continue;
    // A band is there only where two runs have been.
    const there = line.sd.map((sd, i) => (sd === null ? -1 : i)).filter((i) => i >= 0);
    if (!there.length) continue;
    const back = [...there].reverse();
    bands.push({
      type: "scatter", mode: "lines", fill: "toself", fillcolor: rgba(colour, 0.15), line: { width: 0 }, hoverinfo: "skip", showlegend: false,
      x: [...there.map((i) => x[i]), ...back.map((i) => x[i])],
      y: [...there.map((i) => line.mean[i] + line.sd[i]), ...back.map((i) => line.mean[i] - line.sd[i])],
    });
  }
  return grey.x.length ? [grey, ...bands, ...means] : [...bands, ...means];
}

function along(line, axis) {
  if (axis !== "flops") return line[axis];
  return line.tokens.map((tokens) => (line.token_flops === null ? null : tokens * line.token_flops));
}

function runsAt(line, i) {
  const runs = line.runs[i] ?? line.runs;
  return ` (${runs} run${runs === 1 ? "" : "s"})`;
}

function escaped(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
}

function endOf(lines) {
  // The scale of what comes after a tenth of the way; null where there is nothing.
  const known = [];
  for (const line of lines) {
    const last = line.tokens.at(-1);
    line.mean.forEach((value, i) => {
      if (value === null || line.tokens[i] < ZOOMED * last) return;
      const sd = shown.has(line.cell) ? line.sd?.[i] ?? 0 : 0;
      known.push(value - sd, value + sd);
    });
  }
  if (!known.length) return null;
  const low = known.reduce((a, b) => Math.min(a, b));
  const high = known.reduce((a, b) => Math.max(a, b));
  const pad = 0.05 * (high - low || Math.abs(high) || 1);
  return [low - pad, high + pad];
}

function drawCurves() {
  const metric = document.getElementById("metric");
  if (!metric || !metric.value) return;
  const axis = document.getElementById("axis").value;
  const minus = document.getElementById("minus");
  const canSubtract = metric.value === data.metric && data.differences.length > 0;
  minus.disabled = !canSubtract;
  const subtract = canSubtract && minus.checked;
  const lines = subtract ? data.differences : data.curves[metric.value];
  const range = document.getElementById("zoom").checked ? endOf(lines) : null;
  const drawn = traces(lines, axis, true);
  if (metric.value === data.metric && !subtract) drawn.push(...lostTraces(axis, range));
  const unit = data.units[metric.value];
  const named = unit === metric.value ? metric.value : `${metric.value} (${unit})`;
  draw("chart-curves", drawn, {
    height: narrow() ? 380 : 430, showlegend: shown.size <= 14,
    legend: { orientation: "h", y: -0.22, yanchor: "top", x: 0, font: { size: 11 } },
    xaxis: { title: { text: AXES[axis], standoff: 6 }, tickformat: "~s", nticks: narrow() ? 5 : 9 },
    yaxis: { title: { text: subtract ? `difference (${unit})` : named }, zeroline: subtract, zerolinecolor: ink("--ink"),
      ...(range ? { range } : {}) },
  });
  const note = document.getElementById("curves-note");
  const missing = lines.every((line) => along(line, axis).every((value) => value === null));
  const hidden = lines.filter((line) => !shown.has(line.cell)).length;
  note.textContent = missing ? `These runs have not recorded their ${AXES[axis].replace("training ", "")}.`
    : hidden ? `Grey: ${hidden} other arm${hidden === 1 ? "" : "s"}.` : "";
  drawSmall(axis);
}

function lostTraces(axis, range) {
  const of = colours();
  return data.lost.map((line) => {
    const y = range ? line.mean.map((value) => (value === null ? null : Math.min(value, range[1]))) : line.mean;
    return {
      type: "scatter", mode: "lines+markers", x: along(line, axis), y, showlegend: false,
      line: { color: of[line.cell] ?? ink("--grey"), width: 1, dash: "dash" },
      marker: { symbol: "x", size: y.map((_, i) => (i === y.length - 1 ? 8 : 0)) },
      hovertemplate: `<b>${escaped(line.cell)}</b>, ${line.status}<br>%{y:.5g}<extra></extra>`,
    };
  });
}

function drawSmall(axis) {
  const place = document.getElementById("small");
  const others = BESIDE.filter((name) => name in data.curves);
  for (const name of others) {
    const id = `chart-${name.replace(/\W/g, "-")}`;
    if (!document.getElementById(id)) {
      const made = document.createElement("div");
      made.id = id;
      place.append(made);
    }
    const range = name === "train/loss" || name === "train/grad_norm" ? endOf(data.curves[name]) : null;
    draw(id, traces(data.curves[name], axis, name !== "optim/lr"), {
      height: 230, title: { text: name, font: { size: 12 }, x: 0, xref: "paper", y: 0.98 },
      margin: { l: 50, r: 10, t: 28, b: 30 },
      xaxis: { tickformat: "~s", nticks: 5 }, yaxis: { nticks: 6, ...(range ? { range } : {}) },
    });
  }
}

function drawInteractions() {
  const found = data.interactions;
  const section = document.getElementById("interactions");
  if (section) section.hidden = !found;
  if (!found) return;
  const most = Math.max(...found.z.flat().filter((value) => value !== null).map(Math.abs), 1e-12);
  const middle = ink("--raised");
  draw("chart-interactions", [{
    type: "heatmap", x: found.names, y: found.names, z: found.z, text: found.text, texttemplate: "%{text}",
    hovertemplate: "%{y} with %{x}<br>%{text}<extra></extra>", zmin: -most, zmax: most, showscale: false, xgap: 2, ygap: 2,
    colorscale: [[0, ink("--good")], [0.5, middle], [1, ink("--bad")]],
  }], {
    height: 120 + 40 * found.names.length, margin: { l: 10, r: 10, t: 10, b: 10 },
    xaxis: { showgrid: false, tickangle: narrow() ? -60 : -30 }, yaxis: { showgrid: false, autorange: "reversed" },
  });
}

// -- speedups over sizes --------------------------------------------------------------------------------------------
function drawSizes() {
  const chosenUnit = document.getElementById("speedup-unit");
  if (!chosenUnit) return;
  const units = [...new Set(data.sizes.map((line) => line.unit))];
  if (!chosenUnit.options.length) chosenUnit.replaceChildren(...units.map((name) => new Option(name, name)));
  chosenUnit.onchange = drawSizes;
  const of = colours();
  const lines = data.sizes.filter((line) => line.unit === chosenUnit.value);
  const known = (value, i, line) => (value === null ? 0 : Math.abs(value - line.factor[i]));
  const drawn = lines.map((line) => ({
    type: "scatter", mode: "lines+markers", name: line.cell, x: line.parameters, y: line.factor,
    line: { color: of[line.cell] ?? ink("--grey"), width: 2 }, marker: { size: 8 },
    error_y: { type: "data", symmetric: false, thickness: 1.5, width: 0,
      array: line.high.map((value, i) => known(value, i, line)),
      arrayminus: line.low.map((value, i) => known(value, i, line)) },
    text: line.told, hovertemplate: `<b>${escaped(line.cell)}</b><br>%{text} at %{x:.3s} parameters<extra></extra>`,
  }));
  const sizes = [...new Set(data.sizes.flatMap((line) => line.parameters))];
  draw("chart-sizes", drawn, {
    height: narrow() ? 380 : 430, showlegend: true,
    legend: { orientation: "h", y: -0.2, yanchor: "top", x: 0, font: { size: 11 } },
    xaxis: { type: "log", title: { text: "parameters of the reference", standoff: 6 }, tickvals: sizes, tickformat: ".3s" },
    yaxis: { type: "log", title: { text: `speedup in ${chosenUnit.value}` }, dtick: "D1", tickformat: ".2~f" },
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: ink("--ink"), width: 1 } }],
  });
}

function prepareControls() {
  const metric = document.getElementById("metric");
  if (!metric) return;
  const before = metric.value || chosen.metric || data.metric;
  metric.replaceChildren(...Object.keys(data.curves).map((name) => new Option(name, name)));
  metric.value = data.curves[before] ? before : metric.options[0]?.value;
  for (const name of ["axis", "minus", "zoom"]) {
    const control = document.getElementById(name);
    if (name in chosen) control[control.type === "checkbox" ? "checked" : "value"] = chosen[name];
  }
  for (const name of ["metric", "axis", "minus", "zoom"]) {
    document.getElementById(name).onchange = (event) => {
      chosen[name] = event.target.type === "checkbox" ? event.target.checked : event.target.value;
      drawCurves();
    };
  }
  document.getElementById("curves-csv").onclick = (event) => {
    event.currentTarget.href = URL.createObjectURL(new Blob([curvesCsv()], { type: "text/csv" }));
  };
}
const chosen = {};

function curvesCsv() {
  const rows = ["metric,cell,tokens,flops,seconds,mean,sd,runs"];
  for (const [metric, lines] of Object.entries(data.curves)) {
    for (const line of lines) {
      const cell = `"${line.cell.replace(/"/g, '""')}"`;
      const flops = along(line, "flops");
      line.tokens.forEach((tokens, i) => {
        const told = [flops, line.seconds, line.mean, line.sd].map((one) => one[i] ?? "");
        told.push(line.runs[i] ?? line.runs);
        rows.push([metric, cell, tokens, ...told].join(","));
      });
    }
  }
  return rows.join("\n");
}

// -- plotly, after the first paint ----------------------------------------------------------------------------------
async function loadPlotly() {
  const script = document.createElement("script");
  if (PLOTLY_ADDRESS) {
    script.src = PLOTLY_ADDRESS;
    const loaded = new Promise((done, failed) => { script.onload = done; script.onerror = failed; });
    document.head.append(script);
    await loaded;
    return;
  }
  const packed = Uint8Array.from(atob(document.getElementById("plotly-packed").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function drawAll() {
  drawForest();
  drawCurves();
  drawInteractions();
  drawSizes();
  if (window.Plotly) document.body.dataset.drawn = "yes";
}

function prepare() {
  shown ??= firstShown();
  prepareTables();
  prepareNames();
  prepareControls();
  drawAll();
}

// -- a grid that is still running -----------------------------------------------------------------------------------
let version = "";

function show(found) {
  version = found.version;
  data = JSON.parse(found.data);
  const top = scrollY;
  const open = [...document.querySelectorAll("details")].map((one) => one.open);
  const charts = [...document.querySelectorAll("#main [id^=chart-]")];
  document.getElementById("main").innerHTML = found.main;
  // What is drawn stays where it is, and moves on from there.
  for (const chart of charts) {
    const place = document.getElementById(chart.id);
    if (place) place.replaceWith(chart);
    else document.getElementById("small")?.append(chart);
  }
  document.querySelectorAll("details").forEach((one, i) => { one.open = open[i] ?? false; });
  prepare();
  scrollTo(0, top);
}

async function ask() {
  let word = "";
  try {
    const busy = document.activeElement?.tagName === "SELECT"; // a list that is open would close
    const answer = busy ? null : await fetch(`state?known=${encodeURIComponent(version)}`);
    if (answer?.status === 200) show(await answer.json());
  } catch {
    word = "ablab watch has ended: this is what it last saw.";
  }
  const state = document.getElementById("state");
  if (state) state.textContent = word;
  setTimeout(ask, ASK_EVERY);
}

prepare();
requestAnimationFrame(() => setTimeout(async () => {
  try {
    await loadPlotly();
    drawAll();
  } catch (fault) {
    document.body.dataset.drawn = "no";
    console.error(fault);
  }
  if (document.body.dataset.live) ask();
}));
dark.onchange = () => { paintNames(); drawAll(); };
addEventListener("beforeprint", () => { printing = true; paintNames(); drawAll(); });
addEventListener("afterprint", () => { printing = false; paintNames(); drawAll(); });
