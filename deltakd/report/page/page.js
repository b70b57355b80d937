"use strict";
// The page's moving parts: theme, sorting, which runs the charts show, and the examples. Plotly draws; all text that
// comes from a run enters the document as text.

const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const narrow = window.matchMedia("(max-width: 640px)");
const DASHES = ["solid", "dash", "dot", "dashdot"];

function make(tag, className = "", text = null) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== null) node.textContent = text;
  return node;
}

// ---- theme ----------------------------------------------------------------------------------------------------------

const root = document.documentElement;
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  root.dataset.theme = theme;
  drawAgain();
}

const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
const NUM_COLOURS = 12; // then dashes tell runs of one colour apart
const runColour = (run) => colour(`run${run % NUM_COLOURS}`);
const dashOf = (run) => Math.floor(run / NUM_COLOURS) % 4;

function dye(swatch, run) {
  swatch.style.background = `var(--run${run % NUM_COLOURS})`;
  if (dashOf(run)) swatch.classList.add(`dash${dashOf(run)}`);
  return swatch;
}

document.getElementById("theme").addEventListener("click", () => {
  chosenTheme = root.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("deltakd-theme", chosenTheme); } catch { /* a file without storage keeps no choice */ }
  setTheme(chosenTheme);
});
prefersDark.addEventListener("change", () => { if (!chosenTheme) setTheme(prefersDark.matches ? "dark" : "light"); });

for (const swatch of all(".swatch[data-run]")) dye(swatch, +swatch.dataset.run);

// ---- tables ---------------------------------------------------------------------------------------------------------

function sortBy(table, index, heading) {
  const body = table.tBodies[0];
  const down = heading.getAttribute("aria-sort") === "descending";
  const value = (row) => row.cells[index].dataset.v ?? row.cells[index].textContent.trim();
  const isNumber = heading.classList.contains("n");
  const direction = heading.hasAttribute("aria-sort") ? (down ? 1 : -1) : isNumber ? -1 : 1;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what is not there comes last, both ways
    return direction * (isNumber ? x - y : x.localeCompare(y, undefined, { numeric: true }));
  });
  body.append(...rows);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
}

for (const table of all("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, index) => {
    heading.querySelector("button")?.addEventListener("click", () => sortBy(table, index, heading));
  });
}

// ---- charts ---------------------------------------------------------------------------------------------------------

const charts = new Map(data.charts.map((chart) => [chart.id, chart]));
const steps = data.runs.map((run) => run.steps).sort((a, b) => a - b);
const usual = steps[Math.floor(steps.length / 2)];
const tooLong = new Set([...data.runs.keys()].filter((run) => usual && data.runs[run].steps > 3 * usual));
const shown = new Set([...data.runs.keys()].filter((run) => !tooLong.has(run)));
const CROWD = 24; // runs, from which single steps would be a fog
if (shown.size > CROWD) document.getElementById("raw").checked = false;
const drawn = new Map();
const longest = new Map();

function axis(extra, log) {
  const line = { gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true };
  const title = { ...(extra.title ?? {}), font: { size: 12, color: colour("faint") }, standoff: 8 };
  return { ...line, tickfont: { size: 11.5 }, ...extra, title, ...(log ? { type: "log", dtick: 1, rangemode: "normal" } : {}) };
}

function layoutOf(chart, figure) {
  const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("soft") };
  const isBars = chart.data[0]?.type === "bar";
  const log = figure.querySelector(".log")?.getAttribute("aria-pressed") === "true";
  const isResponse = chart.data[0]?.meta.kind === "response";
  const relative = !isBars && !isResponse && document.getElementById("relative")?.checked;
  const x = relative ? { ...chart.layout.xaxis, title: { text: "share of the run" }, tickformat: ".0%" } : chart.layout.xaxis;
  const rows = Math.max(1, ...chart.data.map((trace) => (isBars ? trace.meta.runs.filter((run) => shown.has(run)).length : 1)));
  return {
    ...chart.layout, font, xaxis: axis(x), yaxis: axis(chart.layout.yaxis, log), bargap: 0.35,
    height: isBars ? 110 + 24 * rows : narrow.matches ? 240 : 290,
    margin: { l: 8, r: 14, t: 6, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: isBars || (isResponse && chart.data[0].meta.legend), legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", traceorder: "normal", font: { size: 11.5 } },
    hovermode: "closest", dragmode: narrow.matches ? false : "zoom", uirevision: `${relative}`,
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12 } },
  };
}

function tracesOf(chart) {
  const raw = document.getElementById("raw")?.checked;
  const crowded = shown.size > CROWD;
  return chart.data.map((trace) => {
    if (trace.type === "bar") {
      const kept = [...trace.meta.runs.keys()].filter((at) => shown.has(trace.meta.runs[at]));
      const y = kept.map((at) => (narrow.matches && trace.y[at].length > 18 ? `…${trace.y[at].slice(-17)}` : trace.y[at]));
      return { ...trace, x: kept.map((at) => trace.x[at]), y, marker: { color: colour(trace.meta.phase) } };
    }
    const { run, kind } = trace.meta;
    if (kind === "response") {
      const line = { color: runColour(trace.meta.line), width: 2, dash: DASHES[dashOf(trace.meta.line)] };
      return { ...trace, line, marker: { size: 7 }, error_y: { ...trace.error_y, color: line.color, thickness: 1.2, width: 3 } };
    }
    const width = kind === "raw" ? 1 : crowded ? 1.2 : 2;
    const line = { color: runColour(run), width, dash: kind === "raw" ? "solid" : DASHES[dashOf(run)] };
    const visible = shown.has(run) && (kind !== "raw" || raw);
    const opacity = kind === "raw" ? (crowded ? 0.12 : 0.22) : crowded ? 0.7 : 1;
    return { ...trace, ...relativeTo(trace), line, visible, opacity, marker: { size: 6 } };
  });
}

const KINDS = { u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

function numbers(packed) {
  const bytes = Uint8Array.from(atob(packed.bdata), (letter) => letter.charCodeAt(0));
  return new KINDS[packed.dtype](bytes.buffer);
}

function relativeTo(trace) {
  if (!document.getElementById("relative")?.checked) return {};
  const x = numbers(trace.x);
  const last = longest.get(trace.meta.run) || 1;
  const hovertemplate = trace.hovertemplate?.replace("%{x:,.0f}", "%{customdata:,.0f}");
  return { x: Array.from(x, (step) => step / last), customdata: Array.from(x), hovertemplate };
}

for (const chart of data.charts) {
  for (const trace of chart.data) {
    if (trace.type === "bar" || trace.meta.kind === "response") continue;
    const last = numbers(trace.x).at(-1) ?? 0;
    longest.set(trace.meta.run, Math.max(longest.get(trace.meta.run) ?? 0, last));
  }
}

function draw(figure) {
  const chart = charts.get(figure.dataset.chart);
  const config = { displaylogo: false, responsive: true, displayModeBar: narrow.matches ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] };
  drawn.set(figure, Plotly.react(figure.querySelector(".plot"), tracesOf(chart), layoutOf(chart, figure), config));
}

let waiting = 0;
function drawAgain() {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => { for (const figure of drawn.keys()) draw(figure); });
}

const sight = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting && !drawn.has(target)) draw(target);
  }
}, { rootMargin: "500px" });
for (const figure of all(".chart")) {
  sight.observe(figure);
  figure.querySelector(".log")?.addEventListener("click", ({ target }) => {
    target.setAttribute("aria-pressed", target.getAttribute("aria-pressed") !== "true");
    draw(figure);
  });
}
narrow.addEventListener("change", drawAgain);
window.addEventListener("beforeprint", () => { // what is printed was not all in sight before
  for (const figure of all(".chart")) if (!drawn.has(figure)) draw(figure);
});

// ---- which runs are shown -------------------------------------------------------------------------------------------

function chip(text, run) {
  const button = make("button", "chip");
  const swatch = make("i", run === null ? "swatch nobody" : "swatch");
  if (run !== null) dye(swatch, run);
  button.append(swatch, text);
  button.setAttribute("aria-pressed", "true");
  return button;
}

const runChips = data.runs.map(({ name }, run) => {
  const button = chip(name, run);
  button.title = "click: show or hide; double click: this one alone";
  button.addEventListener("click", () => select(shown.has(run) ? [...shown].filter((one) => one !== run) : [...shown, run]));
  button.addEventListener("dblclick", () => select([run]));
  return button;
});
document.querySelector(".runs .chips")?.append(...runChips);

function select(runs) {
  shown.clear();
  for (const run of runs) shown.add(run);
  press();
  drawAgain();
}

function press() {
  runChips.forEach((button, run) => button.setAttribute("aria-pressed", shown.has(run)));
  const asFirst = tooLong.size && [...tooLong].every((run) => !shown.has(run));
  const note = document.getElementById("hidden");
  if (note) note.textContent = asFirst ? `${tooLong.size} much longer ${tooLong.size === 1 ? "run is" : "runs are"} not shown` : "";
}
press();

for (const button of all("[data-select]")) {
  button.addEventListener("click", () => {
    const visible = [...data.runs.keys()].filter((run) => !runChips[run].hidden);
    const wanted = { all: () => true, none: () => false, scored: (run) => data.runs[run].scored };
    const untouched = [...shown].filter((run) => runChips[run].hidden);
    select([...untouched, ...visible.filter(wanted[button.dataset.select])]);
  });
}
document.getElementById("find-run")?.addEventListener("input", ({ target }) => {
  const words = target.value.toLowerCase();
  runChips.forEach((button, run) => { button.hidden = !data.runs[run].name.toLowerCase().includes(words); });
});
for (const id of ["raw", "relative"]) document.getElementById(id)?.addEventListener("change", drawAgain);
