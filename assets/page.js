// What moves on the page: jobs, previews, results and curves. Runs when the block with LIVE (app.py) is there;
// Gradio gives `element`, the block, and `trigger`, which tells the server of an event.

const STORE = "latentsync-visitor", THEME = "latentsync-theme", SECOND = 1000, ANSWER = 30 * SECOND, POINTS = 120;
const COLOURS = ["#0d9488", "#b45309", "#4f6bd8", "#a2487f", "#5f8a1d", "#8a6d5c"];
const root = (window.gradio_config?.root || location.href.split(/[?#]/)[0]).replace(/\/$/, "");
const find = (selector, within = document) => within.querySelector(selector);

// ---- who looks: an unguessable token that stays in this browser

function token() {
  const letters = crypto.getRandomValues(new Uint8Array(24));
  return btoa(String.fromCharCode(...letters)).replace(/\+/g, "-").replace(/\//g, "_");
}
let visitor = null;
try {
  visitor = localStorage.getItem(STORE);
  if (!visitor) localStorage.setItem(STORE, (visitor = token()));
} catch {
  visitor = visitor || token(); // a browser that stores nothing: the jobs are found until the tab is closed
}

// Where Gradio finds no server for a request of its own, it ignores whatever follows, and opens the page anew once there
// is one: what was typed would be lost. So its requests wait here until a server answers; that of a job is not sent a
// second time, as the first may have arrived.
const send = window.fetch.bind(window), NO_ANSWER = "The server did not answer: see whether it still runs, and try again.";
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
window.fetch = async (input, init) => {
  if (!String(input?.url ?? input).includes("/gradio_api/run/")) return send(input, init);
  for (;;) {
    try {
      return await send(input, init);
    } catch (error) {
      if (init?.signal?.aborted) throw error;
      if (String(init?.body).includes(visitor)) return Response.json({ data: [{ error: NO_ANSWER }] });
      await pause(SECOND);
    }
  }
};

async function call(name, ...data) {
  const answer = await send(`${root}/gradio_api/run/${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ data }),
    signal: AbortSignal.timeout(ANSWER), // of a server that went away meanwhile none may ever come
  });
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return (await answer.json()).data[0];
}

// of the machine, see draw
let drawn = null, plotting = null, since = 0, marks = "";
const curves = {}, times = [];

// ---- small things

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}
const text = (node, words) => { if (node.textContent !== words) node.textContent = words; };
const show = (node, shown) => { if (node.hidden === shown) node.hidden = !shown; };
const clock = (seconds) => {
  const whole = Math.max(0, Math.round(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
};
const dark = () => document.body.classList.contains("dark") || document.documentElement.classList.contains("dark");

function notice(words) {
  text(find("#notice"), words || "");
}

// ---- cards

const cards = new Map();
const STAGES = { faces: "Faces", mouths: "Mouths", writing: "Written" };
const STATES = { waiting: "Waiting", running: "Working", done: "Done", cancelled: "Cancelled", failed: "Failed" };

function makeCard(job) {
  const parts = {};
  const part = (name, node) => (parts[name] = node);
  const button = (name, label, act, kind = "") =>
    part(name, make("button", { type: "button", class: kind, onclick: act }, label));
  const id = job.id;
  const bars = Object.entries(STAGES).map(([stage, label]) => {
    part(`${stage}Bar`, make("progress", { max: job.frames, value: 0, "aria-label": label }));
    return make("div", { class: "stage" }, make("span", {}, label), parts[`${stage}Bar`], part(stage, make("output", {})));
  });
  const ratio = `aspect-ratio: ${job.size[0]} / ${job.size[1]}`;
  const card = make("article", { class: "card", "data-job": id, "aria-label": `Job ${job.names[0]}` },
    make("div", { class: "row" },
      make("h3", {}, `${job.names[0]} + ${job.names[1]}`),
      part("state", make("span", { class: "state", role: "status" }))),
    part("doing", make("p", { class: "doing" })),
    part("busy", make("div", { class: "busy" }, ...bars,
      part("rate", make("p", { class: "rate" })),
      part("shown", make("div", { class: "pair" },
        make("figure", {}, part("picture", make("img", { alt: "The newest finished frame", style: ratio, src: blank(job.size) })),
          make("figcaption", {}, "Newest finished frame")),
        make("figure", {}, part("soon", make("div", { class: "soon", style: ratio }, "The first seconds can be played here as soon as they are done.")),
          part("first", make("video", { controls: true, playsinline: true, preload: "none", style: ratio, hidden: true,
          "aria-label": "The first seconds of the result" })),
          part("firstWords", make("figcaption", {}, "Nothing to play yet"))))),
      make("div", { class: "buttons" },
        button("cancel", "Cancel", () => act("cancel", id, false)),
        button("keep", "Stop and keep what is finished", () => act("cancel", id, true), "soft")))),
    part("error", make("p", { class: "error", role: "alert", hidden: true })),
    part("remedies", make("div", { class: "buttons", hidden: true })),
    part("result", make("div", { class: "result", hidden: true })),
  );
  return { card, parts, state: null };
}
const blank = ([w, h]) =>
  `data:image/svg+xml,${encodeURIComponent(`<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}"/>`)}`;

function update(view, job) {
  const { parts } = view;
  const busy = job.state === "running" || job.state === "waiting";
  text(parts.state, STATES[job.state]);
  view.card.dataset.state = job.state;
  show(parts.busy, busy);
  let doing = job.doing;
  if (job.state === "waiting") doing = job.before === 1 ? "1 job comes before this one" : `${job.before ?? 0} jobs come before this one`;
  if (job.state === "running") doing += ` · ${clock(job.elapsed)} so far`;
  if (job.state === "done") doing = `done in ${clock(job.elapsed)}`;
  text(parts.doing, doing);
  if (busy) {
    for (const stage of Object.keys(STAGES)) {
      const done = stage === "mouths" ? job.mouths : job.stages[stage];
      parts[`${stage}Bar`].value = done;
      text(parts[stage], `${Math.floor(done)} / ${job.frames}`);
    }
    const rate = job.frames_per_second ? `${job.frames_per_second.toFixed(job.frames_per_second < 10 ? 2 : 0)} frames/s · ` : "";
    text(parts.rate, job.seconds_left == null ? "Time left: known once the first frames are painted" : `${rate}about ${clock(job.seconds_left)} left`);
    if (job.picture && view.picture !== job.picture) {
      view.picture = job.picture;
      parts.picture.src = `${root}/lipsync/${job.picture}`;
    }
    const idle = parts.first.paused || parts.first.ended;
    if (job.files.first && job.playable > 0 && view.playable !== job.playable && idle && !parts.first.currentTime) {
      view.playable = job.playable;
      show(parts.soon, false);
      show(parts.first, true);
      parts.first.poster = parts.picture.src;
      parts.first.src = `${root}/lipsync/${job.files.first}?${job.playable}`;
      text(parts.firstWords, `The first ${job.playable} s of the result, with sound`);
    }
    parts.cancel.disabled = parts.keep.disabled = job.ending;
    parts.keep.disabled ||= job.stages.writing === 0;
  }
  if (view.state !== job.state) {
    view.state = job.state;
    if (!busy) ended(view, job);
  }
  if (parts.beside) comparison(view, job);
}

function ended(view, job) {
  const { parts } = view;
  parts.first.removeAttribute("src");
  show(parts.error, Boolean(job.error));
  text(parts.error, job.error || "");
  const remedies = [];
  if (job.remedy?.settings) remedies.push(make("button", { type: "button", class: "main", onclick: () => act("again", job.id, job.remedy.settings) }, job.remedy.label));
  if (job.remedy?.focus) remedies.push(make("button", { type: "button", class: "main", onclick: () => focusOn(job.remedy.focus) }, job.remedy.label));
  if (!job.files.result) {
    remedies.push(make("button", { type: "button", class: "soft", onclick: () => act("again", job.id, {}) }, "Run again"));
    remedies.push(make("button", { type: "button", class: "soft", onclick: () => remove(job.id) }, "Remove"));
  }
  parts.remedies.replaceChildren(...remedies);
  show(parts.remedies, remedies.length > 0);
  if (job.files.result) result(view, job);
}

function result(view, job) {
  const url = (name) => `${root}/lipsync/${job.files[name]}`;
  const ratio = `aspect-ratio: ${job.size[0]} / ${job.size[1]}`;
  const made = make("video", { controls: true, playsinline: true, preload: "metadata", src: url("result"), style: ratio, class: "made", "aria-label": "Result" });
  const original = make("video", { muted: true, playsinline: true, preload: "metadata", src: url("original"), style: ratio, class: "original", "aria-label": "Original, without sound" });
  original.muted = true;
  const still = /\.(png|jpe?g|webp|bmp|gif|avif)$/i.test(job.files.original);
  if (still) original.poster = url("original");
  const words = make("figcaption", {}, still ? "Original, a picture" : "Original, in step, without sound");
  const unseen = () => still || text(words, "Original: this browser cannot play its format");
  original.addEventListener("error", unseen);
  original.addEventListener("loadedmetadata", () => original.videoWidth || unseen()); // it may know the sound alone
  follow(made, original);
  const beside = make("figure", {}, original, words);
  const compare = make("button", { type: "button", class: "soft compare", "aria-pressed": "true", title: "Show the original beside the result", onclick: () => {
    beside.hidden = !beside.hidden;
    compare.setAttribute("aria-pressed", String(!beside.hidden));
  } }, "Original");
  view.parts.beside = make("span", { class: "beside" });
  view.parts.besideError = make("p", { class: "error", role: "alert", hidden: true });
  view.compared = null;
  const rows = Object.entries(job.report.seconds).map(([stage, seconds]) =>
    make("tr", {}, make("th", { scope: "row" }, stage), make("td", {}, `${seconds.toFixed(2)} s`)));
  rows.push(make("tr", {}, make("th", { scope: "row" }, "in all (stages overlap)"), make("td", {}, `${job.report.total_seconds.toFixed(2)} s`)));
  const { settings: used, level, model, resolution, device, frames, frames_without_face: faceless } = job.report;
  const cache = used.cache ? `every ${used.cache.interval} steps` : "off";
  const facts = { level, model: `${model}, ${resolution} px, on ${device}`, steps: used.steps, "lip strength": used.guidance_scale, seed: used.seed,
    DeepCache: cache, face: used.face, "output quality": `CRF ${used.crf}`, frames: faceless ? `${frames}, ${faceless} without a usable face` : frames };
  const list = Object.entries(facts).map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, String(value))));
  const plot = make("div", { class: "timeline", role: "img", "aria-label": "Use of the machine during the job, with its stages" });
  const advice = job.advice.map((each) => make("li", { class: each.severity }, make("b", {}, each.severity[0].toUpperCase() + each.severity.slice(1)), ` ${each.problem} `, make("span", {}, each.remedy)));
  view.parts.result.replaceChildren(
    make("div", { class: "pair" }, beside, make("figure", {}, made, make("figcaption", {}, "Result"))),
    make("div", { class: "buttons" },
      make("a", { class: "button main", href: url("result"), download: job.files.result.split("/").pop() }, "Download"),
      view.parts.beside,
      compare,
      make("button", { type: "button", class: "soft", onclick: () => trigger("select", { settings: job.settings }) }, "Use these settings"),
      make("button", { type: "button", class: "soft", onclick: () => {
        if (confirm(`Remove ${job.files.result.split("/").pop()} and all else of this job from the machine that made it?`)) remove(job.id);
      } }, "Remove")),
    view.parts.besideError,
    make("details", { ontoggle: (event) => event.target.open && timeline(plot, job).catch(() => text(plot, "The curves cannot be drawn now: close this, and open it again.")) },
      make("summary", {}, "Settings, time and advice"),
      make("div", { class: "tables" },
        make("table", {}, make("caption", {}, "Settings used"), ...list),
        make("table", {}, make("caption", {}, "Seconds each stage was busy"), ...rows)),
      plot,
      ...job.messages.map((message) => make("p", { class: "message" }, message)),
      advice.length ? make("ul", { class: "advice" }, ...advice) : null));
  show(view.parts.result, true);
}

/** The button that makes original and result into one video, how far that is, and the link to it. */
function comparison(view, job) {
  const made = job.comparison, state = made?.state ?? "none";
  const key = `${state} ${made?.done ?? 0}`;
  if (view.compared === key) return;
  view.compared = key;
  const all = job.compared_seconds < job.frames / 25 - 1 ? `, of the first ${Math.round(job.compared_seconds / 60)} minutes` : "";
  const about = `A video of original and result next to each other, with the new sound${all}`;
  const part = { class: "button", title: about };
  if (state === "done") {
    view.parts.beside.replaceChildren(make("a", { ...part, href: `${root}/lipsync/${job.files.compared}`, download: job.files.compared.split("/").pop() }, "Download side by side"));
  } else if (state === "running" || state === "waiting") {
    const percent = made.total ? Math.floor((100 * made.done) / made.total) : 0;
    const words = state === "waiting" ? "Side by side: waits for another · stop" : `Side by side: ${percent} % · stop`;
    const shown = find("button.making", view.parts.beside);
    if (shown) text(shown, words);
    else view.parts.beside.replaceChildren(make("button", { type: "button", class: "soft making", title: about, onclick: () => act("cancel", job.id, false) }, words));
  } else {
    view.parts.beside.replaceChildren(make("button", { type: "button", class: "soft", title: about, onclick: () => act("compare", job.id).then(refresh) }, "Side by side"));
  }
  show(view.parts.besideError, Boolean(made?.error));
  text(view.parts.besideError, made?.error || "");
}

/** Let `other` do what `leader` does. The original may be shorter: it is shown forward and backward then. */
function follow(leader, other) {
  const place = () => {
    const length = other.duration || 0;
    if (!length) return 0;
    const turn = leader.currentTime % (2 * length);
    return turn < length ? turn : 2 * length - turn;
  };
  const backward = () => other.duration && leader.currentTime % (2 * other.duration) > other.duration;
  const align = () => { if (Math.abs(other.currentTime - place()) > 0.12) other.currentTime = place(); };
  leader.addEventListener("play", () => { align(); if (!backward()) other.play().catch(() => {}); });
  leader.addEventListener("pause", () => { other.pause(); align(); });
  leader.addEventListener("seeking", align);
  leader.addEventListener("ratechange", () => { other.playbackRate = leader.playbackRate; });
  leader.addEventListener("timeupdate", () => { if (backward()) { other.pause(); align(); } else if (!leader.paused && other.paused) { align(); other.play().catch(() => {}); } });
}

const OWNERLESS = new Set(["fetch", "stop_fetching", "remove_model"]); // models are everybody's
async function act(name, ...data) {
  try {
    if (name === "cancel") {
      const view = cards.get(data[0]);
      if (view && !view.parts.beside) { text(view.parts.doing, data[1] ? "stopping; what is finished is kept" : "cancelling"); view.parts.cancel.disabled = view.parts.keep.disabled = true; }
    }
    told(await call(name, ...data, ...(OWNERLESS.has(name) ? [] : [visitor])));
  } catch {
    notice(NO_ANSWER);
  }
}
async function remove(id) {
  await act("remove", id);
  await refresh();
}
function focusOn(what) {
  const input = find(`#${what}`);
  input?.scrollIntoView({ behavior: "smooth", block: "center" });
  find("button, input", input)?.focus();
}

// ---- curves



function library() {
  return (plotting ||= new Promise((loaded, failed) => {
    const script = make("script", { src: `${root}/lipsync/plotly.min.js`, onload: loaded, onerror: () => {
      script.remove();
      plotting = null; // the next one who wants it asks again
      failed(new Error("the drawing library"));
    } });
    document.head.append(script);
  }));
}
function forgetCurves() {
  since = 0;
  times.length = 0;
  for (const name of Object.keys(curves)) delete curves[name];
  drawn = null;
}
function look() {
  const colour = dark() ? "#aebac2" : "#4a5861", line = dark() ? "#28323a" : "#e6ebee";
  return { colour, line, base: {
    margin: { l: 42, r: 22, t: 8, b: 24 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: true,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
    font: { color: colour, size: 11, family: "system-ui, sans-serif" },
    yaxis: { range: [0, 102], ticksuffix: " %", gridcolor: line, zeroline: false, fixedrange: true },
  } };
}
const rule = (x, line) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: line, width: 1, dash: "dot" } });
const label = (x, words, level) => ({ x, y: 0.97 - 0.13 * (level % 4), yref: "paper", text: words, showarrow: false, xanchor: x > since - 18 ? "right" : "left", yanchor: "top", font: { size: 10 } });

async function draw(live) {
  if (!live.time.length && drawn) return;
  times.push(...live.time);
  for (const [name, values] of Object.entries(live.curves)) (curves[name] ||= []).push(...values);
  if (times.length) since = times[times.length - 1];
  for (const values of [times, ...Object.values(curves)]) values.splice(0, Math.max(0, values.length - POINTS));
  const names = Object.keys(curves);
  if (!names.length || !times.length) return;
  text(find("#now"), names.map((name) => {
    const value = curves[name][curves[name].length - 1];
    const total = live.memory[name.replace(/ memory$/, "")] || live.memory[name];
    if (value == null) return `${name} unknown`;
    return /memory/i.test(name) && total ? `${name} ${(value * total / 100 / 2 ** 30).toFixed(1)} of ${(total / 2 ** 30).toFixed(1)} GB` : `${name} ${Math.round(value)} %`;
  }).join(" · "));
  await library();
  const plot = find("#plot"), { base, line } = look();
  const ticks = () => ({ range: [since - POINTS, since], tickvals: [since - 120, since - 60, since], ticktext: ["2 min ago", "1 min", "now"], ticklabelstandoff: 6,
    gridcolor: line, zeroline: false, fixedrange: true });
  const seen = live.marks.map(([, words]) => words).join() + dark();
  const shapes = live.marks.map(([x]) => rule(x, dark() ? "#6b7a83" : "#9aa8b0"));
  const annotations = live.marks.map(([x, words], i) => label(x, words, i));
  if (!drawn || drawn !== plot) {
    drawn = plot;
    const traces = names.map((name, i) => ({ x: times.slice(), y: curves[name].slice(), name, mode: "lines", line: { width: 1.8, color: COLOURS[i % COLOURS.length] }, hoverinfo: "skip" }));
    await Plotly.newPlot(plot, traces, { ...base, height: 210, xaxis: ticks(), shapes, annotations }, { staticPlot: true, responsive: true });
  } else {
    const fresh = { x: names.map(() => times.slice()), y: names.map((name) => curves[name].slice()) };
    const change = { xaxis: ticks() };
    if (seen !== marks) Object.assign(change, base, { shapes, annotations });
    await Plotly.update(plot, fresh, change);
  }
  marks = seen;
  plot.dataset.points = String((Number(plot.dataset.points) || 0) + live.time.length);
}

async function timeline(plot, job) {
  if (plot.childElementCount || !job.timeline) return;
  text(plot, "");
  await library();
  const { base } = look(), stages = Object.entries(job.timeline.stages);
  const traces = Object.entries(job.timeline.curves || {}).map(([name, y], i) => ({ x: job.timeline.time, y, name, mode: "lines", line: { width: 1.6, color: COLOURS[i % COLOURS.length] } }));
  stages.forEach(([stage, [begin, end]], i) => traces.push({ x: [begin, end], y: [stage, stage], name: STAGES[stage] || stage, mode: "lines", showlegend: false,
    line: { width: 11, color: COLOURS[(i + 2) % COLOURS.length] }, yaxis: "y2" }));
  const layout = { ...base, height: 260, xaxis: { anchor: "y2", ticksuffix: " s", zeroline: false, range: [0, Math.max(job.elapsed, 1)], gridcolor: look().line }, margin: { l: 58, r: 8, t: 8, b: 28 },
    yaxis: { ...base.yaxis, domain: [0.42, 1] }, yaxis2: { domain: [0, 0.3], fixedrange: true, range: [stages.length - 0.3, -0.7], zeroline: false, showgrid: false } };
  await Plotly.newPlot(plot, traces, layout, { displayModeBar: false, responsive: true });
}

// ---- released models: what is here, and fetching others

const LATER = "latentsync-not-now";
const size = (bytes) => bytes >= 1e8 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
const once = { get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
  set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* it is asked again at the next visit */ } } };
let models = null, fetching = null, taskView = null, versionAsked = null;

/** The lines of a licence notice, their addresses as links. */
function licences(lines) {
  return make("ul", { class: "licences" }, ...lines.map((line) => make("li", {}, ...line.trim().split(/(https:\/\/[^\s)]+)/).map((part) =>
    part.startsWith("https://") ? make("a", { href: part, target: "_blank", rel: "noreferrer" }, part.slice(8)) : part))));
}
const modelAct = (label, name, data, kind = "soft") =>
  make("button", { type: "button", class: kind, onclick: () => act(name, ...data) }, label);
const begun = (model) => model.to_fetch > 0 && model.size > 0;
const getLabel = (model) => begun(model) ? `Continue (${size(model.to_fetch)} left)` : model.to_fetch ? `Fetch ${size(model.to_fetch)}` : "Prepare it for fast starts";

function modelState(model) {
  if (!model.present) return begun(model) ? `not complete, ${size(model.to_fetch)} to fetch` : `not here, ${size(model.to_fetch)} to fetch`;
  return model.converted ? `here, ${size(model.size)}` : "here; starts faster once it is prepared";
}

function renderModels() {
  const box = find("#models");
  if (!models || !box) return; // it comes when its accordion is opened
  const key = `${versionAsked} ${fetching?.id} ${fetching?.state}`;
  if (box.dataset.shown === key) return;
  box.dataset.shown = key;
  if (models.error) return box.replaceChildren(make("p", { class: "problem" }, models.error));
  const busy = fetching?.state === "running";
  const rows = models.models.map((model) => {
    const buttons = [];
    if (models.allowed && !busy) {
      if (!model.converted && !(models.offline && model.to_fetch)) buttons.push(modelAct(getLabel(model), "fetch", [model.name, "get"], model.name === models.recommended ? "main" : "soft"));
      if (model.present && model.converted) buttons.push(modelAct("Verify", "fetch", [model.name, "verify"]));
      if (model.pickle) buttons.push(modelAct(`Free ${size(model.pickle)} (the original, not needed any more)`, "remove_model", [model.name, true]));
      if (model.size) buttons.push(make("button", { type: "button", class: "soft", onclick: () => {
        if (confirm(`Remove ${model.title} from this machine (${size(model.size)})?`)) act("remove_model", model.name, false);
      } }, "Remove"));
    }
    return make("article", { "data-model": model.name, "data-present": String(model.present) },
      make("div", { class: "row" },
        make("h3", {}, `${model.title}, ${model.resolution} px`, model.name === models.recommended ? make("span", { class: "best" }, " recommended here") : null),
        make("span", { class: "quiet" }, modelState(model))),
      model.present ? make("details", {}, make("summary", {}, "Licences"), licences(model.notice.slice(1))) : licences(model.notice),
      model.remark ? make("p", { class: "quiet" }, model.remark) : null,
      models.offline && model.to_fetch && models.allowed ? make("p", { class: "quiet" },
        `HF_HUB_OFFLINE forbids to fetch it: start without that variable, or put its files into ${model.folder} (see docs/models.md).`) : null,
      buttons.length ? make("div", { class: "buttons" }, ...buttons) : null);
  });
  box.replaceChildren(
    make("p", { class: "why" }, `Auto is ${models.chosen} here. ${models.remark ? `${models.remark} ` : ""}${models.chosen === models.recommended ? "" : "What suits this machine: "}${models.why}`), ...rows,
    ...(models.allowed ? [] : [make("p", { class: "quiet" }, "Visitors of this server cannot fetch models.")]));
}

function renderOffer() {
  const box = find("#offer");
  const model = models?.models?.find((each) => each.name === models.recommended);
  const wanted = model && models.allowed && !models.offline && !models.models.some((each) => each.present) && !fetching && once.get(LATER) !== model.name;
  show(box, Boolean(wanted));
  if (!wanted || box.dataset.shown === String(versionAsked)) return;
  box.dataset.shown = String(versionAsked);
  box.replaceChildren(
    make("p", {}, make("b", {}, "This machine can do better than the demo model. "), models.why),
    licences(model.notice),
    make("div", { class: "buttons" }, modelAct(getLabel(model), "fetch", [model.name, "get"], "main"),
      make("button", { type: "button", class: "soft", onclick: () => { once.set(LATER, model.name); show(box, false); } }, "Not now")));
}

function renderFetching(task) {
  const box = find("#fetching");
  const shown = Boolean(task) && taskView?.closed !== task.id;
  show(box, shown);
  if (!shown) return;
  const title = models?.models?.find((each) => each.name === task.name)?.title || task.name;
  const key = `${task.id} ${task.state} ${models?.allowed}`;
  if (taskView?.key !== key) {
    const running = task.state === "running", allowed = models?.allowed;
    const parts = { key, doing: make("span", {}), amount: make("span", { class: "amount" }), bar: make("progress", { max: 1, "aria-label": `Progress of ${title}` }) };
    const close = () => { taskView.closed = task.id; show(box, false); };
    box.replaceChildren(
      make("div", { class: "row" }, make("h2", {}, `${task.task === "get" ? "Fetching" : "Verifying"} ${title}`),
        make("span", { class: "state", role: "status" }, { running: "Working", done: "Done", stopped: "Stopped", failed: "Failed" }[task.state])),
      ...(running ? [parts.bar] : []),
      task.error ? make("p", { class: "error", role: "alert" }, task.error) : make("p", { class: "doing" }, parts.doing, parts.amount),
      make("div", { class: "buttons" },
        running && allowed ? modelAct("Cancel", "stop_fetching", []) : null,
        !running && allowed && task.state !== "done" ? modelAct(task.task === "get" ? "Continue" : "Verify again", "fetch", [task.name, task.task], "main") : null,
        running ? null : make("button", { type: "button", class: "soft", onclick: close }, "Close")));
    box.dataset.state = task.state;
    taskView = parts;
  }
  text(taskView.doing, task.doing);
  if (task.total) taskView.bar.value = task.done / task.total; else taskView.bar.removeAttribute("value");
  const words = [];
  if (task.state === "running" && task.total) words.push(`${size(task.done)} of ${size(task.total)}`);
  if (task.speed != null) words.push(`${size(task.speed)}/s`);
  if (task.seconds_left != null) words.push(`about ${clock(task.seconds_left)} left`);
  text(taskView.amount, words.map((each) => ` · ${each}`).join(""));
}

async function showModels(seen) {
  fetching = seen.fetching;
  if (seen.models != null && seen.models !== versionAsked) {
    const first = versionAsked === null;
    versionAsked = seen.models;
    try {
      models = await call("models");
    } catch (error) {
      versionAsked = null;
      throw error;
    }
    if (!first) trigger("input", {}); // the chooser, too
  }
  renderModels();
  renderOffer();
  renderFetching(fetching);
}

let measured = null; // jobs by which the server knows this machine's speed

// ---- once a second, while somebody looks

let asking = null, answering = null; // the server that does

/** Another server answers: it has neither the files that were given nor the old addresses of results. What was typed stays. */
function anew() {
  for (const { card } of cards.values()) card.remove();
  cards.clear();
  forgetCurves();
  versionAsked = -1; // not null: the chooser of models is asked for again, too
  trigger("clear", {});
}
/** What is left of the files that were given to another server: nothing. */
function lost(files) {
  if (files.some(Boolean)) notice("The server was started again and has not got your files any more: give them again.");
  return files.map(() => null);
}

async function ask() {
  const had = Object.fromEntries([...cards].map(([id, view]) => [id, view.version]));
  const seen = await call("watch", visitor, since, had);
  if (seen.error) return notice(seen.error);
  const other = answering !== null && answering !== seen.server;
  answering = seen.server;
  if (other) {
    anew();
    return ask();
  }
  const known = new Set(seen.jobs.map((job) => job.id));
  for (const [id, view] of cards) if (!known.has(id)) { view.card.remove(); cards.delete(id); }
  const list = find("#cards");
  for (const job of [...seen.jobs].reverse()) {
    if (!job.state) continue; // it is as it was
    if (!cards.has(job.id)) {
      const view = makeCard(job);
      cards.set(job.id, view);
      list.prepend(view.card);
    }
    update(cards.get(job.id), job);
    cards.get(job.id).version = job.version;
  }
  show(find("#empty"), cards.size === 0);
  const others = seen.running + seen.waiting;
  text(find("#load"), others === 0 ? "No job is running" : `${seen.running} running, ${seen.waiting} waiting`);
  if (measured !== null && measured !== seen.measured) trigger("submit", {}); // the line under the slider
  measured = seen.measured;
  await showModels(seen);
  await draw(seen.live).catch(() => { drawn = null; }); // no fault of the server's; it is tried again
}
function refresh() {
  return (asking ||= ask().catch(({ message }) => text(find("#load"), message === "watch: 401" ? "The server wants a login again: reload the page" : "The server does not answer; asking again …")).finally(() => (asking = null)));
}
function told(reply) {
  if (!reply) return;
  if (reply.error) {
    notice(reply.error);
    find("#notice").scrollIntoView({ behavior: "smooth", block: "nearest" });
  } else if (reply.job || reply.checked || reply.fetching || reply.removed != null) {
    notice("");
  }
  const given = find("#video video");
  if (reply.picture && given) given.poster = reply.picture; // a browser knows few formats, and shows nothing of others
  if (reply.fetching || reply.removed != null) refresh().then(refresh);
  if (reply.job) refresh().then(refresh).then(() => {
    if (innerWidth < 900) find("#jobs").scrollIntoView({ behavior: "smooth" });
  });
}

/** Mark the button of the level on which the slider stands; −1: it stands between two. */
function chosen(stop) {
  document.querySelectorAll("#stops button").forEach((button, i) => button.setAttribute("aria-pressed", String(i === stop)));
}

// Gradio's error that a browser cannot play a video: the server may well read it, and says so if not.
new MutationObserver(() => {
  for (const toast of document.querySelectorAll(".toast-body")) {
    if (toast.textContent.includes("Video not playable")) toast.querySelector("[data-testid=toast-close]")?.click();
  }
}).observe(find(".toast-wrap"), { childList: true, subtree: true });

// ---- a picture, which is a video of one frame here; Gradio's field takes none that is not called a video

const isPicture = (file) => file.type.startsWith("image/");
function calledVideos(files) {
  const called = new DataTransfer();
  for (const file of files) called.items.add(isPicture(file) ? new File([file], file.name, { type: "video/picture" }) : file);
  return called.files;
}
document.addEventListener("click", ({ target }) => {
  const input = target.closest("#video")?.querySelector("input[type=file]");
  if (input) input.accept = "video/*,image/*"; // before its dialog opens
}, true);
document.addEventListener("change", ({ target }) => {
  if (target.matches("#video input[type=file]") && [...target.files].some(isPicture)) target.files = calledVideos(target.files);
}, true);
document.addEventListener("drop", (event) => {
  const input = event.target.closest("#video")?.querySelector("input[type=file]");
  const files = event.dataTransfer?.files ?? [];
  if (!input || ![...files].some(isPicture)) return;
  event.preventDefault();
  event.stopPropagation();
  event.target.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
  input.files = calledVideos(files);
  input.dispatchEvent(new Event("change", { bubbles: true }));
}, true);

// ---- light and dark

function setTheme(name) {
  document.body.classList.toggle("dark", name === "dark");
  text(find("#theme"), name === "dark" ? "Light" : "Dark");
  forgetCurves(); // they are asked for again, and take the new colours
}
try {
  const chosen = localStorage.getItem(THEME);
  if (chosen) setTheme(chosen); else text(find("#theme"), dark() ? "Light" : "Dark");
} catch { /* nothing is stored here */ }
find("#theme").addEventListener("click", () => {
  const name = dark() ? "light" : "dark";
  setTheme(name);
  try { localStorage.setItem(THEME, name); } catch { /* nothing is stored here */ }
});

window.lipsync = { visitor, told, chosen, refresh, lost };
setInterval(() => { if (!document.hidden) refresh(); }, SECOND);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
