// Curves of the machine over the last two minutes. Plotly is loaded when they are first drawn.

// As in optim/serving/timeline.py.
const COLOURS = ["#0d9488", "#b45309", "#4f6bd8", "#a2487f", "#5f8a1d", "#8a6d5c", "#0e7fa8", "#8553c9"];
const MAX_POINTS = 120;
const DRAW_SECONDS = 12; // from one drawing to the next: each takes 30 ms of the processor, and moves them by 10 %
const curves = {}, times = [];
let since = 0, drawnAt = -Infinity; // the times of the last point, by the server's clock, and of that when it was drawn

/** Plotly, once it is there; a script that did not come is asked for again with the next drawing. */
const loadedPlotly = () => window.Plotly ?? new Promise((resolve, reject) => {
  const script = { src: `${root}/lipsync/plotly.min.js`, onload: () => resolve(window.Plotly), onerror: reject };
  document.head.append(Object.assign(document.createElement("script"), script));
});

/** Forget the curves: they are asked for again, and drawn anew. */
function resetCurves() {
  since = 0;
  drawnAt = -Infinity;
  times.length = 0;
  for (const name of Object.keys(curves)) delete curves[name];
}

/** The i-th curve. Each of several GPUs has a colour; its memory has the same, dotted, and the legend shows one. */
function traceOf(name, i) {
  const [, gpu, memory] = /^GPU (\d+)( memory)?$/.exec(name) ?? [];
  const line = { width: 1.8, color: COLOURS[(gpu ?? i) % COLOURS.length], dash: gpu && memory ? "dot" : "solid" };
  return { x: times, y: curves[name], name, mode: "lines", line, showlegend: !memory || gpu === "0", hoverinfo: "skip" };
}

function layoutOf(marks) {
  const axis = { gridcolor: isDark() ? "#28323a" : "#e6ebee", zeroline: false, fixedrange: true };
  const ticks = { tickvals: [since - 120, since - 60, since], ticktext: ["2 min ago", "1 min", "now"], ticklabelstandoff: 6 };
  return {
    height: 210, margin: { l: 42, r: 22, t: 8, b: 24 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
    font: { color: isDark() ? "#aebac2" : "#4a5861", size: 11, family: "system-ui, sans-serif" },
    xaxis: { ...axis, ...ticks, range: [since - MAX_POINTS, since] },
    yaxis: { ...axis, range: [0, 102], ticksuffix: " %" },
    ...markLayout(marks),
  };
}

/** Lines for the marks, [time, text] each, that the monitor has set; a label goes into the first row that is free. */
function markLayout(marks) {
  const line = { color: isDark() ? "#6b7a83" : "#9aa8b0", width: 1, dash: "dot" };
  const perPixel = MAX_POINTS / Math.max(find("#plot").clientWidth - 64, 1), rows = [], annotations = [];
  const background = getComputedStyle(find("#machine")).backgroundColor; // over the curves
  for (const [x, text] of marks) {
    const width = (6.5 * text.length + 10) * perPixel, right = x > since - width;
    const start = right ? x - width : x, row = [0, 1, 2, 3, 4].find((each) => (rows[each] ?? -Infinity) <= start);
    if (row === undefined) continue; // the line is still there
    rows[row] = start + width;
    annotations.push({
      x, y: 0.96 - 0.13 * row, yref: "paper", yanchor: "top", xanchor: right ? "right" : "left",
      text, showarrow: false, font: { size: 10 }, bgcolor: background, opacity: 0.9,
    });
  }
  return { shapes: marks.map(([x]) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line })), annotations };
}

function usageText(name, memory) {
  const value = curves[name].at(-1), total = memory[name.replace(/ memory$/, "")] || memory[name];
  if (value == null) return `${name} unknown`;
  if (!/memory/i.test(name) || !total) return `${name} ${Math.round(value)} %`;
  const gib = total / 2 ** 30;
  return `${name} ${((value / 100) * gib).toFixed(1)} of ${gib.toFixed(1)} GB`;
}

/** What the meters of the GPUs show, as "GPU 312 W, 71 °C, 1980 MHz"; nothing of meters that a card has not got. */
function sensorTexts(sensors) {
  const units = ["W", "°C", "MHz"];
  return Object.entries(sensors).map(([name, values]) => {
    const shown = values.map((value, i) => (value === null ? null : `${value} ${units[i]}`)).filter(Boolean);
    return shown.length ? `${name} ${shown.join(", ")}` : null;
  }).filter(Boolean);
}

/** Add the points that came to the curves of the last two minutes. */
async function drawLive(live) {
  times.push(...live.time);
  for (const [name, values] of Object.entries(live.curves)) (curves[name] ||= []).push(...values);
  since = times.at(-1) ?? since;
  for (const values of [times, ...Object.values(curves)]) values.splice(0, Math.max(0, values.length - MAX_POINTS));
  const names = Object.keys(curves), plot = find("#plot");
  if (!names.length || !times.length) return;
  setText(find("#now"), [...names.map((name) => usageText(name, live.memory)), ...sensorTexts(live.sensors)].join(" · "));
  plot.dataset.points = String((Number(plot.dataset.points) || 0) + live.time.length);
  if (document.hidden || since - drawnAt < DRAW_SECONDS) return;
  const { react } = await loadedPlotly();
  drawnAt = since;
  await react(plot, structuredClone(names.map(traceOf)), layoutOf(live.marks), { staticPlot: true, responsive: true });
}
