// Curves of the machine over the last two minutes, as paths in the drawing of live.html: x in seconds, y in percent.

// As in optim/serving/timeline.py.
const COLOURS = ["#0d9488", "#b45309", "#4f6bd8", "#a2487f", "#5f8a1d", "#8a6d5c", "#0e7fa8", "#8553c9"];
const SHOWN = 120; // seconds, and points, of which there is one a second
const curves = {}, times = [];
let since = 0; // the time of the last point, by the server's clock

/** Forget the curves: they are asked for again. */
function resetCurves() {
  since = 0;
  times.length = 0;
  for (const name of Object.keys(curves)) delete curves[name];
}

/** The looks of a curve, the i-th one. Each of several GPUs has a colour; its memory has the same, dotted. */
function curveStyle(name, i) {
  const [, gpu, memory] = /^GPU (\d+)( memory)?$/.exec(name) ?? [];
  return `--colour: ${COLOURS[(gpu ?? i) % COLOURS.length]}; ${gpu && memory ? "--line: dotted; --dash: 1 4" : ""}`;
}

const placeOf = (time) => SHOWN + time - since;
const pathOf = (values) => values.map((value, i) => (value == null ? ""
  : `${values[i - 1] == null ? "M" : "L"}${placeOf(times[i]).toFixed(1)} ${100 - value}`)).join("");

/** Lines for the marks, [time, text] each, that the monitor has set; a label goes into the first row that is free. */
function drawMarks(marks, plot) {
  const perPixel = SHOWN / Math.max(find("svg", plot).clientWidth, 1), rows = [], labels = [];
  const seen = marks.map(([time, text]) => [placeOf(time), text]).filter(([x]) => x >= 0);
  for (const [x, text] of seen) {
    const width = (6.5 * text.length + 10) * perPixel, start = x > SHOWN - width ? x - width : x;
    const row = [0, 1, 2, 3, 4].find((each) => (rows[each] ?? -Infinity) <= start);
    if (row === undefined) continue; // the line is still there
    rows[row] = start + width;
    const side = start === x ? `left: ${(100 * x) / SHOWN}%` : `right: ${100 - (100 * x) / SHOWN}%`;
    labels.push(html`<span style="${side}; top: ${1.25 * row}em">${text}</span>`);
  }
  find(".marks", plot).setAttribute("d", seen.map(([x]) => `M${x} 0V100`).join(""));
  find(".labels", plot).innerHTML = html`${labels}`;
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

/** Add the points that came to the curves, and draw them where somebody looks. */
function drawLive(live) {
  times.push(...live.time);
  for (const [name, values] of Object.entries(live.curves)) (curves[name] ||= []).push(...values);
  since = times.at(-1) ?? since;
  for (const values of [times, ...Object.values(curves)]) values.splice(0, Math.max(0, values.length - SHOWN));
  const names = Object.keys(curves), plot = find("#plot"), now = find("#now");
  plot.dataset.points = String((Number(plot.dataset.points) || 0) + live.time.length);
  if (document.hidden) return;
  if (hasChanged(plot, names.join())) {
    find(".curves", plot).innerHTML = html`${names.map((name, i) => html`<path style="${curveStyle(name, i)}"/>`)}`;
    now.innerHTML = html`${names.map((name, i) => html`<span class="curve" style="${curveStyle(name, i)}"></span>`)}<span></span>`;
  }
  names.forEach((name, i) => {
    find(".curves", plot).children[i].setAttribute("d", pathOf(curves[name]));
    setText(now.children[i], usageText(name, live.memory));
  });
  setText(now.lastElementChild, sensorTexts(live.sensors).join(" · "));
  drawMarks(live.marks, plot);
}
